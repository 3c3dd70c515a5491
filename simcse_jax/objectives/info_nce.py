"""InfoNCE over the global batch (SimCSE, equations 1 and 5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from simcse_jax.objectives.pairs import Pairs, dense

Metrics = dict[str, Float[Array, ""]]


def unit(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """x / ‖x‖ along the last axis, in at least float32; a zero vector stays zero, and its gradient finite."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    # The gradient holds ‖x‖⁻³, which overflows in float32 below 1e-12.
    return x * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1))


def info_nce(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N H"] | None = None,
    *,
    temperature: float = 0.05,
    hard_negative_log_weight: float = 0.0,
    valid: Bool[Array, "N"] | None = None,
    pairs: Pairs = dense,
) -> tuple[Float[Array, ""], Metrics]:
    """Contrasts each z1_i with its positive z2_i against every other sentence of the global batch.

    With cosine similarity s, S_ij = s(z1_i, z2_j)/τ and, for hard negatives, S_i,N+j = s(z1_i, z3_j)/τ + [i=j] log α:

        loss_i = −log( exp S_ii / Σ_j exp S_ij ) = softplus( logsumexp_{j≠i} S_ij − S_ii ),   loss = mean_i loss_i

    One direction only, as published. The softplus form is used because nothing in it, or in its gradient, cancels when
    the loss is small. The gradient is that of the global loss, whatever the number of devices; the public PyTorch code
    divides it by the number of devices, which matters to gradient clipping.

    Args:
      z1: anchors, any scale, any float type (computed in float32 at least).
      z2: positives.
      z3: hard negatives of the same rows, or None.
      temperature: τ.
      hard_negative_log_weight: log α.
      valid: rows that count, as anchors and as negatives; all where None. At least one must be True.
      pairs: how the N × N pairs are gone through: `dense`, `tiled`, or one of them with its arguments bound.

    Returns:
      The loss, and scalar metrics: `loss`, `positive_similarity` (mean cosine of the pairs), `negative_similarity`
      (mean cosine of z1_i, z2_j, j≠i), `alignment` (mean ‖ẑ1_i − ẑ2_i‖²), `uniformity`
      (log mean_{j≠i} exp(−2‖ẑ1_i − ẑ2_j‖²); Wang & Isola, arXiv 2005.10242, across the two views) and
      `effective_negatives` (mean of exp H_i, H_i the entropy of the softmax over the negatives of i: their number where
      all are equally hard, 1 where one outweighs the rest or there is none).
    """
    n = z1.shape[0]
    valid = jnp.ones(n, bool) if valid is None else valid
    queries, keys = unit(z1), unit(jnp.stack([z2] if z3 is None else [z2, z3]))
    own = () if z3 is None else (hard_negative_log_weight,)
    statistics = pairs(queries, keys, valid, temperature=temperature, own=own)
    # Not read off a matrix of logits, so that it is the same number, bit for bit, with every way through the pairs.
    positive = jnp.sum(queries * keys[0], axis=-1)
    losses = jax.nn.softplus(statistics.logsumexp - positive / temperature)

    count = jnp.maximum(jnp.sum(valid), 1)

    def mean(x: Float[Array, "N"], terms: Array = count) -> Float[Array, ""]:
        return jnp.sum(jnp.where(valid, x, 0)) / terms

    loss = mean(losses)
    positive, (_, entropy, similarity, potential) = jax.lax.stop_gradient((positive, statistics))
    # As a float: above 65,536 rows the number of pairs does not fit an int32.
    others = jnp.maximum(count.astype(loss.dtype) * (count - 1), 1)
    metrics = {
        "loss": loss,
        "positive_similarity": mean(positive),
        "negative_similarity": mean(similarity, others),
        "alignment": mean(2 - 2 * positive),
        "uniformity": jnp.log(mean(potential, others)),
        "effective_negatives": mean(jnp.exp(entropy)),
    }
    return loss, metrics
