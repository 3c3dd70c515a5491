"""InfoNCE over the global batch (SimCSE, equations 1 and 5)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
    gather: Callable[[Array], Array] = lambda x: x,
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
      gather: applied to what every anchor meets, the normalised z2 and z3 (stacked) and `valid`: where rows are split
        over devices, it makes them whole on each.

    Returns:
      The loss, and scalar metrics: `loss`, `positive_similarity` (mean cosine of the pairs), `negative_similarity`
      (mean cosine of z1_i, z2_j, j≠i), `alignment` (mean ‖ẑ1_i − ẑ2_i‖²) and `uniformity`
      (log mean_{j≠i} exp(−2‖ẑ1_i − ẑ2_j‖²); Wang & Isola, arXiv 2005.10242, across the two views).
    """
    n = z1.shape[0]
    z1 = unit(z1)
    keys = gather(unit(jnp.stack([z2] if z3 is None else [z2, z3])))
    valid = jnp.ones(n, bool) if valid is None else gather(valid)
    rows, columns = jnp.arange(n)[:, None], jnp.arange(n)[None, :]
    negative = valid[None, :] & (rows != columns)
    # Large but finite: a row without any negative then has loss and gradient 0, where -inf would give NaN.
    masked = jnp.finfo(z1.dtype).min / 2

    cosine = jnp.matmul(z1, keys[0].T, precision=jax.lax.Precision.HIGHEST)
    # Read off the matrix: a product of the rows of z1 and z2 would suggest to XLA that z2 be split as z1 is.
    positive = jnp.sum(jnp.where(rows == columns, cosine, 0), axis=1)
    logits = jnp.where(negative, cosine / temperature, masked)
    if z3 is not None:
        hard = jnp.matmul(z1, keys[1].T, precision=jax.lax.Precision.HIGHEST) / temperature
        hard = hard + jnp.where(rows == columns, hard_negative_log_weight, 0.0)
        logits = jnp.concatenate([logits, jnp.where(valid[None, :], hard, masked)], axis=1)
    losses = jax.nn.softplus(jax.nn.logsumexp(logits, axis=1) - positive / temperature)

    def mean(x: Float[Array, "..."], where: Bool[Array, "..."]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1)

    loss = mean(losses, valid)
    pairs = negative & valid[:, None]
    positive, cosine = jax.lax.stop_gradient((positive, cosine))
    metrics = {
        "loss": loss,
        "positive_similarity": mean(positive, valid),
        "negative_similarity": mean(cosine, pairs),
        "alignment": mean(2 - 2 * positive, valid),
        "uniformity": jnp.log(mean(jnp.exp(4 * cosine - 4), pairs)),
    }
    return loss, metrics
