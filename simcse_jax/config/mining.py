"""The settings of mining hard negatives."""

from dataclasses import dataclass
from typing import Annotated, Literal

from simcse_jax.config.settings import Backend
from simcse_jax.config.values import BELOW_ONE, FINITE, NOT_NEGATIVE, POSITIVE, out_of_bounds
from simcse_jax.errors import InputError

MOST_NEGATIVES = 8
"""Hard negatives of an example that training reads."""


@dataclass(frozen=True)
class MiningConfig:
    """Which texts of a corpus become hard negatives."""

    negatives: Annotated[int, POSITIVE] = 1
    """Hard negatives for each example, at most 8; examples with fewer candidates get fewer."""
    first_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Leave out this many of the nearest texts."""
    last_rank: Annotated[int, POSITIVE] = 100
    """Look at this many of the nearest texts."""
    margin: Annotated[float, FINITE] = 0.0
    """A negative's cosine must be below the positive's less this."""
    relative_margin: Annotated[float, BELOW_ONE] = 0.05
    """A negative's cosine must be below the positive's by this share of its size."""
    choose: Literal["nearest", "random"] = "nearest"
    """Of the candidates, the nearest, or some drawn at random."""
    seed: Annotated[int, NOT_NEGATIVE] = 42
    """Seed of the draws; those of an example depend on nothing else but its number."""
    backend: Backend = "jax"
    """`jax` compares with all texts, on all devices; faiss works on the CPU."""

    def validate(self) -> None:
        """Raises `InputError` for values that cannot be used."""
        problems = list(out_of_bounds(self))
        if self.negatives > MOST_NEGATIVES:
            problems.append(f"negatives is {self.negatives}; an example has at most {MOST_NEGATIVES}")
        if self.first_rank + self.negatives > self.last_rank:
            problems.append(
                f"first_rank is {self.first_rank} and last_rank {self.last_rank}: {self.negatives} negatives do not "
                "fit between them"
            )
        if problems:
            raise InputError(*problems)
