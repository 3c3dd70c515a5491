"""The Python tool: it encodes, compares and searches sentences with a trained model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from simcse_jax.config import ENCODE_ROW, Backend, LongText
from simcse_jax.errors import InputError
from simcse_jax.inference.index import Hit, Index, check_backend, check_search
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.names import translated
from simcse_jax.inference.texts import as_texts, texts_or_file
from simcse_jax.inference.vectors import cosines, unit


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

    # An attribute by another library's name, such as max_seq_length, is an error and not without effect.
    __slots__ = ("__weakref__", "_encoder", "_loaded", "_name", "_prompts", "index")

    def __init__(
        self,
        model: str | Path,
        pooler: str | None = None,
        max_length: int | None = None,
        packed_length: int = ENCODE_ROW,
        long_text: LongText = "cut",
        **others: Any,
    ) -> None:
        """Loads a model onto all devices.

        Args:
          model: a run folder, an exported folder, a Hugging Face folder or a name on the hub.
          pooler: overrides the pooler saved with the model.
          max_length: most tokens per sentence; the model's own limit where None.
          packed_length: tokens per row; shorter sentences share a row. 0: one sentence per row. The vectors agree up to
            rounding.
          long_text: treatment of longer texts, see `LongText`.
          others: settings that other libraries have; the error says what to do instead, as for `device`.

        Raises:
          InputError: see `load_model` and `BatchEncoder`.
        """
        translated(others, SimCSE.__init__)
        self._name = str(model)
        self._loaded = load_model(model, pooler)
        self._encoder = self._loaded.encoder(max_length, packed_length=packed_length, long_text=long_text)
        self._prompts = self._loaded.checkpoint.prompts
        self.index: Index | None = None

    def __repr__(self) -> str:
        """The model, its pooler, width and limit, and its index."""
        about = f"pooler={self._loaded.pooler!r}, width={self.width}, max_length={self.max_length}"
        return f"SimCSE({self._name!r}, {about}, index={self.index!r})"

    @property
    def width(self) -> int:
        """Width of the vectors."""
        return self._loaded.width

    @property
    def max_length(self) -> int:
        """Most tokens per sentence, unless a call says otherwise."""
        return self._encoder.max_length

    @property
    def prompts(self) -> dict[str, str]:
        """The texts that the model names, for `prompt_name`."""
        return dict(self._prompts.by_name)

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
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        **others: Any,
    ) -> Float[np.ndarray, "... H"] | Float[Array, "... H"]:
        """Vectors of sentences.

        Args:
          sentences: one sentence, or several in an order: a list, a tuple, a generator, a pandas Series, a NumPy array.
          batch_size: sentences per forward pass, over all devices.
          max_length: most tokens per sentence; that of the constructor where None.
          normalize: scale each vector to length 1.
          progress: show a progress bar.
          output: the kind of array: NumPy's, or JAX's on its first device.
          long_text: treatment of longer texts, see `LongText`; that of the constructor where None.
          prompt: text to put before each sentence, "" for none; the model's own default prompt where None.
          prompt_name: name of one of the model's own prompts, in place of `prompt`.
          truncate_dim: keep this number of dimensions, the first, before the vectors are scaled; all where None.
          others: these settings under sentence-transformers' names (`show_progress_bar`, `normalize_embeddings` …).

        Returns:
          float32 [H] for one sentence, [S, H] for several.

        Raises:
          InputError: something other than strings, a setting that cannot be used, or see `LongText`.
        """
        if others:
            settings = translated(others, SimCSE.encode)
            normalize, progress = settings.get("normalize", normalize), settings.get("progress", progress)
        several = as_texts(sentences)
        limit = self.max_length if max_length is None else max_length
        text = self._prompts.text(prompt, prompt_name)
        encoder = self._encoder.with_limits(batch_size, limit, long_text or self._encoder.long_text, text)
        if output not in ("numpy", "jax"):
            raise InputError(f"output is '{output}'; choose numpy or jax")
        kept = self.width if truncate_dim is None else truncate_dim
        if not isinstance(kept, int | np.integer) or not 1 <= kept <= self.width:
            raise InputError(f"truncate_dim is {truncate_dim}; it must be a whole number from 1 to {self.width}")
        vectors = np.zeros((0, self.width), np.float32)
        if several:
            vectors = encoder(self._loaded.params, several, progress)
        vectors = vectors[:, :kept]
        if normalize:
            vectors = unit(vectors)
        result = vectors[0] if isinstance(sentences, str) else vectors
        return result if output == "numpy" else jnp.asarray(result)

    def are_cut(self, sentences: Iterable[str]) -> list[bool]:
        """Whether each sentence has more tokens than `max_length`, so that its end is not encoded."""
        return self._encoder.are_cut(as_texts(sentences))

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
        first, second = (self._vectors(x) if (rows := _rows(x)) is None else rows for x in (a, b))
        if first.shape[1] != second.shape[1]:
            raise InputError(f"vectors of width {first.shape[1]} and of width {second.shape[1]} cannot be compared")
        return cosines(first, second)

    def build_index(
        self,
        sentences: Iterable[str] | Path,
        backend: Backend = "jax",
        *,
        batch_size: int = 64,
        progress: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> None:
        """Encodes sentences for `search`; the new index replaces an earlier one.

        Args:
          sentences: a list, which is copied, or the `pathlib.Path` of a text file, one sentence per line (also .gz).
          backend: see `Index`.
          batch_size: sentences per forward pass, over all devices.
          progress: show a progress bar.
          prompt, prompt_name: see `encode`; the index keeps them.

        Raises:
          InputError: a plain string, an unreadable or empty file, or see `Index`.
        """
        check_backend(backend)
        texts = texts_or_file(sentences)
        text = self._prompts.text(prompt, prompt_name)
        about = {"model": self._name, "prompt": text, **self._settings()}
        self.index = Index(texts, self._vectors(texts, batch_size, progress, text), backend, about)

    def add_to_index(self, sentences: Iterable[str] | Path, *, batch_size: int = 64, progress: bool = False) -> None:
        """Encodes sentences as those of the index, and appends them; arguments and errors as of `build_index`."""
        index, texts = self._index(), texts_or_file(sentences)
        index.add(texts, self._vectors(texts, batch_size, progress, index.about.get("prompt")))

    @overload
    def search(  # type: ignore[overload-overlap]  # a string is an iterable of strings, too
        self,
        queries: str,
        top_k: int = 5,
        threshold: float | None = None,
        *,
        batch_size: int = 64,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> list[Hit]: ...

    @overload
    def search(
        self,
        queries: Iterable[str],
        top_k: int = 5,
        threshold: float | None = None,
        *,
        batch_size: int = 64,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> list[list[Hit]]: ...

    def search(
        self,
        queries: str | Iterable[str],
        top_k: int = 5,
        threshold: float | None = None,
        *,
        batch_size: int = 64,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> list[Hit] | list[list[Hit]]:
        """The sentences of the index that are most similar to each query.

        Args:
          queries: one sentence, or several.
          top_k: most hits per query.
          threshold: least cosine similarity of a hit; any where None. 1 finds the copies of the query.
          batch_size: sentences per forward pass, over all devices.
          prompt, prompt_name: see `encode`.

        Returns:
          The hits of one query, the best first; for several queries a list of such lists.

        Raises:
          InputError: there is no index, or see `Index.search`.
        """
        index = self._index()
        check_search(top_k, threshold)
        text = self._prompts.text(prompt, prompt_name)
        found = index.search(self._vectors(queries, batch_size, prompt=text), top_k, threshold)
        return found[0] if isinstance(queries, str) else found

    def save_index(self, folder: str | Path) -> Path:
        """Writes the index as a new folder, see `Index.save`."""
        return self._index().save(folder)

    def load_index(self, folder: str | Path) -> None:
        """Reads an index that `save_index` wrote with this model.

        Raises:
          InputError: see `Index.load`; or it was built otherwise: with another pooler, `max_length` or `long_text`, or
            with another model, whose width, or vector of the shortest or the longest of its sentences, differs.
        """
        index = Index.load(folder)
        about = f"the index {folder}, built with {index.about.get('model', 'an unnamed model')},"
        if index.width != self.width:
            raise InputError(f"{about} has vectors of width {index.width}, those of {self._name} have {self.width}")
        own = self._settings()
        if changed := [name for name in own if index.about.get(name, own[name]) != own[name]]:
            shown = "; ".join(f"{name} was {index.about[name]!r}, is {own[name]!r}" for name in changed)
            values = ", ".join(f"{name}={index.about[name]!r}" for name in changed)
            raise InputError(
                f"{about} was built with other settings ({shown}): load the model with {values}, or build it again"
            )
        # An index of an earlier version does not say its length; the longest sentence tells where that cuts.
        numbers = sorted(range(len(index)), key=lambda i: len(index.sentences[i]))
        for number in dict.fromkeys([*numbers[:1], *numbers[-1:]]):
            again = self._vectors(index.sentences[number], prompt=index.about.get("prompt"))
            cosine = float(cosines(again, index.vector(number)[None])[0, 0])
            if cosine < _SAME:
                raise InputError(
                    f"{about} has another vector for '{index.sentences[number][:60]}' than {self._name} gives (their "
                    f"cosine is {cosine:.3f}): load it with the model and the settings it was built with, or build it "
                    "again"
                )
        self.index = index

    def _settings(self) -> dict[str, Any]:
        """What vectors of a sentence follow from, besides the model."""
        encoder = self._encoder
        return {"pooler": self._loaded.pooler, "max_length": encoder.max_length, "long_text": encoder.long_text}

    def _index(self) -> Index:
        if self.index is None:
            raise InputError("there is no index to search: call build_index or load_index first")
        return self.index

    def _vectors(
        self, sentences: str | Iterable[str], batch_size: int = 64, progress: bool = False, prompt: str | None = None
    ) -> Float[np.ndarray, "S H"]:
        return np.asarray(self.encode(as_texts(sentences), batch_size=batch_size, progress=progress, prompt=prompt))


_SAME = 0.999  # least cosine between two vectors of one sentence by one model, whatever the machine


def _rows(given: Any) -> Float[np.ndarray, "S H"] | None:
    """One vector or several, as rows of float32 or wider; None for text, and for anything that is no array."""
    if not hasattr(given, "__array__") or (array := np.asarray(given)).dtype.kind in "OUT":
        return None
    given = array
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)) or not (
        1 <= given.ndim <= 2
    ):
        raise InputError(
            f"an array of type {given.dtype} and shape {list(given.shape)}; expected numbers of shape [H] or [S, H], "
            "or sentences as strings"
        )
    vectors = np.atleast_2d(given)
    return vectors.astype(np.promote_types(vectors.dtype, np.float32))
