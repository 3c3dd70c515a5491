"""The wait of a process until all others have joined its job: lines that name those that are missing, and an end."""

import os
import threading
from contextlib import suppress
from types import TracebackType

from simcse_jax.runtime.heartbeat import end_process

_INTERVAL = 20.0
"""Seconds between two lines."""


class Joining:
    """A block in which this process waits; it ends the process where the others do not come in time."""

    def __init__(
        self, address: str | None, process: int | None, count: int | None, seconds: int, cut: threading.Event
    ) -> None:
        """Knows of no other process so far.

        Args:
          address: host:port of process 0; None where JAX finds it.
          process: number of this process; None where JAX finds it.
          count: number of all processes; None where JAX finds it.
          seconds: time after which the process ends.
          cut: set when process 0 has closed the connection to it.
        """
        self.here: dict[int, str] = {}
        """The hosts of the processes that this one knows to be there; process 0 hears of all that reach it."""
        self._address, self._process, self._count, self._seconds = address, process, count, seconds
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
            if waited >= self._seconds:
                end_process(
                    f"process {self._process} of {self._count} has waited {self._seconds} s for the others to join "
                    f"at {self._address}: {self._missing()}. See why they did not start, or did not reach it; "
                    "--join-timeout of `train` sets how long it waits",
                    1,
                )
            line = f"waiting   for the others to join at {self._address}, {waited:.0f} s so far: {self._missing()}\n"
            with suppress(OSError):
                os.write(2, line.encode())

    def _missing(self) -> str:
        if self._process is None or self._count is None:
            return "JAX knows who they are"
        if self._process:
            if self._cut.is_set():
                return "process 0 was there and has gone, and its log says why"
            return f"process 0 {'is there, and its log names them' if 0 in self.here else 'cannot be reached'}"
        # Cloud TPU's name for the hosts of a slice, in the order of their processes.
        hosts = dict(enumerate(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")))
        hosts = hosts if len(hosts) == self._count else {}
        missing = sorted({*range(1, self._count)} - self.here.keys())
        named = [f"{number}{f' ({hosts[number]})' if number in hosts else ''}" for number in missing[:16]]
        more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
        return (
            f"{len(missing)} of {self._count} processes are missing, {', '.join(named)}{more}"
            if missing
            else ("all have reached it, and one has not begun")
        )
