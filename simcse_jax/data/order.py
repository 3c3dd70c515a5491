"""The order of examples: a pure function of seed and step."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, UInt64

_AT_ONCE = 2**16
"""Examples that are looked at together while batches are made distinct."""


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
    _epoch: tuple[int, Int[np.ndarray, " M"], Int[np.ndarray, " S"] | None] | None = field(default=None, repr=False)
    """Number of an epoch; its examples, batch after batch; and where batches are distinct, the size of each."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""
        return -(-self.n // self.batch_size)

    def examples(self, step: int) -> Int[np.ndarray, " B"]:
        """The examples of a step, at most `batch_size`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        # Read once: another thread may replace it by the next epoch's in the meantime.
        cached = self._epoch
        if cached is None or cached[0] != epoch:
            cached = self._epoch = None  # before the next takes as much memory
            cached = self._epoch = (epoch, *self._drawn(epoch))
        _, order, sizes = cached
        first = batch * self.batch_size
        found = order[first : first + (self.batch_size if sizes is None else int(sizes[batch]))]
        return found.astype(np.int64)  # what follows multiplies them

    def _drawn(self, epoch: int) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " S"] | None]:
        """The examples of an epoch, and the sizes of its batches where they are distinct."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
        # As `generator.permutation`, which takes 8 bytes per example: the draws do not depend on the type.
        permutation = np.arange(self.n, dtype=np.int32 if self.n < 2**31 else np.int64)
        generator.shuffle(permutation)
        return (permutation, None) if self.texts is None else self._distinct(permutation, self.texts)

    def _distinct(
        self, permutation: Int[np.ndarray, " n"], texts: UInt64[np.ndarray, "n C"]
    ) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " S"]]:
        """Batches without a text that occurs twice: each example in the first that has room and none of its texts."""
        steps, most = self.steps_per_epoch, self.batch_size
        batches, sizes = np.zeros((steps, most), permutation.dtype), np.zeros(steps, np.int64)
        seen: dict[int, set[int]] = {}  # of batches that are begun and not full
        first = 0  # all before it are full
        for start in range(0, self.n, _AT_ONCE):
            part = permutation[start : start + _AT_ONCE]
            for example, own in zip(part.tolist(), texts[part].tolist(), strict=True):
                for place in range(first, steps):
                    size = int(sizes[place])
                    if size < most and seen.setdefault(place, set()).isdisjoint(own):
                        batches[place, size] = example
                        sizes[place] += 1
                        seen[place].update(own)
                        if size + 1 == most:
                            del seen[place]
                        break
                while first < steps and sizes[first] == most:
                    first += 1
        return batches.ravel(), sizes

    def size(self, step: int) -> int:
        """Number of examples of a step."""
        if self.texts is not None:
            return len(self.examples(step))
        return min(self.batch_size, self.n - step % self.steps_per_epoch * self.batch_size)

    def filled(self, step: int) -> Int[np.ndarray, " B"]:
        """The examples of a step, repeated up to `batch_size` at the end of an epoch."""
        return np.resize(self.examples(step), self.batch_size)
