"""What a request may ask for, and how requests share a forward pass."""

import math
from dataclasses import dataclass, fields

from simcse_jax.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; a request beyond one is answered at once with what the bound is."""

    max_body: int = 2**20
    """Bytes of a request's body."""
    max_sentences: int = 256
    """Sentences, or queries, of a request."""
    max_characters: int = 5_000
    """Characters of a sentence."""
    max_hits: int = 100
    """Hits of a query."""
    max_request_hits: int = 2_560
    """Hits of a request: of a query, times its queries."""
    max_plot: int = 200
    """Sentences of a plot."""
    max_queue: int = 4_096
    """Sentences that wait for the model; a request beyond is refused (503) rather than kept waiting."""
    max_seconds: float = 30.0
    """From a request's arrival to its answer; then it is given up (504)."""
    batch: int = 64
    """Sentences that requests which arrive together put into a forward pass."""
    gather: float = 0.003
    """Seconds that a request waits for others to share its pass, where the model is idle."""

    def validate(self) -> None:
        """Raises `InputError` for a bound of nothing or without end, or one that keeps another from being reached."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "gather" else 1 if isinstance(field.default, int) else 1e-3
            if not value >= least:
                raise InputError(f"{field.name} is {value}; it must be at least {least}")
            if not math.isfinite(value):
                raise InputError(f"{field.name} is {value}; it must be finite")
        if self.max_queue < self.max_sentences:
            raise InputError(
                f"max_queue is {self.max_queue}, less than the {self.max_sentences} sentences of a request: "
                "no such request would ever be taken"
            )
        if self.max_request_hits < self.max_hits:
            raise InputError(
                f"max_request_hits is {self.max_request_hits}, less than the {self.max_hits} hits of a single query: "
                "raise it, or lower max_hits"
            )
