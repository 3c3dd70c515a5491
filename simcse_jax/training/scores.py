"""The dev and test scores of a run, as functions of its parameters."""

from collections.abc import Callable

from simcse_jax.config import EvaluationConfig
from simcse_jax.evaluation.geometry import geometry
from simcse_jax.evaluation.sts import distinct_sentences, encode_once, evaluate, load_task
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.model.params import Params

Scorer = Callable[[Params], dict[str, float]]


def make_scorers(settings: EvaluationConfig, encoder: BatchEncoder) -> tuple[Scorer | None, Scorer | None]:
    """Functions from parameters to the dev figures and to the table of test scores, each None where it has no task.

    Raises:
      InputError: a task that cannot be read.
    """
    dev = load_task(settings.dev, settings.data, "dev") if settings.dev else None
    test = [load_task(name, settings.data, "test") for name in settings.test]

    def dev_scores(params: Params) -> dict[str, float]:
        assert dev is not None
        encode = encode_once(distinct_sentences([dev]), lambda sentences: encoder(params, sentences))
        score = evaluate([dev], encode)["reported"][dev.name]
        return {"dev": score, **{f"dev_{name}": value for name, value in geometry(dev, encode).items()}}

    def test_scores(params: Params) -> dict[str, float]:
        reported: dict[str, float] = evaluate(test, lambda sentences: encoder(params, sentences))["reported"]
        return reported

    return dev_scores if dev else None, test_scores if test else None
