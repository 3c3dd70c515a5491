"""The wait of a process until all others have joined its job: lines that name those that are missing, and an end."""

import os
import threading
from contextlib import suppress
from types import TracebackType

from simcse_jax.runtime.heartbeat import end_process

_INTERVAL = 20.0
"""Seconds between two lines."""


def say_waiting(what: str) -> None:
    """Writes a line that says what this process waits for, past what Python or a thread may hold back."""
    with suppress(OSError):
        os.write(2, f"waiting   for {what}\n".encode())


class Joining:
    """A block in which this process waits; it ends the process where the others do not come in time."""

    def __init__(self, seconds: int, cut: threading.Event) -> None:
        """Knows neither the job nor any other process so far.

        Args:
          seconds: time after which the process ends.
          cut: set when process 0 has closed the connection to it.
        """
        self.here: dict[int, str] = {}
        """The hosts of the processes that this one knows to be there; process 0 hears of all that reach it."""
        self.job: tuple[str, int, int] | None = None
        """Address of process 0 (host:port), number of this process and of all; None while JAX looks for them."""
        self._seconds = seconds
        self._over, self._cut = threading.Event(), cut
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> "Joining":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _wait(self) -> None:
        waited = 0.0
        while not self._over.wait(step := min(_INTERVAL, self._seconds - waited)):
            waited += step
            at, who = "", "this process"
            if self.job:
                at, who = f" at {self.job[0]}", f"process {self.job[1]} of {self.job[2]}"
            if waited >= self._seconds:
                end_process(
                    f"{who} has waited {self._seconds} s for the others to join{at}: {self._missing()}. See why they "
                    "did not start, or did not reach it; --join-timeout of `train` sets how long it waits",
                    1,
                )
            say_waiting(f"the others to join{at}, {waited:.0f} s so far: {self._missing()}")

    def _missing(self) -> str:
        # Cloud TPU's name for the hosts of this slice, in the order of their processes, and for process 0 of several.
        hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
        if self.job is None:
            first = os.environ.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0])
            return f"JAX does not find the host of process 0{first and f', {first}'}"
        _, process, count = self.job
        if process:
            if self._cut.is_set():
                return "process 0 was there and has gone, and its log says why"
            return f"process 0 {'is there, and its log names them' if 0 in self.here else 'cannot be reached'}"
        missing = sorted({*range(1, count)} - self.here.keys())
        named = [f"{number}{_name(number, count, hosts)}" for number in missing[:16]]
        more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
        return (
            f"{len(missing)} of {count} processes are missing, {', '.join(named)}{more}"
            if missing
            else ("all have reached it, and one has not begun")
        )


def _name(number: int, count: int, hosts: list[str]) -> str:
    """What is known of a process besides its number; JAX numbers them slice by slice."""
    slices, left = divmod(count, len(hosts))
    if left or not hosts[0]:
        return ""
    slice_, worker = divmod(number, len(hosts))
    return f" ({hosts[worker]})" if slices == 1 else f" (worker {worker} of slice {slice_})"
