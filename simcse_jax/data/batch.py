"""A batch of sentences as arrays of token ids."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32


class Packing(NamedTuple):
    """The shape of packed rows, for each device and each column of the text."""

    length: int
    """W, tokens per row."""
    slots: int
    """S, most sentences per row."""
    rows: int
    """R, number of rows."""


class Batch(NamedTuple):
    """N examples of C sentences each (1: the sentence; 2: with its positive; from 3 on: with hard negatives too).

    A row holds one sentence, of the example with the same number; or several (`data.packed_length`), which `places`
    locates. With several devices, each has its own examples in its own rows.
    """

    input_ids: Int[Array, "R C L"] | Int[np.ndarray, "R C L"]
    """Token ids: in each row its sentences, one after the other, then padding."""
    lengths: Int[Array, "R C S"] | Int[np.ndarray, "R C S"]
    """Tokens of each sentence, specials included; 0 where a row holds fewer than S."""
    valid: Bool[Array, " N"] | Bool[np.ndarray, " N"]
    """False for rows that only fill up the last batch of an epoch."""
    places: Int[Array, "N C"] | Int[np.ndarray, "N C"] | None = None
    """Place of each sentence among the R·S places of its device; None where rows are examples."""
    present: Bool[Array, "N C"] | Bool[np.ndarray, "N C"] | None = None
    """Whether an example has each of its hard negatives, which else stands as one token; None where all have all."""
    texts: UInt32[Array, "N T 2"] | UInt32[np.ndarray, "N T 2"] | None = None
    """64-bit ids of the sentences before augmentation, in two words; None where nothing compares them."""
    guide: Float[Array, "N C G"] | None = None
    """Vectors of the guide, where there is one."""

    def repeated(self, times: int) -> "Batch":
        """The batch with the sentences of every example repeated `times` times."""
        if times == 1:
            return self
        places = None if self.places is None else jnp.repeat(jnp.asarray(self.places), times, axis=1)
        ids, lengths = (jnp.repeat(jnp.asarray(x), times, axis=1) for x in (self.input_ids, self.lengths))
        return self._replace(input_ids=ids, lengths=lengths, places=places)

    def numbers(self, examples: Int[Array, " N"]) -> Int[Array, "R C S"]:
        """Number of each sentence in the global batch: n·C + c for sentence c of example n."""
        c = self.input_ids.shape[1]
        numbers = examples[:, None] * c + jnp.arange(c)[None, :]
        if self.places is None:
            return numbers[:, :, None]
        rows, _, slots = self.lengths.shape

        def place(numbers: Int[Array, " N"], places: Int[Array, " N"]) -> Int[Array, "R S"]:
            return jnp.zeros(rows * slots, numbers.dtype).at[places].set(numbers).reshape(rows, slots)

        return jax.vmap(place, in_axes=1, out_axes=1)(numbers, jnp.asarray(self.places))

    def by_example(self, x: Float[Array, "R V S *rest"]) -> Float[Array, "N V *rest"]:
        """The results for each sentence, in the order of the examples; sentences past C are again the first."""
        if self.places is None:
            return x[:, :, 0]
        views = x.shape[1]
        places = jnp.asarray(self.places)[:, np.arange(views) % self.places.shape[1]]
        flat = jnp.moveaxis(x, 1, 2).reshape(-1, views, *x.shape[3:])
        found: Array = jax.vmap(lambda x, at: x[at], in_axes=1, out_axes=1)(flat, places)
        return found

    def rows_at_a_time(self, micro_batch: int) -> int:
        """Rows that hold `micro_batch` examples on average."""
        return -(-self.input_ids.shape[0] * micro_batch // self.valid.shape[0])
