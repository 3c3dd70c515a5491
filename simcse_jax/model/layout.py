"""The layout of a batch: its rows hold one sentence each, padded, or several, packed."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Layout(NamedTuple):
    """The layout of a batch: each row holds one or several sentences, one after the other from its first token on."""

    sentence: Int[Array, "B L"]
    """Which sentence of its row a token belongs to, 0 to S−1; S at padding."""
    position: Int[Array, "#B L"]
    """Place of a token in its sentence."""
    start: Int[Array, "B S"]
    """First token of each sentence."""
    numbers: Int[Array, "B S"] | None
    """Number of each sentence in the global batch; None where nothing is to be dropped."""

    @property
    def packed(self) -> bool:
        """Whether a row may hold several sentences."""
        return self.start.shape[1] > 1

    @property
    def members(self) -> Bool[Array, "B S L"]:
        """Whether a token belongs to a sentence."""
        return self.sentence[:, None, :] == jnp.arange(self.start.shape[1])[None, :, None]

    @property
    def owners(self) -> Int[Array, "B _"] | None:
        """Number of the sentence that each token belongs to; one column where a row is one sentence."""
        if self.numbers is None or not self.packed:
            return self.numbers
        return jnp.take_along_axis(self.numbers, self.sentence, axis=1, mode="clip")


def lay_out(lengths: Int[Array, "B S"], length: int, numbers: Int[Array, "B S"] | None = None) -> Layout:
    """The layout of rows of `length` tokens that hold sentences of the given lengths, 0 for none."""
    column = jnp.arange(length)
    ends = jnp.cumsum(lengths, axis=1)
    start = ends - lengths
    sentence = jnp.sum(column[None, None, :] >= ends[:, :, None], axis=1)
    if lengths.shape[1] == 1:
        return Layout(sentence, column[None, :], start, numbers)
    position = column[None, :] - jnp.take_along_axis(start, sentence, axis=1, mode="clip")
    # Padding is looked up as well, and a row may be longer than the table of positions.
    position = jnp.where(sentence < lengths.shape[1], position, 0)
    return Layout(sentence, position, start, numbers)
