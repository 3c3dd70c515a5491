"""The order of examples: a pure function of seed and step."""

import threading
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, UInt64

from simcse_jax.data.distinct import distinct_batches

_NEAR = 4
"""Steps before and after the one asked for whose epochs are kept: batches are loaded up to 3 steps before the loop asks
for the size of the last."""


@dataclass
class EpochOrder:
    """The order of examples, a pure function of (seed, step): each epoch is a permutation cut into batches.

    The last batch of an epoch holds what remains, so an epoch has ceil(n / batch_size) steps.

    Attributes:
      n: number of examples.
      batch_size: examples per step over all devices.
      seed: seed of the permutations.
      texts: ids of the texts of each example, where no batch may have a text twice; an example that fits no batch of an
        epoch is left out of it.
    """

    n: int
    batch_size: int
    seed: int
    texts: UInt64[np.ndarray, "n C"] | None = field(default=None, repr=False)
    _epochs: dict[int, tuple[Int[np.ndarray, " M"], Int[np.ndarray, " S"] | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Epochs by their numbers: the examples, batch after batch; and where batches are distinct, the size of each."""
    _drawing: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""
        return -(-self.n // self.batch_size)

    def examples(self, step: int) -> Int[np.ndarray, " B"]:
        """The examples of a step, at most `batch_size`; any thread may ask."""
        first = step % self.steps_per_epoch * self.batch_size
        found = self._epoch_of(step)[0][first : first + self.size(step)]
        return found.astype(np.int64)  # what follows multiplies them

    def _epoch_of(self, step: int) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " S"] | None]:
        """The epoch of a step, drawn once while threads ask for steps at its turn."""
        near = range((step - _NEAR) // self.steps_per_epoch, (step + _NEAR) // self.steps_per_epoch + 1)
        for other in [*self._epochs]:
            if other not in near:  # before the next takes as much memory
                self._epochs.pop(other, None)
        epoch = step // self.steps_per_epoch
        if (found := self._epochs.get(epoch)) is None:
            with self._drawing:
                if (found := self._epochs.get(epoch)) is None:  # else another thread has drawn it meanwhile
                    found = self._epochs[epoch] = self._drawn(epoch)
        return found

    def _drawn(self, epoch: int) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " S"] | None]:
        """The examples of an epoch, and the sizes of its batches where they are distinct."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
        # As `generator.permutation`, which takes 8 bytes per example: the draws do not depend on the type.
        permutation = np.arange(self.n, dtype=np.int32 if self.n < 2**31 else np.int64)
        generator.shuffle(permutation)
        return (permutation, None) if self.texts is None else distinct_batches(permutation, self.texts, self.batch_size)

    def size(self, step: int) -> int:
        """Number of examples of a step."""
        batch = step % self.steps_per_epoch
        if self.texts is None:
            return min(self.batch_size, self.n - batch * self.batch_size)
        sizes = self._epoch_of(step)[1]
        assert sizes is not None
        return int(sizes[batch])

    def filled(self, step: int) -> Int[np.ndarray, " B"]:
        """The examples of a step, repeated up to `batch_size` at the end of an epoch."""
        return np.resize(self.examples(step), self.batch_size)
