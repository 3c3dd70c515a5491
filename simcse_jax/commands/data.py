"""`simcse-jax data inspect`, `simcse-jax data nli` and `simcse-jax data mine`."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from simcse_jax.commands.options import Command, Configured
from simcse_jax.config import Config, DataConfig, MiningConfig
from simcse_jax.config.load import load_config_file
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName
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


def _check_new(output: Path, what: str = "file") -> None:
    """Raises `InputError` unless the file can be written and is not there yet."""
    check_writable_file(output)
    if output.expanduser().exists():
        raise InputError(f"{output} exists: choose another {what} to write, or remove it")


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
        _check_new(output, ".csv file")  # where the output was forgotten, this is a source
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


@dataclass(frozen=True)
class Mine(Command):
    """Write pairs of sentences with hard negatives: texts that a model finds near a sentence, and not its positive."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, an exported folder, a Hugging Face or sentence-transformers folder, or a name on the hub."""
    pairs: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PAIRS")]
    """Sentences and their positives: anything that data.train may be, with two columns."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """The .jsonl or .parquet file to write, which must not exist yet. Training reads it as it is."""
    corpus: Path | None = None
    """Text file, one text per line (also .gz), to mine from; by default the positives of all pairs."""
    columns: tuple[str, ...] = ()
    """Columns of the sentence and its positive, for files that have others as well."""
    mining: Annotated[MiningConfig, tyro.conf.arg(name="")] = field(default_factory=MiningConfig)
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""
    max_length: int | None = None
    """Most tokens per text; by default the model's own limit."""
    multi_host: bool = False
    """Join the other processes of a TPU pod, SLURM or MPI job (implied by JAX_COORDINATOR_ADDRESS)."""

    def run(self) -> None:
        """Writes the file and prints what mining took."""
        import json

        import jax

        from simcse_jax.runtime.processes import joined_processes

        self.mining.validate()
        if self.output.suffix not in (".jsonl", ".parquet"):
            raise InputError(f"{self.output} must end in .jsonl or .parquet, which training reads")
        _check_new(self.output)
        with joined_processes(self.multi_host):
            report = self._mine()
            if jax.process_index() == 0:
                print(json.dumps(report, indent=2))

    def _mine(self) -> dict[str, Any]:
        from dataclasses import asdict
        from functools import partial

        from simcse_jax.data.corpus import open_corpus, read_sentences
        from simcse_jax.inference.loading import load_model
        from simcse_jax.inference.mining import Miner, mine_to_file
        from simcse_jax.model.params import digest_params
        from simcse_jax.runtime.mesh import make_mesh
        from simcse_jax.runtime.processes import check_shared

        check_shared(self.output.expanduser().parent)
        source = open_corpus(DataConfig(train=self.pairs, columns=self.columns))
        if len(source.columns) != 2:
            raise InputError(
                f"{self.pairs} has {len(source.columns) or 1} columns; mining needs a sentence and its positive: name "
                "two with --columns"
            )
        examples = [(row[0].strip(), row[1].strip()) for row in source if row[0].strip() and row[1].strip()]
        if not examples:
            raise InputError(f"{self.pairs} holds no pair: give sentences with their positives")
        corpus = [positive for _, positive in examples] if self.corpus is None else read_sentences(self.corpus)
        model = load_model(self.model, self.pooler)
        encode = partial(model.encoder(self.max_length), model.params)
        identity = {
            "mining": asdict(self.mining),
            "pairs": source.fingerprint,
            "corpus": hashlib.sha256("\n".join(corpus).encode()).hexdigest(),
            "model": digest_params(model.params, f"{model.pooler} {self.max_length}"),
        }
        make = partial(Miner, encode, corpus, examples, self.mining, make_mesh())
        return mine_to_file(self.output.expanduser(), corpus, examples, make, identity)
