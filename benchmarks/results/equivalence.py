"""Training by this project and by plain PyTorch: the same weights, examples, order, schedule and type."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results.cells import Figures, Sources, Stopped
from benchmarks.results.measure import DEV, config_of, figures_of
from benchmarks.worker import Contender, Worker
from simcse_jax.evaluation.sts import load_task
from simcse_jax.inference.loading import load_model
from simcse_jax.training.prepare import check_request, load_parts, make_feed
from simcse_jax.training.state import initial_params


def train_side(settings: dict[str, Any], sources: Sources, folder: Path) -> Figures:
    """Trains in a process of its own and scores the seven tasks with the checkpoint that STS-B dev selects.

    A run that was stopped begins anew: its time and memory would be those of a part.
    """
    shutil.rmtree(folder, ignore_errors=True)
    ours = settings["side"] == "jax"
    config = replace(config_of(settings, sources), output=str(folder))
    if ours:
        contender = Contender("results.our_trainer:Trainer", {"config": config})
    else:
        contender = Contender("results.torch_trainer:Trainer", torch_arguments(config, sources, folder))
    with Worker(settings["side"], contender) as worker:
        figures: Figures = worker.call("run")
        figures["peak"] = worker.call("peak")
    if "stopped" in figures:
        raise Stopped
    if "diverged" in figures:
        return figures
    loaded = load_model(folder if ours else folder / "best", None if ours else "cls_before_pooler")
    return figures | figures_of(loaded, ["sts"], sources)


def torch_arguments(config: Any, sources: Sources, folder: Path) -> dict[str, Any]:
    """What PyTorch's trainer takes: our tokens, in the order of our run, and our head before training."""
    request = check_request(config)
    parts = load_parts(request)
    params, feed = initial_params(config, parts.model), make_feed(request, parts)
    assert not callable(params)
    batches = [feed.batch(step) for step in range(config.max_steps)]
    dev = load_task(DEV, sources.senteval, "dev")
    (pairs,) = dev.subsets
    return {
        "model": config.model.path,
        "batches": [(np.asarray(b.input_ids)[:, 0], np.asarray(b.lengths)[:, 0, 0]) for b in batches],
        "head": {name: np.asarray(x) for name, x in params["head"]["dense"].items()},
        "pairs": (list(pairs.first), list(pairs.second), np.asarray(pairs.gold)),
        "rate": config.optimizer.learning_rate,
        "temperature": config.objective.temperature,
        "every": config.evaluation.every,
        "seed": config.seed,
        "target": str(folder / "best"),
    }
