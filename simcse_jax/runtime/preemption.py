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
"""The one that this process last asked about, in whatever run."""


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
        # that. Where the signal came before the first step of this run, a resumed run would never get there.
        global _last_step
        before = not self._asked and multihost_utils.reached_preemption_sync_point(_last_step + 1)
        self._asked, _last_step = True, step
        return bool(before or multihost_utils.reached_preemption_sync_point(step))


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
