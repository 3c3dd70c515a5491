"""The order of examples: a pure function of seed and step."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int


@dataclass
class EpochOrder:
    """The order of examples, a pure function of (seed, step): each epoch is a permutation cut into batches.

    The last batch of an epoch holds what remains, so an epoch has ceil(n / batch_size) steps.

    Attributes:
      n: number of examples.
      batch_size: examples per step over all devices.
      seed: seed of the permutations.
    """

    n: int
    batch_size: int
    seed: int
    _permutation: tuple[int, Int[np.ndarray, " n"]] | None = field(default=None, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""
        return -(-self.n // self.batch_size)

    def examples(self, step: int) -> Int[np.ndarray, " B"]:
        """The examples of a step, at most `batch_size`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        # Read once: another thread may replace it by the next epoch's in the meantime.
        cached = self._permutation
        if cached is None or cached[0] != epoch:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
            cached = self._permutation = (epoch, generator.permutation(self.n))
        return cached[1][batch * self.batch_size : (batch + 1) * self.batch_size]

    def size(self, step: int) -> int:
        """Number of examples of a step."""
        return min(self.batch_size, self.n - step % self.steps_per_epoch * self.batch_size)

    def filled(self, step: int) -> Int[np.ndarray, " B"]:
        """The examples of a step, repeated up to `batch_size` at the end of an epoch."""
        return np.resize(self.examples(step), self.batch_size)
