"""The dev and test scores of a run, as functions of its parameters."""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float

from simcse_jax.config import Config
from simcse_jax.evaluation.geometry import geometry
from simcse_jax.evaluation.sts import Task, distinct_sentences, evaluate, load_task
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.model.params import Params


def _scorers(
    config: Config, encoder: BatchEncoder
) -> tuple[Callable[[Params], dict[str, float]] | None, Callable[[Params], dict[str, float]] | None]:
    """Functions from parameters to the dev figures and to the table of test scores, where the config asks for them."""
    settings = config.evaluation
    dev = load_task(settings.dev, settings.data, "dev") if settings.dev else None
    test = [load_task(name, settings.data, "test") for name in settings.test]

    def dev_scores(task: Task, params: Params) -> dict[str, float]:
        sentences = distinct_sentences([task])
        vectors = dict(zip(sentences, encoder(params, sentences), strict=True))

        def encode(wanted: list[str]) -> Float[np.ndarray, "S H"]:
            return np.stack([vectors[sentence] for sentence in wanted])

        score = evaluate([task], encode)["reported"][task.name]
        return {"dev": score, **{f"dev_{name}": value for name, value in geometry(task, encode).items()}}

    def test_scores(params: Params) -> dict[str, float]:
        reported: dict[str, float] = evaluate(test, lambda sentences: encoder(params, sentences))["reported"]
        return reported

    return partial(dev_scores, dev) if dev else None, test_scores if test else None
