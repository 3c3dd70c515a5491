"""Statistics of all pairs of the global batch for contrastive losses, computed from the whole matrix of logits."""

import itertools
from collections.abc import Callable
from functools import reduce
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

Score = Callable[[Array], Array]
"""An elementwise function of cosines."""
Reduction = Literal["logsumexp", "softplus"]


def identity(cosine: Array) -> Array:
    """The score of plain InfoNCE."""
    return cosine


class AnchorMarks(NamedTuple):
    """What tells the false negatives of each anchor; None where it is not asked for. See `false_negatives`."""

    texts: UInt32[Array, "N T 2"] | None = None
    """64-bit ids of the texts of the anchor's example, in two words each."""
    ceiling: Float[Array, " N"] | None = None
    """A cosine above which a sentence is too similar to the anchor to be a negative."""
    guide: Float[Array, "N G"] | None = None
    """Vectors of another encoder, of length 1."""
    guide_ceiling: Float[Array, " N"] | None = None
    """The same limit for cosines of `guide`."""


class KeyMarks(NamedTuple):
    """What tells which sentences are negatives, by kind and row."""

    valid: Bool[Array, "K N"]
    """Sentences that are negatives at all."""
    texts: UInt32[Array, "K N U 2"] | None = None
    """Ids of texts; a sentence is no negative of an anchor that has one of them."""
    guide: Float[Array, "K N G"] | None = None


class PairStatistics(NamedTuple):
    """A few numbers per anchor, from which a loss over all N × N pairs can be computed.

    With cosine c_i,kj of anchor i and sentence j of kind k, the loss's score function f (by default the identity), its
    tilt β and bias b (by default 0), S_i,kj = f(c_i,kj)/τ + β c_i,kj + b + [i=j] own_k. The negatives of i are all
    (k, j) that are valid, except its own sentences of the kinds whose `own` is None, and except false negatives.
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
    masked: Float[Array, " N"] | None = None
    """Number of false negatives among the valid sentences; None where nothing looks for them."""


@runtime_checkable
class Pairs(Protocol):
    """A function that computes the statistics. All such functions give the same values and gradients, to rounding."""

    def __call__(
        self,
        queries: Float[Array, "N H"],
        keys: Float[Array, "K N H"],
        anchor_marks: AnchorMarks,
        key_marks: KeyMarks,
        *,
        temperature: float | Float[Array, ""],
        own: tuple[float | None, ...],
        bias: float | Float[Array, ""] = 0.0,
        tilt: float = 0.0,
        score: Score = identity,
        reduction: Reduction = "logsumexp",
    ) -> PairStatistics:
        """Computes the statistics.

        Args:
          queries: anchors of length 1, float32 or float64.
          keys: K kinds of sentences of length 1; those of one row belong to the anchor of that row.
          anchor_marks, key_marks: what tells which sentences are negatives; no gradient flows through them.
          temperature: τ; an array has a gradient.
          own: for each kind, the addend to the logit of an anchor with the sentence of its own row, or None where that
            pair is no negative: the positive, or the anchor itself.
          bias: b; an array has a gradient.
          tilt: β.
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


def false_negatives(cosine: Float[Array, "A B"], anchors: AnchorMarks, keys: KeyMarks) -> Bool[Array, "A B"] | None:
    """The pairs of a block that are masked although they are of different rows; None where nothing looks for them.

    They share a text, or their cosine, or that of the guide, is above the anchor's ceiling.

    Args:
      cosine: the block.
      anchors: marks of its anchors.
      keys: marks of its sentences, of one kind, without the axis K.
    """
    tests = []
    if anchors.texts is not None and keys.texts is not None:
        # By a reduction over both words: their conjunction by & takes CPUs five times as long.
        each = itertools.product(range(anchors.texts.shape[1]), range(keys.texts.shape[1]))
        tests += [jnp.all(anchors.texts[:, None, a] == keys.texts[None, :, b], axis=-1) for a, b in each]
    if anchors.ceiling is not None:
        tests.append(cosine > anchors.ceiling[:, None])
    if anchors.guide is not None and keys.guide is not None and anchors.guide_ceiling is not None:
        tests.append(similarities(anchors.guide, keys.guide) > anchors.guide_ceiling[:, None])
    return reduce(jnp.logical_or, tests) if tests else None


class Logits(NamedTuple):
    """The parts of a logit that do not depend on the pair, beside its cosine; see `PairStatistics`."""

    temperature: float | Float[Array, ""]
    bias: float | Float[Array, ""]
    tilt: float
    score: Score

    def __call__(self, cosine: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
        """S of pairs of different rows."""
        logits = self.score(cosine) / self.temperature
        if self.tilt:
            logits = logits + self.tilt * cosine
        return logits if isinstance(self.bias, int | float) and not self.bias else logits + self.bias


def block_logits(
    cosine: Float[Array, "A B"],
    same: Bool[Array, "A B"],
    anchors: AnchorMarks,
    keys: KeyMarks,
    logits_of: Logits,
    own: float | None,
) -> tuple[Float[Array, "A B"], Bool[Array, "A B"], Bool[Array, "A B"] | None]:
    """Logits of a block of pairs of one kind, which of them are negatives, and which only are not because masked.

    Args:
      cosine: the block.
      same: where anchor and sentence are of one row of the batch.
      anchors, keys: as of `false_negatives`.
      logits_of: the logits.
      own: see `Pairs`.
    """
    logits = logits_of(cosine)
    negative = jnp.broadcast_to(keys.valid[None, :], cosine.shape)
    if own is None:
        negative = negative & ~same
    else:
        logits = logits + jnp.where(same, own, 0.0)
    false = false_negatives(cosine, anchors, keys)
    if false is None:
        return logits, negative, None
    return logits, negative & ~false, negative & false


def dense(
    queries: Float[Array, "N H"],
    keys: Float[Array, "K N H"],
    anchor_marks: AnchorMarks,
    key_marks: KeyMarks,
    *,
    temperature: float | Float[Array, ""],
    own: tuple[float | None, ...],
    bias: float | Float[Array, ""] = 0.0,
    tilt: float = 0.0,
    score: Score = identity,
    reduction: Reduction = "logsumexp",
    gather: Callable[[Array], Array] = lambda x: x,
) -> PairStatistics:
    """The statistics from the whole matrix of logits: K·N² numbers, several times over. See `Pairs`.

    Args:
      queries, keys, anchor_marks, key_marks, temperature, own, bias, tilt, score, reduction: see `Pairs`.
      gather: applied to `keys` and to each array of `key_marks`, rows in the second axis, which every anchor meets:
        where rows are split over devices, it makes them whole on each.
    """
    keys, key_marks = gather(keys), jax.tree.map(gather, key_marks)
    kinds, n = keys.shape[:2]
    cosine = similarities(queries, keys.reshape(kinds * n, -1))
    same = jnp.eye(n, dtype=bool)
    logits_of = Logits(temperature, bias, tilt, score)
    blocks = [
        block_logits(part, same, anchor_marks, jax.tree.map(lambda x, k=k: x[k], key_marks), logits_of, own[k])
        for k, part in enumerate(jnp.split(cosine, kinds, axis=1))
    ]
    logits = jnp.concatenate([jnp.where(negative, s, masked(s.dtype)) for s, negative, _ in blocks], axis=1)
    logsumexp = jax.nn.logsumexp(logits, axis=1)
    # softplus of a masked logit is 0, and so is its derivative.
    negatives = logsumexp if reduction == "logsumexp" else jnp.sum(jax.nn.softplus(logits), axis=1)

    logits, cosine, top = jax.lax.stop_gradient((logits, cosine[:, :n], logsumexp))
    others = key_marks.valid[0][None, :] & ~same
    weights = jnp.exp(logits - top[:, None])
    entropy = -jnp.sum(weights * jnp.where(weights > 0, logits - top[:, None], 0), axis=1)
    false = [jnp.sum(found, axis=1).astype(top.dtype) for _, _, found in blocks if found is not None]
    return PairStatistics(
        negatives,
        jnp.where(top > masked(top.dtype) / 2, entropy, 0),
        jnp.sum(jnp.where(others, cosine, 0), axis=1),
        jnp.sum(jnp.where(others, jnp.exp(4 * cosine - 4), 0), axis=1),
        jnp.sum(jnp.stack(false), axis=0) if false else None,
    )
