"""What each setting of a study changes, seed by seed."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from simcse_jax.reports.tables import Row
from simcse_jax.study.grid import Series, Study, in_words

Key = tuple[int, Series, int]
"""Batch, series and seed."""


@dataclass(frozen=True)
class Effect:
    """The difference that a change makes, at settings that stay."""

    change: str
    at: str
    differences: tuple[float, ...]
    """One per seed: the mean over the pairs of runs that differ in nothing else."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.differences))

    @property
    def half(self) -> float:
        """Half of the 95 % interval of the mean, by Student's t over seeds; NaN with one seed."""
        from scipy.stats import t

        n = len(self.differences)
        if n < 2:
            return math.nan
        return float(t.ppf(0.975, n - 1) * np.std(self.differences, ddof=1) / math.sqrt(n))

    @property
    def is_larger_than_noise(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half


def effects(study: Study, rows: list[Row], name: str) -> list[Effect]:
    """What each batch, against the reference batch, and each other value, against the first, changes in a figure.

    Batches are compared within each series, other settings within each batch, over all values of the rest. Pairs of
    which a run lacks the figure are left out.
    """
    figures: dict[Key, tuple[str, float]] = {}
    by_label = {study.label(series): series for series in study.series}
    for row in rows:
        value = row.get(name, math.nan)
        if isinstance(value, int | float) and math.isfinite(value):
            figures[row["batch_size"], by_label[row["series"]], row["seed"]] = row["cell"], float(value)
    batches = sorted(study.batch_sizes)
    reference = study.reference_batch_size if study.reference_batch_size in batches else batches[0]
    found: list[Effect | None] = []
    for series in study.series:
        for b in batches:
            pairs = [((b, series, s), (reference, series, s)) for s in study.seeds if b != reference]
            found.append(_effect(figures, f"batch {b:,} for {reference:,}", study.label(series), pairs))
    for b in batches:
        for words, pairs in _changes(study, b):
            found.append(_effect(figures, words, f"batch {b:,}", pairs))
    return [effect for effect in found if effect is not None]


def _changes(study: Study, batch: int) -> Iterator[tuple[str, list[tuple[Key, Key]]]]:
    """For each value of rule, factors and budget but the first, the pairs of runs that differ in that alone."""
    parts: list[tuple[str, list[Any]]] = [("rule", [*study.rules]), ("budget", [*study.budgets])]
    parts += [(name, [*values]) for name, values in study.factors.items()]
    for part, (first, *others) in parts:
        for other in others:
            pairs = [
                ((batch, changed, s), (batch, series, s))
                for series in study.series
                if _value(series, part) == first
                for changed in study.series
                if _value(changed, part) == other and _without(changed, part) == _without(series, part)
                for s in study.seeds
            ]
            yield f"{part.rpartition('.')[2]} {in_words(other)} for {in_words(first)}", pairs


def _value(series: Series, part: str) -> Any:
    return getattr(series, part) if part in ("rule", "budget") else dict(series.settings)[part]


def _without(series: Series, part: str) -> dict[str, Any]:
    whole = {"rule": series.rule, "budget": series.budget, **dict(series.settings)}
    return {name: value for name, value in whole.items() if name != part}


def _effect(figures: dict[Key, tuple[str, float]], change: str, at: str, pairs: list[tuple[Key, Key]]) -> Effect | None:
    """The effect of some pairs of runs; None where none differ, as at the reference batch, where all rules are one."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for a, b in pairs:
        if a in figures and b in figures and figures[a][0] != figures[b][0]:
            by_seed[a[2]].append(figures[a][1] - figures[b][1])
    return Effect(change, at, tuple(float(np.mean(x)) for x in by_seed.values())) if by_seed else None
