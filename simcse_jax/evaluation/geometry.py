"""Alignment and uniformity of sentence vectors on scored pairs (Wang & Isola, arXiv 2005.10242; SimCSE, section 5)."""

import numpy as np
from jaxtyping import Bool, Float

from simcse_jax.evaluation.sts import EncodeFunction, Task, distinct_sentences

_BLOCK = 1024  # rows of the matrix of distances that are there at a time


def _unit(x: Float[np.ndarray, "S H"]) -> Float[np.ndarray, "S H"]:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def alignment(a: Float[np.ndarray, "P H"], b: Float[np.ndarray, "P H"]) -> float:
    """mean ‖â_p − b̂_p‖² over pairs of vectors of any scale; NaN without a pair. Lower is closer."""
    return float(np.mean(np.sum((_unit(a) - _unit(b)) ** 2, axis=1))) if len(a) else float("nan")


def uniformity(x: Float[np.ndarray, "S H"]) -> float:
    """log mean_{i<j} exp(−2 ‖x̂_i − x̂_j‖²) over vectors of any scale; NaN for fewer than two. Lower is more uniform."""
    x, n = _unit(x), len(x)
    if n < 2:
        return float("nan")
    total = 0.0
    for start in range(0, n, _BLOCK):
        rows = x[start : start + _BLOCK]
        potential = np.exp(4 * (rows @ x[start:].T) - 4)  # ‖x̂ − ŷ‖² = 2 − 2 x̂·ŷ
        total += float(np.sum(np.triu(potential, 1)))
    return float(np.log(total / (n * (n - 1) / 2)))


def average_cosine(x: Float[np.ndarray, "S H"]) -> float:
    """mean_{i≠j} cos(x_i, x_j); NaN for fewer than two vectors. 0 for vectors without a common direction, 1 at most.

    From ‖Σ x̂‖² = Σ ‖x̂‖² + Σ_{i≠j} x̂_i·x̂_j (Ethayarajh, arXiv 1909.00512, section 3.3, takes a sample of the pairs).
    """
    x, n = _unit(x), len(x)
    if n < 2:
        return float("nan")
    return float((np.sum(np.sum(x, axis=0) ** 2) - np.sum(x**2)) / (n * (n - 1)))


def positive_pairs(gold: Float[np.ndarray, "P"]) -> Bool[np.ndarray, "P"]:
    """Which pairs are positives: a gold score above 4 on the scale 0 to 5, or in the top fifth of another scale."""
    low, high = float(np.min(gold)), float(np.max(gold))
    limit = 4.0 if low >= 0 and 1 < high <= 5 else low + 0.8 * (high - low)
    return gold > limit


def geometry(task: Task, encode: EncodeFunction) -> dict[str, float]:
    """Alignment of a task's positive pairs and uniformity of its distinct sentences.

    Args:
      task: from `load_task`; its subsets are taken together.
      encode: sentences to vectors; called once, with each distinct sentence once.
    """
    sentences = distinct_sentences([task])
    vectors = encode(sentences)
    index = {sentence: i for i, sentence in enumerate(sentences)}
    positive = positive_pairs(np.concatenate([subset.gold for subset in task.subsets]))
    first, second = (
        np.array([index[s] for subset in task.subsets for s in getattr(subset, side)])[positive]
        for side in ("first", "second")
    )
    return {"alignment": alignment(vectors[first], vectors[second]), "uniformity": uniformity(vectors)}
