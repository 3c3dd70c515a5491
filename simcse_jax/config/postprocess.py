"""The settings of a post-processor that is fitted to sentence vectors; `simcse_jax.postprocess` fits it."""

from dataclasses import dataclass, field
from typing import Literal

from simcse_jax.errors import InputError


@dataclass(frozen=True)
class FlowSettings:
    """The size of a flow and its training."""

    steps: int = 6
    """Steps of ActNorm, linear map and coupling."""
    hidden: int = 32
    """Width of the two hidden layers of a coupling's network."""
    epochs: int = 5
    """Passes over the sentences."""
    batch_size: int = 128
    """Sentences per step of Adam."""
    learning_rate: float = 1e-4
    """Learning rate of Adam; at 1e-3 flows on vectors of width 384 diverged."""
    seed: int = 0
    """Decides the initial rotations, the couplings' weights and the order of the sentences."""

    def validate(self) -> None:
        """Raises `InputError` for a value that cannot be used."""
        for name in ("steps", "hidden", "epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"flow.{name} is {getattr(self, name)}; it must be greater than 0")
        if self.seed < 0:
            raise InputError(f"flow.seed is {self.seed}; it must be 0 or more")


@dataclass(frozen=True)
class FitSettings:
    """The post-processor to fit, and its settings."""

    method: Literal["whitening", "all-but-the-top", "flow"] = "whitening"
    """Whitening (Su et al. 2021), all-but-the-top (Mu & Viswanath 2018) or BERT-flow (Li et al. 2020)."""
    dim: int | None = None
    """Width of whitened vectors; if not given, the number of directions that the sentences span."""
    components: int | None = None
    """Principal components that all-but-the-top removes; width / 100 if not given."""
    flow: FlowSettings = field(default_factory=FlowSettings)

    def validate(self) -> None:
        """Raises `InputError` for settings that do not go together, or an impossible flow."""
        for name, method in (("dim", "whitening"), ("components", "all-but-the-top")):
            if getattr(self, name) is not None and self.method != method:
                raise InputError(
                    f"{name} is given but the method is {self.method}: only {method} uses it, so leave it out"
                )
        if self.method == "flow":
            self.flow.validate()
