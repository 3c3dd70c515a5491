"""Sentences and their vectors, searched: exactly in JAX, or with faiss."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from simcse_jax.errors import InputError, reason
from simcse_jax.files import check_new_folder, new_folder, write_json, write_text

Backend = Literal["jax", "faiss-flat", "faiss-ivf"]
_FORMAT = 1  # of a saved index: raise it when the files change

# Vectors scored at a time, and queries: no larger matrix of scores exists. Both are filled up to powers of two, so that
# what is compiled serves every number of vectors and queries.
_BLOCK = 65536
_LEAST = 256
_QUERIES = 64


@dataclass(frozen=True)
class Hit:
    """A sentence that was found. Unpacks as (sentence, score)."""

    index: int
    """Its number in the index."""
    score: float
    """Inner product with the query: the cosine, of vectors of length 1."""
    sentence: str

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sentence, self.score))


class Index:
    """Sentences with their vectors, which may be added to, searched and saved.

    Attributes:
      sentences: in the order in which they were added.
      width: D, of the vectors.
      backend: how it is searched.
      about: what its maker wants to remember of it, as JSON values; saved with it.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        vectors: Float[np.ndarray, "N D"],
        backend: Backend = "jax",
        about: dict[str, Any] | None = None,
    ) -> None:
        """Builds an index; sentences and vectors are copied.

        Args:
          sentences: N of them; 0 is possible.
          vectors: theirs, of length 1 where scores are to be cosines.
          backend: `jax`: exact, on JAX's first device; `faiss-flat`: exact, on the CPU; `faiss-ivf`: approximate, in
            less time.
          about: see the attribute.

        Raises:
          InputError: unknown backend, faiss not installed, vectors that do not fit the sentences or are not finite.
        """
        if backend not in get_args(Backend):
            raise InputError(f"unknown backend '{backend}'; choose one of {', '.join(get_args(Backend))}")
        if vectors.ndim != 2 or not vectors.shape[1]:
            raise InputError(f"vectors have shape {list(vectors.shape)}; expected [sentences, width]")
        self.sentences: list[str] = []
        self.width = int(vectors.shape[1])
        self.backend = backend
        self.about = dict(about or {})
        self._blocks: list[Float[np.ndarray, "B D"]] = []
        self._placed: list[Float[Array, "B D"]] = []
        self.add(sentences, vectors)

    def __len__(self) -> int:
        """Sentences."""
        return len(self.sentences)

    @property
    def vectors(self) -> Float[np.ndarray, "N D"]:
        """All vectors, copied: float32, in the order of the sentences."""
        if not self._blocks:
            return np.zeros((0, self.width), np.float32)
        joined: Float[np.ndarray, "N D"] = np.concatenate(self._blocks)[: len(self)]
        return joined

    def add(self, sentences: Sequence[str], vectors: Float[np.ndarray, "N D"]) -> None:
        """Appends sentences and their vectors, copied.

        Raises:
          InputError: their number or width does not fit, or a vector is not finite; nothing is added then.
        """
        if isinstance(sentences, str) or vectors.shape != (len(sentences), self.width):
            given = "one string" if isinstance(sentences, str) else f"{len(sentences):,} sentences"
            raise InputError(
                f"{given} and vectors of shape {list(vectors.shape)}; expected a list of N sentences and [N, "
                f"{self.width}]"
            )
        if not np.isfinite(vectors).all():
            raise InputError("vectors are not all finite: a model that gives such vectors cannot be searched with")
        # Only the last block, which may have room, is made anew.
        kept, rest = divmod(len(self), _BLOCK)
        last = self._blocks[kept][:rest] if rest else np.zeros((0, self.width), np.float32)
        del self._blocks[kept:], self._placed[kept:]
        start = -rest
        while start < len(vectors):
            end = start + _BLOCK
            part = vectors[max(start, 0) : end]
            held = len(last) if start < 0 else 0
            block = np.zeros((_padded(held + len(part), _LEAST, _BLOCK), self.width), np.float32)
            block[:held] = last[:held]
            block[held : held + len(part)] = part
            self._blocks.append(block)
            start = end
        self.sentences += sentences

    def search(self, queries: Float[np.ndarray, "Q D"], top_k: int = 5, threshold: float = -np.inf) -> list[list[Hit]]:
        """The sentences whose vectors have the largest inner products with each query.

        Args:
          queries: vectors, of length 1 where scores are to be cosines.
          top_k: at most so many a query.
          threshold: least score.

        Returns:
          For each query its hits, the best first; of equal scores the one that was added first. (faiss decides ties
          in its own way.)

        Raises:
          InputError: `top_k` below 1, a threshold that is not a number, or queries of another width or not finite.
        """
        if top_k < 1:
            raise InputError(f"top_k is {top_k}; it must be at least 1")
        if np.isnan(threshold):
            raise InputError("threshold is not a number; give the least score of a hit, e.g. 0.6")
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise InputError(f"queries have shape {list(queries.shape)}; expected [queries, {self.width}]")
        if not np.isfinite(queries).all():
            raise InputError("queries are not all finite")
        found = min(top_k, len(self))
        if not found or not len(queries):
            return [[] for _ in queries]
        scores, numbers = self._nearest(np.asarray(queries, np.float32), found)
        return [
            [Hit(i, s, self.sentences[i]) for s, i in zip(*row, strict=True) if i >= 0 and s >= threshold]
            for row in zip(scores.tolist(), numbers.tolist(), strict=True)
        ]

    def _nearest(
        self, queries: Float[np.ndarray, "Q D"], count: int
    ) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
        self._placed += [jnp.asarray(block) for block in self._blocks[len(self._placed) :]]
        wide = _padded(count, 8, 1 << 30)
        results = []
        for start in range(0, len(queries), _QUERIES):
            part = queries[start : start + _QUERIES]
            padded = np.zeros((_padded(len(part), 1, _QUERIES), self.width), np.float32)
            padded[: len(part)] = part
            asked = jnp.asarray(padded)
            best = jnp.full((len(padded), wide), -jnp.inf), jnp.full((len(padded), wide), -1, jnp.int32)
            for number, block in enumerate(self._placed):
                best = _merge(asked, block, *best, number * _BLOCK, len(self))
            results.append([np.asarray(x)[: len(part), :count] for x in best])
        scores, numbers = (np.concatenate(x) for x in zip(*results, strict=True))
        return scores, numbers

    def save(self, folder: str | Path) -> Path:
        """Writes a folder: vectors.npy (float32 [N, D]), sentences.jsonl (a JSON string a line), index.json.

        It is there complete or not at all.

        Raises:
          InputError: the folder exists and is not empty, or cannot be written.
        """
        path = check_new_folder(folder)
        with new_folder(path) as partial_folder:
            np.save(partial_folder / "vectors.npy", self.vectors)
            lines = (json.dumps(sentence, ensure_ascii=False) + "\n" for sentence in self.sentences)
            write_text(partial_folder / "sentences.jsonl", "".join(lines))
            about = {"format": _FORMAT, "sentences": len(self), "width": self.width, "backend": self.backend}
            write_json(partial_folder / "index.json", about | {"about": self.about})
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Reads an index that `save` wrote.

        Raises:
          InputError: no such folder, or its files are damaged or do not fit one another.
        """
        path = Path(folder).expanduser()
        if not is_index(path):
            raise InputError(f"{path} is not a saved index: expected a folder with index.json, see Index.save")
        try:
            about = json.loads((path / "index.json").read_text("utf-8"))
            if about["format"] != _FORMAT:
                raise InputError(f"{path} has format {about['format']}; this version reads {_FORMAT}: build it again")
            sentences = [json.loads(line) for line in (path / "sentences.jsonl").open(encoding="utf-8")]
            vectors = np.load(path / "vectors.npy", mmap_mode="r")
            if vectors.shape != (about["sentences"], about["width"]) or len(sentences) != about["sentences"]:
                raise ValueError(f"{len(sentences)} sentences, vectors of shape {list(vectors.shape)}")
            return cls(sentences, vectors, about["backend"], about["about"])
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the index {path} is damaged ({reason(error)}): copy or build it again") from error


def is_index(folder: Path) -> bool:
    """Whether the folder is one that `Index.save` wrote."""
    return (folder / "index.json").is_file() and (folder / "vectors.npy").is_file()


@partial(jax.jit, donate_argnums=(2, 3))
def _merge(
    queries: Float[Array, "Q D"],
    block: Float[Array, "B D"],
    scores: Float[Array, "Q K"],
    numbers: Int[Array, "Q K"],
    first: Int[Array, ""] | int,
    total: Int[Array, ""] | int,
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """The best K so far, and those of one block of vectors, whose first has the number `first`, merged."""
    width = block.shape[0]
    products = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    products = jnp.where(jnp.arange(width)[None] < total - first, products, -jnp.inf)
    found, places = jax.lax.top_k(products, min(width, scores.shape[1]))
    # top_k takes the first of equals, and what was found before has the lower numbers.
    scores, chosen = jax.lax.top_k(jnp.concatenate([scores, found], axis=1), scores.shape[1])
    numbers = jnp.take_along_axis(jnp.concatenate([numbers, places + first], axis=1), chosen, axis=1)
    return scores, jnp.where(jnp.isneginf(scores), -1, numbers)


def _padded(number: int, least: int, most: int) -> int:
    """The smallest power of two that is no smaller, from `least` to `most`."""
    return min(max(least, 2 ** (number - 1).bit_length()), most)
