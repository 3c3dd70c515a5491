"""metrics.jsonl: the measurements of a run, step by step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import xxhash

from simcse_jax.storage.files import finite, new_file
from simcse_jax.storage.records import parse_record

TIMES = ("sentences_per_second", "utilisation")
"""The fields of a line that depend on time; all others are the same each time a run is trained."""

Record = dict[str, Any]
"""See `MetricsLog.record`."""


class MetricsLog:
    """metrics.jsonl, written by process 0."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log of a run that continues after `step` (-1: begins), and removes the lines of later steps."""
        self._file, self._summary = None, _Summary()
        if jax.process_index() == 0:
            kept = _kept(path, step)
            self._summary.add(kept)
            with new_file(path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept), "utf-8")
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends a line."""
        if self._file:
            line = json.dumps(finite({"step": step, **values}), allow_nan=False)
            self._file.write(f"{line}\n")
            self._file.flush()
            self._summary.add([line])

    def record(self) -> Record:
        """The number of lines so far, and their digest, by which `problem_of` finds later what was lost."""
        return self._summary.record()

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that a kill or a power cut spoilt; [] if there is no file."""
    return [values for line in _lines(path) if (values := _parsed(line))]


def problem_of(path: Path, step: int, written: Record) -> str:
    """What is wrong with the lines of a log up to a step; "" if nothing is.

    Args:
      path: the log.
      step: the step.
      written: the `MetricsLog.record` of that step; {} for a log of an earlier version.
    """
    if not written:
        return ""
    summary = _Summary()
    summary.add(kept := _kept(path, step))
    if written | summary.record() == written:
        return ""
    lost = written["lines"] - len(kept)
    what = f"{lost:,} of its {written['lines']:,} lines up to step {step:,} are lost"
    return what if lost > 0 else f"its lines up to step {step:,} were changed, so that a figure there may be wrong"


def spoilt_lines(path: Path) -> int:
    """The number of lines in a log that a kill or a power cut spoilt."""
    return sum(_parsed(line) is None for line in _lines(path))


class _Summary:
    """The number and the digest of lines."""

    def __init__(self) -> None:
        self._number, self._digest = 0, xxhash.xxh3_128()

    def add(self, lines: list[str]) -> None:
        """Adds lines."""
        self._number += len(lines)
        for line in lines:
            self._digest.update(f"{line}\n".encode())

    def record(self) -> Record:
        """`lines` and `digest`."""
        return {"lines": self._number, "digest": self._digest.hexdigest()}


def _kept(path: Path, step: int) -> list[str]:
    return [line for line in _lines(path) if (values := _parsed(line)) and values["step"] <= step]


def _lines(path: Path) -> list[str]:
    # After a power cut a block of the file can hold anything.
    return path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []


def _parsed(line: str) -> dict[str, Any] | None:
    """The step of a line and its figures; None for a line that a kill or a power cut spoilt."""
    try:
        values = parse_record(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    if not all(value is None or type(value) in (int, float) for value in values.values()):
        return None
    # JSON of other programs may write a figure without its point.
    return {name: float(x) if name != "step" and x is not None else x for name, x in values.items()}
