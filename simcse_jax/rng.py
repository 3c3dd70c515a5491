"""Named key streams: every random draw of a run is a pure function of (seed, name, step)."""

import zlib

import jax
from jax import Array
from jaxtyping import Int


def key(seed: int, name: str, step: int | Int[Array, ""] = 0) -> Array:
    """The random key of stream `name` at `step`.

    Streams are independent of each other, so adding one never changes another, and a resumed run draws what the
    uninterrupted one would have drawn.

    Args:
      seed: the run's seed.
      name: the stream, e.g. "dropout".
      step: global optimisation step; may be traced.

    Returns:
      A scalar typed key array (threefry, partitionable: the noise does not depend on the number of devices).
    """
    stream = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(name.encode()))
    return jax.random.fold_in(stream, step)
