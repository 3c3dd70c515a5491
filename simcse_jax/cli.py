"""Train sentence encoders with SimCSE, score them, encode with them, and export them to PyTorch."""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from simcse_jax.ablation import Ablation
from simcse_jax.config import ENCODE_ROW, Config, load_config_file, load_variable
from simcse_jax.errors import InputError, reason
from simcse_jax.model.pooling import PoolerName
from simcse_jax.postprocess.fit import FitSettings
from simcse_jax.programs import keep_programs
from simcse_jax.study import Study as StudySettings


@dataclass(frozen=True)
class Train:
    """Train a model, or continue the run in the output folder."""

    config_file: tyro.conf.Positional[str]
    """Python file that defines `config`, or the name of a config that comes with the package."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def run(self) -> None:
        """Trains and prints the scores."""
        import logging

        import jax

        from simcse_jax.evaluation.sts import format_table
        from simcse_jax.train import TrainingDiverged, train

        # Where a checkpoint cannot be written, orbax logs a traceback of each of its threads and then raises, too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        try:
            results = train(self.config)
        except TrainingDiverged as error:
            print(f"simcse-jax: training diverged: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if jax.process_index() != 0:
            return
        if "stopped" in results:
            print(f"stopped at step {results['stopped']:,} and saved; the same command continues")
            return
        if results["best_step"] is not None:
            print(f"best dev score {results['dev']:.2f} at step {results['best_step']:,}")
        if "after" in results:
            print("Spearman × 100, test")
            print(format_table({moment: results[moment] for moment in ("before", "after")}))
        output = shlex.quote(self.config.output)
        print(f"run in {output}; export it with: simcse-jax export {output} OUT")


@dataclass(frozen=True)
class PlanConfig(Config):
    """The run to plan, of one global batch or several."""

    batch_size: tuple[int, ...] = (64,)  # type: ignore[assignment]
    """Sentences (or pairs, or triplets) per step over all devices; each size given is planned."""

    @classmethod
    def of(cls, config: Config) -> "PlanConfig":
        """The same run."""
        return cls(**{**vars(config), "batch_size": (config.batch_size,)})

    def each(self) -> list[Config]:
        """One run a global batch."""
        return [
            Config(**{**{f.name: getattr(self, f.name) for f in fields(self)}, "batch_size": n})
            for n in self.batch_size
        ]


@dataclass(frozen=True)
class Plan:
    """Compile a run's train step for devices that are not here: memory, collectives, FLOPs, and what they allow."""

    config_file: tyro.conf.Positional[str]
    """Python file that defines `config`, or the name of a config that comes with the package."""
    topology: tuple[str, ...] = ()
    """TPU slices (v5e:16x16, v4:4x4x4), GPUs (h200:8 is one node, h200:4x8 four nodes of 8) or cpu:8."""
    columns: Literal[1, 2, 3] | None = None
    """Sentences an example; by default as many as data.columns, or 1 for .txt files."""
    json: Path | None = None
    """Write all figures to this file."""
    config: Annotated[PlanConfig, tyro.conf.arg(name="")] = field(default_factory=PlanConfig)

    def run(self) -> None:
        """Prints the table."""
        from simcse_jax.files import write_json
        from simcse_jax.plan import check_plan, format_plans, plan
        from simcse_jax.topology import parse_topology, prepare_process

        if not self.topology or not self.config.batch_size:
            raise InputError(
                "nothing to plan for: name devices with --topology, e.g. v5e:16x16 h200:8, and a --batch-size"
            )
        if self.json:
            _check_writable(self.json)
        prepare_process([parse_topology(name) for name in self.topology])
        for name in self.topology:
            for config in self.config.each():
                check_plan(config, name, self.columns)  # before minutes of compiling are spent on another
        plans = []
        for name in self.topology:
            for config in self.config.each():
                print(f"compiling for {name}, batch {config.batch_size:,} ...", end=" ", file=sys.stderr, flush=True)
                plans.append(plan(config, name, self.columns))
                print(f"{plans[-1].compile_seconds:.1f} s", file=sys.stderr)
        print(format_plans(plans))
        if self.json:
            try:
                write_json(self.json, {"plans": [p.to_dict() for p in plans]})
            except OSError as error:
                raise InputError(f"{self.json} cannot be written ({reason(error)}): free space there") from error


@dataclass(frozen=True)
class Study:
    """Train over a grid of batch × learning-rate rule × seed, or continue; write table, figures and report."""

    config_file: tyro.conf.Positional[str]
    """Python file that defines `study`, or the name of one that comes with the package: study_batch_size."""
    study: Annotated[StudySettings, tyro.conf.arg(name="")] = field(default_factory=StudySettings)

    def run(self) -> None:
        """Runs the cells that are not done."""
        import logging

        import jax

        from simcse_jax.study.run import run_study

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # as in Train
        results = run_study(self.study)
        if jax.process_index() != 0:
            return
        if "stopped" in results:
            done, name = results["done"], results["stopped"]
            print(f"{done} cells are done, stopped in {name} and saved; the same command continues")
        else:
            print(f"{results['cells']} cells are done; the report is {shlex.quote(results['report'])}")


@dataclass(frozen=True)
class Ablate:
    """Train the variants of a config, each with each seed, or continue; print and write the table."""

    config_file: tyro.conf.Positional[str]
    """Python file that defines `ablation`, or the name of one that comes with the package, e.g. dropout."""
    ablation: Annotated[Ablation, tyro.conf.arg(name="")] = field(default_factory=Ablation)

    def run(self) -> None:
        """Runs what is not done."""
        import logging

        from simcse_jax.ablation import run_ablation

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # as in Train
        table = run_ablation(self.ablation)
        print("stopped and saved; the same command continues" if table is None else table)


def _data_folder() -> str:
    root = os.environ.get("SIMCSE_DATA")
    return str(Path(root) / "senteval") if root else ""


@dataclass(frozen=True)
class Evaluate:
    """Score models on STS and transfer tasks; several models in one table."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Runs, exported folders, Hugging Face folders or names on the hub."""
    data: str = field(default_factory=_data_folder)
    """Folder in SentEval's layout (holds STS/ and SICK/, MR/ ...); $SIMCSE_DATA/senteval where that is set."""
    tasks: tuple[str, ...] = ("sts",)
    """STS12 ... STS16, STSBenchmark, SICKRelatedness (`sts`: all seven), MR, CR, SUBJ, MPQA, SST2, TREC, MRPC
    (`transfer`: all seven; `full`: both sets), SICKEntailment, or .tsv files of graded pairs."""
    mode: Literal["test", "dev", "fasttest"] = "test"
    """Split that is reported; fasttest cross-validates the classifiers of transfer tasks with 5 folds instead of 10."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the models."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type."""
    batch_size: int = 64
    """Sentences a forward pass over all devices."""
    all_splits: bool = False
    """Also score the splits of STS-B and SICK-R that are not reported, as SentEval does."""
    bootstrap: int = 0
    """Resamples of each STS task's pairs, for 95 % intervals of the figures and of differences to the first model."""
    json: Path | None = None
    """Write all figures, Pearson and Spearman of every subset, to this file."""
    csv: Path | None = None
    """Write the reported figures to this file, one a line."""
    markdown: Path | None = None
    """Write the tables to this file."""

    def run(self) -> None:
        """Prints the tables."""
        from simcse_jax import hf
        from simcse_jax.embedder import LoadedModel, load_model
        from simcse_jax.encode import BatchEncoder
        from simcse_jax.evaluation.suite import evaluate_models, load_suite
        from simcse_jax.evaluation.tables import format_text, write_csv, write_markdown
        from simcse_jax.files import finite, write_json
        from simcse_jax.sharding import make_mesh

        self._check()
        suite = load_suite(self.tasks, self.data, self.mode, self.all_splits)
        loaded = [load_model(model, self.pooler, self.dtype) for model in self.models]
        mesh = make_mesh()

        def encoder(model: LoadedModel) -> Any:
            tokenizer = hf.load_tokenizer(model.checkpoint.folder)
            encode = BatchEncoder(model.model, tokenizer, mesh, batch_size=self.batch_size)
            return lambda sentences: encode(model.params, sentences, progress=True)

        found = evaluate_models(suite, [encoder(model) for model in loaded], self.bootstrap)
        poolers = [hf.Pooling(m.model.pooler, m.model.mlp_only_train).at_evaluation for m in loaded]
        names = zip(self.models, poolers, strict=True)
        models = [{"model": m, "pooler": p, **result} for (m, p), result in zip(names, found, strict=True)]
        print(format_text(models, self.mode, self.bootstrap))
        everything = {"mode": self.mode, "bootstrap": self.bootstrap, "models": models}
        writers: list[tuple[Path | None, Callable[[Path], None]]] = [
            (self.json, lambda file: write_json(file, finite(everything))),
            (self.csv, lambda file: write_csv(file, models, self.mode)),
            (self.markdown, lambda file: write_markdown(file, models, self.mode, self.bootstrap)),
        ]
        for file, write in writers:
            if file:
                try:
                    write(file)
                except OSError as error:
                    raise InputError(f"{file} cannot be written ({reason(error)}): free space there") from error

    def _check(self) -> None:
        """Raises `InputError` for settings that cannot be."""
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be greater than 0")
        if self.bootstrap < 0:
            raise InputError(f"bootstrap is {self.bootstrap}; it must be a number of resamples, or 0 for none")
        if not self.models:
            raise InputError("no model given: name runs, folders or models on the hub right after evaluate")
        paths = [Path(model).expanduser().absolute() for model in self.models]
        if twice := next((model for n, model in enumerate(self.models) if paths[n] in paths[:n]), None):
            raise InputError(f"model {twice} is given twice: name each once")
        files = [file for file in (self.json, self.csv, self.markdown) if file]
        for file in files:
            _check_writable(file)
        if len(set(files)) < len(files):
            raise InputError(f"{files[-1]} is given for two outputs: give each a file of its own")


@dataclass(frozen=True)
class Encode:
    """Write the vectors of the sentences of a file, one row a line, as float32 .npy."""

    model: tyro.conf.Positional[str]
    """A run, an exported folder, a Hugging Face folder or a name on the hub."""
    input: tyro.conf.Positional[Path]
    """Text file, one sentence a line (also .gz); a blank line gets the vector of the empty sentence."""
    output: tyro.conf.Positional[Path]
    """The .npy file to write."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""
    max_length: int | None = None
    """Tokens a sentence; the model's own limit where not given."""
    packed_length: int = ENCODE_ROW
    """Tokens a row, which shorter sentences share; 0: a sentence a row. The vectors are the same, to rounding."""
    normalize: bool = True
    """Scale each vector to length 1."""

    def run(self) -> None:
        """Encodes the file."""
        import numpy as np

        from simcse_jax.data.corpus import read_sentences
        from simcse_jax.embedder import SimCSE

        if self.output.suffix != ".npy":
            raise InputError(f"output {self.output} must end in .npy")
        _check_writable(self.output)
        sentences = read_sentences(self.input)
        model = SimCSE(self.model, self.pooler, self.max_length, self.packed_length)
        vectors = model.encode(sentences, normalize=self.normalize, progress=True)
        partial = self.output.with_name(f".{self.output.name}.partial.npy")
        try:
            np.save(partial, vectors)
            partial.replace(self.output)
        except OSError as error:
            raise InputError(f"{self.output} cannot be written ({reason(error)}): free space there") from error
        finally:
            partial.unlink(missing_ok=True)
        print(f"{self.output}: {vectors.shape[0]:,} vectors of width {vectors.shape[1]}")


@dataclass(frozen=True)
class Export:
    """Write a model as a folder that transformers, sentence-transformers and this package read."""

    model: tyro.conf.Positional[str]
    """A run (its best checkpoint), or any model this package reads."""
    output: tyro.conf.Positional[Path]
    """Folder to make."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""

    def run(self) -> None:
        """Exports."""
        from simcse_jax.embedder import load_model
        from simcse_jax.export import export

        folder = export(load_model(self.model, self.pooler), self.output)
        print(f'exported to {folder}; use it with sentence_transformers.SentenceTransformer("{folder}")')


@dataclass(frozen=True)
class Analyze:
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
    data: str = field(default_factory=_data_folder)
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


@dataclass(frozen=True)
class Postprocess:
    """Fit whitening, all-but-the-top or a flow to sentences without labels, and write the model that applies it."""

    model: tyro.conf.Positional[str]
    """A run, an exported folder, a Hugging Face folder or a name on the hub."""
    sentences: tyro.conf.Positional[str]
    """Text file, one sentence a line (.txt, .txt.gz); or STS tasks, joined by commas: STSBenchmark, sts, pairs.tsv."""
    output: tyro.conf.Positional[Path]
    """Folder to make, as `export` does."""
    fit: Annotated[FitSettings, tyro.conf.arg(name="")] = field(default_factory=FitSettings)
    data: str = field(default_factory=_data_folder)
    """Folder in SentEval's layout, for tasks; $SIMCSE_DATA/senteval where that is set."""
    limit: int | None = None
    """Use the first so many lines, or sentences of the tasks; all where not given."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""
    batch_size: int = 64
    """Sentences a forward pass over all devices."""

    def run(self) -> None:
        """Fits and exports."""
        from simcse_jax import hf
        from simcse_jax.embedder import load_model
        from simcse_jax.encode import BatchEncoder
        from simcse_jax.evaluation.sentences import unlabelled_sentences
        from simcse_jax.export import export
        from simcse_jax.files import check_new_folder
        from simcse_jax.postprocess import describe, fit
        from simcse_jax.sharding import make_mesh

        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be greater than 0")
        self.fit.validate()
        check_new_folder(self.output)
        sentences = unlabelled_sentences(self.sentences, self.data, self.limit)
        loaded = load_model(self.model, self.pooler)
        loaded.check_no_postprocessor()
        tokenizer = hf.load_tokenizer(loaded.checkpoint.folder)
        encoder = BatchEncoder(loaded.model, tokenizer, make_mesh(), batch_size=self.batch_size)
        post, about = fit(encoder(loaded.params, sentences, progress=True), self.fit)
        about["source"] = ", ".join(Path(name).name for name in self.sentences.split(","))
        folder = export(loaded.with_postprocessor(post, about), self.output)
        print(f"{describe(about)}: written to {folder}")


@dataclass(frozen=True)
class Vocabulary:
    """Learn a WordPiece vocabulary from text and write a BERT without weights, to be pretrained (pretrain_mlm)."""

    text: tyro.conf.Positional[str]
    """Training text, as for data.train."""
    output: tyro.conf.Positional[Path]
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

        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("text", "output")}
        folder = make_model_folder(self.text, self.output, **sizes)
        print(f"wrote {folder}; train it with: simcse-jax train pretrain_mlm --model.path {shlex.quote(str(folder))}")


@dataclass(frozen=True)
class ReplaceWords:
    """Write pairs of sentences and the same with words replaced by a masked language model's, to train on."""

    model: tyro.conf.Positional[str]
    """A run that trained a masked language model (pretrain_mlm), its export, a Hugging Face folder or a name on the
    hub."""
    input: tyro.conf.Positional[Path]
    """Text file, one sentence a line (also .gz); blank lines are left out."""
    output: tyro.conf.Positional[Path]
    """The .csv file to write, columns sentence and positive."""
    share: float = 0.15
    """Share of the words that is replaced, one at least."""
    seed: int = 42
    """Of the choice of words."""
    max_length: int = 32
    """Words beyond so many tokens stay as they are."""
    batch_size: int = 64
    """Sentences a forward pass."""

    def run(self) -> None:
        """Writes the file."""
        from tqdm import tqdm

        from simcse_jax.data.corpus import read_sentences
        from simcse_jax.replace_words import WordReplacer, check_settings
        from simcse_jax.tables import write_csv

        check_settings(self.share, self.seed, self.max_length, self.batch_size)
        if self.output.suffix != ".csv":
            raise InputError(f"output {self.output} must end in .csv")
        _check_writable(self.output)
        sentences = [sentence for sentence in read_sentences(self.input) if sentence.strip()]
        if not sentences:
            raise InputError(f"{self.input} holds blank lines only: give sentences")
        replace = WordReplacer(self.model, self.max_length, self.batch_size)
        bar = tqdm(replace(sentences, self.share, self.seed), total=len(sentences), unit=" sentences")
        pairs = [{"sentence": a, "positive": b} for a, b in zip(sentences, bar, strict=True)]
        try:
            write_csv(self.output, pairs)
        except OSError as error:
            raise InputError(f"{self.output} cannot be written ({reason(error)}): free space there") from error
        same = sum(pair["sentence"] == pair["positive"] for pair in pairs)
        print(f"{self.output}: {len(pairs):,} pairs, {same:,} of them without a word that could be replaced")


def _check_writable(path: Path) -> None:
    """Raises `InputError` if a file cannot be made at `path`, before the work that fills it."""
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path} cannot be written: give a file in a folder that exists and is writable")


def _command(preset: Train | Plan | Study | Ablate | None) -> Any:
    """The commands as one type, for tyro; the settings of a named config are the defaults that options override."""

    def command(kind: type, name: str) -> Any:
        return tyro.conf.subcommand(name, default=preset) if isinstance(preset, kind) else tyro.conf.subcommand(name)

    return (
        Annotated[Train, command(Train, "train")]
        | Annotated[Plan, command(Plan, "plan")]
        | Annotated[Study, command(Study, "study")]
        | Annotated[Ablate, command(Ablate, "ablate")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Encode, tyro.conf.subcommand("encode")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Analyze, tyro.conf.subcommand("analyze")]
        | Annotated[Postprocess, tyro.conf.subcommand("postprocess")]
        | Annotated[Vocabulary, tyro.conf.subcommand("vocabulary")]
        | Annotated[ReplaceWords, tyro.conf.subcommand("replace-words")]
    )


def _preset(argv: list[str]) -> Train | Plan | Study | Ablate | None:
    """The command with the settings of the config file that stands right after its name, if one does."""
    if len(argv) < 2 or argv[1].startswith("-"):
        return None
    name, file = argv[:2]
    if name == "train":
        return Train(file, load_config_file(file))
    if name == "plan":
        return Plan(file, config=PlanConfig.of(load_config_file(file)))
    if name == "study":
        return Study(file, load_variable(file, "study", StudySettings))
    return Ablate(file, load_variable(file, "ablation", Ablation)) if name == "ablate" else None


def main(argv: list[str] | None = None) -> None:
    """Runs a command; bad input is one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        preset = _preset(argv)
        command = tyro.cli(_command(preset), prog="simcse-jax", description=__doc__, args=argv)
        if isinstance(command, Train | Plan | Study | Ablate) and preset is None:
            name = type(command).__name__.lower()
            raise InputError(f"give the config file right after {name}: simcse-jax {name} {command.config_file} ...")
        if not isinstance(command, Plan):  # which says how long compiling takes
            keep_programs()
        command.run()
    except InputError as error:
        print(f"simcse-jax: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("simcse-jax: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
