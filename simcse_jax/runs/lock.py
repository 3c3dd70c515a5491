"""The lock of a run folder: one process trains in it at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import jax

from simcse_jax.errors import InputError
from simcse_jax.runs.folder import writing_to

_NAME = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the run folder's lock, which the system releases however the process ends.

    Raises:
      InputError: another process holds it, or the folder cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    with ExitStack() as stack:
        with writing_to(folder):
            _take(stack.enter_context((folder / _NAME).open("w")), folder)
        yield


def check_free(folder: Path) -> None:
    """Raises `InputError` where another process trains in a run folder, before minutes of work for nothing."""
    if jax.process_index() == 0 and (folder / _NAME).is_file():
        with writing_to(folder), (folder / _NAME).open("r+") as lock:
            _take(lock, folder)


def _take(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process is training in {folder}: wait for it, or choose another --output") from error
