"""`simcse-jax vocabulary`."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from simcse_jax.commands.options import Command


@dataclass(frozen=True)
class VocabularyCommand(Command):
    """Learn a WordPiece vocabulary from text and write a BERT without weights, to be pretrained (pretrain_mlm)."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """Training text, as for data.train."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder to make."""
    size: int = 8000
    """Tokens of the vocabulary."""
    layers: int = 4
    """Layers of the encoder."""
    hidden: int = 256
    """Width of the encoder."""
    heads: int = 4
    """Attention heads of a layer."""
    intermediate: int = 0
    """Width of the feed-forward layers; 0 is four times the encoder's."""
    positions: int = 512
    """Longest sequence, in tokens."""
    lowercase: bool = True
    """Lower-case the text and strip its accents."""

    def run(self) -> None:
        """Writes the folder."""
        from simcse_jax.data.vocabulary import make_model_folder
        from simcse_jax.reports.progress import note

        names = {f.name for f in fields(self)} - {f.name for f in fields(Command)} - {"text", "output"}
        sizes = {name: getattr(self, name) for name in names}
        note(f"learning the vocabulary from {self.text}")
        folder = make_model_folder(self.text, self.output, **sizes)
        print(f"wrote {folder}; train it with: simcse-jax train pretrain_mlm --model.path {shlex.quote(str(folder))}")
