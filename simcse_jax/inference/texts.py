"""What callers give as sentences, as a list of strings; anything that is not sentences is refused with what to give."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from simcse_jax.data.corpus import read_sentences
from simcse_jax.errors import InputError


def as_texts(given: Any) -> list[str]:
    """One string or several, as a new list.

    Raises:
      InputError: something other than strings in an order, or text that is not Unicode.
    """
    texts = as_strings(given)
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"sentence number {number + 1} has half of a surrogate pair at character {error.start + 1}: it is not "
                "Unicode text, or was read from bytes that are not UTF-8"
            ) from error
    return texts


def as_strings(given: Any) -> list[str]:
    """`as_texts` that also takes text that is not Unicode."""
    if isinstance(given, str):
        texts = [given]
    elif (advice := _refused(given)) is not None:
        raise InputError(f"sentences are a {type(given).__name__}; expected a str, or several in a list: {advice}")
    else:
        texts = list(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            shown = repr(text)
            what = f"a {type(text).__name__}, {shown[:40]}{'…' * (len(shown) > 40)}"
            raise InputError(f"sentence number {number + 1} is {what}; expected a str")
    return texts


def _refused(given: Any) -> str | None:
    """What to give instead of something that is not several sentences in an order; None where it may be that."""
    if isinstance(given, Mapping):
        return "list(x.values()) has its values"
    if isinstance(given, set | frozenset):
        return "a set has no order, so give sorted(x)"
    if isinstance(given, bytes | bytearray):
        return 'give x.decode("utf-8")'
    if isinstance(given, Path):
        return "give the lines of the file, e.g. x.read_text().splitlines()"
    if getattr(given, "ndim", 1) != 1 or hasattr(given, "columns"):  # tables, and arrays of other dimensions
        return 'give one column, e.g. x["text"]' if hasattr(given, "columns") else "give an array of one dimension"
    return None if isinstance(given, Iterable) else "give text"


def texts_or_file(given: Any) -> list[str]:
    """The sentences to build an index from: several strings, or the lines of the text file that a `Path` names.

    Raises:
      InputError: a plain string, an unreadable or empty file, or see `as_texts`.
    """
    if isinstance(given, str):
        raise InputError(
            f"an index is built from a list of sentences or from a pathlib.Path, not from the string "
            f"'{given[:60]}': give [sentence] for one sentence, or Path(name) for a text file"
        )
    return read_sentences(given) if isinstance(given, Path) else as_texts(given)
