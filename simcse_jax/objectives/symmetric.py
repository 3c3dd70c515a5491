"""InfoNCE in both directions, as in CLIP (Radford et al., arXiv 2103.00020)."""

from dataclasses import replace
from typing import Unpack

from jaxtyping import Array, Float

from simcse_jax.config import NegativesConfig
from simcse_jax.objectives.contrast import Metrics, Settings
from simcse_jax.objectives.info_nce import info_nce


def symmetric(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N *M H"] | None = None,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """The mean of InfoNCE from z1 to z2 (and z3) and from z2 to z1.

        loss = ( info_nce(z1, z2, z3) + info_nce(z2, z1) ) / 2

    Args:
      z1, z2, z3, settings: see `contrast`.

    Returns:
      The loss, and the metrics of `contrast` for the first direction.
    """
    settings["negatives"] = replace(
        settings.get("negatives", NegativesConfig()),
        directions=("query_to_document", "document_to_query"),
        softmax="direction",
    )
    return info_nce(z1, z2, z3, **settings)
