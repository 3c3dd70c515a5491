"""The Python tool: it encodes, compares and searches sentences with a trained model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from simcse_jax.config import ENCODE_ROW, Backend, LongText
from simcse_jax.data.corpus import read_sentences
from simcse_jax.errors import InputError
from simcse_jax.inference.index import Hit, Index
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.vectors import unit


class SimCSE:
    """Sentence vectors from a trained model, and search with them.

    >>> model = SimCSE("runs/quickstart")            # doctest: +SKIP
    >>> model.similarity("A man sleeps.", "A man is asleep.")  # doctest: +SKIP
    array([[0.97]], dtype=float32)
    >>> model.build_index(["A man is asleep.", "The market fell."])  # doctest: +SKIP
    >>> model.search("A man sleeps.")  # doctest: +SKIP
    [Hit(index=0, score=0.97, sentence='A man is asleep.')]

    Threads may share a model: the settings of a call are its own, and a search beside `add_to_index`, `build_index` or
    `load_index` sees the index before or after. Call `save_index` while no other thread adds sentences.

    Attributes:
      index: the index that `search` searches; None before `build_index` or `load_index`.
    """

    def __init__(
        self,
        model: str | Path,
        pooler: str | None = None,
        max_length: int | None = None,
        packed_length: int = ENCODE_ROW,
        long_text: LongText = "cut",
    ) -> None:
        """Loads a model onto all devices.

        Args:
          model: a run folder, an exported folder, a Hugging Face folder or a name on the hub.
          pooler: overrides the pooler saved with the model.
          max_length: most tokens per sentence; the model's own limit where None.
          packed_length: tokens per row; shorter sentences share a row. 0: one sentence per row. The vectors agree up to
            rounding.
          long_text: treatment of longer texts, see `LongText`.

        Raises:
          InputError: see `load_model` and `BatchEncoder`.
        """
        self._name = str(model)
        self._loaded = load_model(model, pooler)
        limit = self._loaded.checkpoint.max_length if max_length is None else max_length
        self._encoder = self._loaded.encoder(limit, packed_length=packed_length, long_text=long_text)
        self.index: Index | None = None

    @property
    def width(self) -> int:
        """Width of the vectors."""
        return self._loaded.width

    @property
    def max_length(self) -> int:
        """Most tokens per sentence, unless a call says otherwise."""
        return self._encoder.max_length

    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        normalize: bool = True,
        progress: bool = False,
        output: Literal["numpy", "jax"] = "numpy",
        long_text: LongText | None = None,
    ) -> Float[np.ndarray, "... H"] | Float[Array, "... H"]:
        """Vectors of sentences.

        Args:
          sentences: one sentence, or several.
          batch_size: sentences per forward pass, over all devices.
          max_length: most tokens per sentence; that of the constructor where None.
          normalize: scale each vector to length 1.
          progress: show a progress bar.
          output: the kind of array: NumPy's, or JAX's on its first device.
          long_text: treatment of longer texts, see `LongText`; that of the constructor where None.

        Returns:
          float32 [H] for one sentence, [S, H] for several.

        Raises:
          InputError: something other than strings, a setting that cannot be used, or see `LongText`.
        """
        several = _texts(sentences)
        limit = self.max_length if max_length is None else max_length
        encoder = self._encoder.with_limits(batch_size, limit, long_text or self._encoder.long_text)
        if output not in ("numpy", "jax"):
            raise InputError(f"output is '{output}'; choose numpy or jax")
        vectors = np.zeros((0, self.width), np.float32)
        if several:
            vectors = encoder(self._loaded.params, several, progress)
        if normalize:
            vectors = unit(vectors)
        result = vectors[0] if isinstance(sentences, str) else vectors
        return result if output == "numpy" else jnp.asarray(result)

    def are_cut(self, sentences: Iterable[str]) -> list[bool]:
        """Whether each sentence has more tokens than `max_length`, so that its end is not encoded."""
        return self._encoder.are_cut(_texts(sentences))

    def warm_up(self) -> None:
        """Compiles every program that `encode` may need with its defaults, so that no later call waits for one.

        This is for services, which encode a few sentences at a time: from then on, rows have one of a few lengths, see
        `BatchEncoder.with_few_programs`.
        """
        self._encoder = self._encoder.with_few_programs()
        self._encoder.compile(self._loaded.params)

    def similarity(
        self,
        a: str | Iterable[str] | Float[np.ndarray, "... H"] | Float[Array, "... H"],
        b: str | Iterable[str] | Float[np.ndarray, "... H"] | Float[Array, "... H"],
    ) -> Float[np.ndarray, "A B"]:
        """Cosine similarity of every sentence of `a` with every sentence of `b`.

        Args:
          a: one sentence, several, or their vectors: [H] of one, [A, H] of several.
          b: the same.

        Raises:
          InputError: see `encode`; or arrays that are not vectors, or vectors of two widths.
        """
        first, second = (unit(_rows(x)) if isinstance(x, np.ndarray | jax.Array) else self._vectors(x) for x in (a, b))
        if first.shape[1] != second.shape[1]:
            raise InputError(f"vectors of width {first.shape[1]} and of width {second.shape[1]} cannot be compared")
        product: Float[np.ndarray, "A B"] = first @ second.T
        return product

    def build_index(
        self, sentences: Iterable[str] | Path, backend: Backend = "jax", *, batch_size: int = 64, progress: bool = False
    ) -> None:
        """Encodes sentences for `search`; the new index replaces an earlier one.

        Args:
          sentences: a list, which is copied, or the `pathlib.Path` of a text file, one sentence per line (also .gz).
          backend: see `Index`.
          batch_size: sentences per forward pass, over all devices.
          progress: show a progress bar.

        Raises:
          InputError: a plain string, an unreadable or empty file, or see `Index`.
        """
        texts = _several(sentences)
        about = {"model": self._name, "pooler": self._loaded.pooler}
        self.index = Index(texts, self._vectors(texts, batch_size, progress), backend, about)

    def add_to_index(self, sentences: Iterable[str] | Path, *, batch_size: int = 64, progress: bool = False) -> None:
        """Encodes sentences and appends them to the index; arguments and errors as of `build_index`."""
        index, texts = self._index(), _several(sentences)
        index.add(texts, self._vectors(texts, batch_size, progress))

    @overload
    def search(  # type: ignore[overload-overlap]  # a string is an iterable of strings, too
        self, queries: str, top_k: int = 5, threshold: float = 0.6, *, batch_size: int = 64
    ) -> list[Hit]: ...

    @overload
    def search(
        self, queries: Iterable[str], top_k: int = 5, threshold: float = 0.6, *, batch_size: int = 64
    ) -> list[list[Hit]]: ...

    def search(
        self, queries: str | Iterable[str], top_k: int = 5, threshold: float = 0.6, *, batch_size: int = 64
    ) -> list[Hit] | list[list[Hit]]:
        """The sentences of the index that are most similar to each query.

        Args:
          queries: one sentence, or several.
          top_k: most hits per query.
          threshold: least cosine similarity of a hit.
          batch_size: sentences per forward pass, over all devices.

        Returns:
          The hits of one query, the best first; for several queries a list of such lists.

        Raises:
          InputError: there is no index, or see `Index.search`.
        """
        found = self._index().search(self._vectors(queries, batch_size), top_k, threshold)
        return found[0] if isinstance(queries, str) else found

    def save_index(self, folder: str | Path) -> Path:
        """Writes the index as a new folder, see `Index.save`."""
        return self._index().save(folder)

    def load_index(self, folder: str | Path) -> None:
        """Reads an index that `save_index` wrote with this model.

        Raises:
          InputError: see `Index.load`; or another model built it: its width, or the vector of one of its sentences, is
            not what this model gives.
        """
        index = Index.load(folder)
        about = f"the index {folder}, built with {index.about.get('model', 'an unnamed model')},"
        if index.width != self.width:
            raise InputError(f"{about} has vectors of width {index.width}, those of {self._name} have {self.width}")
        if index.sentences:
            # The shortest sentence: no limit cuts it.
            number = min(range(len(index)), key=lambda i: len(index.sentences[i]))
            cosine = float(self._vectors(index.sentences[number])[0] @ index.vector(number))
            if cosine < _SAME:
                raise InputError(
                    f"{about} has another vector for '{index.sentences[number][:60]}' than {self._name} gives (their "
                    f"cosine is {cosine:.3f}): load it with the model it was built with, or build it again"
                )
        self.index = index

    def _index(self) -> Index:
        if self.index is None:
            raise InputError("there is no index to search: call build_index or load_index first")
        return self.index

    def _vectors(
        self, sentences: str | Iterable[str], batch_size: int = 64, progress: bool = False
    ) -> Float[np.ndarray, "S H"]:
        return np.asarray(self.encode(_texts(sentences), batch_size=batch_size, progress=progress))


_SAME = 0.999  # least cosine between two vectors of one sentence by one model, whatever the machine


def _rows(given: Any) -> Float[np.ndarray, "S H"]:
    """One vector or several, as rows of float32 or wider."""
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)) or not (
        1 <= given.ndim <= 2
    ):
        raise InputError(
            f"an array of type {given.dtype} and shape {list(given.shape)}; expected numbers of shape [H] or [S, H], "
            "or sentences as strings"
        )
    vectors = np.atleast_2d(np.asarray(given))
    return vectors.astype(np.promote_types(vectors.dtype, np.float32))


def _texts(sentences: Any) -> list[str]:
    """One string or several, as a new list; `InputError` for anything else, also for text that is not Unicode."""
    texts = [sentences] if isinstance(sentences, str) else list(sentences)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"sentence number {number + 1} is a {type(text).__name__}; expected a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"sentence number {number + 1} has half of a surrogate pair at character {error.start + 1}: it is not "
                "Unicode text, or was read from bytes that are not UTF-8"
            ) from error
    return texts


def _several(sentences: Any) -> list[str]:
    if isinstance(sentences, str):
        raise InputError(
            f"an index is built from a list of sentences or from a pathlib.Path, not from the string "
            f"'{sentences[:60]}': give [sentence] for one sentence, or Path(name) for a text file"
        )
    return read_sentences(sentences) if isinstance(sentences, Path) else _texts(sentences)
