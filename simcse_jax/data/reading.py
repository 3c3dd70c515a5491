"""Text files, plain or packed with gzip, opened so that damage and other encodings become one clear error."""

import gzip
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from simcse_jax.errors import InputError, reason

T = TypeVar("T")
_HEAD = 4096  # bytes
LONGEST = 2**22
"""Most characters of a line, and of the row of a table: more than any book has."""
_RATIO = 250  # text is packed to a third or a tenth
_UNPACKED = 2**30  # characters that are taken whatever the ratio


def is_packed(path: Path) -> bool:
    """Whether a file is packed with gzip, by its name."""
    return path.suffix.lower() == ".gz"


def format_of(path: Path) -> str:
    """The ending that names the format of a file, in lower case and without .gz."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def digest(path: Path) -> str:
    """SHA-256 of a file's content; raises `InputError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from error


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """The content of a file, unpacked; errors while it is read become an `InputError`."""
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a complete gzip file ({error}): copy or compress it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIOWrapper]:
    """The text of a file, to be read by `lines_of`; errors while it is read become an `InputError`."""
    with open_bytes(path) as file:
        if b"\0" in file.peek(_HEAD)[:_HEAD]:
            raise InputError(f"{path} is not UTF-8 (it holds zero bytes, as UTF-16 and binary files do): {_ADVICE}")
        try:
            # utf-8-sig drops the byte-order mark that Windows editors write.
            with TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
                yield text
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 ({_undecodable(path)}): {_ADVICE}") from error


_ADVICE = "convert it with iconv -f ENCODING -t utf-8, where ENCODING is its own, often windows-1252 or utf-16"


def _undecodable(path: Path) -> str:
    """The place of the first bytes that are not UTF-8; the decoder itself only knows their place in its buffer."""
    start = 0
    with open_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                while file.read(2**20):
                    pass  # at the end, a damaged gzip file is found out
                return f"line {number}, byte {start + error.start} of the text: {error.reason}"
            start += len(line)
    return "the file has changed in the meantime"


def lines_of(path: Path, file: TextIOWrapper) -> Iterator[str]:
    """The lines of an open text, each with its end.

    Raises:
      InputError: a line of more than `LONGEST` characters, or a packed file that unpacks to far more than text does.
    """
    most = max(_UNPACKED, _RATIO * path.stat().st_size) if is_packed(path) else math.inf
    number = characters = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        characters += len(line)
        if len(line) > LONGEST:
            raise InputError(
                f"{path}, line {number} has more than {LONGEST:,} characters, which no sentence has: put each sentence "
                "on a line of its own"
            )
        if characters > most:
            raise InputError(
                f"{path} unpacks to more than {_RATIO} times its size, as files do that are made to fill a memory: if "
                "its text is right, unpack it with gunzip"
            )
        yield line


def few(items: Iterable[T], most: int, size: Callable[[T], int]) -> Iterator[T]:
    """The first `most` items, or fewer of long ones: as many as have `LONGEST` characters."""
    characters = 0
    for item in islice(items, most):
        yield item
        characters += size(item)
        if characters > LONGEST:
            return


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1; raises `InputError` where it cannot be read."""
    with open_text(path) as file:
        for number, line in enumerate(lines_of(path, file), 1):
            yield number, line.rstrip("\r\n")
