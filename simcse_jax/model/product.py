"""Dense layers that sum their matrix products in wider arithmetic than that of the factors."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(
    x: Float[Array, "T K"], kernel: Float[Array, "K N"], bias: Float[Array, " N"], dtype: Any
) -> Float[Array, "T N"]:
    """x W + b, with the factors rounded to `dtype`; sums are float32 at least.

    The gradients of kernel and bias keep their types: with bfloat16 they are not rounded.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.named_scope("product"):
        return (_multiply("tk,kn->tn", x, kernel, dtype).astype(wide) + bias.astype(wide)[None, :]).astype(dtype)


def _multiply(form: str, x: Array, kernel: Array, dtype: Any) -> Array:
    """A product of factors in `dtype`, summed in float32 at least, in a type that holds as much as `dtype`.

    CPUs use their bfloat16 units only for products with float32 results: for bfloat16 results, XLA widens the factors
    first. Accelerators sum in float32 either way and write half as much for bfloat16 results.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    factors = x, kernel.astype(dtype)

    def product(kind: Any, x: Array, y: Array) -> Array:
        return jnp.einsum(form, x, y, preferred_element_type=kind).astype(dtype)

    if wide == dtype:
        return product(dtype, *factors)
    return jnp.asarray(
        jax.lax.platform_dependent(*factors, cpu=partial(product, wide), default=partial(product, dtype))
    )


def _forward(x: Array, kernel: Array, bias: Array, dtype: Any) -> tuple[Array, tuple[Array, Array, Array]]:
    return affine(x, kernel, bias, dtype), (x, kernel, bias)


def _backward(dtype: Any, kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, kernel, bias = kept
    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.named_scope("product_gradient"):
        for_x = _multiply("tn,kn->tk", g, kernel, dtype).astype(x.dtype)
    with jax.named_scope("weights_gradient"):
        for_kernel, for_bias = _for_kernel(x, g, wide), jnp.sum(g, axis=0, dtype=wide)
    return for_x, for_kernel.astype(kernel.dtype), for_bias.astype(bias.dtype)


def _for_kernel(x: Float[Array, "T K"], g: Float[Array, "T N"], wide: Any) -> Float[Array, "K N"]:
    """xᵀ g."""

    def product(x: Array, g: Array) -> Array:
        return jnp.einsum("tk,tn->kn", x, g, preferred_element_type=wide)

    def in_halves(x: Array, g: Array) -> Array:
        # XLA multiplies on a CPU's bfloat16 units where the left factor is summed over its last axis. It folds a plain
        # transposition into the product, and then widens both; into a loop it does not reach. Turned as integers,
        # because moving bfloat16 about widens it, too; the narrower factor, because wide rows turn ten times as slowly.
        narrow, other = (x, g) if x.shape[1] <= g.shape[1] else (g, x)
        bits = jax.lax.bitcast_convert_type(narrow, jnp.uint16).T.reshape(2, -1, len(x))

        def half(bits: Array) -> Array:
            turned = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
            return jnp.einsum("kt,tn->kn", turned, other, preferred_element_type=wide)

        whole: Array = jax.lax.map(half, bits).reshape(-1, other.shape[1])
        return whole if narrow is x else whole.T

    if x.dtype != jnp.bfloat16 or min(x.shape[1], g.shape[1]) % 2:
        return product(x, g)
    return jnp.asarray(jax.lax.platform_dependent(x, g, cpu=in_halves, default=product))


affine.defvjp(_forward, _backward)


class Dense(nn.Module):
    """x W + b, by `affine`."""

    features: int
    kernel_init: Any
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        tokens = jnp.asarray(x, self.dtype).reshape(-1, x.shape[-1])
        y = affine(tokens, jnp.asarray(kernel), jnp.asarray(bias), self.dtype)
        return y.reshape(*x.shape[:-1], self.features)
