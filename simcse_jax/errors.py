"""The one exception for bad input, the words of its messages (guesses, the exceptions of others), and warnings."""

import difflib
import errno
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

_ROOM = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
}
_LIMITS = {
    errno.EMFILE: "raise the limit of a process (ulimit -n)",
    errno.ENFILE: "end other programs, or have the limit of the system raised (sysctl fs.file-max)",
    errno.ENOMEM: "free memory",
}
_NUMBER = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")

_NUMPY = re.compile(r"\d+ requested and \d+ written")
"""numpy's message, which lacks the system's number, for an array that was not written to its end."""


class InputError(ValueError):
    """Bad input. Each argument is a message that says what was given, what was expected and what to do."""

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        return "\n".join([f"{len(self.args)} problems", *(f"  - {message}" for message in self.args)])


def check_all(*checks: Callable[[], Any]) -> list[Any]:
    """Runs checks that do not need one another.

    Returns:
      What each returns.

    Raises:
      InputError: one or more do; it has the messages of all.
    """
    results: list[Any] = []
    messages: list[str] = []
    for check in checks:
        try:
            results.append(check())
        except InputError as error:
            messages += error.args
    if messages:
        raise InputError(*dict.fromkeys(messages))
    return results


def some(names: Iterable[str], longest: int | None = 60, most: int = 20) -> str:
    """Names with commas between them, for a message: those longer than `longest` cut, and of many the first."""
    names = list(names)
    shown = [name if longest is None or len(name) <= longest else f"{name[: longest - 1]}…" for name in names[:most]]
    return ", ".join([*shown, *[f"… ({len(names):,} in all)"] * (len(names) > most)])


def did_you_mean(word: str, words: Iterable[str], other_names: Mapping[str, str] | None = None) -> str:
    """The question "did you mean 'train'? " after a misspelt name; empty where no name is close.

    Args:
      word: the name given. Case, hyphens and underscores do not count.
      words: the names there are.
      other_names: for names that other programs use, as `plain` spells them, the name here; those that are not among
        `words` are passed over.
    """
    close = {plain(name): name for name in words}
    close = {other: name for other, name in (other_names or {}).items() if name in close.values()} | close
    found = difflib.get_close_matches(plain(word), close, 1)
    return f"did you mean '{close[found[0]]}'? " if found else ""


def plain(name: str) -> str:
    """A name without case, hyphens, underscores and points, to be compared."""
    return re.sub(r"[\W_]", "", name).lower()


@cache
def warn(message: str) -> None:
    """Logs a line that a user should read, once per process: on stderr, unless the program sets up `logging`."""
    logging.getLogger("simcse_jax").warning(message)


def reason(error: BaseException) -> str:
    """The message of another library's exception, on one line: the system's words, its first line, or its type."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether XLA says, in an exception or in the words of one, that a device has too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


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
    return next((number for number in _ROOM if os.strerror(number) in str(error)), None)


def limit(error: BaseException) -> str:
    """What to do after an error that a limit of the system makes, whatever the file; otherwise ""."""
    return _LIMITS.get(system_error(error) or 0, "")


def room(error: BaseException) -> str:
    """What makes room after the error of a full disk, a quota used up or a file larger than allowed; otherwise ""."""
    return _ROOM.get(system_error(error) or 0, "")
