"""Matrix products in the compute type whose sums are wider."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*B K"], kernel: Float[Array, "K N"], dtype: Any) -> Float[Array, "*B N"]:
    """x W, of factors rounded to `dtype`, summed in float32 at least and rounded to `dtype` once.

    The gradient of the kernel keeps the type of the kernel: with bfloat16 it is not rounded. CPUs with bfloat16 units
    use them for such products, and not for those whose sums are asked for in bfloat16.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum("...k,kn->...n", x, kernel.astype(dtype), preferred_element_type=wide).astype(dtype)


def _forward(x: Array, kernel: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel, dtype), (x, kernel)


def _backward(dtype: Any, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    wide = jnp.promote_types(dtype, jnp.float32)
    for_x = jnp.einsum("...n,kn->...k", g, kernel.astype(dtype), preferred_element_type=wide).astype(x.dtype)
    for_kernel = jnp.einsum("...k,...n->kn", x, g, preferred_element_type=wide).astype(kernel.dtype)
    return for_x, for_kernel


product.defvjp(_forward, _backward)


class Dense(nn.Module):
    """x W + b, the product by `product`."""

    features: int
    kernel_init: Any
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        y = product(jnp.asarray(x, self.dtype), jnp.asarray(kernel), self.dtype)
        return y + jnp.asarray(bias, self.dtype).reshape(*[1] * (y.ndim - 1), -1)
