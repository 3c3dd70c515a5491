"""`simcse-jax data inspect` and `simcse-jax data nli`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from simcse_jax.commands.options import Command, Configured
from simcse_jax.config import Config, DataConfig
from simcse_jax.config.load import load_config_file
from simcse_jax.errors import InputError
from simcse_jax.storage.files import check_writable_file, writing


@dataclass(frozen=True)
class Inspect(Configured):
    """Report what a model will see of its training text: counts, lengths, cuts, repetitions, three examples."""

    config_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Python file that defines `config`, or the name of a config that comes with the package; as for train."""
    json: Path | None = None
    """Write all figures to this .json file."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    @classmethod
    def from_file(cls, file: str) -> "Inspect":
        """The command with the settings of a config file."""
        return cls(file, config=load_config_file(file))

    def run(self) -> None:
        """Prints the report."""
        from simcse_jax.data.corpus import open_corpus
        from simcse_jax.data.inspection import format_report, inspect_corpus
        from simcse_jax.pretrained.folders import read_checkpoint
        from simcse_jax.pretrained.tokenizers import check_tokenizer, load_tokenizer
        from simcse_jax.storage.files import write_json

        self.config.validate()
        if self.json:
            if self.json.suffix != ".json":  # no training text ends so: none can be overwritten
                raise InputError(f"json {self.json} must end in .json")
            check_writable_file(self.json)
        checkpoint = read_checkpoint(self.config.model.path)
        tokenizer = load_tokenizer(checkpoint.folder)
        check_tokenizer(tokenizer, checkpoint.config.vocab_size)
        corpus = open_corpus(self.config.data)
        report = inspect_corpus(corpus, self.config, tokenizer, progress=True)
        if self.json:
            with writing(self.json):
                write_json(self.json, report)
        print(format_report(report))


@dataclass(frozen=True)
class Nli(Command):
    """Write triplets (premise, entailment, contradiction) from the labelled pairs of SNLI, MultiNLI and the like."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...] OUTPUT")]
    """Sources, then the .csv file to write. A source is anything that data.train may be, with the columns premise,
    hypothesis and label, or sentence1, sentence2 and gold_label. The .csv file must not exist yet."""
    split: str = "train"
    """Split of a data set of the hub or of TFDS."""
    subset: str | None = None
    """Configuration name of a data set of the hub."""
    seed: int = 42
    """Random seed; it decides which hypothesis is taken where a premise has several of one kind."""

    def run(self) -> None:
        """Writes the file."""
        from simcse_jax.data.corpus import open_source
        from simcse_jax.data.nli import CLASSES, build_triplets, read_pairs
        from simcse_jax.reports.progress import note
        from simcse_jax.reports.tables import write_csv

        *names, last = self.paths or ("",)
        output = Path(last)
        if not names or output.suffix != ".csv":
            given = " ".join(self.paths) or "nothing"
            raise InputError(f"give one source or more, and then the .csv file to write; got {given}")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must be 0 or more")
        check_writable_file(output)
        if output.expanduser().exists():  # where the output was forgotten, this is a source
            raise InputError(f"{output} exists: choose another .csv file to write, or remove it")
        sources = [open_source(DataConfig(train=name, split=self.split, subset=self.subset)) for name in names]
        note(f"reading {', '.join(names)}")
        found = build_triplets((pair for source in sources for pair in read_pairs(source)), self.seed)
        columns = ("sent0", "sent1", "hard_neg")
        if found.rows:
            with writing(output):
                write_csv(output, [dict(zip(columns, row, strict=True)) for row in found.rows])
        counts = ", ".join(f"{found.pairs[name]:,} {name}" for name in CLASSES)
        print(f"{found.pairs.total():,} pairs: {counts}, {found.pairs['']:,} without a label")
        if found.blank:
            print(f"left out: {found.blank:,} pairs with a blank sentence")
        if not found.rows:
            raise InputError(f"no premise of {', '.join(names)} has both an entailed and a contradicting hypothesis")
        premises = f"{found.premises:,} premises"
        print(f"{output}: {len(found.rows):,} triplets, one for each of {premises} that has both kinds")
