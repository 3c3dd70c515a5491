"""One process per contender, called through a pipe.

The caller loads no framework, so that its children inherit none: imports, threads and memory of one contender neither
slow down another nor count as its own.
"""

import importlib
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from benchmarks.timing import peak_bytes

ROOT = Path(__file__).parents[1]

# Several processes share an accelerator here, so none may take most of its memory at once.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "true"}


@dataclass(frozen=True)
class Contender:
    """A measured class, and how its process makes it.

    Attributes:
      make: "module:Class" of this package. The class has `run()`, the timed call; if it is compared with others,
        `check()`, the figures that all must agree on; `peak()`, bytes; and `ceiling(size, dtype)`, FLOP/s of a matrix
        product.
      arguments: arguments of the class.
      environment: environment variables of its process.
    """

    make: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


class OnHost:
    """The base of contenders that need no accelerator: memory."""

    def peak(self) -> int:
        """Most bytes that the process has held."""
        return peak_bytes()


class WorkerFailed(RuntimeError):
    """A contender raised an exception, or its process ended."""


class Worker:
    """The process of a contender."""

    def __init__(self, name: str, contender: Contender) -> None:
        """Starts the process.

        Args:
          name: name in messages.
          contender: the contender to make in it.
        """
        self.name = name
        self._pipe, theirs = Pipe()
        code = "import sys; from benchmarks.worker import serve; serve(int(sys.argv[1]))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env=os.environ | _ENVIRONMENT | contender.environment,
        )
        theirs.close()
        try:
            self._ask(contender.make, contender.arguments)
        except WorkerFailed:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the contender and returns its result."""
        return self._ask(method, arguments)[0]

    def timed(self, method: str = "run", *arguments: Any) -> float:
        """Seconds that a method takes, as its own process measures them."""
        return self._ask(method, arguments)[1]

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.wait()

    def _ask(self, name: str, arguments: Any) -> tuple[Any, float]:
        try:
            self._pipe.send((name, arguments))
            error, value, taken = self._pipe.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            raise WorkerFailed(f"{self.name}: its process ended with status {status} (-9: no memory left?)") from None
        if error:
            raise WorkerFailed(f"{self.name} failed:\n{error}")
        return value, taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_with(parent: int) -> None:
    """Ends this process once its parent has ended, in the middle of a call, too."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def serve(descriptor: int) -> None:
    """Serves the other side: makes the contender and answers calls until the pipe is closed."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    pipe = Connection(descriptor)
    contender: Any = None
    while True:
        try:
            message = pipe.recv_bytes()  # unpacked below, where errors are reported
        except EOFError:
            return
        error, value, start = "", None, time.perf_counter()
        try:
            name, arguments = pickle.loads(message)
            if contender is None:
                module, kind = name.split(":")
                contender = getattr(importlib.import_module(f"benchmarks.{module}"), kind)(**arguments)
            else:
                start = time.perf_counter()
                value = getattr(contender, name)(*arguments)
        except Exception:  # whatever it is: its text goes to the calling process
            error = traceback.format_exc()
        pipe.send((error, value, time.perf_counter() - start))
