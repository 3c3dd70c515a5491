"""What is measured in a cell: a training run, or an encoder as it is."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.results.cells import Figures, Sources, Stopped
from simcse_jax.analysis.measure import measure as analyse
from simcse_jax.analysis.measure import pairs_of
from simcse_jax.config import Config
from simcse_jax.config.values import with_settings
from simcse_jax.evaluation.bootstrap import spearman_resamples
from simcse_jax.evaluation.sentences import unlabelled_sentences
from simcse_jax.evaluation.sts import (
    STS_TASKS,
    EncodeFunction,
    Task,
    distinct_sentences,
    encode_once,
    evaluate,
    load_task,
    reported_pairs,
)
from simcse_jax.evaluation.suite import evaluate_models, load_suite
from simcse_jax.inference.loading import LoadedModel, load_model
from simcse_jax.postprocess import FitSettings, fit
from simcse_jax.runs.metrics_log import read_log
from simcse_jax.training.trainer import TrainingDiverged, train

RESAMPLES = 1000
"""Of the pairs of a task."""
DEV = "STSBenchmark"
BINS = 40
"""Of the cosines, from −1 to 1."""


def config_of(settings: dict[str, Any], sources: Sources) -> Config:
    """The training run of a cell."""
    changes = {name: tuple(x) if isinstance(x, list) else x for name, x in settings["config"].items()}
    if "data.synonyms" in changes:
        changes["data.synonyms"] = str(sources.synonyms)
    changes |= {"model.path": str(getattr(sources, settings["model"])), "evaluation.data": sources.senteval}
    config: Config = with_settings(Config(), changes | {"data.train": str(sources.texts[settings["text"]])})
    return config


def train_and_measure(settings: dict[str, Any], sources: Sources, folder: Path) -> Figures:
    """Trains a run and measures what `settings["measures"]` names: its path on STS-B dev is always kept."""
    config = replace(config_of(settings, sources), output=str(folder))
    try:
        results = train(config)
    except TrainingDiverged as error:
        return {"diverged": str(error)}
    if "stopped" in results:
        raise Stopped
    lines = read_log(folder / "metrics.jsonl")
    figures: Figures = {
        "path": [
            [line["step"], *(_rounded(line.get(name)) for name in ("dev", "dev_alignment", "dev_uniformity"))]
            for line in lines
            if "dev" in line
        ],
        "best": results["dev"],
        "best_step": results["best_step"],
        "loss": [line["loss"] for line in lines if "loss" in line][-1],
        "memory": results["memory"],
        "steps": results["steps"],
        "seconds": results["seconds"],
    }
    if settings["measures"]:
        figures |= figures_of(load_model(folder, dtype=config.model.dtype), settings["measures"], sources)
    return figures


def encode_and_measure(settings: dict[str, Any], sources: Sources, folder: Path) -> Figures:
    """Measures the encoder as it was pretrained."""
    loaded = load_model(getattr(sources, settings["model"]), settings["pooler"], settings["dtype"])
    return figures_of(loaded, settings["measures"], sources)


def postprocess_and_measure(settings: dict[str, Any], sources: Sources, folder: Path) -> Figures:
    """Measures a post-processor that is fitted to the sentences of each task, without gold scores."""
    loaded = load_model(getattr(sources, settings["model"]), settings["pooler"], settings["dtype"])
    encoder, data = loaded.encoder(), sources.senteval
    tasks = {name: load_task(name, data, "test") for name in STS_TASKS}
    sentences = {name: unlabelled_sentences(name, data) for name in tasks}
    everything = list(dict.fromkeys(text for texts in sentences.values() for text in texts))
    vectors = dict(zip(everything, encoder(loaded.params, everything, progress=True), strict=True))
    apply = jax.jit(lambda post, x: post(x))
    encoders = {}
    for name, texts in sentences.items():
        post, _ = fit(np.stack([vectors[text] for text in texts]), FitSettings(settings["method"]))

        def encode(asked: list[str], post: Any = post) -> np.ndarray:
            return np.asarray(apply(post, np.stack([vectors[text] for text in asked])))

        encoders[name] = encode
    dev = load_task(DEV, data, "dev")
    found: Figures = similarity(list(tasks.values()), encoders.__getitem__)
    return found | {"dev": evaluate([dev], encoders[DEV])["reported"][DEV]}


def figures_of(loaded: LoadedModel, measures: list[str], sources: Sources) -> Figures:
    """Figures of a model.

    Args:
      loaded: the model.
      measures: `sts`, the seven tasks, with resamples of their average; `dev`, STS-B dev; `transfer`, the seven
        transfer tasks; `vectors`, singular values and cosines of the pairs of STS-B dev.
      sources: the tasks.
    """
    encoder, data, found = loaded.encoder(), sources.senteval, dict[str, Any]()

    def encode(texts: list[str]) -> np.ndarray:
        return encoder(loaded.params, texts)

    dev = load_task(DEV, data, "dev")
    if "dev" in measures:
        found["dev"] = evaluate([dev], encode)["reported"][DEV]
    if "sts" in measures:
        tasks = [load_task(name, data, "test") for name in STS_TASKS]
        vectors_of = encode_once(distinct_sentences(tasks), encode)
        found |= similarity(tasks, lambda _: vectors_of)
    if "transfer" in measures:
        scored = evaluate_models(load_suite("transfer", data), [encode])[0]["transfer"]["reported"]
        found["transfer"] = {name: _rounded(x) for name, x in scored.items()}
    if "vectors" in measures:
        found |= spread(dev, encode)
    return found


def similarity(tasks: list[Task], encoder_of: Callable[[str], EncodeFunction]) -> Figures:
    """Spearman × 100 of tasks and its average as `sts`, and that average in resamples of the pairs as `resamples`.

    Args:
      tasks: the tasks.
      encoder_of: the encoder for a task, by the task's name.
    """
    scores, drawn = {}, []
    for task in tasks:
        encode = encoder_of(task.name)
        scores[task.name] = evaluate([task], encode)["reported"][task.name]
        system, gold = reported_pairs(task, encode)
        drawn.append(spearman_resamples(system[None], gold, RESAMPLES, task.name)[0])
    average = float(np.mean([math.nan if x is None else x for x in scores.values()]))
    resamples = [_rounded(x) for x in np.mean(drawn, axis=0)]
    return {"sts": {name: _rounded(x) for name, x in {**scores, "Avg.": average}.items()}, "resamples": resamples}


def spread(task: Task, encode: EncodeFunction) -> Figures:
    """Singular values over the largest, thinned to 64 or so, and the density of cosines by group of gold scores."""
    pairs = pairs_of(task)
    sentences = distinct_sentences([task])
    vectors = dict(zip(sentences, encode(sentences), strict=True))
    figures, _, spectrum, cosines = analyse(pairs, [], vectors)
    ranks = np.unique(np.geomspace(1, len(spectrum), 64).astype(int))
    edges = np.linspace(-1, 1, BINS + 1)
    counts = [np.histogram(np.clip(cosines[pairs.group == g], -1, 1), edges)[0] for g in range(5)]
    densities = [count * BINS / 2 / max(1, count.sum()) for count in counts]
    return {
        "spectrum": [[int(rank), round(float(spectrum[rank - 1] / spectrum[0]), 5)] for rank in ranks],
        "cosines": [[round(float(x), 4) for x in density] for density in densities],
        "groups": pairs.labels,
        "geometry": {name: round(x, 4) for name, x in figures.items()},
    }


def _rounded(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else round(float(x), 3)
