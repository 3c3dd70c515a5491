"""metrics.jsonl: the measurements of a run, step by step."""

import json
import math
from pathlib import Path
from typing import Any

import jax

from simcse_jax.storage.files import finite

TIMES = ("sentences_per_second", "utilisation")
"""The fields of a line that depend on time; all others are the same each time a run is trained."""


class MetricsLog:
    """metrics.jsonl, written by process 0."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log of a run that continues after `step` (-1: begins), and removes the lines of later steps."""
        self._file = None
        if jax.process_index() == 0:
            kept = [line for line in _lines(path) if _step_of(line) <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept), "utf-8")
            partial.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line."""
        if self._file:
            self._file.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that a kill or a power cut spoilt; [] if there is no file."""
    return [json.loads(line) for line in _lines(path) if _step_of(line) < math.inf]


def _lines(path: Path) -> list[str]:
    # After a power cut a block of the file can hold anything.
    return path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []


def _step_of(line: str) -> float:
    """Step of a line of the log; infinite for one that a kill or a power cut spoilt."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
