"""InfoNCE in both directions, as in CLIP (Radford et al., arXiv 2103.00020)."""

from typing import Unpack

from jaxtyping import Array, Float

from simcse_jax.objectives.contrast import Metrics, Settings, contrast, moderate
from simcse_jax.objectives.info_nce import mean_info_nce


def symmetric(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N H"] | None = None,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """The mean of InfoNCE from z1 to z2 (and z3) and from z2 to z1.

        loss = ( info_nce(z1, z2, z3) + info_nce(z2, z1) ) / 2

    Args:
      z1, z2, z3, settings: see `contrast`.

    Returns:
      The loss, and the metrics of `contrast` for the first direction.
    """
    z1, z2, z3 = moderate(z1), moderate(z2), None if z3 is None else moderate(z3)
    forth, back = contrast(z1, z2, z3, **settings, moderated=True), contrast(z2, z1, **settings, moderated=True)
    return (mean_info_nce(forth) + mean_info_nce(back)) / 2, forth.metrics
