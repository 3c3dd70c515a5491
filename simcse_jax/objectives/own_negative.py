"""A contrast with each sentence's own hard negative, without in-batch negatives (an ablation of SimCSE)."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simcse_jax.errors import InputError
from simcse_jax.objectives.contrast import Metrics, Settings, contrast
from simcse_jax.objectives.negatives import Marks
from simcse_jax.objectives.pairs import masked
from simcse_jax.objectives.vectors import unit


def own_negative(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N *M H"] | None = None,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """The loss that asks whether z1_i is closer to its positive than to its hard negatives.

        loss_i = softplus( logsumexp_m s(z1_i, z3_im)/τ + log α − s(z1_i, z2_i)/τ ),   s the cosine

    Args:
      z1, z2, z3, settings: see `contrast`; only the metrics go through all pairs.

    Returns:
      The loss, and the metrics of `contrast`.

    Raises:
      InputError: no hard negatives.
    """
    if z3 is None:
        raise InputError(
            "the objective own_negative needs a hard negative with every example: give three columns or more"
        )
    # z1 is used twice: the two parts of its gradient are added before they are rounded to its type.
    z1 = z1.astype(jnp.promote_types(z1.dtype, jnp.float32))
    c = contrast(z1, z2, z3, **settings)
    hard = z3[:, None] if z3.ndim == 2 else z3
    present = settings.get("marks", Marks()).present
    logits = jnp.sum(unit(z1)[:, None] * unit(hard), axis=-1) / settings["temperature"]
    if present is not None:
        logits = jnp.where(present[:, 2:], logits, masked(logits.dtype))
    own = jax.nn.logsumexp(logits, axis=1) + settings.get("hard_negative_log_weight", 0)
    return c.mean(jax.nn.softplus(own - c.cosine / settings["temperature"])), c.metrics
