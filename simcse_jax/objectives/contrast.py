"""The common part of the contrastive losses: cosines of the pairs, reductions over each anchor's negatives, metrics."""

from typing import NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from simcse_jax.objectives.pairs import Pairs, Reduction, Score, dense, identity

Metrics = dict[str, Float[Array, ""]]


class Settings(TypedDict):
    """Arguments of `contrast` that every loss hands on."""

    temperature: float
    """τ: similarities are divided by it."""
    hard_negative_log_weight: NotRequired[float]
    """log α; 0 if not given."""
    valid: NotRequired[Bool[Array, " N"] | None]
    """Rows that count, as anchors and as negatives, at least one; all if not given."""
    pairs: NotRequired[Pairs]
    """The way through the N × N pairs: `dense`, `tiled`, or one of them with its arguments bound."""


class Contrast(NamedTuple):
    """The logits of a batch, in the form that a loss needs."""

    cosine: Float[Array, " N"]
    """s(z1_i, z2_i)."""
    positive: Float[Array, " N"]
    """S_ii = f(cos(z1_i, z2_i))/τ."""
    negatives: Float[Array, " N"]
    """The reduction over the negatives of each anchor; see `PairStatistics`."""
    valid: Bool[Array, " N"]
    metrics: Metrics
    """Scalars that carry no gradient; see `contrast`."""

    def mean(self, losses: Float[Array, " N"]) -> Float[Array, ""]:
        """Mean over the rows that count."""
        return _mean(losses, self.valid)


def moderate(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """`x` in at least float32, with rows whose largest entry is far from 1 scaled to about 1 by a power of two.

    Nothing derived from the squares of a row, such as its norm and the gradient of its norm, then overflows or
    vanishes. Other rows keep every bit: those with a largest entry from 2⁻³⁰ to 2³⁰, and those below 2¹⁶ times the
    smallest normal number (8e-34 in float32), whose gradient would overflow and which count as zero.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * _scale(x)


def _scale(x: Float[Array, "*batch H"]) -> Float[Array, "*batch 1"]:
    """The power of two by which `moderate` multiplies each row."""
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True, initial=0)
    kept = (largest < 2.0**16 * jnp.finfo(x.dtype).tiny) | ((largest >= 2.0**-30) & (largest <= 2.0**30))
    # Below the largest exponent by two, so that the power is not subnormal, which some devices flush to zero.
    exponent = jnp.minimum(jnp.frexp(largest)[1], jnp.finfo(x.dtype).maxexp - 2)
    return jnp.ldexp(jnp.ones((), x.dtype), jnp.where(kept, 0, -exponent))


@jax.custom_vjp
def unit(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """x / ‖x‖ along the last axis, at any scale, in at least float32; a zero vector stays zero, its gradient finite."""
    return _unit_forward(x)[0]


def _unit_forward(x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    # `_unit(moderate(x))` without a copy of the rows.
    rows = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = _scale(rows)
    square = jnp.sum((rows * scale) * (rows * scale), axis=-1, keepdims=True)
    return rows * (scale * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1))), (x, scale, square)


def _unit_backward(saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array]:
    # In the order of JAX's own rules for `_unit(moderate(x))`, so that ordinary rows get the same bits.
    x, scale, square = saved
    safe = jnp.where(square > 1e-24, square, 1)
    root = jax.lax.rsqrt(safe)
    # Of long rows the gradient is short: neither product leaves the range of the type.
    large = scale < 1
    left, right = jnp.where(large, 1, scale), jnp.where(large, scale, 1)
    of_root = jnp.sum((gradient * left) * (x * right), axis=-1, keepdims=True)
    of_square = jnp.where(square > 1e-24, of_root * (-0.5 * (root / safe)), 0)
    of_rows = gradient * root + of_square * (x * scale) + of_square * (x * scale)
    return ((of_rows * scale).astype(x.dtype),)


unit.defvjp(_unit_forward, _unit_backward)


def _unit(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """`unit` of rows from `moderate`."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1))


def cosines(a: Float[Array, "N H"], b: Float[Array, "N H"], moderated: bool = False) -> Float[Array, " N"]:
    """Cosine of each pair of rows; for `moderated` see `contrast`."""
    return jnp.sum(_unit(a) * _unit(b), axis=-1) if moderated else jnp.sum(unit(a) * unit(b), axis=-1)


def _mean(x: Float[Array, " N"], valid: Bool[Array, " N"]) -> Float[Array, ""]:
    """Mean over the rows that count."""
    return jnp.sum(jnp.where(valid, x, 0)) / jnp.maximum(jnp.sum(valid), 1)


def contrast(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N H"] | None = None,
    *,
    temperature: float,
    hard_negative_log_weight: float = 0.0,
    valid: Bool[Array, " N"] | None = None,
    pairs: Pairs = dense,
    score: Score = identity,
    reduction: Reduction = "logsumexp",
    moderated: bool = False,
) -> Contrast:
    """Contrasts each z1_i with z2_i against all z2_j, j≠i, and all z3_j.

    With cosine similarity s and the elementwise function f, S_ij = f(s(z1_i, z2_j))/τ and
    S_i,N+j = f(s(z1_i, z3_j))/τ + [i=j] log α.

    Args:
      z1: anchors, any scale, any float type (computed in float32 at least).
      z2: positives.
      z3: hard negatives of the same rows, or None.
      temperature: τ.
      hard_negative_log_weight: log α.
      valid: rows that count, as anchors and as negatives; all if None. At least one must be True.
      pairs: the way through the N × N pairs: `dense`, `tiled`, or one of them with its arguments bound.
      score: f.
      reduction: over the negatives, `logsumexp` or the sum of `softplus`.
      moderated: the vectors come from `moderate`. A loss that uses a vector in two places calls it itself, once, so
        that the sum of both gradients is the same, bit for bit, as without it.

    Returns:
      The logits, and the metrics `positive_similarity` (mean cosine of the pairs), `negative_similarity` (mean cosine
      of z1_i, z2_j, j≠i), `alignment` (mean ‖ẑ1_i − ẑ2_i‖²), `uniformity` (log mean_{j≠i} exp(−2‖ẑ1_i − ẑ2_j‖²); Wang &
      Isola, arXiv 2005.10242, across the two views) and `effective_negatives` (mean of exp H_i, H_i the entropy of the
      softmax over the negatives of i: their number where all are equally hard, 1 where one outweighs the rest or
      there are no negatives). Where a single row counts, `negative_similarity` and `uniformity` are NaN.
    """
    valid = jnp.ones(z1.shape[0], bool) if valid is None else valid
    to_unit = _unit if moderated else unit
    queries, keys = to_unit(z1), to_unit(jnp.stack([z2] if z3 is None else [z2, z3]))
    own = () if z3 is None else (hard_negative_log_weight,)
    statistics = pairs(queries, keys, valid, temperature=temperature, own=own, score=score, reduction=reduction)
    # Not read off a matrix of logits, so that every way through the pairs gives the same number, bit for bit.
    cosine = jnp.sum(queries * keys[0], axis=-1)

    known, (_, entropy, similarity, potential) = jax.lax.stop_gradient((cosine, statistics))
    # As a float: above 65,536 rows the number of pairs does not fit an int32.
    count = jnp.maximum(jnp.sum(valid), 1)
    others = jnp.maximum(count.astype(known.dtype) * (count - 1), 1)

    def over_pairs(x: Float[Array, " N"]) -> Float[Array, ""]:
        return jnp.where(count > 1, jnp.sum(jnp.where(valid, x, 0)) / others, jnp.nan)

    metrics = {
        "positive_similarity": _mean(known, valid),
        "negative_similarity": over_pairs(similarity),
        "alignment": _mean(2 - 2 * known, valid),
        "uniformity": jnp.log(over_pairs(potential)),
        "effective_negatives": _mean(jnp.exp(entropy), valid),
    }
    return Contrast(cosine, score(cosine) / temperature, statistics.negatives, valid, metrics)
