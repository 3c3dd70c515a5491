"""`simcse-jax analyze`."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import tyro

from simcse_jax.commands.options import Command, senteval_folder
from simcse_jax.poolers import PoolerName


@dataclass(frozen=True)
class Analyze(Command):
    """Measure where models' vectors lie (alignment, uniformity, isotropy, spectrum); write tables, figures, report."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Runs, exported folders, Hugging Face folders or names on the hub; of a run, its path in training is drawn."""
    output: Path
    """Folder to make."""
    names: tuple[str, ...] = ()
    """What to call the models in figures and tables; the ends of their paths where not given."""
    checkpoints: bool = False
    """Analyse every kept checkpoint of the models that are runs, not their best alone."""
    task: str = "STSBenchmark"
    """Pairs to analyse: one of the STS tasks, or a .tsv file."""
    mode: Literal["test", "dev"] = "dev"
    """Its split; STS12 ... STS16 have `test` alone."""
    tasks: tuple[str, ...] = ()
    """Score these STS tasks as well, test split: names, `sts` for all seven, .tsv files."""
    data: str = field(default_factory=senteval_folder)
    """Folder in SentEval's layout (holds STS/ and SICK/); $SIMCSE_DATA/senteval where that is set."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with each model."""
    batch_size: int = 64
    """Sentences a forward pass over all devices."""

    def run(self) -> None:
        """Writes the folder."""
        from simcse_jax.analysis.run import AnalysisSettings, analyze

        given = {f.name: getattr(self, f.name) for f in fields(AnalysisSettings)}
        print(f"the report is {shlex.quote(str(analyze(self.models, self.output, AnalysisSettings(**given))))}")
