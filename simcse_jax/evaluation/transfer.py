"""Transfer: the accuracy of linear classifiers on frozen vectors (SentEval, Conneau & Kiela 2018)."""

import time
from typing import Any

import numpy as np

from simcse_jax.evaluation.probe import FOLDS, Examples, Probed, TransferMode, held_out, k_fold, nested_k_fold
from simcse_jax.evaluation.sts import EncodeFunction, encode_once
from simcse_jax.evaluation.transfer_tasks import TransferTask, sentences_of
from simcse_jax.reports.progress import progress_bar


def evaluate_transfer(tasks: list[TransferTask], encode: EncodeFunction, mode: TransferMode = "test") -> dict[str, Any]:
    """Scores a model.

    Args:
      tasks: from `load_transfer_task`.
      encode: sentences to vectors; called once, with each distinct sentence of all tasks once.
      mode: `test` (10 folds) and `fasttest` (5) report accuracy on test data, `dev` (5) that on held-out training data.

    Returns:
      `{"tasks": {task: {"dev_accuracy", "C", "seconds"[, "accuracy"][, "f1"]}}, "reported": {task: accuracy, "Avg.":
      their mean}}`; accuracies and F1 (of MRPC) × 100, seconds spent on the classifiers.
    """
    vectors_of = encode_once(sentences_of(tasks), encode)
    scores: dict[str, Any] = {}
    with progress_bar(len(tasks), "tasks", "classifiers") as bar:
        for task in tasks:
            start = time.monotonic()
            splits = {name: (split.features(vectors_of), split.labels) for name, split in task.splits.items()}
            found = probe_splits(splits, FOLDS[mode], test=mode != "dev")
            bar.update()
            scores[task.name] = {"dev_accuracy": found.dev, "C": found.c, "seconds": time.monotonic() - start}
            if found.test is not None:
                scores[task.name]["accuracy"] = found.test
            if task.name == "MRPC" and found.predicted is not None:
                from sklearn.metrics import f1_score

                scores[task.name]["f1"] = 100 * float(f1_score(task.splits["test"].labels, found.predicted))
    figure = "dev_accuracy" if mode == "dev" else "accuracy"
    reported = {name: score[figure] for name, score in scores.items()}
    reported["Avg."] = float(np.mean(list(reported.values())))
    return {"tasks": scores, "reported": reported}


def probe_splits(splits: dict[str, Examples], folds: int, test: bool = True) -> Probed:
    """Probes with the protocol for the given splits, see `TransferTask`.

    Args:
      splits: features and labels of each split.
      folds: folds of cross-validation, used without a dev split.
      test: whether to score the test data.
    """
    train, scored = splits["train"], splits.get("test") if test else None
    if "dev" in splits:
        return held_out(train, splits["dev"], scored)
    if "test" in splits:
        return k_fold(train, scored, folds)
    return nested_k_fold(train, folds, test)
