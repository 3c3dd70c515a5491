"""Linear classifiers on frozen vectors, their L2 penalty chosen on held-out data, as SentEval does.

SentEval has two classifiers, scikit-learn's logistic regression and one of its own in PyTorch. This is the first, with
SentEval's grid and folds, run to its optimum: it minimises C · (sum of cross-entropies) + ½ ‖W‖². The other runs Adam
over mini-batches and stops early, so that it has not converged and depends on its seed. docs/evaluate.md compares them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

TransferMode = Literal["test", "dev", "fasttest"]
FOLDS: dict[TransferMode, int] = {"test": 10, "dev": 5, "fasttest": 5}
"""Folds of cross-validation, outer and inner."""
C = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""SentEval's grid for this classifier."""
SEED = 1111
"""SentEval's seed of the folds."""

Features = Float[np.ndarray, "_ F"]
Labels = Int[np.ndarray, " _"]
Examples = tuple[Features, Labels]
_Split = tuple[Labels, Labels]
"""The rows to train on, and the rows held out."""


@dataclass(frozen=True)
class Probed:
    """Accuracies × 100.

    Attributes:
      dev: best mean accuracy over the grid on held-out data (of nested folds: its mean over the outer folds).
      test: accuracy on the test split (of nested folds: the mean over them); None if only `dev` was asked for.
      c: the C chosen (of nested folds: one per outer fold).
      predicted: labels of the test split; None for nested folds.
    """

    dev: float
    test: float | None
    c: list[float]
    predicted: Labels | None = None


def held_out(train: Examples, dev: Examples, test: Examples | None) -> Probed:
    """Chooses C on the dev split and scores the classifier of the train split on the test split (SST2, SICKEntailment).

    Args:
      train: features [N, F] and labels [N] from 0 upwards.
      dev: the same of other examples.
      test: the same; None scores the dev split only.
    """
    best, c = _best(np.concatenate(_parallel(lambda c: _path(train, dev, (c,)), C)))
    return _tested(best, c, train, test)


def k_fold(train: Examples, test: Examples | None, folds: int) -> Probed:
    """Chooses C by stratified k-fold cross-validation of the train split, and trains on all of it (TREC, MRPC).

    Args:
      train: features [N, F] and labels [N] from 0 upwards, each label at least `folds` times.
      test: the same of other examples; None scores the folds only.
      folds: k.
    """
    accuracies = _parallel(lambda split: _path(*_cut(train, split)), _splits(train[1], folds))
    best, c = _best(np.mean(accuracies, axis=0))
    return _tested(best, c, train, test)


def nested_k_fold(examples: Examples, folds: int, test: bool = True) -> Probed:
    """Cross-validates with k stratified folds, choosing C by k folds of each training part (MR, CR, SUBJ, MPQA).

    Args:
      examples: features [N, F] and labels [N] from 0 upwards; the inner folds need enough of each label.
      folds: k, outer and inner.
      test: whether to train and score the outer classifiers; False scores the inner folds only.
    """
    labels = examples[1]
    outer = _splits(labels, folds)
    inner = [(part[a], part[b]) for part, _ in outer for a, b in _splits(labels[part], folds)]
    accuracies = _parallel(lambda split: _path(*_cut(examples, split)), inner)
    chosen = [_best(row) for row in np.mean(np.reshape(accuracies, (folds, folds, len(C))), axis=1)]
    dev = float(np.mean([best for best, _ in chosen]))
    c = [strength for _, strength in chosen]
    if not test:
        return Probed(dev, None, c)
    scores = _parallel(lambda n: _accuracy(*_cut(examples, outer[n]), c[n])[0], range(folds))
    return Probed(dev, float(np.mean(scores)), c)


def _splits(labels: Labels, folds: int) -> list[_Split]:
    from sklearn.model_selection import StratifiedKFold

    folded = StratifiedKFold(folds, shuffle=True, random_state=SEED)
    return list(folded.split(np.zeros((len(labels), 1)), labels))


def _cut(examples: Examples, split: _Split) -> tuple[Examples, Examples]:
    """The examples of both sides; cut only when used, because all folds at once would fill the memory."""
    (x, y), (train, test) = examples, split
    return (x[train], y[train]), (x[test], y[test])


def _tested(dev: float, c: float, train: Examples, test: Examples | None) -> Probed:
    if test is None:
        return Probed(dev, None, [c])
    accuracy, predicted = _accuracy(train, test, c)
    return Probed(dev, accuracy, [c], predicted)


def _best(accuracies: Float[np.ndarray, " _"]) -> tuple[float, float]:
    """The best accuracy and its C; among accuracies that tie to two decimals, the least C, as in SentEval."""
    rounded = np.round(accuracies, 2)
    return float(rounded.max()), C[int(np.argmax(rounded))]


def _path(train: Examples, held: Examples, grid: Sequence[float] = C) -> list[float]:
    """Accuracy on the held-out examples for each C; the search for each optimum starts from that of the C before it."""
    model = _classifier(grid[0])
    return [100 * float(model.set_params(C=c).fit(*train).score(*held)) for c in grid]


def _accuracy(train: Examples, test: Examples, c: float) -> tuple[float, Labels]:
    predicted: Labels = _classifier(c).fit(*train).predict(test[0])
    return 100 * float(np.mean(predicted == test[1])), predicted


def _classifier(c: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, tol=1e-5, max_iter=5000, warm_start=True)


def _parallel(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """Results for the values, computed on one core each: products of this size gain little from several."""
    from joblib import Parallel, delayed
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        results: list[Any] = Parallel(n_jobs=-1, prefer="threads")(delayed(function)(value) for value in values)
    return results
