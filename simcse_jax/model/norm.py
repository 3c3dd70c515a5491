"""LayerNorm (Ba et al., arXiv 1607.06450) that keeps little for its backward pass."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, "*B H"], scale: Float[Array, " H"], bias: Float[Array, " H"], epsilon: float, dtype: Any
) -> Float[Array, "*B H"]:
    """(x − mean) / √(variance + ε) · scale + bias, computed in float32 at least and rounded to `dtype` once.

    The variance is the mean of (x − mean)², not E[x²] − E[x]², which cancels. For the backward pass, x and two numbers
    per token are kept; autodiff would keep three arrays of float32.
    """
    return _forward(x, scale, bias, epsilon, dtype)[0]


@jax.named_scope("norm")
def _forward(x: Array, scale: Array, bias: Array, epsilon: float, dtype: Any) -> tuple[Array, tuple[Array, ...]]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True, dtype=wide)
    centred = x.astype(wide) - mean
    rate = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    lead = (1,) * (x.ndim - 1)
    y = centred * (rate * scale.reshape(*lead, -1)) + bias.reshape(*lead, -1)
    return y.astype(dtype), (x, mean, rate, scale)


@jax.named_scope("norm")
def _backward(epsilon: float, dtype: Any, kept: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, mean, rate, scale = kept
    lead = tuple(range(x.ndim - 1))
    normal = (x.astype(mean.dtype) - mean) * rate
    wide = g.astype(mean.dtype)
    scaled = wide * scale.reshape(*(1,) * len(lead), -1)
    along = jnp.mean(scaled * normal, axis=-1, keepdims=True)
    for_x = rate * (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - normal * along)
    for_scale, for_bias = jnp.sum(wide * normal, axis=lead), jnp.sum(wide, axis=lead)
    return for_x.astype(x.dtype), for_scale.astype(scale.dtype), for_bias.astype(scale.dtype)


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale, initially 1, and a learned bias, initially 0."""

    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon, self.dtype)
