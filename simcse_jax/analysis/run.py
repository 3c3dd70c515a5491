"""The analysis: it encodes with and measures every model, and writes tables, figures and report into one new folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simcse_jax import postprocess
from simcse_jax.analysis.figures import write_figures
from simcse_jax.analysis.measure import MEASURES, GradedPairs, Measured, measure, pairs_of
from simcse_jax.analysis.report import write_report
from simcse_jax.analysis.sources import AnalysedModel, find_sources, training_path
from simcse_jax.errors import InputError
from simcse_jax.evaluation.sts import Mode, Task, distinct_sentences, load_task
from simcse_jax.evaluation.suite import expand_tasks
from simcse_jax.inference.loading import load_model
from simcse_jax.reports.progress import say
from simcse_jax.reports.tables import Row, write_csv
from simcse_jax.storage.files import check_new_folder, new_folder


@dataclass(frozen=True)
class AnalysisSettings:
    """The settings of an analysis."""

    names: tuple[str, ...] = ()
    """Names of the models in figures and tables; by default the ends of their paths."""
    checkpoints: bool = False
    """Analyse every checkpoint that a run has kept, not the best alone."""
    task: str = "STSBenchmark"
    """GradedPairs to analyse: one of the STS tasks, or a .tsv file."""
    mode: Mode = "dev"
    """Split of `task`; STS12 ... STS16 have `test` alone."""
    tasks: tuple[str, ...] = ()
    """Score these STS tasks as well, test split: names, `sts` for all seven, .tsv files."""
    data: str = ""
    """Folder in SentEval's layout (holds STS/ and SICK/); $SIMCSE_DATA/senteval where that is set."""
    pooler: str | None = None
    """Overrides the pooler saved with each model."""
    batch_size: int = 64
    """Sentences per forward pass, over all devices."""


def analyze(models: tuple[str, ...], output: Path, settings: AnalysisSettings) -> Path:
    """Writes measures.csv, plane.csv, spectrum.csv, cosines.csv, the figures and report.md into a new folder.

    Args:
      models: runs, exported folders, Hugging Face folders or names on the hub.
      output: the new folder, made complete or not at all.
      settings: see `AnalysisSettings`.

    Returns:
      The report's path.

    Raises:
      InputError: models, tasks or an output that cannot be used; all are checked before the first model is loaded.
    """
    if settings.batch_size < 1:
        raise InputError(f"batch_size is {settings.batch_size}; it must be greater than 0")
    folder = check_new_folder(output)
    sources = find_sources(models, settings.names, settings.checkpoints)
    pairs = pairs_of(load_task(settings.task, settings.data, settings.mode))
    tasks = [load_task(name, settings.data) for name in expand_tasks(settings.tasks, "test")]
    measured = [m for source in sources for m in _measure(source, pairs, tasks, settings)]
    paths = {source.name: training_path(source, pairs.task, settings.mode) for source in sources}
    with new_folder(folder, last="report.md") as partial:
        write_csv(partial / "measures.csv", [{"model": m.name, "step": _step(m), **_row(m)} for m in measured])
        write_csv(partial / "plane.csv", _plane(measured, paths))
        write_csv(partial / "spectrum.csv", _spectra(measured))
        write_csv(partial / "cosines.csv", _cosines(measured, pairs))
        write_figures(partial, measured, paths, pairs)
        write_report(partial, sources, measured, paths, pairs, settings.mode)
    return folder / "report.md"


def _measure(
    source: AnalysedModel, pairs: GradedPairs, tasks: list[Task], settings: AnalysisSettings
) -> list[Measured]:
    sentences, results = distinct_sentences([pairs.task, *tasks]), []
    steps: list[int | None] = [*source.steps] if source.steps else [None]
    for step in steps:
        loaded = load_model(source.model, settings.pooler, step=step)
        label = source.name if step is None else f"{source.name}, step {step:,}"
        say(f"{label}: pooler {loaded.pooler}, {len(sentences):,} sentences")
        encoder = loaded.encoder(batch_size=settings.batch_size)
        vectors = encoder(loaded.params, sentences, progress=True)
        if not np.isfinite(vectors).all():
            raise InputError(f"{label} gives vectors that are not finite: leave this model out")
        about = {
            "pooler": loaded.pooler,
            "width": loaded.width,
            "post-processor": postprocess.describe(loaded.postprocessor) if loaded.postprocessor else "",
        }
        figures = measure(pairs, tasks, dict(zip(sentences, vectors, strict=True)))
        results.append(Measured(source.name, label, loaded.step, about, *figures))
    return results


def _step(m: Measured) -> int | str:
    return "" if m.step is None else m.step


def _row(m: Measured) -> Row:
    absent = dict.fromkeys(name for name in MEASURES if name != "sts" or m.scores)
    return {**m.about, **absent, **m.figures, **{f"test_{name}": score for name, score in m.scores.items()}}


def _plane(measured: list[Measured], paths: dict[str, list[Row]]) -> list[Row]:
    names = ("alignment", "uniformity", "score")
    models = [
        {"model": m.name, "kind": "measured", "step": _step(m), **{n: m.figures.get(n) for n in names}}
        for m in measured
    ]
    logged = [{"model": model, "kind": "logged in training", **row} for model, path in paths.items() for row in path]
    return models + logged


def _spectra(measured: list[Measured]) -> list[Row]:
    return [
        {"model": m.name, "step": _step(m), "index": i, "singular_value": float(value)}
        for m in measured
        for i, value in enumerate(m.spectrum, 1)
    ]


def _cosines(measured: list[Measured], pairs: GradedPairs) -> list[Row]:
    return [
        {"model": m.name, "step": _step(m), "gold": float(gold), "group": int(group) + 1, "cosine": float(value)}
        for m in measured
        for gold, group, value in zip(pairs.gold, pairs.group, m.cosines, strict=True)
    ]
