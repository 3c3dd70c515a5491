"""How much of an anchor's gradient comes from its hardest negatives."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simcse_jax.objectives import unit

_BLOCK = 256  # anchors whose similarities are in memory at a time


@partial(jax.jit, static_argnames="share")
def hardest_share(
    z1: Float[Array, "N H"], z2: Float[Array, "N H"], temperature: float | Float[Array, ""], share: float
) -> Float[Array, ""]:
    """The mean over anchors of the weight of their hardest in-batch negatives, in the softmax over all of these.

    The gradient of InfoNCE with respect to the logit of negative j is, but for a factor of the anchor, its softmax
    weight w_ij = exp(s_ij/τ) / Σ_{k≠i} exp(s_ik/τ); this is Σ of the largest ⌈share (N − 1)⌉ of them.

    Args:
      z1: anchors, any scale.
      z2: positives; each is a negative of the other anchors. N ≥ 2.
      temperature: τ.
      share: of the negatives.
    """
    n = len(z1)
    queries, keys, most = unit(z1), unit(z2), math.ceil(share * (n - 1))

    def of_anchor(row: tuple[Float[Array, " H"], Array]) -> Float[Array, ""]:
        query, i = row
        logits = jnp.matmul(keys, query, precision="highest") / temperature
        weights = jax.nn.softmax(logits.at[i].set(-jnp.inf))
        return jnp.sum(jax.lax.top_k(weights, most)[0])

    return jnp.mean(jax.lax.map(of_anchor, (queries, jnp.arange(n)), batch_size=_BLOCK))
