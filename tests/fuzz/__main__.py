"""Fuzzes every target and writes a record: `python -m tests.fuzz [--executions N] [--seed S] [--target NAME ...]`.

Targets that are left out keep their lines of the record.

An input that a reader neither takes nor refuses is an escape; it is kept in the target's folder of the corpus.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simcse_jax.runtime.provenance import cores, processor
from tests.fuzz.record import RECORD, table
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
DICTIONARY = Path(__file__).parent / "dictionary.txt"
MEMORY = 2048
"""Most MiB of a process that fuzzes a target."""
SECONDS = 60
"""Most seconds for one input, on the clock: a busy machine has little time for each process."""


def fuzz(name: str, executions: int, seed: int) -> dict[str, Any]:
    """Fuzzes one target.

    Args:
      name: the target.
      executions: how often its reader is called.
      seed: of libFuzzer, which decides all inputs together with the corpus.

    Returns:
      Its line of the record; `escapes` has the names of new files in its corpus.
    """
    kept = CORPUS / name
    kept.mkdir(exist_ok=True)
    before, begin, log = {*kept.iterdir()}, time.perf_counter(), ""
    with tempfile.TemporaryDirectory(prefix=f"corpus-{name}-") as place:
        found = Path(place)
        for number, content in enumerate(SEEDS[name]()):
            (found / f"seed-{number}").write_bytes(content)
        options = [
            f"-runs={executions}",
            f"-seed={seed}",
            f"-rss_limit_mb={MEMORY}",
            f"-timeout={SECONDS}",
            f"-report_slow_units={SECONDS}",
        ]
        options += [
            f"-dict={DICTIONARY}",
            "-print_final_stats=1",
            "-use_value_profile=1",
            f"-artifact_prefix={kept}/escape-",
            place,
            str(kept),
        ]
        done = subprocess.run(_command(name, options), capture_output=True, text=True, errors="replace")
        log = done.stderr
        _keep(found, name)
    if done.returncode:
        print(done.stdout[-3000:], log[-500:], file=sys.stderr)
    covered = [tuple(map(int, pair)) for pair in re.findall(r"cov: (\d+) ft: (\d+)", log)] or [(0, 0)]
    stats = {key: int(value) for key, value in re.findall(r"stat::(\w+):\s+(\d+)", log)}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        "executions": stats.get("number_of_executed_units", 0),
        "seconds": round(time.perf_counter() - begin, 1),
        "coverage": covered[-1][0],
        "features": covered[-1][1],
        "peak_mib": stats.get("peak_rss_mb", 0),
        "slowest_seconds": stats.get("slowest_unit_time_sec", 0),
        "escapes": sorted(path.name for path in {*kept.iterdir()} - before if path.name.startswith("escape-")),
        "exit": done.returncode,
    }


def _command(name: str, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "tests.fuzz.one", name, *options]


def _keep(found: Path, name: str) -> None:
    """Keeps of all inputs found the fewest that cover as much, and all escapes."""
    kept, merged = CORPUS / name, found.with_name(f"{found.name}-merged")
    merged.mkdir()
    subprocess.run(
        _command(name, ["-merge=1", f"-rss_limit_mb={MEMORY}", str(merged), str(found)]), capture_output=True
    )
    inputs = sorted(merged.iterdir(), key=lambda path: path.stat().st_size)
    if inputs:
        for path in kept.iterdir():
            if not path.name.startswith("escape-"):
                path.unlink()
        size = 0
        for path in inputs[:: -(-len(inputs) // _MOST)]:
            size += path.stat().st_size
            if size > _KEPT:
                break
            shutil.copy(path, kept / path.name[:12])
    shutil.rmtree(merged)


_MOST, _KEPT = 50, 9000
"""Most inputs, and most bytes, kept of each target."""


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    shares = {name: TARGETS[name].share for name in given.target}

    def one(name: str) -> dict[str, Any]:
        line = fuzz(name, round(given.executions * shares[name] / sum(shares.values())), given.seed)
        print(f"{name}: {line}", flush=True)
        return line

    with ThreadPoolExecutor(given.jobs) as pool:
        lines = dict(zip(given.target, pool.map(one, given.target), strict=True))
    earlier = json.loads(given.record.read_text())["targets"] if given.record.is_file() else {}
    record: dict[str, Any] = {
        "machine": f"{processor()}, {cores()} cores",
        "python": platform.python_version(),
        "atheris": version("atheris"),
        "targets": {name: (earlier | lines)[name] for name in TARGETS if name in earlier | lines},
    }
    given.record.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    raise SystemExit(any(line["escapes"] or line["exit"] for line in lines.values()))


main()
