"""Logging: left as a calling program set it up, and quiet under a command."""

import logging
import sys
from collections.abc import Iterator
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


@cache
def quiet_orbax() -> None:
    """Silences orbax: where it cannot write a checkpoint, it logs a traceback per thread and raises as well.

    Answers of tensorstore that come later find the loop that waited for them closed, and show one traceback each. For
    commands: the settings are those of the whole process, and stay.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_others(raised: Any) -> None:
        if raised.object is not None or str(raised.exc_value) != "Event loop is closed":
            show(raised)

    sys.unraisablehook = show_others
