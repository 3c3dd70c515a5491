"""Statistics of all pairs of the global batch for contrastive losses, computed from the whole matrix of logits."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Score = Callable[[Array], Array]
"""An elementwise function of cosines."""
Reduction = Literal["logsumexp", "softplus"]


def identity(cosine: Array) -> Array:
    """The score of plain InfoNCE."""
    return cosine


class PairStatistics(NamedTuple):
    """A few numbers per anchor, from which a loss over all N × N pairs can be computed.

    With cosine c_i,kj of anchor i and sentence j of kind k and the loss's score function f (by default the identity),
    S_i,kj = f(c_i,kj)/τ + [i=j] own_k. The negatives of i are all (k, j) whose row j is valid, except its positive
    (0, i).
    """

    negatives: Float[Array, " N"]
    """n_i = log Σ exp S_i,kj over the negatives, a large negative number without any; or, with the reduction
    `softplus`, Σ log(1 + exp S_i,kj)."""
    entropy: Float[Array, " N"]
    """Entropy in nats of the softmax over the negatives, 0 without any; no gradient flows through it."""
    similarity: Float[Array, " N"]
    """Σ_{j≠i} c_i,0j over valid rows j; no gradient."""
    potential: Float[Array, " N"]
    """Σ_{j≠i} exp(−2‖q_i − k_0j‖²) = Σ exp(4 c_i,0j − 4) over valid rows j; no gradient."""


@runtime_checkable
class Pairs(Protocol):
    """A function that computes the statistics. All such functions give the same values and gradients, to rounding."""

    def __call__(
        self,
        queries: Float[Array, "N H"],
        keys: Float[Array, "K N H"],
        valid: Bool[Array, " N"],
        *,
        temperature: float,
        own: tuple[float, ...],
        score: Score = identity,
        reduction: Reduction = "logsumexp",
    ) -> PairStatistics:
        """Computes the statistics.

        Args:
          queries: anchors of length 1, float32 or float64.
          keys: K kinds of sentences of length 1; those of one row belong to the anchor of that row. Kind 0 holds the
            positives.
          valid: rows that are negatives of others.
          temperature: τ.
          own: for kinds 1 to K−1, the addend to the logit of an anchor with the sentence of its own row.
          score: f, differentiable; a function of the module or a `partial` of one, so that it can be hashed.
          reduction: the reduction over the negatives that `negatives` holds.
        """


def masked(dtype: jnp.dtype) -> float:
    """A finite stand-in for −∞, so that an anchor without any negative has loss and gradient 0 and not NaN."""
    return float(jnp.finfo(dtype).min) / 2


def similarities(queries: Float[Array, "A H"], keys: Float[Array, "B H"]) -> Float[Array, "A B"]:
    """All inner products, accumulated in float32 at least; float32 inputs are not rounded to a shorter type."""
    return jnp.matmul(
        queries,
        keys.T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(queries.dtype, jnp.float32),
    )


def block_logits(
    cosine: Float[Array, "A B"],
    same: Bool[Array, "A B"],
    valid: Bool[Array, " B"],
    temperature: float,
    own: float | None,
    score: Score,
) -> tuple[Float[Array, "A B"], Bool[Array, "A B"]]:
    """Logits of a block of pairs of one kind, and which of them are negatives.

    Args:
      cosine: the block.
      same: where anchor and sentence are of one row of the batch.
      valid: which sentences count.
      temperature: τ.
      own: the addend where they are of one row; None where that pair is the positive.
      score: f.
    """
    logits = score(cosine) / temperature
    if own is None:
        return logits, valid[None, :] & ~same
    return logits + jnp.where(same, own, 0.0), jnp.broadcast_to(valid[None, :], cosine.shape)


def dense(
    queries: Float[Array, "N H"],
    keys: Float[Array, "K N H"],
    valid: Bool[Array, " N"],
    *,
    temperature: float,
    own: tuple[float, ...],
    score: Score = identity,
    reduction: Reduction = "logsumexp",
    gather: Callable[[Array], Array] = lambda x: x,
) -> PairStatistics:
    """The statistics from the whole matrix of logits: K·N² numbers, several times over. See `Pairs`.

    Args:
      queries, keys, valid, temperature, own, score, reduction: see `Pairs`.
      gather: applied to `keys` and `valid`, which every anchor meets: where rows are split over devices, it makes them
        whole on each.
    """
    keys, valid = gather(keys), gather(valid)
    kinds, n = keys.shape[:2]
    cosine = similarities(queries, keys.reshape(kinds * n, -1))
    same = jnp.eye(n, dtype=bool)
    blocks = [
        block_logits(part, same, valid, temperature, bias, score)
        for part, bias in zip(jnp.split(cosine, kinds, axis=1), (None, *own), strict=True)
    ]
    logits = jnp.concatenate([jnp.where(negative, s, masked(s.dtype)) for s, negative in blocks], axis=1)
    logsumexp = jax.nn.logsumexp(logits, axis=1)
    # softplus of a masked logit is 0, and so is its derivative.
    negatives = logsumexp if reduction == "logsumexp" else jnp.sum(jax.nn.softplus(logits), axis=1)

    logits, cosine, top = jax.lax.stop_gradient((logits, cosine[:, :n], logsumexp))
    negative = blocks[0][1]
    weights = jnp.exp(logits - top[:, None])
    entropy = -jnp.sum(weights * jnp.where(weights > 0, logits - top[:, None], 0), axis=1)
    return PairStatistics(
        negatives,
        jnp.where(top > masked(top.dtype) / 2, entropy, 0),
        jnp.sum(jnp.where(negative, cosine, 0), axis=1),
        jnp.sum(jnp.where(negative, jnp.exp(4 * cosine - 4), 0), axis=1),
    )
