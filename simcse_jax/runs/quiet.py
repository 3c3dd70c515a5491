"""Logging: left as a calling program set it up, and quiet under a command."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def no_root_handler() -> Iterator[None]:
    """Takes back the handler that absl, through which orbax logs, gives to a root logger without one.

    With that handler, `logging.basicConfig` of the calling program would do nothing.
    """
    had_none = not logging.root.handlers
    try:
        yield
    finally:
        for handler in [*logging.root.handlers] if had_none else []:
            if type(handler) is logging.StreamHandler:
                logging.root.removeHandler(handler)


class _Log(logging.Filter):
    """What is shown of orbax's log, and who hears of the failures in it."""

    quiet = False
    hear: Callable[[BaseException], None] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if self.hear and record.exc_info and record.exc_info[1] and record.threadName == "async_save":
            self.hear(record.exc_info[1])
        return not self.quiet or record.levelno >= logging.CRITICAL


@cache
def _log() -> _Log:
    log = _Log()
    logging.getLogger("absl").addFilter(log)
    return log


@contextmanager
def hearing_failures(hear: Callable[[BaseException], None]) -> Iterator[None]:
    """A block in which `hear` gets the exceptions that end orbax's writing, at once.

    orbax raises them later, once its threads in all processes have come together, and logs them before.
    """
    _log().hear = hear
    try:
        yield
    finally:
        _log().hear = None


@cache
def quiet_orbax() -> None:
    """Silences orbax: where it cannot write a checkpoint, it logs a traceback per thread and raises as well.

    Answers of tensorstore that come later find the loop that waited for them closed, and show one traceback each. For
    commands: the settings are those of the whole process, and stay.
    """
    _log().quiet = True
    show = sys.unraisablehook

    def show_others(raised: Any) -> None:
        if raised.object is not None or str(raised.exc_value) != "Event loop is closed":
            show(raised)

    sys.unraisablehook = show_others
