"""What is said while work goes on: progress, and a line before each wait. None of it can end the work."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_SECONDS = 10  # between two lines of progress in a file or a pipe
_SIZE = 80, 24
_quiet, _notes = False, False


@contextmanager
def telling(quiet: bool) -> Iterator[None]:
    """A block that writes notes; if `quiet`, one without notes, progress and what is said, whatever is inside it."""
    global _quiet, _notes
    before = _quiet, _notes
    _quiet, _notes = _quiet or quiet, True
    try:
        yield
    finally:
        _quiet, _notes = before


def say(text: str) -> None:
    """Writes a line about the work to stdout, above any progress bar."""
    _write(text, sys.stdout)


def note(text: str) -> None:
    """Writes a line to stderr, before a wait; only inside `telling`, so that a library's caller is not disturbed."""
    if _notes:
        _write(text, sys.stderr)


def _write(text: str, file: Any) -> None:
    if _quiet or file is None:  # Python has no stderr where a program was started without one
        return
    with _outliving_its_reader(file):
        tqdm.write(printable(text, file), file=file)
        file.flush()


def printable(text: str, file: Any) -> str:
    """Text with `?` for each character that the encoding of a file lacks."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def progress_bar(
    total: int | None, unit: str, what: str = "", *, start: int = 0, most_lines: int = 0, shown: bool = True
) -> tqdm:
    """Progress on stderr: in a terminal one line, in Jupyter a widget, elsewhere a line now and then.

    Elsewhere, the first line comes at once, so that it announces the wait; the next ones are ten seconds apart or more,
    and hold no control characters.

    Args:
      total: units to come; None where that is not known.
      unit: the units' name.
      what: the work's name, put first; without it, that of the unit comes first.
      start: units done before.
      most_lines: most lines elsewhere; 0 sets no bound.
      shown: whether to show anything.
    """
    count, left = ("{n:,} of {total:,}", ", {remaining} left") if total else ("{n:,}", "")
    head = f"{what}: {count} {unit}" if what else f"{unit} {count}"
    if _quiet or not shown or sys.stderr is None:
        return tqdm(total=total, initial=start, disable=True)
    if sys.stderr.isatty() or _in_notebook():
        from tqdm.auto import tqdm as automatic

        bar = f"{head} {{bar}}{{percentage:3.0f}}%{left}{{postfix}}" if total else f"{head}{{postfix}}"
        settings: dict[str, Any] = {"mininterval": 0.5, "dynamic_ncols": True, "leave": None if what else True}
        made: tqdm = automatic(total=total, initial=start, smoothing=0.05, bar_format=bar, **settings)
        sizes = (getattr(made, "ncols", None), getattr(made, "nrows", None))
        if any(isinstance(size, int) and size < 0 for size in sizes):
            # A terminal that does not know its size, as in a container: tqdm would show nothing.
            made.ncols, made.nrows, made.dynamic_ncols = *_SIZE, None
            made.refresh()
        return made
    return tqdm(
        total=total,
        initial=start,
        smoothing=0.05,
        bar_format=f"{head}{left}{{postfix}}",
        file=_Lines(sys.stderr),
        mininterval=_SECONDS,
        miniters=-(-(total or 0) // most_lines) if most_lines else 1,
        maxinterval=math.inf,
        leave=not what,
        position=0,  # of several, each writes lines: none moves the cursor to one of its own
    )


class _Lines:
    """A file other than a terminal, for a progress bar: each state becomes a line of its own."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.encoding = file.encoding

    def write(self, text: str) -> None:
        """Writes a state, which tqdm would draw over the last one, as a new line."""
        if text := text.strip().replace(", ? left", ""):  # tqdm does not know yet
            with _outliving_its_reader(self._file):
                self._file.write(f"{printable(text, self._file)}\n")

    def flush(self) -> None:
        """Flushes the file."""
        with _outliving_its_reader(self._file):
            self._file.flush()


@contextmanager
def _outliving_its_reader(file: Any) -> Iterator[None]:
    """Drops what a full disk does not take, and all that goes to a pipe once its reader, `head` say, has closed it."""
    try:
        yield
    except BrokenPipeError:
        discard(file)
    except OSError:
        pass


def discard(file: Any) -> None:
    """Sends to nowhere what is written to a file from now on, and what it still holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


def _in_notebook() -> bool:
    """Whether tqdm, too, takes this for Jupyter and finds its widgets."""
    if "ipykernel" not in sys.modules:
        return False
    from tqdm.auto import tqdm as automatic

    return any(kind.__module__ == "tqdm.notebook" for kind in automatic.__mro__)
