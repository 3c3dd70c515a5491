"""The geometry of sentence vectors: alignment and uniformity, isotropy, spectrum.

Alignment and uniformity are those of Wang & Isola (arXiv 2005.10242; SimCSE, section 5). Each function of vectors takes
them at any scale; its docstring says whether it normalises them first, as a cosine does.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from simcse_jax.evaluation.sts import EncodeFunction, Task, distinct_sentences
from simcse_jax.inference.vectors import unit

_BLOCK = 1024  # rows of the matrix of distances in memory at a time


def _unit(x: Float[np.ndarray, "S H"]) -> Float[np.ndarray, "S H"]:
    return unit(x.astype(np.float64))


def alignment(a: Float[np.ndarray, "P H"], b: Float[np.ndarray, "P H"]) -> float | None:
    """mean ‖â_p − b̂_p‖² over pairs of vectors of any scale; None without a pair. Lower is closer."""
    return float(np.mean(np.sum((_unit(a) - _unit(b)) ** 2, axis=1))) if len(a) else None


def uniformity(x: Float[np.ndarray, "S H"]) -> float | None:
    """log mean_{i<j} exp(−2 ‖x̂_i − x̂_j‖²) over vectors of any scale; None for fewer than two. Lower is more uniform."""
    x, n = _unit(x), len(x)
    if n < 2:
        return None
    total = 0.0
    for start in range(0, n, _BLOCK):
        rows = x[start : start + _BLOCK]
        potential = np.exp(4 * (rows @ x[start:].T) - 4)  # ‖x̂ − ŷ‖² = 2 − 2 x̂·ŷ
        total += float(np.sum(np.triu(potential, 1)))
    return float(np.log(total / (n * (n - 1) / 2)))


def average_cosine(x: Float[np.ndarray, "S H"]) -> float | None:
    """mean_{i≠j} cos(x_i, x_j); None for fewer than two vectors. 0 for vectors without a common direction, 1 at most.

    From ‖Σ x̂‖² = Σ ‖x̂‖² + Σ_{i≠j} x̂_i·x̂_j (Ethayarajh, arXiv 1909.00512, section 3.3, takes a sample of the pairs).
    """
    x, n = _unit(x), len(x)
    if n < 2:
        return None
    return float((np.sum(np.sum(x, axis=0) ** 2) - np.sum(x**2)) / (n * (n - 1)))


def isotropy(x: Float[np.ndarray, "S H"]) -> float | None:
    """I = min_c Z(c) / max_c Z(c), Z(c) = Σ_i exp(c·x̂_i), over c = ±u for the eigenvectors u of Σ_i x̂_i x̂_iᵀ.

    From Mu & Viswanath (arXiv 1702.01417, section 2.1), with both signs of each eigenvector and on unit vectors,
    because Z depends on scale. 1 where no direction is preferred; e⁻² where all vectors are one; None without a vector.
    """
    if not len(x):
        return None
    x = _unit(x)
    directions = np.linalg.eigh(x.T @ x)[1]
    products = x @ directions
    z = np.concatenate([np.sum(np.exp(products), axis=0), np.sum(np.exp(-products), axis=0)])
    return float(np.min(z) / np.max(z))


def iso_score(x: Float[np.ndarray, "S H"]) -> float | None:
    """IsoScore (Rudman et al., arXiv 2108.07344, algorithm 1): how evenly the variance fills all H dimensions.

    With λ the variances along the principal directions and λ̂ = √H λ / ‖λ‖: δ = ‖λ̂ − 1‖ / √(2 (H − √H)),
    φ = (H − δ² (H − √H))² / H², and the score is (H φ − 1) / (H − 1): 0 where one direction holds all variance, 1 where
    each holds the same. Independent of mean and scale. None for fewer than two vectors, width 1 or no variance.
    """
    n = x.shape[1]
    if len(x) < 2 or n < 2:
        return None
    variances = np.linalg.eigvalsh(np.cov(x.astype(np.float64).T))
    norm = np.linalg.norm(variances)
    if not norm > 0:
        return None
    defect = np.linalg.norm(n**0.5 * variances / norm - 1) / (2 * (n - n**0.5)) ** 0.5
    filled = (n - defect**2 * (n - n**0.5)) ** 2 / n**2
    return float((n * filled - 1) / (n - 1))


def singular_values(x: Float[np.ndarray, "S H"]) -> Float[np.ndarray, " R"]:
    """Singular values over the largest, descending, of the matrix of vectors as they are: not centred, not scaled."""
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    return values / max(float(values[0]), 1e-300) if len(values) else values


def effective_rank(values: Float[np.ndarray, " R"]) -> float | None:
    """exp(−Σ p_k log p_k), p = σ / Σ σ, of singular values σ (Roy & Vetterli, EUSIPCO 2007): from 1 to their number.

    None where all are 0.
    """
    total = float(np.sum(values))
    if not total > 0:
        return None
    p = values[values > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def gold_range(gold: Float[np.ndarray, " P"]) -> tuple[float, float]:
    """The scale of gold scores: 0 to 5 where they lie there as in STS, else their own range."""
    low, high = float(np.min(gold)), float(np.max(gold))
    return (0.0, 5.0) if low >= 0 and 1 < high <= 5 else (low, high)


def positive_pairs(gold: Float[np.ndarray, " P"]) -> Bool[np.ndarray, " P"]:
    """Marks the positive pairs: a gold score above 4 on the scale 0 to 5, or in the top fifth of another scale."""
    low, high = gold_range(gold)
    return gold > low + 0.8 * (high - low)


def gold_groups(gold: Float[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
    """The fifth of the scale, 0 to 4, that each gold score lies in; a score between two counts to the lower one."""
    low, high = gold_range(gold)
    fifths = np.ceil((gold - low) / max(high - low, 1e-300) * 5) - 1
    groups: np.ndarray = np.clip(fifths, 0, 4).astype(np.int64)
    return groups


def geometry(task: Task, encode: EncodeFunction) -> dict[str, float | None]:
    """Alignment of a task's positive pairs and uniformity of its distinct sentences.

    Args:
      task: from `load_task`; its subsets are taken together.
      encode: sentences to vectors; called once, with each distinct sentence once.
    """
    vectors = encode(distinct_sentences([task]))
    first, second, gold = indexed_pairs(task)
    positive = positive_pairs(gold)
    return {
        "alignment": alignment(vectors[first[positive]], vectors[second[positive]]),
        "uniformity": uniformity(vectors),
    }


def indexed_pairs(task: Task) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """A task's pairs, its subsets taken together: the numbers of both sentences in `distinct_sentences`, and gold."""
    index = {sentence: i for i, sentence in enumerate(distinct_sentences([task]))}
    first, second = (
        np.array([index[s] for subset in task.subsets for s in getattr(subset, side)]) for side in ("first", "second")
    )
    return first, second, np.concatenate([subset.gold for subset in task.subsets])
