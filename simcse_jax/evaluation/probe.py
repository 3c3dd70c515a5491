"""Linear classifiers on frozen vectors, their L2 penalty chosen on held-out data, as SentEval does.

The objective, mean cross-entropy + λ/2 ‖W‖², and the folds are SentEval's. The optimiser is not: SentEval runs Adam
over mini-batches and stops early, which leaves a classifier that has not converged and depends on the order of the
examples. Here it is L-BFGS, run to its optimum, on all of the training data. docs/evaluate.md compares the two.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

TransferMode = Literal["test", "dev", "fasttest"]
FOLDS: dict[TransferMode, int] = {"test": 10, "dev": 5, "fasttest": 5}
"""Folds of cross-validation, outer and inner."""
L2 = (1e-5, 1e-4, 1e-3, 1e-2)
"""Grid of λ, that of SentEval's code."""
SEED = 1111
"""SentEval's seed of the folds."""

Features = Float[np.ndarray, "_ F"]
Labels = Int[np.ndarray, "_"]
Examples = tuple[Features, Labels]
_Split = tuple[Labels, Labels]
"""Rows to train on, and held out."""


@dataclass(frozen=True)
class Probed:
    """Accuracies × 100.

    Attributes:
      dev: best mean accuracy over the grid on held-out data (of nested folds: its mean over the outer folds).
      test: accuracy on the test split (of nested folds: the mean over them); None where only `dev` was asked for.
      l2: the λ chosen (of nested folds: one each).
      predicted: labels of the test split; None for nested folds.
    """

    dev: float
    test: float | None
    l2: list[float]
    predicted: Labels | None = None


def held_out(train: Examples, dev: Examples, test: Examples | None) -> Probed:
    """λ chosen on the dev split; the classifier of the train split scored on the test split (SST2, SICKEntailment).

    Args:
      train: features [N, F] and labels [N] from 0 upwards.
      dev: the same of other examples.
      test: the same; None scores the dev split only.
    """
    best, l2 = _best(np.concatenate(_parallel(lambda l2: _path(train, dev, (l2,)), L2)))
    return _tested(best, l2, train, test)


def k_fold(train: Examples, test: Examples | None, folds: int) -> Probed:
    """λ chosen by stratified k-fold cross-validation of the train split, then a classifier of all of it (TREC, MRPC).

    Args:
      train: features [N, F] and labels [N] from 0 upwards, each label at least `folds` times.
      test: the same of other examples; None scores the folds only.
      folds: k.
    """
    accuracies = _parallel(lambda split: _path(*_cut(train, split)), _splits(train[1], folds))
    best, l2 = _best(np.mean(accuracies, axis=0))
    return _tested(best, l2, train, test)


def nested_k_fold(examples: Examples, folds: int, test: bool = True) -> Probed:
    """Stratified k-fold cross-validation, λ chosen in each fold by k folds of its training part (MR, CR, SUBJ, MPQA).

    Args:
      examples: features [N, F] and labels [N] from 0 upwards; each label must last for the inner folds.
      folds: k, outer and inner.
      test: whether to train and score the outer classifiers; without, the inner folds are scored only.
    """
    labels = examples[1]
    outer = _splits(labels, folds)
    inner = [(part[a], part[b]) for part, _ in outer for a, b in _splits(labels[part], folds)]
    accuracies = _parallel(lambda split: _path(*_cut(examples, split)), inner)
    chosen = [_best(row) for row in np.mean(np.reshape(accuracies, (folds, folds, len(L2))), axis=1)]
    dev = float(np.mean([best for best, _ in chosen]))
    l2 = [strength for _, strength in chosen]
    if not test:
        return Probed(dev, None, l2)
    scores = _parallel(lambda n: _accuracy(*_cut(examples, outer[n]), l2[n])[0], range(folds))
    return Probed(dev, float(np.mean(scores)), l2)


def _splits(labels: Labels, folds: int) -> list[_Split]:
    from sklearn.model_selection import StratifiedKFold

    folded = StratifiedKFold(folds, shuffle=True, random_state=SEED)
    return list(folded.split(np.zeros((len(labels), 1)), labels))


def _cut(examples: Examples, split: _Split) -> tuple[Examples, Examples]:
    """The examples of both sides; cut where they are used, because all folds at once would fill the memory."""
    (x, y), (train, test) = examples, split
    return (x[train], y[train]), (x[test], y[test])


def _tested(dev: float, l2: float, train: Examples, test: Examples | None) -> Probed:
    if test is None:
        return Probed(dev, None, [l2])
    accuracy, predicted = _accuracy(train, test, l2)
    return Probed(dev, accuracy, [l2], predicted)


def _best(accuracies: Float[np.ndarray, "_"]) -> tuple[float, float]:
    """The best accuracy and its λ; the least of λ that tie to two decimals, as in SentEval."""
    rounded = np.round(accuracies, 2)
    return float(rounded.max()), L2[int(np.argmax(rounded))]


def _path(train: Examples, held: Examples, grid: Sequence[float] = L2) -> list[float]:
    """Accuracy on the held-out examples for each λ; each optimum starts from that of the next stronger penalty."""
    model = _classifier(train, grid[-1])
    found = {}
    for l2 in sorted(grid, reverse=True):
        model.set_params(C=_inverse_strength(train, l2)).fit(*train)
        found[l2] = 100 * float(model.score(*held))
    return [found[l2] for l2 in grid]


def _accuracy(train: Examples, test: Examples, l2: float) -> tuple[float, Labels]:
    predicted: Labels = _classifier(train, l2).fit(*train).predict(test[0])
    return 100 * float(np.mean(predicted == test[1])), predicted


def _classifier(train: Examples, l2: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=_inverse_strength(train, l2), tol=1e-5, max_iter=5000, warm_start=True)


def _inverse_strength(train: Examples, l2: float) -> float:
    """scikit-learn's C for λ: it minimises C · (sum of cross-entropies) + ½ ‖W‖², so that C = 1 / (N λ).

    For two classes it has one weight vector w where SentEval has two; the best such two are ±w/2, of squared length
    ‖w‖²/2, so that C = 2 / (N λ). The bias is free here and penalised there, which moves nothing that is seen.
    """
    labels = train[1]
    return (2 if labels.max() < 2 else 1) / (len(labels) * l2)


def _parallel(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """Results for the values, one core each: products of this size gain little from several."""
    from joblib import Parallel, delayed
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        results: list[Any] = Parallel(n_jobs=-1, prefer="threads")(delayed(function)(value) for value in values)
    return results
