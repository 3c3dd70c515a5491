"""Sentences and their vectors, to search, add to, save and load."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float

from simcse_jax.config import Backend
from simcse_jax.errors import InputError, reason
from simcse_jax.inference.nearest import Exact, Faiss, Nearest, import_faiss
from simcse_jax.inference.texts import as_strings
from simcse_jax.inference.vectors import is_unit
from simcse_jax.runtime.provenance import provenance
from simcse_jax.storage.files import check_new_folder, local_only, new_folder, write_json, write_text
from simcse_jax.storage.manifest import MANIFEST, Damage, verify, write_manifest
from simcse_jax.storage.records import open_array, parse_json, read_record

_FORMAT = 1  # of a saved index: raise it when the files change
_WIDEST = 2**16
_ABOUT, _SENTENCES, _VECTORS, _CELLS = "index.json", "sentences.jsonl", "vectors.npy", "cells.npy"


@dataclass(frozen=True)
class Hit:
    """A sentence that was found. Unpacks as (sentence, score)."""

    index: int
    """Number of the sentence in the index."""
    score: float
    """Inner product with the query: the cosine, of vectors of length 1."""
    sentence: str

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sentence, self.score))


class Index:
    """Sentences with their vectors. Blank ones keep their numbers, and no search finds them.

    Attributes:
      sentences: in the order in which they were added.
      width: D, of the vectors.
      backend: the method of search, see `Backend`.
      about: notes of its maker, as JSON values; saved with it.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        vectors: Float[np.ndarray, "N D"],
        backend: Backend = "jax",
        about: dict[str, Any] | None = None,
        cells: np.ndarray | None = None,
    ) -> None:
        """Builds an index; sentences and vectors are copied.

        Args:
          sentences: N of them; 0 is possible.
          vectors: one per sentence, of length 1 if scores are to be cosines.
          backend: see `Backend`.
          about: see the attribute.
          cells: the cells of a saved index of backend `faiss-ivf`; learnt from the vectors where None.

        Raises:
          InputError: unknown backend, faiss not installed, vectors that do not fit the sentences or are not finite.
        """
        check_backend(backend)
        vectors = _matrix(vectors, "vectors", "[sentences, width]")
        self.sentences: list[str] = []
        self.width = int(vectors.shape[1])
        self.backend = backend
        self.about = dict(about or {})
        self._cosines = True  # whether all vectors have length 1
        texts, vectors = _checked(sentences, vectors, self.width)
        self._lock = threading.Lock()  # a search sees all of an `add` or nothing
        self._rows = np.zeros(0, np.int64)  # the numbers of the sentences that are not blank, which `_nearest` holds
        self._blank = np.zeros((0, self.width), np.float32)  # the vectors of the others
        self._nearest: Nearest
        if backend == "jax":
            self._nearest = Exact(self.width)
        else:
            learn = backend == "faiss-ivf" and cells is None
            self._nearest = Faiss(self.width, vectors[_filled(texts)] if learn else None, cells)
        self.add(texts, vectors)

    def __repr__(self) -> str:
        """The number of sentences, the width and the backend."""
        return f"Index({len(self):,} sentences, width={self.width}, backend={self.backend!r})"

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.sentences)

    @property
    def vectors(self) -> Float[np.ndarray, "N D"]:
        """All vectors, copied: float32, in the order of the sentences."""
        blank = np.ones(len(self), bool)
        blank[self._rows] = False
        vectors = np.empty((len(self), self.width), np.float32)
        vectors[self._rows], vectors[blank] = self._nearest.vectors(0, len(self._rows)), self._blank
        return vectors

    def vector(self, number: int) -> Float[np.ndarray, " D"]:
        """The vector of one sentence, copied."""
        row = int(np.searchsorted(self._rows, number))
        blank = row == len(self._rows) or self._rows[row] != number
        vector: Float[np.ndarray, " D"]
        vector = self._blank[number - row].copy() if blank else self._nearest.vectors(row, row + 1)[0]
        return vector

    def add(self, sentences: Sequence[str], vectors: Float[np.ndarray, "N D"]) -> None:
        """Appends sentences and their vectors, copied.

        Raises:
          InputError: their number or width does not fit, or a vector is not finite; nothing is added then.
        """
        texts, vectors = _checked(sentences, vectors, self.width)
        filled = _filled(texts)
        with self._lock:
            self._nearest.add(vectors[filled])
            self._rows = np.concatenate([self._rows, len(self) + np.flatnonzero(filled)])
            self._blank = np.concatenate([self._blank, vectors[~filled]])
            self._cosines = self._cosines and is_unit(vectors)
            self.sentences += texts

    def search(
        self, queries: Float[np.ndarray, "Q D"], top_k: int = 5, threshold: float | None = None
    ) -> list[list[Hit]]:
        """The sentences whose vectors have the largest inner products with each query.

        Args:
          queries: vectors, of length 1 if scores are to be cosines.
          top_k: most hits per query.
          threshold: least score of a hit; any where None.

        Returns:
          For each query its hits, the best first; among equal scores, the one added first (with faiss, any). Where all
          vectors have length 1, scores are cosines: at most 1, and exactly 1 for a copy of the query, see `as_cosines`.

        Raises:
          InputError: `top_k` below 1, a threshold that is not a number, or queries of another width or not finite.
        """
        check_search(top_k, threshold)
        queries = _matrix(queries, "queries", f"[queries, {self.width}]")
        if queries.shape[1] != self.width:
            raise InputError(f"queries have shape {list(queries.shape)}; expected [queries, {self.width}]")
        queries = _float32(queries, "queries")
        if not len(self._rows) or not len(queries):
            return [[] for _ in queries]
        with self._lock:
            cosines = self._cosines and is_unit(queries)
            scores, found = self._nearest.find(queries, min(int(top_k), len(self._rows)), cosines)
            numbers = np.where(found < 0, -1, self._rows[found])
        least = -np.inf if threshold is None else threshold
        return [
            [Hit(i, s, self.sentences[i]) for s, i in zip(*row, strict=True) if i >= 0 and s >= least]
            for row in zip(scores.tolist(), numbers.tolist(), strict=True)
        ]

    def save(self, folder: str | Path) -> Path:
        """Writes a folder: vectors.npy (float32 [N, D]), sentences.jsonl (one JSON string per line), index.json, and
        manifest.json with the digests of these.

        The folder exists complete or not at all.

        Raises:
          InputError: the folder exists and is not empty, or cannot be written.
        """
        path = check_new_folder(folder)
        with new_folder(path, last=_ABOUT) as partial:
            np.save(partial / _VECTORS, self.vectors)
            if isinstance(self._nearest, Faiss) and self._nearest.cells is not None:
                np.save(partial / _CELLS, self._nearest.cells)
            write_text(partial / _SENTENCES, "".join(json.dumps(sentence) + "\n" for sentence in self.sentences))
            about = {"format": _FORMAT, "sentences": len(self), "width": self.width, "backend": self.backend}
            write_json(partial / _ABOUT, about | {"about": self.about, "manifest": True})
            write_manifest(partial, {"made": provenance()})
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Reads an index that `save` wrote.

        Raises:
          InputError: no such folder, or its files are damaged or do not fit one another.
        """
        path = local_only(folder)
        if not is_index(path):
            raise InputError(f"{path} is not a saved index: expected a folder with {_ABOUT}, as save_index writes it")
        try:
            stored = read_record(path / _ABOUT)
            if stored["format"] != _FORMAT:
                raise InputError(f"{path} has format {stored['format']}; this version reads {_FORMAT}: build it again")
            with (path / _SENTENCES).open(encoding="utf-8") as file:
                sentences = [parse_json(line) for line in file]
            vectors = open_array(path / _VECTORS, np.float32, 2)
            if (len(sentences), *vectors.shape) != (stored["sentences"], stored["sentences"], stored["width"]):
                raise ValueError(f"{len(sentences)} sentences, vectors of shape {list(vectors.shape)}")
            if vectors.shape[1] > _WIDEST:  # a search of even a few takes the room of 256
                raise ValueError(f"vectors of width {vectors.shape[1]:,}; expected {_WIDEST:,} at most")
            if not all(isinstance(sentence, str) for sentence in sentences):
                raise ValueError(f"a line of {_SENTENCES} that is no string")
            cells = np.array(open_array(path / _CELLS, np.uint8, 1)) if stored["backend"] == "faiss-ivf" else None
            if "manifest" in stored or (path / MANIFEST).exists():
                verify(path)
            return cls(sentences, vectors, stored["backend"], stored["about"], cells)
        except InputError:
            raise
        except (Damage, OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise InputError(f"the index {path} is damaged ({reason(error)}): copy or build it again") from error


def is_index(folder: Path) -> bool:
    """Whether `Index.save` wrote the folder."""
    return (folder / _ABOUT).is_file() and (folder / _VECTORS).is_file()


def check_backend(backend: Any) -> None:
    """Raises `InputError` for a backend that does not exist, or whose package is not installed."""
    if backend not in get_args(Backend):
        raise InputError(f"unknown backend '{backend}'; choose one of {', '.join(get_args(Backend))}")
    if backend != "jax":
        import_faiss()


def check_search(top_k: Any, threshold: Any) -> None:
    """Raises `InputError` for settings of a search that cannot be used."""
    if not isinstance(top_k, int | np.integer) or top_k < 1:
        raise InputError(f"top_k is {top_k!r}; it must be a whole number, at least 1")
    number = isinstance(threshold, int | float | np.integer | np.floating)
    if threshold is not None and not (number and not np.isnan(threshold)):
        raise InputError(f"threshold is {threshold!r}, not a number; give the least score of a hit, e.g. 0.6, or None")


def _filled(texts: list[str]) -> Bool[np.ndarray, " N"]:
    """Whether each text holds more than white space."""
    return np.array([bool(text.strip()) for text in texts], bool)


def _checked(sentences: Any, vectors: Any, width: int) -> tuple[list[str], np.ndarray]:
    """The sentences as a list, and the vectors as float32."""
    vectors = _matrix(vectors, "vectors", f"[N, {width}]")
    if isinstance(sentences, str) or vectors.shape != (len(texts := as_strings(sentences)), width):
        given = "one string" if isinstance(sentences, str) else f"{len(texts):,} sentences"
        raise InputError(
            f"{given} and vectors of shape {list(vectors.shape)}; expected a list of N sentences and [N, {width}]"
        )
    return texts, _float32(vectors, "vectors")


def _matrix(given: Any, what: str, expected: str) -> np.ndarray:
    """Rows of numbers as an array of NumPy: of one of JAX, of lists of numbers."""
    try:
        array = np.asarray(given)
    except ValueError as error:  # lists of different lengths
        raise InputError(f"{what} are rows of different lengths; expected an array {expected}") from error
    if array.ndim != 2 or not array.shape[1]:
        raise InputError(
            f"{what} are a {type(given).__name__} of shape {list(array.shape)}; expected an array {expected}"
        )
    return array


def _float32(vectors: np.ndarray, what: str) -> np.ndarray:
    if vectors.dtype.kind not in "fiu":
        raise InputError(f"{what} are of type {vectors.dtype}; expected float32")
    with np.errstate(over="ignore"):
        cast = np.asarray(vectors, np.float32)
    if not np.isfinite(cast).all():
        raise InputError(f"{what} are not all finite as float32: search with a model whose vectors are finite")
    return cast
