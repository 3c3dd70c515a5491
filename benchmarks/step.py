"""The train step beside PyTorch and sentence-transformers."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import Figures, compare
from benchmarks.report import Table
from benchmarks.work import (
    BATCHES,
    DTYPES,
    QUICK,
    Lengths,
    Size,
    bert_folder,
    forward_flops,
    peer_batches,
    token_table,
    training_text,
)
from benchmarks.worker import Contender
from simcse_jax.pretrained.folders import read_checkpoint

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
"""Relative tolerance of loss and gradient norm, to those of our step in the first type measured. Autocast computes the
logits of sentence-transformers in bfloat16, too: they are off by a 256th of 1/τ."""


@dataclass(frozen=True)
class Step:
    """One training step of unsupervised SimCSE: forward, backward, clip, AdamW; dropout 0.1, τ 0.05."""

    size: Size = field(default_factory=Size)
    batch_size: int = 64
    """Sentences, each encoded twice."""
    length: int = 32
    """Most tokens per sentence."""
    lengths: Lengths = "padded"
    """`padded`: every sentence has `length` tokens; `wiki`, `sts`: sentences from SIMCSE_DATA at their own lengths."""
    dtypes: tuple[DTYPES, ...] = ("float32", "bfloat16")
    """Types of arithmetic; weights are float32. PyTorch's bfloat16 is autocast."""
    scan: bool | None = None
    """Compile our layers as one, or each by itself; by default as training does."""
    compile: bool = False
    """Measure torch.compile, too, beside eager PyTorch; it takes minutes to compile."""
    product: int = 4096
    """Side of the matrix products whose rate is the ceiling."""
    rounds: int = 5

    def quick(self) -> "Step":
        """The same part at the size of a rehearsal."""
        return replace(self, size=QUICK, batch_size=16, dtypes=self.dtypes[:1], product=512, rounds=2)

    def work(self, folder: Path) -> "Material":
        """Model, text and batches."""
        model = bert_folder(self.size, folder)
        text = training_text(self.lengths, BATCHES * self.batch_size, self.length, folder)
        batches = peer_batches(token_table(model, text, self.length, folder / "cache"), self.batch_size)
        return Material(self, model, text, folder / "cache", batches)

    def run(self, folder: Path) -> list[Table]:
        """Measures.

        Args:
          folder: folder for models, text and caches.

        Raises:
          Disagreement: a peer computes another loss or gradient norm.
        """
        work = self.work(folder)
        tables: list[Table] = []
        expected: Figures | None = None
        for dtype in self.dtypes:
            rows, expected, ceilings = compare(
                work.contenders(dtype),
                self.rounds,
                tolerance=TOLERANCE[dtype],
                expected=expected,
                product=(self.product, dtype),
            )
            rows = [replace(r, items=work.sentences, flops=work.flops, ceiling=max(ceilings.values())) for r in rows]
            note = (
                f"Without dropout, loss and gradient norm of all are within {TOLERANCE[dtype]:g} of our "
                f"{self.dtypes[0]} step's, {expected['loss']:.5f} and {expected['gradient norm']:.5f}; compiled peers "
                "are compared before they are compiled."
            )
            tables.append(Table(f"{self.title(work)}, {dtype}", rows, notes=[note], ceilings=ceilings))
        return tables

    def title(self, work: "Material") -> str:
        """The work in words, for the title of a table."""
        kind = "all padded" if self.lengths == "padded" else f"{self.lengths}, {work.tokens:.1f} tokens on average"
        return (
            f"Training step: BERT {self.size.layers} × {self.size.width}, {self.batch_size} sentences twice, "
            f"{self.length} tokens at most ({kind})"
        )


@dataclass(frozen=True)
class Material:
    """The inputs that the contenders of a step share."""

    settings: Step
    model: Path
    text: Path
    cache: Path
    batches: list[tuple[np.ndarray, np.ndarray]]

    @property
    def tokens(self) -> float:
        """Tokens per sentence, on average."""
        return float(np.mean(np.concatenate([lengths for _, lengths in self.batches])))

    @property
    def sentences(self) -> int:
        """Sentences encoded per step."""
        return 2 * self.settings.batch_size

    @property
    def flops(self) -> float:
        """FLOPs of the encoder per step, forward and backward, for both views; the average over batches."""
        config = read_checkpoint(self.model).config
        return 3 * 2 * forward_flops(config, np.concatenate([n for _, n in self.batches])) / len(self.batches)

    def ours(self, dtype: str = "float32", kind: str = "Step", environment: Any = None, **more: Any) -> Contender:
        """This project's contender."""
        paths = {"model": str(self.model), "text": str(self.text), "cache": str(self.cache), "dtype": dtype}
        settings = self.settings
        arguments = {"batch_size": settings.batch_size, "length": settings.length, "scan": settings.scan}
        return Contender(f"ours_training:{kind}", paths | arguments | more, environment or {})

    def peer(self, make: str, dtype: str = "float32", compiled: bool = False, **more: Any) -> Contender:
        """A contender on PyTorch."""
        arguments = {"model": str(self.model), "batches": self.batches, "dtype": dtype, "temperature": 0.05}
        return Contender(make, arguments | {"compiled": compiled} | more)

    def contenders(self, dtype: str) -> dict[str, Contender]:
        """The contenders, ours first."""
        found = {f"ours {dtype}": self.ours(dtype)}
        if self.settings.lengths != "padded":
            found[f"ours packed {dtype}"] = self.ours(dtype, packed_length=128)
        found |= {
            f"torch {dtype}": self.peer("peers_torch:Step", dtype),
            f"sentence-transformers {dtype}": self.peer("peers_st:Step", dtype),
        }
        if self.settings.compile:
            found[f"torch.compile {dtype}"] = self.peer("peers_torch:Step", dtype, compiled=True)
        return found
