"""What masks and hard negatives cost in the loss."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.compare import compare
from benchmarks.loss import TOLERANCE
from benchmarks.report import Table
from benchmarks.work import SEED
from benchmarks.worker import Contender

Setting = Literal[
    "duplicates masked",
    "margin masked",
    "both",
    "guide of width 384",
    "1 hard negative",
    "2 hard negatives",
    "4 hard negatives",
]
SETTINGS: dict[Setting, dict[str, Any]] = {
    "duplicates masked": {"negatives": {"duplicates": True}},
    "margin masked": {"negatives": {"margin": 3.0}},
    "both": {"negatives": {"duplicates": True, "margin": 3.0}},
    "guide of width 384": {"negatives": {"guide": "a model", "guide_margin": 3.0}, "guide": 384},
    "1 hard negative": {"hard": 1},
    "2 hard negatives": {"hard": 2},
    "4 hard negatives": {"hard": 4},
}
"""By name, arguments of `benchmarks.ours.Loss` that leave the loss as it is."""


@dataclass(frozen=True)
class Negatives:
    """The loss in tiles, forward and backward, with masks and with hard negatives, against the loss without."""

    rows: int = 16384
    """Number of pairs."""
    width: int = 768
    product: int = 4096
    """Side of the matrix products whose rate is the ceiling."""
    rounds: int = 5
    settings: tuple[Setting, ...] = tuple(SETTINGS)
    """What is compared with the loss without masks and hard negatives."""

    def quick(self) -> "Negatives":
        """The same part at the size of a rehearsal."""
        return replace(self, rows=256, width=64, product=512, rounds=2)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument and errors see `Step.run`."""
        chosen = {name: SETTINGS[name] for name in self.settings}
        n, generator = self.rows, np.random.default_rng(SEED)
        first, other = generator.normal(size=(2, n, self.width)).astype(np.float32)
        arguments = {"views": (first, first + 3 * other), "temperature": 0.05, "form": "tiled"}
        contenders = {"plain": Contender("ours:Loss", arguments)}
        contenders |= {str(name): Contender("ours:Loss", arguments | more) for name, more in chosen.items()}
        found, _, ceilings = compare(
            contenders, self.rounds, tolerance=TOLERANCE, product=(self.product, "float32", True)
        )
        rows = [replace(row, items=n) for row in found]
        note = (
            "float32, exact products. Nothing is masked and every hard negative is absent, so that losses and "
            f"gradients agree, within {TOLERANCE:g}; the work is the same as where some are."
        )
        title = f"InfoNCE in tiles, forward and backward: {n:,} pairs of width {self.width}"
        return [Table(title, rows, unit="pairs", notes=[note], ceilings=ceilings)]
