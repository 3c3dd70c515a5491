"""Rows of many tokens to vectors, by each way of computing attention without dropout."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import compare, cosine_distance
from benchmarks.encode import TOLERANCE
from benchmarks.ours_attention import WAYS
from benchmarks.report import Table
from benchmarks.work import DTYPES, QUICK, SEED, Size, bert_folder, forward_flops
from benchmarks.worker import Contender, Worker
from simcse_jax.errors import InputError
from simcse_jax.model.long_attention import SHORT
from simcse_jax.pretrained.folders import read_checkpoint


@dataclass(frozen=True)
class Attention:
    """Encoding of long rows: with the accelerator's fused kernel, in blocks of queries, with all weights at once."""

    size: Size = field(default_factory=Size)
    length: int = 512
    """Tokens per row: more than 128, which shorter rows need no blocks for, and at most the model's 512 positions."""
    rows: int = 64
    """Rows per call."""
    texts: tuple[int, ...] = (1, 4)
    """Texts per row: one table for each number. Of several, the kernel takes a mask."""
    dtypes: tuple[DTYPES, ...] = ("bfloat16",)
    product: int = 4096
    """Side of the matrix products whose rate is the ceiling."""
    rounds: int = 5

    def quick(self) -> "Attention":
        """The same part at the size of a rehearsal."""
        return replace(self, size=QUICK, length=192, rows=2, dtypes=("float32",), product=512, rounds=2)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument and errors see `Step.run`.

        Raises:
          InputError: a length that the model has no positions for, or that needs no blocks.
        """
        model = bert_folder(self.size, folder)
        most = read_checkpoint(model).config.max_position_embeddings
        if not SHORT < self.length <= most:
            raise InputError(f"length is {self.length}; it must be from {SHORT + 1} to {most}")
        tables: list[Table] = []
        for dtype in self.dtypes:
            with Worker("kernel", self.contenders(model, dtype, 1)["ours"]) as worker:
                kernel = f"The fused kernel, for {dtype}: {worker.call('kernel')}."
            print(kernel, flush=True)
            tables += [self._table(model, dtype, texts, kernel) for texts in self.texts]
        return tables

    def lengths(self, texts: int) -> np.ndarray:
        """Tokens of each text, by row: all rows are full."""
        return np.tile([len(part) for part in np.array_split(np.arange(self.length), texts)], (self.rows, 1))

    def contenders(self, model: Path, dtype: str, texts: int) -> dict[str, Contender]:
        """The contenders, first that which encoding takes."""
        ids = np.random.default_rng(SEED).integers(1000, 20000, (self.rows, self.length), np.int32)
        batch: dict[str, Any] = {"ids": ids, "lengths": self.lengths(texts).astype(np.int32)}
        arguments = {"model": str(model), "dtype": dtype} | batch
        return {way: Contender("ours_attention:LongRows", arguments | {"way": way}) for way in WAYS}

    def _table(self, model: Path, dtype: str, texts: int, kernel: str) -> Table:
        rows, _, ceilings = compare(
            self.contenders(model, dtype, texts),
            self.rounds,
            tolerance=TOLERANCE[dtype],
            distance=cosine_distance,
            product=(self.product, dtype),
        )
        flops = forward_flops(read_checkpoint(model).config, self.lengths(texts))
        rows = [replace(r, items=self.rows * texts, flops=flops, ceiling=max(ceilings.values())) for r in rows]
        note = f"{kernel} The cosine of each vector with that of ours is above {1 - TOLERANCE[dtype]:g}."
        title = (
            f"Encoding {self.rows} rows of {self.length} tokens, {texts} text{'s' * (texts > 1)} per row, with BERT "
            f"{self.size.layers} × {self.size.width}, {dtype}"
        )
        return Table(title, rows, unit="texts", notes=[note], ceilings=ceilings)
