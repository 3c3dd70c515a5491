"""Digests of what the settings of a run name: pairs and weights, which a run that goes on must find unchanged."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from simcse_jax.config import Config
from simcse_jax.evaluation.retrieval import RetrievalTask
from simcse_jax.evaluation.sts import Task
from simcse_jax.model.build import build_model
from simcse_jax.model.params import Params, digest_params
from simcse_jax.pretrained.folders import Checkpoint, read_checkpoint
from simcse_jax.training.scores import Tasks
from simcse_jax.training.state import initial_params


def digests_of(tasks: Tasks) -> dict[str, Any]:
    """The digests of the dev and test pairs, by setting; of the pairs as they are scored, not of their files."""
    return {
        "evaluation.dev": tasks.dev and _digest_task(tasks.dev),
        "evaluation.test": [_digest_task(task) for task in tasks.test],
    }


def digest_model(config: Config, checkpoint: Checkpoint, params: Params | Callable[[], Params]) -> str:
    """The digest of a model's configuration and of the weights that a run takes from it.

    Args:
      config: the run.
      checkpoint: the model.
      params: from `initial_params`; those that were drawn have no part in the digest.
    """
    fresh = ["head"] if config.model.head == "fresh" else []
    read = {} if callable(params) else {name: x for name, x in params.items() if name not in fresh}
    return digest_params(read, json.dumps(checkpoint.hf_config, sort_keys=True))


def read_start(config: Config) -> tuple[Params | Callable[[], Params], str]:
    """The parameters that a config starts from, read again, and their digest.

    Raises:
      InputError: the model cannot be read.
    """
    checkpoint = read_checkpoint(config.model.path)
    params = initial_params(config, build_model(checkpoint.config, config.model))
    return params, digest_model(config, checkpoint, params)


def _digest_task(task: Task | RetrievalTask) -> str:
    held: list[Any]
    if isinstance(task, RetrievalTask):
        held = [task.questions, task.corpus, task.answers.tolist()]
    else:
        held = [[u.first, u.second, u.gold.tolist()] for u in task.subsets]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]
