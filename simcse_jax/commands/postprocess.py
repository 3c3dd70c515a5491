"""`simcse-jax postprocess`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from simcse_jax.commands.options import Command, senteval_folder
from simcse_jax.config.postprocess import FitSettings
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName


@dataclass(frozen=True)
class Postprocess(Command):
    """Fit whitening, all-but-the-top or a flow to sentences without labels, and write the model that applies it."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, an exported folder, a Hugging Face folder or a name on the hub."""
    sentences: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SENTENCES")]
    """Text file, one sentence per line (.txt, .txt.gz); or STS tasks joined by commas: STSBenchmark, sts, pairs.tsv."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder to make, with the files that `export` writes."""
    fit: Annotated[FitSettings, tyro.conf.arg(name="")] = field(default_factory=FitSettings)
    data: str = field(default_factory=senteval_folder)
    """Folder in SentEval's layout, for tasks; $SIMCSE_DATA/senteval where that is set."""
    limit: int | None = None
    """Use only this many of the lines, or of the tasks' sentences, from the first; by default all."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""
    batch_size: int = 64
    """Sentences per forward pass, over all devices."""

    def run(self) -> None:
        """Fits and exports."""
        from simcse_jax.evaluation.sentences import unlabelled_sentences
        from simcse_jax.inference.export import export
        from simcse_jax.inference.loading import load_model
        from simcse_jax.postprocess import describe, fit
        from simcse_jax.reports.progress import note
        from simcse_jax.storage.objects import check_new_output

        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be greater than 0")
        self.fit.validate()
        check_new_output(self.output)
        sentences = unlabelled_sentences(self.sentences, self.data, self.limit)
        loaded = load_model(self.model, self.pooler)
        loaded.check_no_postprocessor()
        encoder = loaded.encoder(batch_size=self.batch_size)
        vectors = encoder(loaded.params, sentences, progress=True)
        note(f"fitting {self.fit.method} to {len(sentences):,} sentences")
        post, about = fit(vectors, self.fit)
        about["source"] = ", ".join(Path(name).name for name in self.sentences.split(","))
        folder = export(loaded.with_postprocessor(post, about), self.output)
        print(f"{describe(about)}: written to {folder}")
        if loaded.origin:
            print(f"made from {loaded.origin}")
