#!/usr/bin/env python3
"""Transfer accuracies of the package, and with both classifiers of SentEval's protocol as published, restated here.

    python benchmarks/transfer_protocol.py MODEL --pooler avg --data SentEval/data/downstream

SentEval's scikit-learn classifier: LogisticRegression with its defaults, C from 1/4 to 8, each trained on its own.

SentEval's PyTorch classifier: a linear layer trained with Adam (learning rate 1e-3, λ as its weight decay) on batches
of 64; it looks at held-out accuracy every 4 epochs, stops at the 6th look without a new best, or after 200 epochs, and
keeps the best. λ is chosen on the inner folds, then a classifier of the whole training part holds out 5 % for stopping.
Here the classifiers of all λ and inner folds are trained side by side, which changes none of them. Needs PyTorch.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from simcse_jax import SimCSE
from simcse_jax.commands.options import senteval_folder
from simcse_jax.evaluation.sts import encode_once
from simcse_jax.evaluation.transfer import probe_splits
from simcse_jax.evaluation.transfer_tasks import ALL_TRANSFER_TASKS, load_transfer_task, sentences_of

SEED, BATCH, TENACITY, EPOCH_SIZE, MAX_EPOCHS = 1111, 64, 5, 4, 200
GRID = (1e-5, 1e-4, 1e-3, 1e-2)
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
Index = np.ndarray
Examples = tuple[np.ndarray, np.ndarray]


def regression(train: Examples, held: Examples, strength: float) -> float:
    """Accuracy × 100 of scikit-learn's classifier."""
    # It does not always converge within its 100 iterations; SentEval uses it all the same.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return 100 * float(LogisticRegression(C=strength, random_state=SEED).fit(*train).score(*held))


def choose_strength(train: Examples, folds: int) -> tuple[float, float]:
    """Dev accuracy and C by cross-validation."""
    x, y = train
    inner = list(StratifiedKFold(folds, shuffle=True, random_state=SEED).split(x, y))
    scores = Parallel(n_jobs=-1)(
        delayed(regression)((x[a], y[a]), (x[b], y[b]), strength) for strength in STRENGTHS for a, b in inner
    )
    means = np.round(np.reshape(scores, (len(STRENGTHS), folds)).mean(1), 2)
    return float(means.max()), STRENGTHS[int(means.argmax())]


def senteval_sklearn(splits: dict[str, Examples], folds: int) -> tuple[float, float]:
    """Dev and test accuracy of a task with SentEval's scikit-learn classifier."""
    x, y = splits["train"]
    if "dev" in splits:
        scores = [round(regression((x, y), splits["dev"], strength), 2) for strength in STRENGTHS]
        return max(scores), regression((x, y), splits["test"], STRENGTHS[int(np.argmax(scores))])
    if "test" in splits:
        dev, strength = choose_strength((x, y), folds)
        return dev, regression((x, y), splits["test"], strength)
    devs, tests = [], []
    for part, out in StratifiedKFold(folds, shuffle=True, random_state=SEED).split(x, y):
        dev, strength = choose_strength((x[part], y[part]), folds)
        devs.append(dev)
        tests.append(regression((x[part], y[part]), (x[out], y[out]), strength))
    return float(np.mean(devs)), float(np.mean(tests))


def fit_many(
    x: torch.Tensor, y: torch.Tensor, train: list[Index], held: list[Index], l2: list[float]
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Trains classifiers, each on rows of its own: best held-out accuracies, weights and biases."""
    count, classes, width = len(train), int(y.max()) + 1, x.shape[1]
    generator = torch.Generator().manual_seed(SEED)
    bound = width**-0.5
    weights = torch.empty(1, width + 1, classes).uniform_(-bound, bound, generator=generator).repeat(count, 1, 1)
    sizes = torch.tensor([len(rows) for rows in train])
    rows = torch.stack([torch.nn.functional.pad(torch.tensor(r), (0, int(sizes.max()) - len(r))) for r in train])
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    decay = torch.tensor(l2)[:, None, None]
    best, kept, misses = torch.full((count,), -1.0), weights.clone(), torch.zeros(count, dtype=torch.int64)
    running = torch.arange(count)
    w, m, v = weights.clone(), torch.zeros_like(weights), torch.zeros_like(weights)
    steps = epochs = 0
    while len(running) and epochs <= MAX_EPOCHS:
        for _ in range(EPOCH_SIZE):
            keys = torch.rand(len(running), rows.shape[1], generator=generator)
            order = keys.masked_fill_(torch.arange(rows.shape[1]) >= sizes[running, None], 2.0).argsort(dim=1)
            for start in range(0, rows.shape[1], BATCH):
                places = order[:, start : start + BATCH]
                real = (places < sizes[running, None]).float()
                chosen = rows[running].gather(1, places)
                inputs = ones[chosen]
                error = torch.softmax(inputs @ w, dim=2) - torch.nn.functional.one_hot(y[chosen], classes)
                error *= (real / real.sum(1, keepdim=True).clamp(min=1))[:, :, None]
                gradient = inputs.transpose(1, 2) @ error + decay[running] * w
                steps += 1
                m = 0.9 * m + 0.1 * gradient
                v = 0.999 * v + 0.001 * gradient**2
                w = w - 1e-3 * (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8)
        epochs += EPOCH_SIZE
        accuracy = torch.tensor(
            [(ones[held[n]] @ w[i]).argmax(1).eq(y[held[n]]).double().mean() for i, n in enumerate(running.tolist())]
        ).float()
        better = accuracy > best[running]
        kept[running[better]], best[running[better]] = w[better], accuracy[better]
        stops = ~better & (misses[running] >= TENACITY)
        misses[running[~better]] += 1
        running, w, m, v = running[~stops], w[~stops], m[~stops], v[~stops]
    return best.double().numpy(), kept[:, :-1], kept[:, -1:]


def choose(scores: np.ndarray) -> tuple[float, float]:
    """The best mean accuracy and its λ."""
    rounded = np.round(100 * scores, 2)
    return float(rounded.max()), GRID[int(rounded.argmax())]


def cross_validate(x: torch.Tensor, y: torch.Tensor, part: Index, folds: int) -> tuple[float, float]:
    """Dev accuracy and λ of a part of the examples."""
    splitter = StratifiedKFold(folds, shuffle=True, random_state=SEED)
    inner = [(part[a], part[b]) for a, b in splitter.split(part, y[part])]
    train, held = ([split[i] for _ in GRID for split in inner] for i in (0, 1))
    best, *_ = fit_many(x, y, train, held, [l2 for l2 in GRID for _ in inner])
    return choose(best.reshape(len(GRID), folds).mean(1))


def final(x: torch.Tensor, y: torch.Tensor, parts: list[Index], l2: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains classifiers on whole parts, with 5 % of each held out for stopping."""
    order = [np.random.default_rng(SEED).permutation(part) for part in parts]
    cut = [int(0.05 * len(part)) for part in parts]
    pairs = list(zip(order, cut, strict=True))
    _, weights, biases = fit_many(x, y, [o[c:] for o, c in pairs], [o[:c] for o, c in pairs], l2)
    return weights, biases


def accuracy(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor) -> float:
    """Accuracy × 100."""
    return 100 * float((x @ weights + bias).argmax(1).eq(y).double().mean())


def senteval_adam(splits: dict[str, Examples], folds: int) -> tuple[float, float]:
    """Dev and test accuracy of a task with SentEval's PyTorch classifier."""
    data = {
        name: (torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64))
        for name, (x, y) in splits.items()
    }
    x, y = data["train"]
    everything = np.arange(len(y))
    if "dev" in data:
        all_x, all_y = (torch.cat([a, b]) for a, b in zip(data["train"], data["dev"], strict=True))
        held = np.arange(len(y), len(all_y))
        best, weights, biases = fit_many(all_x, all_y, [everything] * len(GRID), [held] * len(GRID), list(GRID))
        dev, l2 = choose(best)
        return dev, accuracy(*data["test"], weights[GRID.index(l2)], biases[GRID.index(l2)])
    if "test" in data:
        dev, l2 = cross_validate(x, y, everything, folds)
        weights, biases = final(x, y, [everything], [l2])
        return dev, accuracy(*data["test"], weights[0], biases[0])
    outer = list(StratifiedKFold(folds, shuffle=True, random_state=SEED).split(x, y))
    found = [cross_validate(x, y, part, folds) for part, _ in outer]
    fitted = zip(*final(x, y, [part for part, _ in outer], [l2 for _, l2 in found]), strict=True)
    scores = [accuracy(x[test], y[test], *model) for (_, test), model in zip(outer, fitted, strict=True)]
    return float(np.mean([dev for dev, _ in found])), float(np.mean(scores))


def ours(splits: dict[str, Examples], folds: int) -> tuple[float, float]:
    """Dev and test accuracy of a task by the package."""
    found = probe_splits(splits, folds)
    assert found.test is not None
    return found.dev, found.test


@dataclass(frozen=True)
class Compare:
    """Compares the three on the vectors of a model."""

    model: tyro.conf.Positional[str]
    """A model that the package reads."""
    pooler: str | None = None
    """Overrides the pooler saved with the model."""
    data: str = field(default_factory=senteval_folder)
    """Folder in SentEval's layout."""
    tasks: tuple[str, ...] = ALL_TRANSFER_TASKS
    """Transfer tasks."""
    folds: int = 10
    """Number of folds, outer and inner."""
    adam: bool = True
    """Train SentEval's PyTorch classifier, too."""
    vectors: Path | None = None
    """File (.npy) that keeps the sentences' vectors between calls with the same tasks."""

    def run(self) -> None:
        """Prints one line per task."""
        torch.set_num_threads(1)
        tasks = [load_transfer_task(name, self.data) for name in self.tasks]
        sentences = sentences_of(tasks)
        if self.vectors and self.vectors.exists():
            vectors = np.load(self.vectors)
        else:
            vectors = SimCSE(self.model, self.pooler).encode(sentences, normalize=False, progress=True)
            if self.vectors:
                np.save(self.vectors, vectors)
        vectors_of = encode_once(sentences, lambda _: vectors)
        ways: dict[str, Callable[[dict[str, Examples]], tuple[float, float]]] = {
            "ours": lambda splits: ours(splits, self.folds),
            "scikit-learn": lambda splits: senteval_sklearn(splits, self.folds),
        }
        if self.adam:
            ways["Adam"] = lambda splits: senteval_adam(splits, self.folds)
        print("task           " + "".join(f"{name:>14}: dev   test      s" for name in ways))
        for task in tasks:
            splits = {name: (split.features(vectors_of), split.labels) for name, split in task.splits.items()}
            print(f"{task.name:<15}", end="", flush=True)
            for way in ways.values():
                start = time.perf_counter()
                dev, test = way(splits)
                print(f"{dev:19.2f} {test:6.2f} {time.perf_counter() - start:6.1f}", end="", flush=True)
            print()


if __name__ == "__main__":
    tyro.cli(Compare, description=__doc__).run()
