"""InfoNCE over the global batch (SimCSE, equations 1 and 5)."""

from typing import Unpack

import jax
from jaxtyping import Array, Float

from simcse_jax.objectives.contrast import Metrics, Settings, contrast


def info_nce(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N *M H"] | None = None,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """Contrasts each z1_i with its positive z2_i against every other sentence of the global batch.

    With cosine similarity s, S_ij = s(z1_i, z2_j)/τ and, for hard negatives, S_i,N+j = s(z1_i, z3_j)/τ + [i=j] log α:

        loss_i = −log( exp S_ii / Σ_j exp S_ij ) = softplus( logsumexp_{j≠i} S_ij − S_ii ),   loss = mean_i loss_i

    One direction only, as published. The softplus form is used because nothing in it, or in its gradient, cancels when
    the loss is small. The gradient is that of the global loss, whatever the number of devices; the public PyTorch code
    divides it by the number of devices, which matters to gradient clipping.

    Args:
      z1, z2, z3, settings: see `contrast`.

    Returns:
      The loss, and the metrics of `contrast`.
    """
    c = contrast(z1, z2, z3, **settings)
    return c.mean(jax.nn.softplus(c.negatives - c.positive)), c.metrics
