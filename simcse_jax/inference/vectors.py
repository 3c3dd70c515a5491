"""Vectors of length 1, and their cosines."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

ROUNDING = 5e-6
"""Four times what float32 rounding moved the product of a vector of length 1 with itself (widths 3 to 16,384)."""


def unit(vectors: Float[np.ndarray, "S H"]) -> Float[np.ndarray, "S H"]:
    """Scales each row x to x / ‖x‖, in its dtype; a row of zeros stays zero."""
    scaled: Float[np.ndarray, "S H"] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


def is_unit(vectors: Float[np.ndarray, "S H"]) -> bool:
    """Whether every row has length 1, or is zero, up to rounding: whether inner products are cosines."""
    with np.errstate(over="ignore"):
        squares = np.einsum("sh,sh->s", vectors, vectors)
    return bool(np.all((np.abs(squares - 1) < 1e-3) | (squares == 0)))


def as_cosines(products: Any) -> Any:
    """Inner products of vectors of length 1, without their rounding errors at both ends.

    A product within `ROUNDING` of 1 or −1, or beyond, becomes that number: equal vectors have a cosine of exactly 1.

    Args:
      products: an array of NumPy or of JAX.
    """
    library = jnp if isinstance(products, jax.Array) else np
    ends = abs(products) >= products.dtype.type(1 - ROUNDING)
    return library.where(ends, library.sign(products), products)


def cosines(a: Float[np.ndarray, "A H"], b: Float[np.ndarray, "B H"]) -> Float[np.ndarray, "A B"]:
    """The cosine of every vector of `a` with every vector of `b`."""
    found: Float[np.ndarray, "A B"] = as_cosines(unit(a) @ unit(b).T)
    return found
