"""The measures of a study as rows, and their spread over seeds."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from simcse_jax.reports.tables import Row
from simcse_jax.study.grid import Cell, Study


def rows_of(study: Study, measures: dict[Cell, dict[str, Any]]) -> list[Row]:
    """One row per point of the grid: its settings, then all measures; NaN for a measure that is missing.

    The run at the reference batch has one row per rule; `cell` names the run.
    """
    rows = []
    for batch_size in sorted(study.batch_sizes):
        for series in study.series:
            for seed in study.seeds:
                cell = study.cell(batch_size, series, seed)
                settings = {
                    "batch_size": batch_size,
                    "rule": series.rule,
                    **dict(series.settings),
                    **({"budget": series.budget} if series.budget else {}),
                    "series": study.label(series),
                    "seed": seed,
                    "cell": cell.name,
                    "learning_rate": study.learning_rate(cell),
                    "steps": study.steps_of(cell),
                }
                measured = {name: value for name, value in measures[cell].items() if name != "path"}
                rows.append({**settings, **{n: math.nan if v is None else v for n, v in measured.items()}})
    return rows


def values(rows: list[Row], name: str, **where: Any) -> np.ndarray:
    """The finite figures `name` of the rows whose settings are as given; each run counts once."""
    chosen = {r["cell"]: r.get(name, math.nan) for r in rows if all(r[k] == v for k, v in where.items())}
    array = np.array([v for v in chosen.values() if isinstance(v, (int, float))], np.float64)
    return array[np.isfinite(array)]


def mean_sd(x: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN for too few figures."""
    mean = float(np.mean(x)) if len(x) else math.nan
    return mean, float(np.std(x, ddof=1)) if len(x) > 1 else math.nan


def slope(rows: list[Row], name: str, transform: Callable[[Any], Any] = np.log2) -> tuple[float, float] | None:
    """Least-squares slope of `transform(name)` against log2 of the batch, and its standard error.

    Each run is one point. With `np.log2` the slope is the exponent p of name ∝ B^p, with the identity the change at
    each doubling.

    Returns:
      Slope and standard error; None for fewer than three runs or fewer than two batches with a figure that can be
      transformed.
    """
    from scipy.stats import linregress

    runs = {r["cell"]: (r["batch_size"], r.get(name, math.nan)) for r in rows}
    with np.errstate(divide="ignore", invalid="ignore"):
        points = [(np.log2(b), transform(v)) for b, v in runs.values()]
    x, y = np.array([p for p in points if np.isfinite(p[1])]).reshape(-1, 2).T
    if len(x) < 3 or len(set(x)) < 2:
        return None
    fit = linregress(x, y)
    return float(fit.slope), float(fit.stderr)
