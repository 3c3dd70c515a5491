"""The order of examples: a pure function of seed and step."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, UInt64


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
    _epoch: tuple[int, Int[np.ndarray, " n"] | list[Int[np.ndarray, " _"]]] | None = field(default=None, repr=False)
    """Number of an epoch, and its examples in order, or its batches where they are distinct."""

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
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
            permutation = generator.permutation(self.n)
            order = permutation if self.texts is None else self._distinct(permutation, self.texts)
            cached = self._epoch = (epoch, order)
        found = cached[1]
        return (
            found[batch] if isinstance(found, list) else found[batch * self.batch_size : (batch + 1) * self.batch_size]
        )

    def _distinct(
        self, permutation: Int[np.ndarray, " n"], texts: UInt64[np.ndarray, "n C"]
    ) -> list[Int[np.ndarray, " _"]]:
        """Batches without a text that occurs twice: each example in the first that has room and none of its texts."""
        batches: list[list[int]] = [[] for _ in range(self.steps_per_epoch)]
        seen: list[set[int]] = [set() for _ in batches]
        first = 0  # all before it are full
        for example, own in zip(permutation.tolist(), texts[permutation].tolist(), strict=True):
            for place in range(first, len(batches)):
                if len(batches[place]) < self.batch_size and seen[place].isdisjoint(own):
                    batches[place].append(example)
                    seen[place].update(own)
                    break
            while first < len(batches) and len(batches[first]) == self.batch_size:
                seen[first] = set()
                first += 1
        return [np.array(batch, int) for batch in batches]

    def size(self, step: int) -> int:
        """Number of examples of a step."""
        if self.texts is not None:
            return len(self.examples(step))
        return min(self.batch_size, self.n - step % self.steps_per_epoch * self.batch_size)

    def filled(self, step: int) -> Int[np.ndarray, " B"]:
        """The examples of a step, repeated up to `batch_size` at the end of an epoch."""
        return np.resize(self.examples(step), self.batch_size)
