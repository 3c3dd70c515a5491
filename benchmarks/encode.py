"""Sentences to vectors, beside sentence-transformers."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.compare import Figures, compare, cosine_distance
from benchmarks.report import Table
from benchmarks.work import DTYPES, QUICK, Size, bert_folder, forward_flops, real_sentences
from benchmarks.worker import Contender
from simcse_jax.data.demo import minilm_folder
from simcse_jax.data.tokens import encode_batch
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer

Model = Literal["minilm", "random"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Tolerance of 1 − cos between a sentence's vector and that of our model in the first type measured."""


@dataclass(frozen=True)
class Encode:
    """Real STS sentences (without SIMCSE_DATA, Python's documentation) to vectors, tokenisation included."""

    models: tuple[Model, ...] = ("minilm", "random")
    """Model: all-MiniLM-L6-v2, or a random BERT of `size`."""
    size: Size = field(default_factory=Size)
    sentences: int = 1000
    batch_size: int = 64
    dtypes: tuple[DTYPES, ...] = ("float32", "bfloat16")
    product: int = 4096
    """Side of the matrix products whose rate is the ceiling."""
    rounds: int = 5

    def quick(self) -> "Encode":
        """The same part at the size of a rehearsal."""
        return replace(self, models=("minilm",), size=QUICK, sentences=64, dtypes=("float32",), product=512, rounds=2)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument and errors see `Step.run`."""
        sentences = real_sentences(self.sentences)
        tables: list[Table] = []
        for name in self.models:
            model, what = model_of(name, self.size, folder)
            title = f"Encoding {len(sentences):,} sentences with {what}"
            tables += encoding(title, model, sentences, self.batch_size, self.dtypes, self.rounds, self.product)[0]
        return tables


def model_of(name: Model, size: Size, folder: Path) -> tuple[Path, str]:
    """A model's folder, made for a random model, and the model's name."""
    if name == "minilm":
        return minilm_folder(), "all-MiniLM-L6-v2"
    return bert_folder(size, folder), f"BERT {size.layers} × {size.width}"


def contenders(model: Path, sentences: list[str], batch_size: int, dtype: str) -> dict[str, Contender]:
    """The contenders, ours first."""
    arguments = {"model": str(model), "sentences": sentences, "batch_size": batch_size, "dtype": dtype}
    return {
        f"ours {dtype}": Contender("ours:Encode", arguments),
        f"ours, a sentence a row, {dtype}": Contender("ours:Encode", arguments | {"packed_length": 0}),
        f"sentence-transformers {dtype}": Contender("peers_st:Encode", arguments),
    }


def encoding(
    title: str,
    model: Path,
    sentences: list[str],
    batch_size: int,
    dtypes: tuple[DTYPES, ...],
    rounds: int,
    product: int,
) -> tuple[list[Table], np.ndarray]:
    """One table per type of arithmetic, and our vectors in the first type."""
    checkpoint = read_checkpoint(model)
    limit = checkpoint.max_length
    lengths = [len(ids) for ids in encode_batch(load_tokenizer(model), sentences, limit)]
    flops = forward_flops(checkpoint.config, lengths)
    tables: list[Table] = []
    expected: Figures | None = None
    for dtype in dtypes:
        rows, expected, ceilings = compare(
            contenders(model, sentences, batch_size, dtype),
            rounds,
            tolerance=TOLERANCE[dtype],
            distance=cosine_distance,
            expected=expected,
            product=(product, dtype),
        )
        rows = [replace(row, items=len(sentences), flops=flops, ceiling=max(ceilings.values())) for row in rows]
        note = (
            f"{np.mean(lengths):.1f} tokens per sentence, {batch_size} sentences at a time. The cosine of each vector "
            f"with that of our {dtypes[0]} model is above {1 - TOLERANCE[dtype]:g}."
        )
        tables.append(Table(f"{title}, {dtype}", rows, notes=[note], ceilings=ceilings))
    assert expected is not None
    return tables, expected["vectors"]
