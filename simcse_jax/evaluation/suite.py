"""Tasks of both kinds for one model or several: all are read first, and each model encodes each sentence once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.errors import InputError
from simcse_jax.evaluation import bootstrap
from simcse_jax.evaluation.pairs import is_pairs
from simcse_jax.evaluation.probe import TransferMode
from simcse_jax.evaluation.retrieval import RetrievalTask, check_used, load_retrieval, retrieve
from simcse_jax.evaluation.sts import (
    STS_DEV_TASKS,
    STS_TASKS,
    EncodeFunction,
    Mode,
    Task,
    distinct_sentences,
    encode_once,
    evaluate,
    load_task,
    reported_pairs,
    unknown_tasks,
)
from simcse_jax.evaluation.transfer import evaluate_transfer
from simcse_jax.evaluation.transfer_tasks import (
    ALL_TRANSFER_TASKS,
    TRANSFER_TASKS,
    TransferTask,
    load_transfer_task,
    sentences_of,
)


@dataclass(frozen=True)
class Suite:
    """The tasks to score, and the split to report."""

    sts: list[Task]
    transfer: list[TransferTask]
    mode: TransferMode
    retrieval: list[RetrievalTask] = field(default_factory=list)


def expand_tasks(names: str | Path | Iterable[str | Path], mode: TransferMode) -> list[str]:
    """Task names, or a single one, with the sets `sts`, `transfer` and `full` (both) written out, each task once.

    In mode `dev`, `sts` holds the two tasks that have a dev split.
    """
    sts = STS_DEV_TASKS if mode == "dev" else STS_TASKS
    several = [names] if isinstance(names, str | Path) else names
    sets = {"sts": sts, "transfer": TRANSFER_TASKS, "full": (*sts, *TRANSFER_TASKS)}
    return list(dict.fromkeys(task for name in map(str, several) for task in sets.get(name, (name,))))


def load_suite(
    names: str | Path | Iterable[str | Path],
    data: str | Path,
    mode: TransferMode = "test",
    all_splits: bool = False,
    columns: Sequence[str] = (),
) -> Suite:
    """Reads tasks.

    Args:
      names: any of `STS_TASKS`, `ALL_TRANSFER_TASKS`, graded pairs as in `load_task`, and the sets of `expand_tasks`.
      data: folder in SentEval's layout.
      mode: `test`, `dev`, or `fasttest`: test with fewer folds, the same as `test` for STS.
      all_splits: see `sts.load_task`.
      columns: see `load_retrieval`.

    Raises:
      InputError: no task, an unknown one, or one that cannot be read.
    """
    expanded = expand_tasks(names, mode)
    if not expanded:
        raise InputError("no task given: name tasks, sets or .tsv files with --tasks, or leave it out for STS")
    known = (*STS_TASKS, *ALL_TRANSFER_TASKS)
    if unknown := [name for name in expanded if name not in known and not is_pairs(name)]:
        raise unknown_tasks(unknown, (*known, "sts", "transfer", "full"))
    split: Mode = "dev" if mode == "dev" else "test"
    retrieval = {name: task for name in expanded if (task := load_retrieval(name, split, columns))}
    sts = [
        load_task(name, data, split, all_splits)
        for name in expanded
        if name not in ALL_TRANSFER_TASKS and name not in retrieval
    ]
    check_used(columns, [*retrieval.values()])
    return Suite(
        sts,
        [load_transfer_task(name, data, mode) for name in expanded if name in ALL_TRANSFER_TASKS],
        mode,
        [*retrieval.values()],
    )


def evaluate_models(suite: Suite, models: Sequence[EncodeFunction], resamples: int = 0) -> list[dict[str, Any]]:
    """Scores models.

    Args:
      suite: from `load_suite`.
      models: sentences to vectors; each is called once, with each distinct sentence once.
      resamples: number of resamples in the bootstrap of the STS tasks; 0 for no bootstrap.

    Returns:
      Per model, `{"sts": {"tasks", "reported"[, "intervals"][, "differences"]}, "transfer": {"tasks", "reported"},
      "retrieval": {task: {metric: value}}}`, without a kind that has no task; see `sts.evaluate`,
      `bootstrap.bootstrap`, `evaluate_transfer` and `retrieve`.
    """
    results: list[dict[str, Any]] = []
    scored: dict[str, list[Any]] = {task.name: [] for task in suite.sts}
    texts = [*distinct_sentences(suite.sts), *sentences_of(suite.transfer)]
    sentences = list(dict.fromkeys([*texts, *(text for task in suite.retrieval for text in task.sentences)]))
    for encode in models:
        vectors_of = encode_once(sentences, encode)
        result: dict[str, Any] = {}
        if suite.sts:
            result["sts"] = evaluate(suite.sts, vectors_of)
            for task in suite.sts:
                scored[task.name].append(reported_pairs(task, vectors_of))
        if suite.transfer:
            result["transfer"] = evaluate_transfer(suite.transfer, vectors_of, suite.mode)
        if suite.retrieval:
            result["retrieval"] = {task.name: retrieve(task, vectors_of) for task in suite.retrieval}
        results.append(result)
    if resamples and suite.sts:
        pairs = {name: (np.stack([system for system, _ in rows]), rows[0][1]) for name, rows in scored.items()}
        found = bootstrap.bootstrap(pairs, [result["sts"]["reported"] for result in results], resamples)
        for result, intervals in zip(results, found, strict=True):
            result["sts"] |= intervals
    return results
