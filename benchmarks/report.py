"""Results as a Markdown table and as JSON, with their machine, date and versions."""

import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.timing import spread
from benchmarks.worker import ROOT, Contender, Worker
from simcse_jax.errors import InputError
from simcse_jax.runtime.provenance import cores, processor

PACKAGES = (
    *("simcse-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("torch", "transformers", "sentence-transformers", "tokenizers"),
)

COMMIT = ROOT / "benchmarks" / "COMMIT"
"""The file that names the commit in a copy without git's history, see benchmarks/gpu/prepare.py."""


@dataclass(frozen=True)
class Row:
    """A contender's figures."""

    name: str
    seconds: list[float]
    """Seconds of each call."""
    ratios: list[float] = field(default_factory=list)
    """Ratios of its time to that of the first row, in neighbouring calls; empty for the first row itself."""
    peak: int | None = None
    """Most bytes held, by the process on a CPU, else on the accelerator."""
    items: float | None = None
    """Items per call, in the table's unit."""
    flops: float | None = None
    """Multiplications and additions of the model per call."""
    ceiling: float | None = None
    """FLOP/s of a large matrix product in the same run."""

    @property
    def rate(self) -> float | None:
        """Items per second."""
        return None if self.items is None else self.items / statistics.median(self.seconds)

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs per second over the ceiling."""
        if self.flops is None or self.ceiling is None:
            return None
        return self.flops / statistics.median(self.seconds) / self.ceiling


@dataclass(frozen=True)
class Table:
    """The figures of contenders at one piece of work."""

    title: str
    rows: list[Row]
    unit: str = "sentences"
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """The figures in the notes, for the JSON file."""
    ceilings: dict[str, float] = field(default_factory=dict)
    """FLOP/s of a large matrix product, by contender; the best is the ceiling."""

    def markdown(self) -> str:
        """Title, table and notes."""
        from simcse_jax.reports.tables import markdown_table

        header = [
            *("", "seconds a call", f"{self.unit}/s", "of the ceiling", "peak memory", f"time ÷ {self.rows[0].name}"),
        ]
        lines = [
            [
                row.name,
                spread(row.seconds, 4 if statistics.median(row.seconds) < 0.1 else 2),
                "" if row.rate is None else f"{row.rate:,.1f}",
                "" if row.utilisation is None else f"{row.utilisation:.0%}",
                "" if row.peak is None else f"{row.peak / 1e9:.2f} GB",
                spread(row.ratios) if row.ratios else "",
            ]
            for row in self.rows
        ]
        each = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in self.ceilings.items())
        notes = [*self.notes, *([f"Ceiling, GFLOP/s of a matrix product: {each}."] if each else [])]
        return "\n\n".join([f"### {self.title}", markdown_table(header, lines), *notes])

    def json(self) -> dict[str, Any]:
        """The same, with every single measurement."""
        rows = [asdict(row) | {"rate": row.rate, "utilisation": row.utilisation} for row in self.rows]
        return asdict(self) | {"rows": rows}


class Devices:
    """A contender that only names the devices of JAX and PyTorch."""

    def describe(self) -> dict[str, str]:
        """Kinds of devices, by framework."""
        import jax

        devices = {"jax": ", ".join(sorted({f"{d.platform} {d.device_kind}" for d in jax.devices()}))}
        try:
            import torch
        except ImportError:
            return devices
        return devices | {"torch": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def provenance() -> dict[str, Any]:
    """Command, date, machine and versions."""
    with Worker("devices", Contender("report:Devices")) as worker:
        devices = worker.call("describe")
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    arguments = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    return {
        "command": arguments,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": cores(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "devices": devices,
        "versions": versions,
        "commit": commit(),
    }


def status_of(run: Callable[[], int | None]) -> int:
    """The exit status of a command: what it returns, 0 for None, and 1, with a line, if its input cannot be used."""
    try:
        return run() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def commit() -> str | None:
    """The commit of the working tree, with a plus sign where files differ from it; in a copy, that which it names."""
    if COMMIT.is_file():
        return COMMIT.read_text("utf-8").strip() or None
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write(output: Path, about: dict[str, Any], tables: list[Table], skipped: dict[str, str]) -> None:
    """Writes `output`.json and `output`.md, each replaced in one step.

    Args:
      output: path without ending.
      about: from `provenance`.
      tables: the results so far.
      skipped: parts without results, and why.
    """
    from simcse_jax.storage.files import finite, write_json, write_text

    output.parent.mkdir(parents=True, exist_ok=True)
    results = {"about": about, "tables": [table.json() for table in tables], "skipped": skipped}
    write_json(output.with_name(f"{output.name}.json"), finite(results))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    devices = "; ".join(f"{name} on {kind}" for name, kind in about["devices"].items())
    head = [
        "# Benchmarks beside peers",
        f"`{about['command']}`, {about['date'][:10]}, commit {about['commit'] or 'unknown'}.",
        f"Machine: {about['cpu']}, {about['cores']} cores; {devices}. Load before: {about['load'][0]}.",
        f"Versions: {versions}.",
        "Times and ratios are medians, with their range in brackets; ratios are of neighbouring calls. Utilisation is "
        "the model's FLOPs, of real tokens alone, over the best matrix product of the same type in the same run.",
    ]
    absent = [f"Not measured: {name} ({why})." for name, why in skipped.items()]
    write_text(
        output.with_name(f"{output.name}.md"),
        "\n\n".join([*head, *(table.markdown() for table in tables), *absent]) + "\n",
    )
