"""Negatives that mean the same as their anchor, by the cosine of a frozen model."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from simcse_jax.config import Config
from simcse_jax.data.corpus import Corpus
from simcse_jax.data.tokens import is_complete
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.vectors import unit
from simcse_jax.reports.progress import say

_BLOCK = 1024  # anchors whose similarities are in memory at a time


class Reference:
    """Unit vectors, under the frozen model, of the first sentences of some examples."""

    def __init__(self, examples: Int[np.ndarray, " E"], vectors: Float[np.ndarray, "E H"]) -> None:
        """Args:
        examples: numbers of the examples in the token table, ascending.
        vectors: their vectors, of any scale.
        """
        self.examples = examples
        self.vectors = unit(vectors)

    def of(self, examples: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B H"]:
        """The vectors of these examples."""
        return self.vectors[np.searchsorted(self.examples, examples)]


def load_reference(
    file: Path, model: str, pooler: str | None, config: Config, corpus: Corpus, wanted: Int[np.ndarray, " E"]
) -> Reference:
    """Vectors of the wanted examples; those that `file` lacks are encoded and added to it.

    Args:
      file: an .npz file, made if absent.
      model: the frozen model.
      pooler: its pooler; the one saved with it where None.
      config: a run; sentences are cut to its data.max_length, as training does, or to the frozen model's positions.
      corpus: the training text.
      wanted: examples, as the token table numbers them, ascending.

    Raises:
      InputError: see `load_model`.
    """
    examples, vectors = np.zeros(0, np.int64), None
    if file.is_file():
        try:
            with np.load(file, allow_pickle=False) as stored:
                examples, vectors = stored["examples"], stored["vectors"]
            whole = examples.dtype == np.int64 and vectors.dtype == np.float32 and vectors.ndim == 2
            if not whole or examples.shape != vectors.shape[:1]:
                raise ValueError
        except Exception:  # numpy's errors for damaged files are those of zip and of a parser of Python
            say(f"{file} is damaged: the sentences are encoded again")
            examples, vectors = np.zeros(0, np.int64), None
    missing = np.setdiff1d(wanted, examples, assume_unique=True)
    if len(missing) or vectors is None:
        loaded = load_model(model, pooler)
        encoder = loaded.encoder(min(config.data.max_length, loaded.model.config.max_length))
        say(f"encoding {len(missing):,} training sentences with the frozen model {model}")
        new = encoder(loaded.params, first_sentences(corpus, missing), progress=True)
        examples = np.concatenate([examples, missing])
        order = np.argsort(examples)
        examples = examples[order]
        vectors = (new if vectors is None else np.concatenate([vectors, new]))[order]
        partial = file.with_name(f".{file.stem}.partial.npz")
        np.savez(partial, examples=examples, vectors=vectors)
        partial.replace(file)
    return Reference(examples, vectors)


def first_sentences(corpus: Corpus, wanted: Int[np.ndarray, " E"]) -> list[str]:
    """The first sentence of the given examples, ascending, as the token table numbers them."""
    numbers = iter([*wanted.tolist(), -1])
    following, texts = next(numbers), []
    for number, example in enumerate(filter(is_complete, corpus)):
        if following < 0:
            break
        if number == following:
            texts.append(example[0])
            following = next(numbers)
    return texts


def false_negatives(batches: Iterable[Float[np.ndarray, "_ H"]], threshold: float) -> dict[str, float | None]:
    """Counts the pairs of sentences in a batch that are alike.

    Args:
      batches: unit vectors of the anchors of each step.
      threshold: two different rows of a batch with a greater cosine are a false negative of each other.

    Returns:
      `false_negative_pairs`: share of all (anchor, other) pairs; `false_negative_anchors`: share of anchors with at
      least one; `false_negatives`: mean number of false negatives per anchor. None without a pair.
    """
    pairs = anchors = found = affected = 0
    for vectors in batches:
        n = len(vectors)
        pairs, anchors = pairs + n * (n - 1), anchors + n
        for start in range(0, n, _BLOCK):
            similar = vectors[start : start + _BLOCK] @ vectors.T > threshold
            rows = np.arange(len(similar))
            similar[rows, start + rows] = False
            counts = np.count_nonzero(similar, axis=1)
            found, affected = found + int(counts.sum()), affected + int(np.count_nonzero(counts))
    return {
        "false_negative_pairs": found / pairs if pairs else None,
        "false_negative_anchors": affected / anchors if pairs else None,
        "false_negatives": found / anchors if pairs else None,
    }
