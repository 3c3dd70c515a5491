"""Ending a run early without losing anything."""

import itertools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

_calls = itertools.count(1)
"""Of the coordination service by this process, in whatever run."""


class StopRequest:
    """Whether SIGTERM (a preemption notice) or Ctrl-C has asked the run to save and end."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, step: int) -> bool:
        """True on every process after the same `step`; all must ask after every step."""
        if jax.process_count() > 1:
            # The coordination service picks a number that no process has passed, and waits for exactly that. It is 1
            # where the signal comes before the first call, and a run that is resumed has no step 1.
            return bool(multihost_utils.reached_preemption_sync_point(next(_calls)))
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """While the block runs, SIGTERM and Ctrl-C ask instead of ending the process; a second time they end it."""
    request = StopRequest()

    def handle(number: int, frame: Any) -> None:
        request.signal = number
        tqdm.write(f"{signal.Signals(number).name}: saving and stopping after this step; once more to stop at once")
        signal.signal(number, previous[signal.Signals(number)])

    # Under jax.distributed SIGTERM belongs to its preemption service; only a main thread may set handlers.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
