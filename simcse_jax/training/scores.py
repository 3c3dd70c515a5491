"""The dev and test scores of a run, as functions of its parameters."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from simcse_jax.config import EvaluationConfig, RetrievalMetric
from simcse_jax.data.tokens import encode_batch
from simcse_jax.errors import InputError, check_all
from simcse_jax.evaluation.geometry import geometry
from simcse_jax.evaluation.retrieval import (
    METRICS,
    RetrievalTask,
    answer_geometry,
    check_metric,
    check_used,
    load_retrieval,
    retrieve,
)
from simcse_jax.evaluation.sts import (
    STS_TASKS,
    Mode,
    Task,
    distinct_sentences,
    encode_once,
    evaluate,
    load_task,
    mean_of_all,
)
from simcse_jax.evaluation.suite import expand_tasks
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.model.params import Params

Scorer = Callable[[Params], dict[str, float | None]]
"""Figures by name, None for one that is absent: the correlation of scores that are all alike, say."""

_LEAST = 3  # pairs or questions: two pairs are in order or not, and half of all models order them


class Scorers(NamedTuple):
    """Functions from parameters to scores, each None where it has no task, and what they measure."""

    dev: Scorer | None
    """`dev`, the score that selects; the same by the name of its metric (`dev_ndcg@10`), beside the other metrics of
    the task; and alignment and uniformity of the dev pairs."""
    test: Scorer | None
    """The score of each test task, and their mean `Avg.`."""
    dev_metric: str
    test_metric: str
    about: str
    """The dev task in words."""


class Tasks(NamedTuple):
    """The tasks of a run."""

    dev: Task | RetrievalTask | None
    """The task that selects the checkpoint."""
    test: list[Task | RetrievalTask]


def load_tasks(settings: EvaluationConfig) -> Tasks:
    """Reads the tasks of a run; in `test`, `sts` stands for all seven.

    Raises:
      InputError: tasks that cannot be read, all of them; a metric that `dev` lacks, or test tasks of both kinds.
    """
    dev: list[tuple[str, Mode]] = [(settings.dev, "dev")] if settings.dev else []
    named = [*dev, *((name, "test") for name in expand_tasks(settings.test, "test"))]
    here = [(name, mode) for name, mode in named if settings.data or name not in STS_TASKS]
    _, *tasks = check_all(partial(check_data, settings), *(partial(_load, name, settings, mode) for name, mode in here))
    found = Tasks(tasks.pop(0) if dev else None, tasks)
    read = [found.dev, *found.test]
    check_used(settings.columns, [task for task in read if isinstance(task, RetrievalTask)])
    if len({type(task) for task in found.test}) > 1:
        raise InputError(
            "evaluation.test names graded pairs and questions with their answers, whose scores have no common mean: "
            "name tasks of one kind here, and score the others with simcse-jax evaluate"
        )
    if found.dev:
        _metric(found.dev, settings)
    for task in found.test:
        if isinstance(task, RetrievalTask) and settings.metric in METRICS:
            check_metric(task, settings.metric)
    return found


def check_data(settings: EvaluationConfig) -> None:
    """Raises `InputError` for tasks of SentEval without its folder."""
    named = {"dev": [settings.dev], "test": expand_tasks(settings.test, "test")}
    for option, names in named.items() if not settings.data else ():
        if lacking := next((name for name in names if name in STS_TASKS), None):
            nothing = "''" if option == "dev" else "with nothing after it"
            raise InputError(
                f"evaluation.{option} {lacking} needs SentEval's data: give the folder that holds STS/ and SICK/ "
                f"(--evaluation.data FOLDER), or name graded pairs of your own (--evaluation.{option} PAIRS.tsv), or "
                f"leave it out (--evaluation.{option} {nothing})"
            )


def check_selects(task: Task | RetrievalTask, encoder: BatchEncoder) -> None:
    """Raises `InputError` for a dev task by which no checkpoint can be selected.

    It has too few pairs or questions, one gold score, pairs or answers that are all alike to the model's tokenizer, or
    no answer that is wrong for any question.
    """
    if isinstance(task, RetrievalTask):
        many, unit = len(task.questions), "question"
        questions, answers = (_tokens(encoder, texts) for texts in (task.questions, task.corpus))
        problem = ""
        if all(ids == answers[0] for ids in answers):
            problem = "has answers that are all alike to the model: words its tokenizer lacks, or ends that it cuts"
        elif len(task.answers) == len(task.questions) * len(task.corpus):
            problem = "has every answer for every question"
        elif all(questions[q] == answers[a] for q, a in task.answers):
            problem = "has the question itself for each answer"
    else:
        gold, alike = _pairs(task, encoder)
        many, unit = len(gold), "scored pair"
        problem = f"has the score {gold[0]:g} for every pair" if np.ptp(gold) == 0 else ""
        if alike and not problem:
            problem = "has pairs that are all alike to the model: the same text twice, or words its tokenizer lacks"
    if many < _LEAST:
        problem = f"holds {many} {unit}{'s' if many > 1 else ''}, and {_LEAST} or more are needed"
    if problem:
        raise InputError(
            f"evaluation.dev {task.name} {problem}, so that it cannot select a checkpoint: give some hundred "
            f"{unit}s{' of different scores' if isinstance(task, Task) else ''}, or --evaluation.dev '' to keep the "
            "last step"
        )


def _pairs(task: Task, encoder: BatchEncoder) -> tuple[Float[np.ndarray, " P"], bool]:
    """The gold scores of the pairs behind the task's figure, and whether the tokenizer finds all pairs alike."""
    subsets = [u for u in task.subsets if task.reported in ("all", u.name)]
    first, second = (_tokens(encoder, [text for u in subsets for text in getattr(u, s)]) for s in ("first", "second"))
    one_pair = len({frozenset(pair) for pair in zip(first, second, strict=True)}) == 1
    return np.concatenate([u.gold for u in subsets]), one_pair or first == second


def _tokens(encoder: BatchEncoder, texts: list[str]) -> list[tuple[int, ...]]:
    """What the model reads of each text."""
    return [*map(tuple, encode_batch(encoder.tokenizer, [encoder.prompt + text for text in texts], encoder.max_length))]


def make_scorers(tasks: Tasks, settings: EvaluationConfig, encoder: BatchEncoder) -> Scorers:
    """The scorers of the tasks that `load_tasks` has read."""
    dev, test = tasks
    dev_metric = _metric(dev, settings) if dev else ""
    test_metric = "spearman"
    if test and isinstance(test[0], RetrievalTask):
        test_metric = settings.metric if settings.metric in METRICS else METRICS[0]

    def dev_scores(params: Params) -> dict[str, float | None]:
        assert dev is not None
        found = _measure(dev, encoder, params)
        return {"dev": found[dev_metric], **{f"dev_{name}": value for name, value in found.items()}}

    def test_scores(params: Params) -> dict[str, float | None]:
        if pairs := [task for task in test if isinstance(task, Task)]:
            reported: dict[str, float | None] = evaluate(pairs, lambda s: encoder(params, s, "evaluating"))["reported"]
            return reported
        found = {task.name: _measure(task, encoder, params)[test_metric] for task in test}
        return found | {"Avg.": mean_of_all([*found.values()])}

    about = "" if dev is None else dev.describe() if isinstance(dev, RetrievalTask) else f"graded pairs of {dev.name}"
    return Scorers(dev_scores if dev else None, test_scores if test else None, dev_metric, test_metric, about)


def _load(name: str, settings: EvaluationConfig, mode: Mode) -> Task | RetrievalTask:
    return load_retrieval(name, mode, settings.columns) or load_task(name, settings.data, mode)


def _metric(task: Task | RetrievalTask, settings: EvaluationConfig) -> str:
    """The metric that selects the checkpoint."""
    if isinstance(task, Task):
        if settings.metric not in (None, "spearman"):
            raise InputError(
                f"evaluation.metric is '{settings.metric}' but {task.name} holds graded pairs, which have 'spearman' "
                "alone: leave it out, or give questions and their answers without scores as evaluation.dev"
            )
        return "spearman"
    metric: RetrievalMetric
    if settings.metric == "spearman":
        raise InputError(
            f"evaluation.metric is 'spearman' but {task.name} has no scores: leave it out, or add a column score"
        )
    metric = settings.metric or METRICS[0]
    check_metric(task, metric)
    return metric


def _measure(task: Task | RetrievalTask, encoder: BatchEncoder, params: Params) -> dict[str, float | None]:
    """The metrics of a task by name, alignment and uniformity."""
    if isinstance(task, RetrievalTask):
        vectors_of = encode_once(task.sentences, lambda s: encoder(params, s, "evaluating"))
        return {**retrieve(task, vectors_of), **answer_geometry(task, vectors_of)}
    vectors_of = encode_once(distinct_sentences([task]), lambda s: encoder(params, s, "evaluating"))
    return {"spearman": evaluate([task], vectors_of)["reported"][task.name], **geometry(task, vectors_of)}
