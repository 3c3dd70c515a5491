"""The common part of the contrastive losses: cosines of the pairs, reductions over each anchor's negatives, metrics."""

from typing import NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from simcse_jax.config import NegativesConfig
from simcse_jax.errors import InputError
from simcse_jax.objectives.negatives import Earlier, Marks, Sides, debiased, groups_of
from simcse_jax.objectives.pairs import Pairs, PairStatistics, Reduction, Score, dense, identity
from simcse_jax.objectives.vectors import unit

Metrics = dict[str, Float[Array, ""]]


class Settings(TypedDict):
    """Arguments of `contrast` that every loss hands on."""

    temperature: float | Float[Array, ""]
    """τ: similarities are divided by it. An array where it is learned."""
    hard_negative_log_weight: NotRequired[float]
    """log α; 0 if not given."""
    valid: NotRequired[Bool[Array, " N"] | None]
    """Rows that count, as anchors and as negatives, at least one; all if not given."""
    negatives: NotRequired[NegativesConfig]
    """Which sentences are negatives, and how much they weigh; by default all others, the same."""
    marks: NotRequired[Marks]
    """Facts of the examples that `negatives` needs, and which hard negatives there are."""
    earlier: NotRequired[Earlier | None]
    """Sentences of earlier batches, which are negatives, too."""
    pairs: NotRequired[Pairs]
    """The way through the N × N pairs: `dense`, `tiled`, or one of them with its arguments bound."""


class Contrast(NamedTuple):
    """The logits of a batch, in the form that a loss needs.

    The first three have an axis P before the rows where each anchor or direction has a softmax of its own
    (`NegativesConfig.softmax`). A loss that treats them elementwise need not know: `mean` takes the mean over P, too.
    """

    cosine: Float[Array, "*P N"]
    """s(z1_i, z2_i)."""
    positive: Float[Array, "*P N"]
    """S_ii = f(cos(z1_i, z2_i))/τ."""
    negatives: Float[Array, "*P N"]
    """The reduction over the negatives of each anchor; see `PairStatistics`."""
    valid: Bool[Array, " N"]
    metrics: Metrics
    """Scalars that carry no gradient; see `contrast`."""

    def mean(self, losses: Float[Array, "*P N"]) -> Float[Array, ""]:
        """Mean over the rows that count, and over softmaxes."""
        return _mean(losses if losses.ndim == 1 else jnp.mean(losses, axis=0), self.valid)


class _Group(NamedTuple):
    """Negatives that are reduced together."""

    statistics: PairStatistics
    reduced: Float[Array, " N"]
    """The reduction over the negatives, weighed."""
    candidates: Float[Array, " N"]
    """Number of negatives before any is masked."""
    left: Float[Array, " N"]
    """Number that are left."""


def _mean(x: Float[Array, " N"], valid: Bool[Array, " N"]) -> Float[Array, ""]:
    """Mean over the rows that count."""
    return jnp.sum(jnp.where(valid, x, 0)) / jnp.maximum(jnp.sum(valid), 1)


def contrast(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N *M H"] | None = None,
    *,
    temperature: float | Float[Array, ""],
    hard_negative_log_weight: float = 0.0,
    valid: Bool[Array, " N"] | None = None,
    negatives: NegativesConfig = NegativesConfig(),  # noqa: B008 (frozen)
    marks: Marks = Marks(),  # noqa: B008 (a tuple)
    earlier: Earlier | None = None,
    pairs: Pairs = dense,
    score: Score = identity,
    bias: float | Float[Array, ""] = 0.0,
    reduction: Reduction = "logsumexp",
    positive: Float[Array, " N"] | None = None,
) -> Contrast:
    """Contrasts each z1_i with z2_i against all z2_j, j≠i, all z3_j, and all of earlier batches.

    With cosine similarity s and the elementwise function f, S_ij = f(s(z1_i, z2_j))/τ + b and, for each hard negative
    m, S_i,mj = f(s(z1_i, z3_jm))/τ + b + [i=j] log α. `negatives` masks some of them, adds the other directions, and
    weighs them; its docstrings have the equations.

    Args:
      z1: anchors, any scale, any float type (computed in float32 at least).
      z2: positives.
      z3: hard negatives of the same rows, one or M of each; or None.
      temperature: τ.
      hard_negative_log_weight: log α.
      valid: rows that count, as anchors and as negatives; all if None. At least one must be True.
      negatives: which sentences are negatives, and how much they weigh.
      marks: facts of the examples; those that `negatives` needs.
      earlier: sentences of earlier batches, S_i,e = f(s(z1_i, e))/τ + b, in the direction from query to document.
      pairs: the way through the N × N pairs: `dense`, `tiled`, or one of them with its arguments bound.
      score: f.
      bias: b.
      reduction: over the negatives, `logsumexp` or the sum of `softplus`.
      positive: the cosines that margins are measured from; those of z1 and z2 if None.

    Returns:
      The logits, and the metrics `positive_similarity` (mean cosine of the pairs), `negative_similarity` (mean cosine
      of z1_i, z2_j, j≠i), `alignment` (mean ‖ẑ1_i − ẑ2_i‖²), `uniformity` (log mean_{j≠i} exp(−2‖ẑ1_i − ẑ2_j‖²); Wang &
      Isola, arXiv 2005.10242, across the two views) and `effective_negatives` (mean of exp H_i, H_i the entropy of the
      softmax over the negatives of z1_i: their number where all are equally hard, 1 where one outweighs the rest or
      there are no negatives); and, with masks, `masked_share`, of all negatives that there were without them. Where a
      single row counts, `negative_similarity` and `uniformity` are NaN.

    Raises:
      InputError: `hardness` or `debias` with the reduction `softplus`.
    """
    if reduction == "softplus" and (negatives.hardness or negatives.debias):
        raise InputError("negatives.hardness and negatives.debias need the reduction logsumexp: set both to 0")
    valid = jnp.ones(z1.shape[0], bool) if valid is None else valid
    hard = [] if z3 is None else [z3] if z3.ndim == 2 else list(jnp.moveaxis(z3, 1, 0))
    first, others = unit(z1), unit(jnp.stack([z2, *hard]))
    places = len(others)
    if earlier is not None:
        others = jnp.concatenate([others, unit(earlier.vectors)])
    views = [first, *others]
    # Not read off a matrix of logits, so that every way through the pairs gives the same number, bit for bit.
    cosine = jnp.sum(first * others[0], axis=-1)
    sides = Sides(
        negatives, marks, earlier, places, valid, jax.lax.stop_gradient(cosine if positive is None else positive)
    )

    groups: list[_Group] = []
    for anchor, kinds in groups_of(negatives, len(views)):
        own = tuple(None if kind < 2 else hard_negative_log_weight if kind <= places else 0.0 for kind in kinds)
        keys = others if kinds == tuple(range(1, len(views))) else jnp.stack([views[kind] for kind in kinds])
        place = views[anchor], keys, sides.anchors(anchor), sides.keys(kinds)
        found = pairs(
            *place,
            temperature=temperature,
            own=own,
            bias=bias,
            tilt=negatives.hardness,
            score=score,
            reduction=reduction,
        )
        candidates = sides.candidates(kinds)
        left, reduced = candidates if found.masked is None else candidates - found.masked, found.negatives
        if negatives.hardness:
            # The mean of the weights exp(β c) over the negatives is made 1.
            flat = tuple(None if addend is None else 0.0 for addend in own)
            total = pairs(*place, own=flat, temperature=1 / negatives.hardness).negatives
            some = left > 0
            reduced = reduced + jnp.where(some, jnp.log(jnp.where(some, left, 1)) - total, 0)
        groups.append(_Group(found, reduced, candidates, left))

    logit = score(cosine) / temperature + bias
    softmaxes = [(group.reduced, group.left) for group in groups]
    if negatives.softmax == "joint" and len(groups) > 1:
        every, counts = (jnp.stack(x) for x in zip(*softmaxes, strict=True))
        joined = jnp.sum(every, axis=0) if reduction == "softplus" else jax.nn.logsumexp(every, axis=0)
        softmaxes = [(joined, jnp.sum(counts, axis=0))]
    reductions = [
        debiased(reduced, count, logit, temperature, negatives.debias) if negatives.debias else reduced
        for reduced, count in softmaxes
    ]

    known, (_, entropy, similarity, potential, _) = jax.lax.stop_gradient((cosine, groups[0].statistics))
    # As a float: above 65,536 rows the number of pairs does not fit an int32.
    count = jnp.maximum(jnp.sum(valid), 1)
    all_pairs = jnp.maximum(count.astype(known.dtype) * (count - 1), 1)

    def over_pairs(x: Float[Array, " N"]) -> Float[Array, ""]:
        return jnp.where(count > 1, jnp.sum(jnp.where(valid, x, 0)) / all_pairs, jnp.nan)

    metrics = {
        "positive_similarity": _mean(known, valid),
        "negative_similarity": over_pairs(similarity),
        "alignment": _mean(2 - 2 * known, valid),
        "uniformity": jnp.log(over_pairs(potential)),
        "effective_negatives": _mean(jnp.exp(entropy), valid),
    }
    if groups[0].statistics.masked is not None:
        candidates, left = (
            _mean(jnp.sum(jnp.stack(x), axis=0), valid) for x in zip(*(g[2:] for g in groups), strict=True)
        )
        metrics["masked_share"] = (candidates - left) / jnp.maximum(candidates, 1)
    if len(reductions) == 1:
        return Contrast(cosine, logit, reductions[0], valid, metrics)
    stacked = jnp.stack(reductions)
    cosine, logit = (jnp.broadcast_to(x, stacked.shape) for x in (cosine, logit))
    return Contrast(cosine, logit, stacked, valid, metrics)
