"""`simcse-jax replace-words`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from simcse_jax.commands.options import Command
from simcse_jax.errors import InputError
from simcse_jax.storage.files import check_writable_file, writing


@dataclass(frozen=True)
class ReplaceWords(Command):
    """Write training pairs: each sentence, and the same with words that a masked language model predicts instead."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run that trained a masked language model (pretrain_mlm), its export, a Hugging Face folder or a name on the
    hub."""
    input: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """Text file, one sentence per line (also .gz); blank lines are left out."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """The .csv file to write, columns sentence and positive."""
    share: float = 0.15
    """Share of the words to replace; at least one word per sentence."""
    seed: int = 42
    """Random seed of the choice of words."""
    max_length: int = 32
    """Words beyond this number of tokens stay as they are."""
    batch_size: int = 64
    """Sentences per forward pass."""

    def run(self) -> None:
        """Writes the file."""
        from simcse_jax.data.corpus import read_sentences
        from simcse_jax.inference.replace_words import WordReplacer, check_settings
        from simcse_jax.reports.progress import progress_bar
        from simcse_jax.reports.tables import write_csv

        check_settings(self.share, self.seed, self.max_length, self.batch_size)
        if self.output.suffix != ".csv":
            raise InputError(f"output {self.output} must end in .csv")
        check_writable_file(self.output)
        sentences = [sentence for sentence in read_sentences(self.input) if sentence.strip()]
        if not sentences:
            raise InputError(f"{self.input} holds blank lines only: give sentences")
        replace = WordReplacer(self.model, self.max_length, self.batch_size)
        pairs = []
        with progress_bar(len(sentences), "sentences", "replacing words") as bar:
            for sentence, positive in zip(sentences, replace(sentences, self.share, self.seed), strict=True):
                pairs.append({"sentence": sentence, "positive": positive})
                bar.update()
        with writing(self.output):
            write_csv(self.output, pairs)
        same = sum(pair["sentence"] == pair["positive"] for pair in pairs)
        print(f"{self.output}: {len(pairs):,} pairs, {same:,} of them without a word that could be replaced")
