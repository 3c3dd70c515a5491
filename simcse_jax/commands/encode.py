"""`simcse-jax encode`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from simcse_jax.commands.options import Command
from simcse_jax.config import ENCODE_ROW, LongText
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName
from simcse_jax.storage.files import check_writable_file, new_file, write_or_rescue, writing


@dataclass(frozen=True)
class Encode(Command):
    """Write the vectors of a file's sentences, one row per line, as float32 .npy."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, an exported folder, a Hugging Face folder or a name on the hub."""
    input: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """Text file, one sentence per line (also .gz, /dev/stdin); a blank line gets the vector of the empty sentence."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """The .npy file to write."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""
    max_length: int | None = None
    """Most tokens per sentence; by default the model's own limit."""
    packed_length: int = ENCODE_ROW
    """Tokens per row; shorter sentences share a row. 0: one sentence per row. The vectors agree up to rounding."""
    long_text: LongText = "cut"
    """Longer texts are cut, encoded in windows whose vectors are averaged, or refused."""
    normalize: bool = True
    """Scale each vector to length 1."""
    prompt: str | None = None
    """Text to put before each sentence; by default the model's own default prompt, if it has one."""

    def run(self) -> None:
        """Encodes the file."""
        import numpy as np

        from simcse_jax.data.corpus import read_sentences
        from simcse_jax.inference.simcse import SimCSE

        if self.output.suffix != ".npy":
            raise InputError(f"output {self.output} must end in .npy")
        check_writable_file(self.output)
        sentences = read_sentences(self.input)
        model = SimCSE(self.model, self.pooler, self.max_length, self.packed_length, self.long_text)
        vectors = model.encode(sentences, normalize=self.normalize, progress=True, prompt=self.prompt)

        def write(file: Path) -> None:
            with writing(file), new_file(file) as partial:
                np.save(partial, vectors)

        write_or_rescue(write, self.output)
        print(f"{self.output}: {vectors.shape[0]:,} vectors of width {vectors.shape[1]}")
