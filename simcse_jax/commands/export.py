"""`simcse-jax export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from simcse_jax.commands.options import Command
from simcse_jax.poolers import PoolerName


@dataclass(frozen=True)
class Export(Command):
    """Write a model as a folder that transformers, sentence-transformers and this package read."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run (its best checkpoint), or any model this package reads."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder to make."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""
    step: int | Literal["best", "latest"] | None = None
    """Checkpoint of a run: a kept step, the best dev score, or the latest; by default the best, or the latest where the
    run has no dev scores."""

    def run(self) -> None:
        """Writes the folder."""
        from simcse_jax.inference.export import export
        from simcse_jax.inference.loading import load_model
        from simcse_jax.storage.objects import check_new_output

        check_new_output(self.output)
        loaded = load_model(self.model, self.pooler, step=self.step)
        folder = export(loaded, self.output)
        if loaded.origin:
            print(f"took {loaded.origin}")
        print(f'exported to {folder}; use it with sentence_transformers.SentenceTransformer("{folder}")')
        if loaded.step == 0:
            print("WARNING: this is the model before training. --step latest exports the last step of the run")
