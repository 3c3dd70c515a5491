"""The limits of a request, and how requests share a forward pass."""

import math
from dataclasses import dataclass, fields

from simcse_jax.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; a request beyond one gets an error that names the bound."""

    max_body: int = 2**20
    """Most bytes of a request's body."""
    max_sentences: int = 256
    """Most sentences, or queries, per request."""
    max_characters: int = 5_000
    """Most characters per sentence."""
    max_hits: int = 100
    """Most hits per query."""
    max_request_hits: int = 2_560
    """Most hits per request: hits per query, times queries."""
    max_plot: int = 200
    """Most sentences per plot."""
    max_queue: int = 4_096
    """Most sentences that wait for the model; the service refuses a request beyond it (503)."""
    max_seconds: float = 30.0
    """Most seconds from a request's arrival to its answer; then the service gives it up (504)."""
    max_connections: int = 2_048
    """Most connections; for one more, the service closes the one that has kept it waiting for longest."""
    max_wait: float = 10.0
    """Most seconds for a request's headers to arrive, from the connection or from the answer before."""
    max_stop: float = 10.0
    """Most seconds to end in, once the service is told to stop; requests under way have eight tenths of them."""
    batch: int = 64
    """Most sentences per forward pass, from requests that arrive together."""
    gather: float = 0.003
    """Seconds that an idle model waits for more requests to share a forward pass."""

    def validate(self) -> None:
        """Raises `InputError` for a bound that is zero or infinite, or that makes another unreachable."""
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
                "raise it, or lower max_sentences"
            )
        if self.max_request_hits < self.max_hits:
            raise InputError(
                f"max_request_hits is {self.max_request_hits}, less than the {self.max_hits} hits of a single query: "
                "raise it, or lower max_hits"
            )
