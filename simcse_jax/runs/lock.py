"""The lock of a run folder: one process trains in it at a time."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

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
            _take(stack.enter_context(_opened(folder / _NAME, os.O_RDWR | os.O_CREAT)), folder)
        yield


def check_free(folder: Path) -> None:
    """Raises `InputError` where another process trains in a run folder, before minutes of work for nothing."""
    if jax.process_index() == 0 and (folder / _NAME).is_file():
        with writing_to(folder), _opened(folder / _NAME, os.O_RDWR) as lock:
            _take(lock, folder)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """The file of a lock. Its content does not matter; a link in its place is not followed, and nothing is cut."""
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{path} is a link; expected a file that this package made: remove it") from error
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise InputError(f"{path} is not a plain file; expected one that this package made: remove it")
        yield number
    finally:
        os.close(number)


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process is training in {folder}: wait for it, or choose another --output") from error
