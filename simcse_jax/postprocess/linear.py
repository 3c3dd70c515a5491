"""Whitening and all-but-the-top: affine maps of sentence vectors from the mean and covariance of a sample."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from simcse_jax.errors import InputError


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=[])
@dataclass(frozen=True)
class Affine:
    """x ↦ x W + b.

    Attributes:
      weight: W, [H, D].
      bias: b, [D].
    """

    weight: Any
    bias: Any

    @property
    def width(self) -> int:
        """D, the width of the mapped rows."""
        return int(np.shape(self.bias)[0])

    def __call__(self, x: Float[Array, "S H"]) -> Float[Array, "S D"]:
        """The mapped rows. Products are taken in full precision, also where an accelerator's default is less."""
        mapped: Array = jnp.matmul(x, self.weight, precision=jax.lax.Precision.HIGHEST) + self.bias[None]
        return mapped


def whitening(vectors: Float[np.ndarray, "S H"], dim: int | None = None) -> Affine:
    """Whitens vectors and keeps the leading directions (Su et al., arXiv 2103.15316, equations 3 to 7, algorithm 1).

    With μ the mean and Σ = U Λ Uᵀ the covariance (over S, not S − 1) of the sample, Λ descending: x̃ = (x − μ) W,
    W = U Λ^(−1/2) cut to its first `dim` columns. The mapped sample has mean 0 and covariance I.

    Args:
      vectors: the sample, of any scale.
      dim: width of the result; if None, the number of directions that the sample spans. That is H − 1 for means of one
        LayerNorm's outputs, which lie in a hyperplane.

    Returns:
      The map, float64.

    Raises:
      InputError: `dim` out of range, or the sample does not span that many directions.
    """
    mean, spread, directions = _principal(vectors)
    if dim is not None and not 1 <= dim <= vectors.shape[1]:
        raise InputError(f"dim is {dim}; it must be from 1 to the width of the vectors, {vectors.shape[1]}")
    # Below, a direction holds nothing but the rounding of float32 vectors, which whitening would blow up.
    rank = int(np.sum(spread > spread[0] * vectors.shape[1] * np.finfo(np.float32).eps)) if spread[0] > 0 else 0
    wanted = max(rank, 1) if dim is None else dim
    if wanted > rank:
        raise InputError(
            f"whitening to {wanted} dimensions needs as many directions, but the {len(vectors):,} vectors it is fitted "
            f"to span {rank}: give more distinct sentences, or a smaller dim"
        )
    weight = directions[:, :wanted] / spread[:wanted]
    return Affine(weight, -mean @ weight)


def all_but_the_top(vectors: Float[np.ndarray, "S H"], components: int | None = None) -> Affine:
    """Removes the mean and the leading principal components (Mu & Viswanath, arXiv 1702.01417, algorithm 1).

    With μ the mean of the sample and u_1 … u_D the leading principal directions of the centred sample:
    x′ = (I − Σ_d u_d u_dᵀ)(x − μ). The paper's algorithm projects x, not x − μ, in the sum; every vector would then
    keep the constant −Σ_d u_d u_dᵀ μ, one of the common parts that the method is meant to remove.

    Args:
      vectors: the sample, of any scale.
      components: D; if None, H / 100, rounded, at least 1 (the paper's rule of thumb).

    Returns:
      The map, float64.

    Raises:
      InputError: `components` out of range, or fewer than two vectors.
    """
    width = vectors.shape[1]
    mean, _, directions = _principal(vectors)
    removed = max(1, round(width / 100)) if components is None else components
    if not 0 <= removed < width:
        raise InputError(f"components is {removed}; it must be from 0 to {width - 1}: the vectors have width {width}")
    top = directions[:, :removed]
    weight = np.eye(width) - top @ top.T
    return Affine(weight, -mean @ weight)


def _principal(
    vectors: Float[np.ndarray, "S H"],
) -> tuple[Float[np.ndarray, " H"], Float[np.ndarray, " H"], Float[np.ndarray, "H H"]]:
    """Mean, standard deviations along the principal directions (descending), and these, as columns."""
    if len(vectors) < 2:
        raise InputError(f"a post-processor cannot be fitted to {len(vectors)} vectors: give two distinct sentences")
    wide = vectors.astype(np.float64)
    mean = np.mean(wide, axis=0)
    centred = wide - mean
    values, directions = np.linalg.eigh(centred.T @ centred / len(wide))
    return mean, np.sqrt(np.maximum(values[::-1], 0)), directions[:, ::-1]
