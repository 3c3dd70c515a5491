"""A contrast with each sentence's own hard negative, without in-batch negatives (an ablation of SimCSE)."""

from typing import Unpack

import jax
from jaxtyping import Array, Float

from simcse_jax.errors import InputError
from simcse_jax.objectives.contrast import Metrics, Settings, contrast, cosines, moderate


def own_negative(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N H"] | None = None,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """The loss that asks whether z1_i is closer to its positive than to its hard negative.

        loss_i = softplus( s(z1_i, z3_i)/τ + log α − s(z1_i, z2_i)/τ ),   s the cosine

    Args:
      z1, z2, z3, settings: see `contrast`; only the metrics go through all pairs.

    Returns:
      The loss, and the metrics of `contrast`.

    Raises:
      InputError: no hard negatives.
    """
    if z3 is None:
        raise InputError("the objective own_negative needs a hard negative with every example: give three columns")
    z1, z2, z3 = moderate(z1), moderate(z2), moderate(z3)
    c = contrast(z1, z2, z3, **settings, moderated=True)
    difference = (cosines(z1, z3, moderated=True) - c.cosine) / settings["temperature"] + settings.get(
        "hard_negative_log_weight", 0
    )
    return c.mean(jax.nn.softplus(difference)), c.metrics
