"""Times of calls made in turn, the spread of their ratios, and the most memory that a process has held."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Measured:
    """The times of one function's calls."""

    seconds: list[float] = field(default_factory=list)
    """Seconds of each call."""
    ratios: list[float] = field(default_factory=list)
    """Ratio of each call to the call of the first function just before it; empty for the first function itself."""


def seconds(function: Callable[[], Any]) -> float:
    """Seconds of a call of a JAX function, until its results are there."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def alternate(functions: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, Measured]:
    """Calls the first function and each other in turn: A B A C, A B A C, …

    A disturbance of the machine then slows down both sides of a ratio.

    Args:
      functions: each returns the seconds that it took; one by itself is called `rounds` times.
      rounds: number of calls of each other function; the first is called once before each of them.
      warm_up: calls of each beforehand that do not count.
    """
    first, *others = functions
    for function in functions.values():
        for _ in range(warm_up):
            function()
    measured = {name: Measured() for name in functions}
    for _ in range(rounds):
        if not others:
            measured[first].seconds.append(functions[first]())
        for other in others:
            reference, taken = functions[first](), functions[other]()
            measured[first].seconds.append(reference)
            measured[other].seconds.append(taken)
            measured[other].ratios.append(taken / reference)
    return measured


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range, e.g. "1.04 (0.98 to 1.12)"; a single value alone."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def peak_bytes() -> int:
    """The most memory of the host that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which on Linux begins with what the parent held when it started this process.
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
