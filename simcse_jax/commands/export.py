"""`simcse-jax export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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

    def run(self) -> None:
        """Writes the folder."""
        from simcse_jax.inference.export import export
        from simcse_jax.inference.loading import load_model

        folder = export(load_model(self.model, self.pooler), self.output)
        print(f'exported to {folder}; use it with sentence_transformers.SentenceTransformer("{folder}")')
