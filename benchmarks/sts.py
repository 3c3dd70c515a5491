"""The seven STS tasks, beside sentence-transformers on the same tasks."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.encode import Model, encoding, model_of
from benchmarks.report import Table
from benchmarks.work import DTYPES, Size, data_root
from simcse_jax.data.demo import demo_similarity
from simcse_jax.evaluation.sts import STS_TASKS, distinct_sentences, evaluate, load_task


@dataclass(frozen=True)
class Sts:
    """All sentences of STS tasks, each once, to vectors; needs SIMCSE_DATA."""

    tasks: tuple[str, ...] = STS_TASKS
    """Names of tasks, or .tsv files."""
    model: Model = "minilm"
    """Model: all-MiniLM-L6-v2, or a random BERT of `size`."""
    size: Size = field(default_factory=Size)
    batch_size: int = 64
    dtypes: tuple[DTYPES, ...] = ("float32",)
    product: int = 4096
    """Side of the matrix products whose rate is the ceiling."""
    rounds: int = 3

    def quick(self) -> "Sts":
        """The same part at the size of a rehearsal, on the package's own pairs."""
        return replace(self, tasks=(str(demo_similarity("dev")),), product=512, rounds=1)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument and errors see `Step.run`. Vectors that agree score alike."""
        files = all(name.endswith(".tsv") for name in self.tasks)
        data = "" if files else data_root() / "senteval"
        tasks = [load_task(name, data) for name in self.tasks]
        sentences = distinct_sentences(tasks)
        model, what = model_of(self.model, self.size, folder)
        title = f"STS: the {len(sentences):,} sentences of {len(tasks)} task(s) with {what}"
        tables, found = encoding(title, model, sentences, self.batch_size, self.dtypes, self.rounds, self.product)
        vectors = dict(zip(sentences, found, strict=True))
        scores = evaluate(tasks, lambda asked: np.stack([vectors[s] for s in asked]))["reported"]
        note = f"Spearman × 100 of our {self.dtypes[0]} vectors, on average: {scores['Avg.']:.2f}."
        return [replace(table, notes=[*table.notes, note], figures={"scores": scores}) for table in tables]
