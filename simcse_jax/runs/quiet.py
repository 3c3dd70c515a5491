"""Logging left as the caller set it up."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
