"""The processes of a job watch each other, so that none waits for ever for one that is lost or has failed.

Each beats in the key-value store of JAX's coordination service, from a thread of its own: a process that compiles, or
writes a checkpoint, for minutes is not lost. Process 0, which holds the store, looks for beats that stay out; the
others look whether they still reach process 0. Whoever finds a loss, or fails, writes so into the store, where all wait
for such a word. Each process then ends itself, whatever its main thread does: that may hang in a collective for ever.
"""

import atexit
import importlib
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

import jax

from simcse_jax.errors import InputError

_ALIVE, _END = "simcse_jax/alive/", "simcse_jax/end"
_LEFT = "left"
"""The last beat of a process that ends because the job does."""
_GRACE = 5.0
"""Seconds for the processes to hear why the job ends."""
NEVER = 7 * 24 * 3600
"""Seconds after which JAX would take a silent process for lost, and abort the others."""


class Watch:
    """The watch of this process over its job, which all have joined, until JAX leaves it."""

    def __init__(self, heartbeat: float, cut: threading.Event) -> None:
        """Begins to watch.

        Args:
          heartbeat: seconds without a sign of life after which a process is lost.
          cut: set when process 0 closes the connection to it.
        """
        state = private("distributed", "global_state")
        self._process, self._count, self._client = state.process_id, state.num_processes, state.client
        self._heartbeat, self._interval, self._cut = heartbeat, min(1.0, heartbeat / 5), cut
        self._name = f"{socket.gethostname()}, pid {os.getpid()}"
        self._names = {self._process: self._name}
        self._beats = dict.fromkeys(range(self._count) if self._process == 0 else [0], "")
        self._status: int | None = None
        self._end = threading.Lock()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._judge)]
        for thread in self._threads:
            thread.start()
        atexit.register(self._finish)

    def fail(self, error: BaseException) -> None:
        """Ends the others after an exception that ends this process, unless the loss of one of them has caused it."""
        if not isinstance(error, InputError | KeyboardInterrupt):
            self._await_beats()
        what, self._status = f"has failed ({type(error).__name__}: {_line(error)})", 1
        if isinstance(error, KeyboardInterrupt):
            what, self._status = "was interrupted", 130
        elif isinstance(error, InputError):
            what, self._status = f"has failed: {_line(error)}", 2
        self._tell(f"{self._called(self._process)} {what}", self._status, [])

    def _beat(self) -> None:
        """Shows that this process lives; ends it when another has written why the job ends."""
        beats = 0
        while self._in_job() and self._status is None:
            beats += 1
            try:
                self._put(f"{beats} {self._name}")
                if self._process == 0:
                    self._beats |= self._read()
                elif 0 in self._names:
                    self._beats[0] = str(beats)
                else:
                    self._names |= _names(self._read())
                end = json.loads(self._client.blocking_key_value_get(_END, int(1000 * self._interval)))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    time.sleep(self._interval)
                continue
            if self._status is None:
                self._exit(**end)

    def _judge(self) -> None:
        """Ends this process, and by word of process 0 the others, when one has been silent for too long."""
        silent, last, longest = dict.fromkeys(self._beats, 0.0), dict(self._beats), 0.0
        waited, now = 0.0, time.monotonic()
        while self._in_job():
            time.sleep(self._interval / 2)
            before, now = now, time.monotonic()
            passed = min(now - before, self._interval)  # more, where this process or the machine stood still
            longest = max(longest, now - before)
            for process, beat in self._beats.items():
                silent[process] = silent[process] + passed if beat == last[process] else 0
                last[process] = beat
            lost = [process for process, seconds in silent.items() if seconds >= self._heartbeat]
            waited += passed if self._status is not None or self._cut.is_set() else 0
            if self._status is not None:  # the main thread ends the process, unless it hangs
                if waited >= self._heartbeat:
                    os._exit(self._status)
            elif lost or waited >= min(_GRACE, self._heartbeat):
                self._lose(lost or [0], longest)

    def _lose(self, lost: list[int], longest: float) -> None:
        self._names |= _names(self._beats)
        who = " and ".join(map(self._called, lost))
        why = "its connection closed" if self._cut.is_set() else f"no sign of life for {self._heartbeat:g} s"
        still = f" (this process itself stood still for {longest:.0f} s)" if longest > self._heartbeat else ""
        message = (
            f"{who} {'was' if len(lost) == 1 else 'were'} lost: {why}{still}. The last checkpoint is kept: start all "
            "processes again, with the same command, to go on from there"
        )
        if self._process == 0:
            self._tell(message, 1, lost)
        self._exit(message, 1, lost)

    def _exit(self, message: str, status: int, lost: list[int]) -> None:
        """Ends the process with a line on stderr; the second thread that comes here waits for the first."""
        self._end.acquire()
        self._wait_for_others(lost)
        end_process(message, status)

    def _finish(self) -> None:
        """Leaves the job once all come to their end; after `fail`, ends the process at once."""
        if self._status is None:
            # JAX's own wait for the others aborts after five minutes.
            self._client.wait_at_barrier("simcse_jax/finish", 1000 * NEVER)
            jax.distributed.shutdown()
            for thread in self._threads:  # inside JAX, they would abort when Python is taken down
                thread.join()
            return
        for file in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):
                file.flush()
        self._wait_for_others([])
        os._exit(self._status)

    def _wait_for_others(self, lost: list[int]) -> None:
        """Says that this process ends. Process 0, with which the store goes, waits until the others say so."""
        until = time.monotonic() + _GRACE
        if self._process and 0 in lost:
            return
        with suppress(jax.errors.JaxRuntimeError):
            self._put(_LEFT)
            while self._process == 0 and time.monotonic() < until:
                beats = self._read()
                if all(beats.get(process) == _LEFT for process in range(self._count) if process not in lost):
                    return
                time.sleep(0.05)

    def _await_beats(self) -> None:
        """Returns once all processes have beaten again; where one does not, this process ends meanwhile."""
        before: dict[int, str] = {}
        awaited = set(range(self._count))
        while awaited:
            with suppress(jax.errors.JaxRuntimeError):
                beats = self._read()
                before = before or beats
                awaited = {p for p in awaited if beats.get(p, "") in (before.get(p, ""), "")} - _left(beats)
            time.sleep(self._interval / 2)

    def _in_job(self) -> bool:
        return private("distributed", "global_state").client is not None

    def _called(self, process: int) -> str:
        name = self._names.get(process)
        return f"process {process} of {self._count}" + (f" ({name})" if name else "")

    def _put(self, beat: str) -> None:
        self._client.key_value_set(f"{_ALIVE}{self._process}", beat, allow_overwrite=True)

    def _read(self) -> dict[int, str]:
        """The last beat of each process that has beaten."""
        return {int(key.rpartition("/")[2]): beat for key, beat in self._client.key_value_dir_get(_ALIVE)}

    def _tell(self, message: str, status: int, lost: list[int]) -> None:
        """Writes why the job ends, unless that is written already."""
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_END, json.dumps({"message": message, "status": status, "lost": lost}))


def private(module: str, name: str) -> Any:
    """What JAX has no public name for: its store, and what finds a job. A process alone does without.

    Raises:
      InputError: this release of JAX lacks it.
    """
    try:
        return getattr(importlib.import_module(f"jax._src.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"JAX {jax.__version__} lacks jax._src.{module}.{name}, by which processes join and watch each other: "
            "install a release that has it, such as 0.10.2 or 0.12, or train in one process"
        ) from error


def end_process(message: str, status: int) -> NoReturn:
    """Ends this process at once, from any thread, with a line on stderr."""
    with suppress(OSError):
        bar = "\n" if os.isatty(2) else ""
        os.write(2, f"{bar}simcse-jax: error: {message}\n".encode())
    os._exit(status)


def _names(beats: dict[int, str]) -> dict[int, str]:
    """The host and number of each process, from its beat."""
    return {process: beat.partition(" ")[2] for process, beat in beats.items() if " " in beat}


def _left(beats: dict[int, str]) -> set[int]:
    return {process for process, beat in beats.items() if beat == _LEFT}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
