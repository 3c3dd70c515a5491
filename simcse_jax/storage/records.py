"""JSON and arrays from files that may be damaged or made to harm: sizes are checked before anything is allocated."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.storage.files import is_remote
from simcse_jax.storage.places import Place, StoreError, reached

LARGEST = 2**24
"""Most bytes of a JSON file that is read at once."""
DEEPEST = 64
"""Most objects and lists of JSON inside one another: Python code that walks deeper ones runs out of stack."""


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text spells.

    Raises:
      ValueError: text that is no JSON, is larger than `LARGEST`, or deeper than `DEEPEST`.
    """
    return _parse(_decoded(text))


def parse_record(text: str | bytes) -> Any:
    """`parse_json` for text that this package wrote: without duplicate keys, and every number and text usable.

    Raises:
      ValueError: also for a key given twice, a number that is no finite number of 64 bits, and half of a surrogate
        pair, but for those by which Python spells file names that are no UTF-8.
    """
    text = _decoded(text)
    value = _parse(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_distinct)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return value


def read_record(path: Place) -> Any:
    """`parse_record` of a file.

    Raises:
      ValueError: see `parse_record`.
      OSError: the file cannot be read.
    """
    return parse_record(read_bounded(path))


def read_bounded(path: Place, most: int = LARGEST) -> bytes:
    """The content of a file, up to one byte more than `most`; no pipe or device holds the reader up."""

    def unblocked(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)

    with reached(path), path.open("rb") if is_remote(path) else open(path, "rb", opener=unblocked) as file:
        return file.read(most + 1) or b""


def _decoded(text: str | bytes) -> str:
    if len(text) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    return text.decode("utf-8") if isinstance(text, bytes) else text


def _parse(text: str, **how: Any) -> Any:
    try:
        value = json.loads(text, **how)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    if text.count("[") + text.count("{") > DEEPEST and not _is_shallow(value):
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return value


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        lists = [v for v in level if isinstance(v, list)]
        objects = [v for v in level if isinstance(v, dict)]
        if not lists and not objects:
            return True
        level = [x for v in lists for x in v] + [x for v in objects for x in v.values()]
    return False


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the number {digits[:20]}… has more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is no finite number")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("it has a key twice")
    return found


def open_array(path: Path, dtype: Any, dimensions: int) -> np.ndarray:
    """The array in a .npy file, mapped and not read, so that its memory is bounded by the size of the file.

    Args:
      path: the file.
      dtype: the type that its elements must have.
      dimensions: the number that it must have.

    Raises:
      ValueError: a damaged file, a pickle, or another type or number of dimensions.
      OSError: the file cannot be read.
    """
    try:
        with reached(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, StoreError):
        raise
    except Exception as error:  # numpy reads the header as Python: its errors are those of a parser, down to TokenError
        raise ValueError(f"{path.name} is not an array of NumPy ({type(error).__name__})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path.name} holds several arrays")
    if array.dtype != dtype or array.ndim != dimensions:
        raise ValueError(f"{path.name} is of type {array.dtype} and shape {list(array.shape)}")
    return array
