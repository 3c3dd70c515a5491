"""Numbers that lie in several files, read as one array that need not fit into memory."""

import errno
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

_MAPPED = 2**28
"""Bytes of files up to which they are mapped: pages that were read count as memory of the process."""


class Pieces:
    """Pieces of files of numbers, one after the other.

    They are indexed as an array is: by numbers, slices without a step, and arrays of numbers from 0 on. Small files are
    mapped into memory; of large ones, only what is asked for is read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        dtype: str,
        file: Int[np.ndarray, " P"],
        start: Int[np.ndarray, " P"],
        size: Int[np.ndarray, " P"],
        added: Int[np.ndarray, " P"] | None = None,
    ) -> None:
        """Opens the files.

        Args:
          paths: the files.
          dtype: the type of their numbers.
          file: the file of each piece.
          start: the place in its file where each piece begins.
          size: the numbers in each piece.
          added: what is added to the numbers of each piece.

        Raises:
          OSError: a file cannot be read.
          ValueError: a file is empty, or holds a part of a number.
        """
        self.dtype = np.dtype(dtype)
        self._open: list[int] = []
        weakref.finalize(self, _close, self._open)
        for path in paths:
            self._open.append(os.open(path, os.O_RDONLY))
        self._maps: list[Shaped[np.ndarray, " N"]] = []
        if sum(os.fstat(number).st_size for number in self._open) <= _MAPPED:
            maps = [mmap.mmap(number, 0, access=mmap.ACCESS_READ) for number in self._open]
            self._maps = [np.frombuffer(memory, self.dtype) for memory in maps]
            _close(self._open)
        self._ends = np.cumsum(size)
        self._file, self._added = file, added
        self._shift = start - (self._ends - size)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All numbers, in memory."""
        return np.array(self[:], dtype, copy=copy)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, np.ndarray):
            return self._chosen(index.ravel()).reshape(index.shape)
        chosen = range(len(self))[index]
        if isinstance(chosen, int):
            return self._chosen(np.array([chosen]))[0]
        return self._chosen(np.arange(chosen.start, chosen.stop))

    def _chosen(self, index: Int[np.ndarray, " N"]) -> Shaped[np.ndarray, " N"]:
        """The numbers at these places."""
        if len(self._file) == 1:
            found = self._from_file(int(self._file[0]), index + self._shift[0])
            return found if self._added is None else np.asarray(found + self._added[0])
        piece = np.searchsorted(self._ends, index, side="right")
        if len(index) and piece.max() == len(self._ends):
            raise IndexError(f"place {index.max()} of {len(self)}")
        place, file = index + self._shift[piece], self._file[piece]
        found = np.empty(len(index), self.dtype)
        for number in np.unique(file):
            here = file == number
            found[here] = self._from_file(int(number), place[here])
        if self._added is not None:
            found += self._added[piece]
        return found

    def _from_file(self, file: int, place: Int[np.ndarray, " N"]) -> Shaped[np.ndarray, " N"]:
        """The numbers at these places in a file."""
        if self._maps:
            return np.asarray(self._maps[file][place])
        # Numbers that follow one another are read together.
        first = np.flatnonzero(np.diff(place, prepend=-2) != 1)
        counts = np.diff(first, append=len(place)) * self.dtype.itemsize
        runs = zip(counts.tolist(), (place[first] * self.dtype.itemsize).tolist(), strict=True)
        content = b"".join([_read(self._open[file], count, at) for count, at in runs])
        if len(content) != len(place) * self.dtype.itemsize:
            raise OSError(errno.EIO, "a file of the token cache has become shorter")
        return np.frombuffer(content, self.dtype)


def _read(file: int, count: int, at: int) -> bytes:
    """Bytes of a file, fewer at its end. The system gives at most 2 GiB at a time, and may give less."""
    content = b""
    while len(content) < count and (part := os.pread(file, count - len(content), at + len(content))):
        content = content + part if content else part
    return content


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())
