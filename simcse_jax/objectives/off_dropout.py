"""Negatives without dropout noise (SimCSE++; Xu et al., arXiv 2305.13192, section 3)."""

import math
from typing import Unpack

import jax
from jaxtyping import Array, Float

from simcse_jax.errors import InputError
from simcse_jax.objectives.contrast import Metrics, Settings, contrast
from simcse_jax.objectives.vectors import cosines


def off_dropout(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N *M H"] | None = None,
    *,
    clean: Float[Array, "N H"],
    negative_weight: float = 1.0,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """InfoNCE whose positives are encoded with dropout and whose negatives are not.

    With h the vectors of the first sentences without dropout and s the cosine,

        loss_i = softplus( log m + logsumexp_{j≠i} s(h_i, h_j)/τ − s(z1_i, z2_i)/τ )

    Dropout noise makes positives useful, but tells nothing about negatives. The price is a third pass through the
    encoder.

    Args:
      z1, z2, z3, settings: see `contrast`; z3 are negatives of h.
      clean: h.
      negative_weight: m.

    Returns:
      The loss, and the metrics of `contrast`, whose positives are those of z1 and z2.

    Raises:
      InputError: `negative_weight` is not above 0.
    """
    if not negative_weight > 0:
        raise InputError(f"negative_weight of off_dropout is {negative_weight}; it must be greater than 0")
    positive = cosines(z1, z2)
    c = contrast(clean, clean, z3, **settings, positive=positive)
    loss = c.mean(jax.nn.softplus(math.log(negative_weight) + c.negatives - positive / settings["temperature"]))
    known = jax.lax.stop_gradient(positive)
    return loss, c.metrics | {"positive_similarity": c.mean(known), "alignment": c.mean(2 - 2 * known)}
