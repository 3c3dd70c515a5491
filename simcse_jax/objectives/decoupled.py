"""Decoupled contrastive learning (Yeh et al., arXiv 2110.06848)."""

from typing import Unpack

import jax.numpy as jnp
from jaxtyping import Array, Float

from simcse_jax.objectives.contrast import Metrics, Settings, contrast
from simcse_jax.objectives.pairs import masked


def decoupled(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N *M H"] | None = None,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """InfoNCE without the positive in the denominator (equation 5 of the paper, from z1 to z2 only).

        loss_i = logsumexp_{j≠i} S_ij − S_ii

    The gradient of a pair does not fade when the pair is already close, which matters in small batches. The loss may be
    negative; that of an anchor without negatives is 0.

    Args:
      z1, z2, z3, settings: see `contrast`.

    Returns:
      The loss, and the metrics of `contrast`.
    """
    c = contrast(z1, z2, z3, **settings)
    some = c.negatives > masked(c.negatives.dtype) / 2
    return c.mean(jnp.where(some, c.negatives - c.positive, 0)), c.metrics
