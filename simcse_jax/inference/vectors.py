"""Vectors of length 1, and their cosines."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

ROUNDING = 5e-6
"""Four times what float32 rounding moved the product of a vector of length 1 with itself (widths 3 to 16,384)."""


def moderate(vectors: Float[np.ndarray, "S H"]) -> Float[np.ndarray, "S H"]:
    """The rows in at least float32, those whose largest entry is far from 1 scaled to about 1 by a power of two.

    No norm or inner product of such rows overflows or vanishes. Rows whose largest entry lies between 2⁻³⁰ and 2³⁰
    keep every bit, and so does a row of zeros.
    """
    wide = np.result_type(vectors.dtype, np.float32 if vectors.dtype.kind == "f" else np.float64)
    rows = vectors.astype(wide, copy=False)
    largest = np.max(np.abs(rows), axis=1, keepdims=True, initial=0)
    kept = (largest == 0) | ((largest >= 2.0**-30) & (largest <= 2.0**30))
    return rows if np.all(kept) else np.ldexp(rows, np.where(kept, 0, -np.frexp(largest)[1]))


def unit(vectors: Float[np.ndarray, "S H"]) -> Float[np.ndarray, "S H"]:
    """Scales each row x, of any length, to x / ‖x‖, in its float type; a row of zeros stays zero."""
    rows = moderate(vectors)
    scaled: Float[np.ndarray, "S H"] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return scaled.astype(vectors.dtype, copy=False) if vectors.dtype.kind == "f" else scaled


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
