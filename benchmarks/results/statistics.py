"""Means, spreads and tests over the seeds of a few runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """The difference of two means (Welch). Runs of one seed share order and head; that is not made use of.

    Attributes:
      mean: mean of the first less mean of the second.
      error: its standard error; NaN where neither side has two figures.
      freedom: Welch's degrees of freedom.
    """

    mean: float
    error: float
    freedom: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Its interval by Student's t."""
        half = float(stats.t.ppf(0.5 + level / 2, self.freedom)) * self.error
        return self.mean - half, self.mean + half


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """The difference of two means. A side of one figure, an encoder without training, has no spread."""
    parts = [(float(np.var(x, ddof=1)) / len(x), len(x) - 1) for x in (a, b) if len(x) > 1]
    variance = sum(v for v, _ in parts)
    squares = sum(v * v / n for v, n in parts)
    freedom = variance**2 / squares if squares else float(sum(n for _, n in parts))
    error = math.sqrt(variance) if parts else math.nan
    return Difference(float(np.mean(a) - np.mean(b)), error, freedom or math.nan)


def verdict(found: Difference) -> str:
    """Whether a difference that a paper has above 0 is here: holds, does not hold, not decided at this scale."""
    low, high = found.interval()
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 else "not decided at this scale"


def is_equivalent(found: Difference, margin: float) -> bool:
    """Two one-sided tests at 5 %: the 90 % interval lies within ± margin (Schuirmann 1987). Without spread, no test."""
    low, high = found.interval(0.9)
    return found.error > 0 and -margin < low and high < margin
