"""Comparison of contenders, called in turn, that must agree on what they compute."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from benchmarks.report import Row
from benchmarks.timing import alternate
from benchmarks.worker import Contender, Worker

Figures = dict[str, Any]
Distance = Callable[[np.ndarray, np.ndarray], float]

WARM_UP = 2
"""Calls of each contender before its memory is read, its figures are compared and anything is timed."""
CORES = 4
"""Cores per contender while several start at once: they import and compile, which is not timed."""


class Disagreement(AssertionError):
    """Two contenders compute different things, so that their times are of different work."""


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """The relative error ‖a − b‖ / ‖b‖."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest 1 − cos between a row of a and the same row of b."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.max(1 - np.sum(a * b, axis=1) / norms))


def agree(name: str, figures: Figures, expected: Figures, tolerance: float, distance: Distance) -> None:
    """Raises `Disagreement` unless every figure lies within the tolerance of the expected one."""
    for key, value in expected.items():
        ours, theirs = (np.atleast_1d(np.asarray(x, np.float64)) for x in (value, figures[key]))
        apart = distance(theirs, ours) if theirs.shape == ours.shape else float("inf")
        if not apart <= tolerance:
            raise Disagreement(
                f"{name} computes something else: its {key} is {apart:.1e} away from the expected (at most "
                f"{tolerance:.0e}); {theirs.ravel()[:4]} against {ours.ravel()[:4]}"
            )


def compare(
    contenders: dict[str, Contender],
    rounds: int,
    *,
    tolerance: float,
    distance: Distance = relative_error,
    expected: Figures | None = None,
    product: tuple[int, str] | tuple[int, str, bool] | None = None,
) -> tuple[list[Row], Figures, dict[str, float]]:
    """Measures contenders in turn, the first before each of the others, once their figures agree.

    Args:
      contenders: the contenders, by name.
      rounds: number of timed calls of each.
      tolerance: see `agree`.
      distance: see `agree`.
      expected: figures that all must agree with; those of the first contender where None.
      product: side and type of the matrix products whose rate is the ceiling of this run, and whether they are exact,
        without TF32. Each contender that can multiply does so once before the rounds and once after; the best counts.

    Returns:
      One row per contender, without the fields that the caller knows; the expected figures; and the rate of the
      product, FLOP/s, by contender.

    Raises:
      Disagreement: two contenders compute different things.
      WorkerFailed: a contender raised an exception.
    """
    ceilings: dict[str, float] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        peaks: dict[str, int] = {}

        def start(name: str) -> Figures:
            worker = workers[name] = stack.enter_context(Worker(name, contenders[name]))
            for _ in range(WARM_UP):
                worker.call("run")
            peaks[name] = worker.call("peak")  # before the check, which holds a model of its own
            figures: Figures = worker.call("check")
            return figures

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES)) as threads:
            started = list(threads.map(start, contenders))
        for name, figures in zip(contenders, started, strict=True):
            expected = figures if expected is None else expected
            agree(name, figures, expected, tolerance, distance)

        def multiply() -> None:
            if product is not None:
                for name in contenders:
                    ceilings[name] = max(ceilings.get(name, 0.0), workers[name].call("ceiling", *product))

        multiply()
        timed = {name: partial(workers[name].timed, "run") for name in contenders}
        measured = alternate(timed, rounds)
        multiply()
    rows = [Row(name, m.seconds, m.ratios, peak=peaks[name]) for name, m in measured.items()]
    return rows, expected or {}, ceilings
