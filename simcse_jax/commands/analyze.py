"""`simcse-jax analyze`."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from simcse_jax.commands.options import Command, senteval_folder
from simcse_jax.poolers import PoolerName


@dataclass(frozen=True)
class Analyze(Command):
    """Measure where models' vectors lie (alignment, uniformity, isotropy, spectrum); write tables, figures, report."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Runs, exported folders, Hugging Face folders or names on the hub. The figures also show a run's path in
    training."""
    output: Path
    """Folder to make."""
    names: tuple[str, ...] = ()
    """Names of the models in figures and tables; by default the ends of their paths."""
    checkpoints: bool = False
    """Analyse every checkpoint that a run has kept, not the best alone."""
    task: str = "STSBenchmark"
    """Pairs to analyse: one of the STS tasks, or a .tsv file."""
    mode: Literal["test", "dev"] = "dev"
    """Split of `task`; STS12 ... STS16 have `test` alone."""
    tasks: tuple[str, ...] = ()
    """Score these STS tasks as well, test split: names, `sts` for all seven, .tsv files."""
    data: str = field(default_factory=senteval_folder)
    """Folder in SentEval's layout (holds STS/ and SICK/); $SIMCSE_DATA/senteval where that is set."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with each model."""
    batch_size: int = 64
    """Sentences per forward pass, over all devices."""

    def run(self) -> None:
        """Writes the folder."""
        from simcse_jax.analysis.run import AnalysisSettings, analyze

        given = {f.name: getattr(self, f.name) for f in fields(AnalysisSettings)}
        print(f"the report is {shlex.quote(str(analyze(self.models, self.output, AnalysisSettings(**given))))}")
