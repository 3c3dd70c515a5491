"""Ending a run early without losing anything."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

_last_step = 0
"""The step that this process last asked about, in any run."""


class StopRequest:
    """Whether SIGTERM (a preemption notice) or Ctrl-C has asked the run to save and end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = False

    def __call__(self, step: int) -> bool:
        """True on every process after the same step; all must ask after every step."""
        if jax.process_count() == 1:
            return self.signal is not None
        # The coordination service picks the number after the last that any process asked about, and waits for exactly
        # that number. If the signal came before the first step of this run, a resumed run would never reach it.
        global _last_step
        before = not self._asked and multihost_utils.reached_preemption_sync_point(_last_step + 1)
        self._asked, _last_step = True, step
        return bool(before or multihost_utils.reached_preemption_sync_point(step))


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """A block in which SIGTERM and Ctrl-C ask the run to stop, the first time; a second signal ends the process."""
    request = StopRequest()

    def handle(number: int, frame: Any) -> None:
        request.signal = number
        tqdm.write(f"{signal.Signals(number).name}: saving and stopping after this step; once more to stop at once")
        signal.signal(number, previous[signal.Signals(number)])
        if several:
            signal.raise_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield request
        return
    several = jax.process_count() > 1  # then SIGTERM belongs to JAX's preemption service
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)[several:]}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
