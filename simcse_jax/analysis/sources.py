"""The sources of an analysis: models, or the kept checkpoints of runs, and the path in a run's log."""

import math
from dataclasses import dataclass
from pathlib import Path

from simcse_jax.errors import InputError
from simcse_jax.evaluation.pairs import is_pairs_file
from simcse_jax.evaluation.sts import Mode, Task
from simcse_jax.inference.loading import kept_steps
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.reports.tables import Row
from simcse_jax.runs.folder import Run, is_run, open_run
from simcse_jax.runs.metrics_log import read_log
from simcse_jax.storage.objects import local_path


@dataclass(frozen=True)
class AnalysedModel:
    """A model as given.

    Attributes:
      model: a run, a folder or a name on the hub.
      name: name in figures and tables.
      steps: the checkpoints to analyse; None for the model itself, which for a run is its best checkpoint.
      run: the run; None if the model is no run.
    """

    model: str
    name: str
    steps: list[int] | None
    run: Run | None


def find_sources(
    models: tuple[str, ...], names: tuple[str, ...] = (), checkpoints: bool = False
) -> list[AnalysedModel]:
    """Checks each model, before the first is loaded.

    Args:
      models: runs, exported folders, Hugging Face folders or names on the hub.
      names: names for them; if empty, the shortest ends of their paths that differ.
      checkpoints: take all kept checkpoints of each run.

    Raises:
      InputError: no model, a model that does not exist, too few or equal names, or no run for `checkpoints`.
    """
    if not models:
        raise InputError("no model given: name runs, model folders or names on the hub")
    if names and len(names) != len(models):
        raise InputError(f"{len(models)} models are given and {len(names)} names: give a name for each, or none")
    chosen = list(names) or _short_names(models)
    if len(set(chosen)) < len(chosen):
        raise InputError(f"the names {', '.join(chosen)} are not distinct: give each model another with --names")
    sources = []
    for model, name in zip(models, chosen, strict=True):
        folder = local_path(model)
        run = open_run(folder) if is_run(folder) else None
        if run is None:
            read_checkpoint(model)
        kept = kept_steps(folder) if run else None
        sources.append(AnalysedModel(model, name, kept if checkpoints else None, run))
    if checkpoints and all(source.run is None for source in sources):
        raise InputError(f"checkpoints are asked for and none of {', '.join(models)} is a run: give run folders")
    return sources


def _short_names(models: tuple[str, ...]) -> list[str]:
    parts = [Path(model).expanduser().absolute().parts for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"a model is given twice among {', '.join(models)}: leave one out")


def training_path(source: AnalysedModel, task: Task, mode: Mode) -> list[Row]:
    """The evaluations in a run's metrics.jsonl: step, alignment, uniformity and score, NaN where not a number.

    Returns:
      The rows; empty if the model is no run, or if the run evaluated on other pairs than the analysis.
    """
    if source.run is None or (mode != "dev" and not is_pairs_file(task.name)):
        return []
    evaluated = source.run.config.evaluation.dev
    if evaluated != task.name and not _same_file(evaluated, task.name):
        return []
    path: dict[int, Row] = {}
    for values in read_log(source.run.metrics_file):
        if "dev_alignment" in values:
            figures = {n: values.get(key) for n, key in _LOGGED.items()}
            path[values["step"]] = {"step": values["step"], **{n: _number(v) for n, v in figures.items()}}
    return [path[step] for step in sorted(path)]


_LOGGED = {"alignment": "dev_alignment", "uniformity": "dev_uniformity", "score": "dev"}


def _same_file(a: str, b: str) -> bool:
    first, second = (Path(name).expanduser().resolve() for name in (a, b))
    return is_pairs_file(a) and first == second


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
