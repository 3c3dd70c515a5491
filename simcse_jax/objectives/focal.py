"""Focal InfoNCE (Hou & Li, arXiv 2310.06918)."""

from functools import partial
from typing import Unpack

import jax
from jaxtyping import Array, Float

from simcse_jax.objectives.contrast import Metrics, Settings, contrast


def _modulated(cosine: Array, margin: float) -> Array:
    return cosine * (cosine + margin)


def focal(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N *M H"] | None = None,
    *,
    margin: float = 0.3,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """InfoNCE whose logits are scaled by the cosine itself: easy negatives and unsure positives count less.

        loss_i = softplus( logsumexp_{j≠i} s_ij (s_ij + m)/τ − s_ii²/τ ),   s the cosine

    Args:
      z1, z2, z3, settings: see `contrast`.
      margin: m.

    Returns:
      The loss, and the metrics of `contrast`.
    """
    c = contrast(z1, z2, z3, **settings, score=partial(_modulated, margin=margin))
    return c.mean(jax.nn.softplus(c.negatives - c.cosine**2 / settings["temperature"])), c.metrics
