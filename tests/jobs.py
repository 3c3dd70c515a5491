"""Jobs of several processes on this machine, joined over loopback, whose members tests lose one by one."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]


class Job:
    """Processes of one CPU device each that run the same command; those that live are killed at the end of a block."""

    def __init__(
        self, count: int, arguments: list[str], logs: Path, own: dict[int, dict[str, str]] | None = None
    ) -> None:
        """Starts Python `count` times with the arguments.

        Args:
          count: the number of processes.
          arguments: of Python.
          logs: a folder for their logs.
          own: variables of single processes.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"{process}.log" for process in range(count)]
        self.processes = []
        for process, log in enumerate(self._logs):
            job = {"JAX_COORDINATOR_ADDRESS": self.address, "JAX_NUM_PROCESSES": str(count)}
            cpu = {"JAX_PROCESS_ID": str(process), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
            unbuffered = {"PYTHONUNBUFFERED": "1"}
            with log.open("w") as file:
                started = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env=os.environ | job | cpu | unbuffered | (own or {}).get(process, {}),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(started)

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def until(self, reached: Callable[[], bool], seconds: float = 180) -> None:
        """Waits until something is so; all processes must live meanwhile."""
        end = time.monotonic() + seconds
        while not reached():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def send(self, number: signal.Signals, *victims: int) -> None:
        """Sends a signal to processes, all where none is named."""
        for victim in victims or range(len(self.processes)):
            self.processes[victim].send_signal(number)

    def ends(self, seconds: float, without: int | None = None) -> list[int]:
        """The exit statuses of all processes (but one), which must end within a time."""
        end = time.monotonic() + seconds
        waited = [process for number, process in enumerate(self.processes) if number != without]
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in waited]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a process lives after {seconds} s: {self.said()}") from None

    def log(self, process: int) -> str:
        """What a process has written."""
        return self._logs[process].read_text(errors="replace")

    def errors(self, process: int) -> list[str]:
        """The lines of a process that begin with the program's name, which must be its last."""
        lines = self.log(process).splitlines()
        found = [line for line in lines if line.startswith("simcse-jax: ")]
        assert not found or lines[-1] == found[-1], self.log(process)
        return found

    def said(self) -> str:
        """All logs."""
        return "\n".join(f"--- {process}\n{self.log(process)}" for process in range(len(self.processes)))
