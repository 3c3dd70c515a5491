"""Vectors of length 1, at any scale."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def moderate(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """`x` in at least float32, with rows whose largest entry is far from 1 scaled to about 1 by a power of two.

    Nothing derived from the squares of a row, such as its norm and the gradient of its norm, then overflows or
    vanishes. Other rows keep every bit: those with a largest entry from 2⁻³⁰ to 2³⁰, and those below 2¹⁶ times the
    smallest normal number (8e-34 in float32), whose gradient would overflow and which count as zero.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * _scale(x)


def _scale(x: Float[Array, "*batch H"]) -> Float[Array, "*batch 1"]:
    """The power of two by which `moderate` multiplies each row."""
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True, initial=0)
    kept = (largest < 2.0**16 * jnp.finfo(x.dtype).tiny) | ((largest >= 2.0**-30) & (largest <= 2.0**30))
    # Below the largest exponent by two, so that the power is not subnormal, which some devices flush to zero.
    exponent = jnp.minimum(jnp.frexp(largest)[1], jnp.finfo(x.dtype).maxexp - 2)
    return jnp.ldexp(jnp.ones((), x.dtype), jnp.where(kept, 0, -exponent))


@jax.custom_vjp
def unit(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """x / ‖x‖ along the last axis, at any scale, in at least float32; a zero vector stays zero, its gradient finite."""
    return _unit_forward(x)[0]


def _unit_forward(x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    # x · rsqrt(Σ x²) of `moderate(x)`, without a copy of the rows.
    rows = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = _scale(rows)
    square = jnp.sum((rows * scale) * (rows * scale), axis=-1, keepdims=True)
    return rows * (scale * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1))), (x, scale, square)


def _unit_backward(saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array]:
    # In the order of JAX's own rules for that, so that ordinary rows get the same bits.
    x, scale, square = saved
    safe = jnp.where(square > 1e-24, square, 1)
    root = jax.lax.rsqrt(safe)
    # Of long rows the gradient is short: neither product leaves the range of the type.
    large = scale < 1
    left, right = jnp.where(large, 1, scale), jnp.where(large, scale, 1)
    of_root = jnp.sum((gradient * left) * (x * right), axis=-1, keepdims=True)
    of_square = jnp.where(square > 1e-24, of_root * (-0.5 * (root / safe)), 0)
    of_rows = gradient * root + of_square * (x * scale) + of_square * (x * scale)
    return ((of_rows * scale).astype(x.dtype),)


unit.defvjp(_unit_forward, _unit_backward)


def cosines(a: Float[Array, "N H"], b: Float[Array, "N H"]) -> Float[Array, " N"]:
    """Cosine of each pair of rows."""
    return jnp.sum(unit(a) * unit(b), axis=-1)
