"""`simcse-jax evaluate`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from simcse_jax.commands.options import Command, senteval_folder
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName
from simcse_jax.storage.files import check_writable_file, writing


@dataclass(frozen=True)
class Evaluate(Command):
    """Score models on STS, transfer and retrieval tasks; several in one table."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Runs, exported folders, Hugging Face folders or names on the hub."""
    data: str = field(default_factory=senteval_folder)
    """Folder in SentEval's layout (holds STS/ and SICK/, MR/ ...); $SIMCSE_DATA/senteval where that is set."""
    tasks: tuple[str, ...] = ("sts",)
    """STS12 ... STS16, STSBenchmark, SICKRelatedness (`sts`: all seven), MR, CR, SUBJ, MPQA, SST2, TREC, MRPC
    (`transfer`: all seven; `full`: both sets), SICKEntailment, or graded pairs: files with the columns
    sentence1, sentence2, score, tfds:glue/stsb, data sets of the hub; or questions and their answers, for retrieval:
    the same with two columns."""
    columns: tuple[str, ...] = ()
    """Columns of the question and of its answer, for tasks that have others as well."""
    mode: Literal["test", "dev", "fasttest"] = "test"
    """Split to report; fasttest cross-validates the classifiers of transfer tasks with 5 folds instead of 10."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the models."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type."""
    batch_size: int = 64
    """Sentences per forward pass, over all devices."""
    all_splits: bool = False
    """Also score the splits of STS-B and SICK-R that are not reported, as SentEval does."""
    bootstrap: int = 0
    """Resamples of each STS task's pairs, for 95 % intervals of the figures and of differences to the first model."""
    json: Path | None = None
    """Write all figures, Pearson and Spearman of every subset, to this file."""
    csv: Path | None = None
    """Write the reported figures to this file, one per line."""
    markdown: Path | None = None
    """Write the tables to this file."""

    def run(self) -> None:
        """Prints the tables."""
        from simcse_jax.evaluation.suite import evaluate_models, load_suite
        from simcse_jax.evaluation.tables import format_text, write_csv, write_markdown
        from simcse_jax.inference.loading import LoadedModel, load_model
        from simcse_jax.reports.progress import note
        from simcse_jax.storage.files import finite, write_json

        self._check()
        suite = load_suite(self.tasks, self.data, self.mode, self.all_splits, self.columns)
        if self.bootstrap and not suite.sts:
            raise InputError("bootstrap is given but no task has graded pairs: leave it out, or name an STS task, too")
        for task in suite.retrieval:
            note(f"{task.name}: {task.describe()}")
        loaded = [load_model(model, self.pooler, self.dtype) for model in self.models]

        def encoder(model: LoadedModel) -> Any:
            encode = model.encoder(batch_size=self.batch_size)
            return lambda sentences: encode(model.params, sentences, progress=True)

        found = evaluate_models(suite, [encoder(model) for model in loaded], self.bootstrap)
        rows = zip(self.models, loaded, found, strict=True)
        models = [{"model": name, "pooler": model.pooler, **result} for name, model, result in rows]
        everything = {"mode": self.mode, "bootstrap": self.bootstrap, "models": models}
        writers: list[tuple[Path | None, Callable[[Path], None]]] = [
            (self.json, lambda file: write_json(file, finite(everything))),
            (self.csv, lambda file: write_csv(file, models, self.mode)),
            (self.markdown, lambda file: write_markdown(file, models, self.mode, self.bootstrap)),
        ]
        for file, write in writers:
            if file:
                with writing(file):
                    write(file)
        print(format_text(models, self.mode, self.bootstrap))

    def _check(self) -> None:
        """Raises `InputError` for settings that cannot be used."""
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
            check_writable_file(file)
        if len(set(files)) < len(files):
            raise InputError(f"{files[-1]} is given for two outputs: give each a file of its own")
