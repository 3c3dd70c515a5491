"""Softmax attention with dropout, with the heads as an axis of their own."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from simcse_jax.noise import Drawn, drop


class Noise(NamedTuple):
    """The dropout noise of attention weights."""

    drawn: Drawn
    counter: UInt32[Array, "..."]
    """Number of each weight in its sentence."""


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    query: Float[Array, "B h Q d"],
    key: Float[Array, "B h L d"],
    value: Float[Array, "B h L d"],
    allowed: Bool[Array, "B 1 _ L"],
    noise: Noise | None,
    rate: float,
) -> Float[Array, "B h Q d"]:
    """drop(softmax(Q Kᵀ / √d)) V, the softmax in float32 or wider.

    For the backward pass, queries, keys, values and weights are kept, in their type, and the noise is drawn again.

    Args:
      query, key, value: by head.
      allowed: whether a query meets a key. A query that meets no key (in an empty slot of a packed row) gets the mean
        of all values, which nothing uses.
      noise: the dropout noise of the weights; None drops nothing.
      rate: probability that a weight is dropped.
    """
    return _forward(query, key, value, allowed, noise, rate)[0]


@jax.named_scope("attention")
def _forward(
    query: Array, key: Array, value: Array, allowed: Array, noise: Noise | None, rate: float
) -> tuple[Array, Any]:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=wide) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(wide).min)).astype(query.dtype)
    context = jnp.einsum("bhqk,bhkd->bhqd", _dropped(weights, noise, rate), value)
    return context, (query, key, value, weights, noise)


def _dropped(x: Array, noise: Noise | None, rate: float) -> Array:
    return x if noise is None else drop(x, noise.drawn, noise.counter, rate)


@jax.named_scope("attention")
def _backward(rate: float, kept: Any, g: Array) -> tuple[Array | None, ...]:
    query, key, value, weights, noise = kept
    wide = jnp.promote_types(query.dtype, jnp.float32)
    for_value = jnp.einsum("bhqk,bhqd->bhkd", _dropped(weights, noise, rate), g)
    # Dropping is linear: the gradient passes where a weight did.
    for_weights = _dropped(jnp.einsum("bhqd,bhkd->bhqk", g, value, preferred_element_type=wide), noise, rate)
    mean = jnp.sum(weights * for_weights, axis=-1, keepdims=True)
    for_scores = (weights * (for_weights - mean) / query.shape[-1] ** 0.5).astype(query.dtype)
    for_query = jnp.einsum("bhqk,bhkd->bhqd", for_scores, key)
    for_key = jnp.einsum("bhqk,bhqd->bhkd", for_scores, query)
    return for_query, for_key, for_value, None, None


attend.defvjp(_forward, _backward)
