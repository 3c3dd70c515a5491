"""Commands as forked children of a process that has imported everything and started neither a thread nor a backend.

A child pays for no import, and finds its programs in JAX's cache: a run takes two seconds instead of ten.
"""

import atexit
import contextlib
import faulthandler
import os
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simcse_jax.cli import program as command
from tests.torture.kinds import Fault

CPU_LIMIT, IDLE_LIMIT = 90.0, 60.0
"""Seconds of a child's own time, and seconds without any, after which it counts as hung. A busy machine moves neither
much."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    """Its exit status; -n for the end by signal n."""
    out: str
    err: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """All it said."""
        return f"{self.out}\n{self.err}"


class Process:
    """A command that runs in a child; `wait` must be called until it has ended."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str | None],
        setup: Callable[[], Any] | None = None,
        main: Callable[[], Any] | None = None,
    ) -> None:
        """Starts the command.

        Args:
          words: its arguments.
          folder: the present folder of the child.
          environment: variables to set, or to remove where None.
          setup: called in the child before the command.
          main: called in the place of the command.
        """
        self.words = tuple(words)
        self._text = {1: b"", 2: b""}
        pipes = {number: os.pipe() for number in self._text}
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            for number, (read, write) in pipes.items():
                os.close(read)
                os.dup2(write, number)
                os.close(write)
            _run(words, folder, environment, setup, main)
        self._open: dict[int, int] = {}
        for number, (read, write) in pipes.items():
            os.close(write)
            os.set_blocking(read, False)
            self._open[read] = number
        self._start = self._last = time.monotonic()
        self._cpu = 0.0
        self._status: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def ended(self) -> bool:
        """Whether the child has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless the child has ended."""
        if not self.ended:
            os.kill(self.pid, number)

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits until the child has ended, or a condition holds.

        Returns:
          Whether the condition holds in a child that has not ended.

        Raises:
          Fault: it hangs.
        """
        while not self.ended:
            if until():
                return True
            self._read(0.004)
            self._watch()
        self._read(0)
        for read in [*self._open]:
            os.close(read)
        self._open.clear()
        return False

    def finish(self) -> Done:
        """Waits to the end."""
        self.wait()
        assert self._status is not None
        out, err = (self._text[number].decode(errors="replace") for number in (1, 2))
        return Done(self._status, out, err, self.words)

    def _read(self, seconds: float) -> None:
        ready, _, _ = select.select([*self._open], [], [], seconds)
        for read in ready:
            if text := os.read(read, 1 << 16):
                self._text[self._open[read]] += text
            else:
                os.close(read)
                del self._open[read]
        if not self._open:
            time.sleep(seconds)

    def _watch(self) -> None:
        if (now := time.monotonic()) - self._last < 1:
            return
        cpu = _cpu_seconds(self.pid)
        used = f"used {cpu:.1f} s of the processor in {self.seconds:.0f} s"
        if cpu > self._cpu + 0.5:  # threads that wait look at the clock now and then
            self._cpu, self._last = cpu, now
        if cpu > CPU_LIMIT or now - self._last > IDLE_LIMIT:
            os.kill(self.pid, signal.SIGABRT)  # faulthandler's traceback, in the child's stderr
            deadline = time.monotonic() + 5
            while not self.ended and time.monotonic() < deadline:
                self._read(0.05)
            self.send(signal.SIGKILL)
            raise Fault(f"hang: {self.words[:2]} {used}\n{self._text[2].decode(errors='replace')[-1500:]}")


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run(
    words: Sequence[str],
    folder: Path,
    environment: Mapping[str, str | None],
    setup: Callable[[], Any] | None,
    main: Callable[[], Any] | None,
) -> None:
    """The child: it ends as the interpreter does, with the libraries' threads and exit handlers, and never returns."""
    code = 1
    try:
        faulthandler.enable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.setsid()
        os.chdir(folder)
        sys.argv = ["simcse-jax", *words]
        # The campaign's own may be of a file, in which Python keeps a position.
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        if setup:
            setup()
        code = _status(main or (lambda: command([*words])))
        if _status(lambda: (threading._shutdown(), atexit._run_exitfuncs())):  # type: ignore[attr-defined]
            code = code or 1
        for file in (sys.stdout, sys.stderr):
            try:
                if file is not None:
                    file.flush()
            except OSError:
                code = 120  # as of Python
    finally:
        os._exit(code)


def _status(call: Callable[[], Any]) -> int:
    """The exit status to which a call leads."""
    try:
        call()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        with contextlib.suppress(Exception):  # nobody may take it
            traceback.print_exc()
        return 1
    return 0
