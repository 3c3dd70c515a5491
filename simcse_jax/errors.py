"""The one exception for bad input, the words in which its messages report the exceptions of others, and warnings."""

import errno
import logging
import os
import re
from functools import cache

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NUMBER = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")

_NUMPY = re.compile(r"\d+ requested and \d+ written")
"""numpy's message, which lacks the system's number, for an array that was not written to its end."""


class InputError(ValueError):
    """Bad input. The message says what was given, what was expected and what to do."""


@cache
def warn(message: str) -> None:
    """Logs a line that a user should read, once per process: on stderr, unless the program sets up `logging`."""
    logging.getLogger("simcse_jax").warning(message)


def reason(error: BaseException) -> str:
    """The message of another library's exception, on one line: the system's words, its first line, or its type."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]


def system_error(error: BaseException) -> int | None:
    """The number of the system's error behind an exception; None for an exception of another kind.

    An `OSError` has the number. tensorstore and Rust raise exceptions of other types that hold it in their text:
    `ValueError("OUT_OF_RANGE: ... No space left on device [os_error_code='28']")`, `Exception("... (os error 28)")`.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if match := _NUMBER.search(str(error)):
        return int(match[1] or match[2])
    if _NUMPY.fullmatch(str(error)):
        return errno.ENOSPC
    return next((number for number in _FULL if os.strerror(number) in str(error)), None)


def is_full(error: BaseException) -> bool:
    """Whether an exception says that a disk is full, a quota used up, or a file larger than allowed."""
    return system_error(error) in _FULL
