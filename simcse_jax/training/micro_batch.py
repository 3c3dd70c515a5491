"""A function of many rows, computed a few rows at a time (GradCache)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def map_chunks(function: Callable[[tuple[Array, ...]], Any], arrays: tuple[Array, ...], size: int) -> Any:
    """`function(arrays)`, whose rows do not depend on each other, computed at most `size` rows at a time.

    Only the results of a chunk are kept; the backward pass computes it again (GradCache, arXiv 2101.06983).

    Args:
      function: takes arrays and gives a tree of arrays of as many rows.
      arrays: arrays of the same number of rows.
      size: rows at a time; all where 0.
    """
    n = arrays[0].shape[0]
    chunks = -(-n // size) if size else 1
    if chunks == 1:
        return function(arrays)
    size = -(-n // chunks)

    def cut(x: Array) -> Array:
        # What fills the last chunk up is a repetition, whose results are dropped.
        return jnp.take(x, jnp.arange(chunks * size) % n, axis=0).reshape(chunks, size, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(chunks * size, *x.shape[2:])[:n]

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(function), jax.tree.map(cut, arrays)))
