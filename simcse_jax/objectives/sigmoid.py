"""The pairwise sigmoid loss (SigLIP; Zhai et al., arXiv 2303.15343)."""

from typing import Unpack

import jax
from jaxtyping import Array, Float

from simcse_jax.objectives.contrast import Metrics, Settings, contrast


def sigmoid(
    z1: Float[Array, "N H"],
    z2: Float[Array, "N H"],
    z3: Float[Array, "N *M H"] | None = None,
    *,
    bias: float | Float[Array, ""] = -10.0,
    **settings: Unpack[Settings],
) -> tuple[Float[Array, ""], Metrics]:
    """The loss that asks of each pair on its own whether it is a positive.

        loss_i = softplus(−(S_ii + b)) + Σ_{j≠i} softplus(S_ij + b)

    In the paper, 1/τ and b are learned and start at 10 and −10; here both are settings, or learned too
    (`objective.learned`). b should make up for the N − 1 negatives of each positive: about −log N.

    Args:
      z1, z2, z3, settings: see `contrast`.
      bias: b, added to every logit.

    Returns:
      The loss, and the metrics of `contrast`.
    """
    c = contrast(z1, z2, z3, **settings, bias=bias, reduction="softplus")
    return c.mean(jax.nn.softplus(-c.positive) + c.negatives), c.metrics
