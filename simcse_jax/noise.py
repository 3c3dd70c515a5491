"""Noise that is a pure function of the element it falls on: the sentence, the place in it, the feature.

Nothing else enters, so a sentence meets the same noise alone or in a batch, padded or packed among others, on one
device or many. A draw is a dozen integer operations on the element's number, which XLA computes inside the loop that
uses it: no array of random bits is written, and the backward pass draws again instead of keeping a mask.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

Words = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]
"""A key as two words."""


def words_of(key: Key[Array, ""], sentences: Int[Array, "*shape"]) -> Words:
    """The key of each sentence: `key` folded with its number.

    Args:
      key: of the stream and the place in the network; threefry, as `rng.key` makes them.
      sentences: number of each sentence in the global batch.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sentences.reshape(-1))
    words = jax.random.key_data(keys).reshape(*sentences.shape, 2)
    return words[..., 0], words[..., 1]


def below(probability: float) -> np.uint32:
    """The bound that a random word is below with this probability, to 2⁻³²."""
    return np.uint32(min(round(probability * 2**32), 2**32 - 1))


def random_bits(key: Words, counter: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """32 random bits for each counter: for any key a bijection of the counters.

    Three rounds of xor-shift and multiplication, with the constants that C. Wellons searched for ("triple32", measured
    bias 0.02 of the ideal avalanche); the first word of the key enters before them and the second between, so that two
    sentences do not meet the same stretch of bits in another order.

    Args:
      key: two words, of shapes that broadcast with the counters.
      counter: number of each element.
    """
    x = counter ^ key[0]
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB)
    x = ((x ^ (x >> 11)) + key[1]) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)


class Drawn(NamedTuple):
    """The keys from which the noise of sentences is drawn, and which sentences have no noise."""

    key: Words
    quiet: Bool[Array, "..."]


def drawn(key: Key[Array, ""], sentences: Int[Array, "*shape"]) -> Drawn:
    """The noise of sentences at one place.

    Args:
      key: of the pass and the place in the network.
      sentences: number of each sentence in the global batch, of a shape that broadcasts to that of the array; a
        sentence with a negative number has no noise.
    """
    return Drawn(words_of(key, sentences), sentences < 0)


def drop(
    x: Float[Array, "*shape"], noise: Drawn, counter: UInt32[Array, "*any"], rate: float
) -> Float[Array, "*shape"]:
    """Inverted dropout: each element is 0 with probability `rate`, otherwise x / (1 − rate). Linear in x.

    Args:
      x: the array.
      noise: of the sentences that the elements belong to.
      counter: number of each element in its sentence, of a shape that broadcasts to that of `x`.
      rate: probability.
    """
    dropped = random_bits(noise.key, counter) < below(rate)
    return jnp.where(noise.quiet, x, jnp.where(dropped, jnp.zeros((), x.dtype), x / (1 - rate)))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dropout(
    x: Float[Array, "*shape"], noise: Drawn, counter: UInt32[Array, "*any"], rate: float
) -> Float[Array, "*shape"]:
    """`drop` with a backward pass that draws the noise again."""
    return drop(x, noise, counter, rate)


def _forward(x: Array, noise: Drawn, counter: Array, rate: float) -> Any:
    return drop(x, noise, counter, rate), (noise, counter)


def _backward(rate: float, kept: tuple[Drawn, Array], g: Array) -> Any:
    return drop(g, *kept, rate), None, None


dropout.defvjp(_forward, _backward)
