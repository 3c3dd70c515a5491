"""Bootstrap intervals of Spearman's correlation over sentence pairs (Efron 1979), and of differences between models.

A resample draws as many pairs as a task has, with replacement, and ranks them anew. An interval spans the 2.5 to 97.5
percentiles: it says how far a figure, or a difference, depends on the choice of the task's pairs. It says nothing about
training: another seed of the same recipe moves a score, too.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

_CHUNK = 2**20  # counts held at a time: 8 MB
SEED = 1111
"""Random seed of the resamples."""

ScoredPairs = tuple[Float[np.ndarray, "M _"], Float[np.ndarray, " _"]]
"""Scores of a task's pairs by each of M models, and their gold scores."""


class _Ranked:
    """Values whose weighted copies are ranked; the work that does not depend on the weights is done once."""

    def __init__(self, values: Float[np.ndarray, " P"]) -> None:
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        self._starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self._place = np.empty(len(values), np.int64)  # of each value's group of ties
        self._place[self._order] = np.cumsum(np.concatenate([[0], ordered[1:] != ordered[:-1]]))

    def ranks(self, counts: Float[np.ndarray, "B P"]) -> Float[np.ndarray, "B P"]:
        """Mean rank of each value, where value p occurs counts[b, p] times."""
        ties = np.add.reduceat(counts[:, self._order], self._starts, axis=1)
        middle = np.cumsum(ties, axis=1) - ties / 2 + 0.5
        ranks: Float[np.ndarray, "B P"] = middle[:, self._place]
        return ranks


def _correlate(
    a: Float[np.ndarray, "B P"], b: Float[np.ndarray, "B P"], counts: Float[np.ndarray, "B P"]
) -> Float[np.ndarray, " B"]:
    """Pearson's correlation of weighted pairs; NaN where one side is constant."""
    middle = (a.shape[1] + 1) / 2  # mean rank of P draws
    x, y = a - middle, b - middle
    covariance, var_x, var_y = (np.einsum("bp,bp,bp->b", counts, *pair) for pair in ((x, y), (x, x), (y, y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: np.ndarray = 100 * covariance / np.sqrt(var_x * var_y)
    return correlation


def spearman_resamples(
    systems: Float[np.ndarray, "M P"], gold: Float[np.ndarray, " P"], resamples: int, stream: str = ""
) -> Float[np.ndarray, "M B"]:
    """Spearman × 100 of each system's scores with gold, in resamples that all systems share.

    With c_p the number of times a resample holds pair p, the mean rank of a value is the count of smaller ones plus
    half that of equal ones plus ½, and Spearman is Pearson of the ranks weighted by c: no resample is sorted.

    Args:
      systems: scores of the pairs, one row per system.
      gold: gold scores of the pairs.
      resamples: their number, B.
      stream: names the stream of random numbers, so that tasks are resampled independently of each other.

    Returns:
      float64; NaN where a resample's scores, or its gold scores, are all the same.
    """
    pairs = len(gold)
    draws = np.random.default_rng([SEED, *stream.encode()])
    ranked, ranked_gold = [_Ranked(system) for system in systems], _Ranked(gold)
    result = np.empty((len(systems), resamples))
    chunk = max(1, _CHUNK // pairs)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = draws.integers(pairs, size=(rows, pairs)) + pairs * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * pairs).reshape(rows, pairs).astype(np.float64)
        target = ranked_gold.ranks(counts)
        for row, system in zip(result, ranked, strict=True):
            row[start : start + rows] = _correlate(system.ranks(counts), target, counts)
    return result


def interval(resamples: Float[np.ndarray, " B"]) -> list[float] | list[None]:
    """The 2.5 and 97.5 percentiles of the resamples that have a correlation; None for each if no resample has one."""
    finite = resamples[np.isfinite(resamples)]
    return [float(x) for x in np.percentile(finite, [2.5, 97.5])] if len(finite) else [None] * 2


def bootstrap(
    tasks: dict[str, ScoredPairs], reported: list[dict[str, float | None]], resamples: int
) -> list[dict[str, Any]]:
    """Intervals of each model's figures, and of their differences to those of the first model.

    All models are scored on the same resamples, so the differences are paired: easy and hard pairs, which the models
    share, cancel. The average is that of the tasks' figures, each from its own resample.

    Args:
      tasks: scores of the pairs, by name of the task.
      reported: for each model, the figures of the tasks, and "Avg.".
      resamples: their number, B.

    Returns:
      For each model, `{"intervals": {task: [low, high]}, "differences": {task: [difference, low, high]}}`, "Avg." among
      the tasks; the first model has no differences. None stands for a figure that is absent.
    """
    drawn = {name: spearman_resamples(systems, gold, resamples, name) for name, (systems, gold) in tasks.items()}
    drawn["Avg."] = np.mean(list(drawn.values()), axis=0)
    results: list[dict[str, Any]] = []
    for number, figures in enumerate(reported):
        found: dict[str, Any] = {"intervals": {name: interval(row[number]) for name, row in drawn.items()}}
        if number:
            found["differences"] = {
                name: [_difference(figures[name], reported[0][name]), *interval(row[number] - row[0])]
                for name, row in drawn.items()
            }
        results.append(found)
    return results


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
