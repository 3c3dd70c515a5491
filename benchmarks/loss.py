"""InfoNCE alone, beside PyTorch."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.compare import compare
from benchmarks.report import Table
from benchmarks.work import SEED
from benchmarks.worker import Contender

TOLERANCE = 1e-4
"""Relative tolerance of the loss, and of both gradients as a whole."""


@dataclass(frozen=True)
class Loss:
    """Forward and backward of the loss, by batch size: ours dense and tiled, PyTorch's dense."""

    rows: tuple[int, ...] = (64, 1024, 4096, 16384)
    """Numbers of pairs."""
    most_dense: int = 32768
    """Beyond this number of pairs, whose logits alone take 4 N² bytes, our tiled form is measured by itself."""
    width: int = 768
    product: int = 4096
    """Side of the matrix products whose rate is the ceiling."""
    rounds: int = 5

    def quick(self) -> "Loss":
        """The same part at the size of a rehearsal."""
        return replace(self, rows=(256,), width=128, product=512, rounds=2)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument and errors see `Step.run`."""
        return [self._table(n) for n in self.rows]

    def contenders(self, n: int) -> dict[str, Contender]:
        """The contenders, ours first."""
        generator = np.random.default_rng(SEED)
        first, other = generator.normal(size=(2, n, self.width)).astype(np.float32)
        # Views of cosine about 0.3: near a loss of 0, the usual form of the gradient is good to three digits only.
        arguments = {"views": (first, first + 3 * other), "temperature": 0.05}
        tiled = {"ours tiled": Contender("ours:Loss", arguments | {"form": "tiled"})}
        if n > self.most_dense:
            return tiled
        return {
            "ours dense": Contender("ours:Loss", arguments | {"form": "dense"}),
            **tiled,
            "torch dense": Contender("peers_torch:Loss", arguments),
        }

    def _table(self, n: int) -> Table:
        found, _, ceilings = compare(
            self.contenders(n), self.rounds, tolerance=TOLERANCE, product=(self.product, "float32", True)
        )
        # Dense: logits and two gradients, 2N²H each. Products that tiles repeat do not count as work.
        work = {"items": n, "flops": 6.0 * n**2 * self.width, "ceiling": max(ceilings.values())}
        rows = [replace(row, **work) for row in found]  # type: ignore[arg-type]
        same = f" Loss and gradients of all agree within {TOLERANCE:g}." if len(found) > 1 else ""
        note = f"float32, exact products.{same}"
        title = f"InfoNCE, forward and backward: {n:,} pairs of width {self.width}"
        return Table(title, rows, unit="pairs", notes=[note], ceilings=ceilings)
