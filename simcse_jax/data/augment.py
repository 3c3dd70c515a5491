"""Augmented positives: the discrete operations that SimCSE's table 1 compares with dropout.

All work on the words of a tokenised sentence. Their draws are a pure function of (seed, step, row of the global batch).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from simcse_jax.config import DataConfig
from simcse_jax.data.reading import read_lines
from simcse_jax.data.tokens import encode_batch
from simcse_jax.errors import InputError
from simcse_jax.pretrained.tokenizers import token_names
from simcse_jax.storage.objects import local_path

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Augmenter:
    """Makes the positives of a batch of single sentences.

    Attributes:
      kind: `crop`, `delete_words`, `delete_word`, `synonyms` or `repetition`; see `DataConfig.augment`.
      share: k as a fraction.
      seed: the seed of the draws.
      starts: for each token of the vocabulary, whether it begins a word.
      pad_id: token that fills up sentences.
      synonyms: the synonyms of a word, by the word's tokens.
    """

    kind: str
    share: float
    seed: int
    starts: Bool[np.ndarray, " vocab"]
    pad_id: int
    synonyms: dict[Tokens, list[Tokens]]

    @property
    def fingerprint(self) -> str:
        """A digest that changes when the synonyms do; empty without any."""
        if not self.synonyms:
            return ""
        return "-" + hashlib.sha256(repr(sorted(self.synonyms.items())).encode()).hexdigest()[:16]

    def draws(self, step: int, batch_size: int, length: int) -> Float[np.ndarray, "B U"]:
        """Uniform numbers in [0, 1) for every row of a global batch: one per token, and one more."""
        # The spawn key keeps this stream apart from the order of examples.
        sequence = np.random.SeedSequence((self.seed, step), spawn_key=(1,))
        return np.random.Generator(np.random.Philox(sequence)).random((batch_size, length + 1))

    def __call__(
        self, ids: Int[np.ndarray, "B L"], lengths: Int[np.ndarray, " B"], draws: Float[np.ndarray, "B U"]
    ) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
        """The augmented sentences.

        Args:
          ids: token ids, padded on the right, first and last token special.
          lengths: tokens of each sentence.
          draws: the rows of `draws` that belong to these sentences.
        """
        if self.kind == "repetition":
            return self._repeat(ids, lengths, draws)
        words = self._words(ids, lengths)
        if self.kind == "synonyms":
            return self._replace(ids, lengths, words, draws)
        counts = words.max(axis=1) + 1
        if self.kind == "crop":
            kept = np.maximum(counts - np.round(self.share * counts).astype(int), np.minimum(counts, 1))
            first = np.floor(draws[:, -1] * (counts - kept + 1)).astype(int)
            keep = (words >= first[:, None]) & (words < (first + kept)[:, None])
        else:
            gone = np.ones_like(counts) if self.kind == "delete_word" else np.round(self.share * counts).astype(int)
            gone = np.minimum(gone, np.maximum(counts - 1, 0))
            # The words of lowest draws go.
            score = np.where(np.arange(ids.shape[1]) < counts[:, None], draws[:, :-1], np.inf)
            rank = np.argsort(np.argsort(score, axis=1), axis=1)
            keep = np.take_along_axis(rank, np.maximum(words, 0), axis=1) >= gone[:, None]
        keep = np.where(words >= 0, keep, np.arange(ids.shape[1]) < lengths[:, None])
        order = np.argsort(~keep, axis=1, kind="stable")
        lengths = keep.sum(axis=1).astype(lengths.dtype)
        moved = np.take_along_axis(ids, order, axis=1)
        return np.where(np.arange(ids.shape[1]) < lengths[:, None], moved, self.pad_id).astype(ids.dtype), lengths

    @property
    def lengthens(self) -> bool:
        """Whether a positive may have more tokens than its sentence."""
        return self.kind in ("synonyms", "repetition")

    def _repeat(
        self, ids: Int[np.ndarray, "B L"], lengths: Int[np.ndarray, " B"], draws: Float[np.ndarray, "B U"]
    ) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
        """Doubles tokens; the last of a sentence that grows over the limit are cut, but for the special one."""
        n, column = ids.shape[1], np.arange(ids.shape[1])[None, :]
        inner = np.maximum(lengths - 2, 0)
        most = np.minimum(np.maximum(2, (self.share * inner).astype(int)), inner)
        doubled = np.floor(draws[:, -1] * (most + 1)).astype(int)
        # The tokens of lowest draws are doubled.
        inside = (column > 0) & (column < lengths[:, None] - 1)
        rank = np.argsort(np.argsort(np.where(inside, draws[:, :-1], np.inf), axis=1), axis=1)
        times = np.where(column < lengths[:, None], 1 + (inside & (rank < doubled[:, None])), 0)
        ends = np.cumsum(times, axis=1)
        # Place p of the new sentence holds the first token whose copies end behind p.
        source = (ends[:, None, :] <= column[:, :, None]).sum(axis=2)
        grown = np.minimum(ends[:, -1], n).astype(lengths.dtype)
        moved = np.take_along_axis(ids, np.minimum(source, n - 1), axis=1)
        last = np.take_along_axis(ids, np.maximum(lengths[:, None] - 1, 0), axis=1)
        moved = np.where(column == grown[:, None] - 1, last, moved)
        return np.where(column < grown[:, None], moved, self.pad_id).astype(ids.dtype), grown

    def _words(self, ids: Int[np.ndarray, "B L"], lengths: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B L"]:
        """Number of the word that each token belongs to; −1 for specials and padding."""
        column = np.arange(ids.shape[1])[None, :]
        inside = (column > 0) & (column < lengths[:, None] - 1)
        begins = inside & (self.starts[ids] | (column == 1))
        return np.where(inside, np.cumsum(begins, axis=1) - 1, -1)

    def _replace(
        self,
        ids: Int[np.ndarray, "B L"],
        lengths: Int[np.ndarray, " B"],
        words: Int[np.ndarray, "B L"],
        draws: Float[np.ndarray, "B U"],
    ) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
        """Replaces one word that has synonyms, if any, by one of them."""
        ids, lengths = ids.copy(), lengths.copy()
        for row, (tokens, length, word, draw) in enumerate(zip(ids.copy(), lengths.copy(), words, draws, strict=True)):
            spans = [np.flatnonzero(word == w) for w in range(word.max() + 1)]
            known = [s for s in spans if tuple(tokens[s].tolist()) in self.synonyms]
            if not known:
                continue
            span = known[int(draw[0] * len(known))]
            choices = self.synonyms[tuple(tokens[span].tolist())]
            new = [*tokens[: span[0]], *choices[int(draw[1] * len(choices))], *tokens[span[-1] + 1 : length]]
            if len(new) <= len(tokens):  # a sentence that grows over the limit stays as it was
                ids[row] = self.pad_id
                ids[row, : len(new)], lengths[row] = new, len(new)
        return ids, lengths


def make_augmenter(config: DataConfig, tokenizer: Any, seed: int) -> Augmenter | None:
    """The augmenter that a config asks for; None if it asks for none.

    Raises:
      InputError: `synonyms` without a readable table of synonyms.
    """
    if config.augment == "none":
        return None
    vocabulary = token_names(tokenizer)
    # WordPiece marks tokens that continue a word, byte-level BPE those that begin one.
    continues = any(token.startswith("##") for token in vocabulary)
    starts = [not t.startswith("##") if continues else t.startswith("Ġ") for t in vocabulary]
    synonyms = (
        _read_synonyms(local_path(config.synonyms, config.cache), tokenizer) if config.augment == "synonyms" else {}
    )
    return Augmenter(config.augment, config.augment_share, seed, np.array(starts), tokenizer.pad_token_id, synonyms)


def _read_synonyms(path: Path, tokenizer: Any) -> dict[Tokens, list[Tokens]]:
    """A table of lines `word<tab>synonym<tab>synonym...`, as tokens of words in the middle of a sentence."""
    if not path.is_file():
        raise InputError(f"no file {path}: check the path in data.synonyms")
    lines = [(number, line.split("\t")) for number, line in read_lines(path) if line.strip()]
    short = [number for number, cells in lines if len(cells) < 2 or not all(cell.strip() for cell in cells)]
    if short or not lines:
        where = f"line {short[0]}" if short else "it"
        raise InputError(f"{path}: {where} has no synonym or an empty one; expected word<tab>synonym<tab>synonym...")

    def tokens(word: str) -> Tokens:
        # With a blank before, for tokenizers to which it belongs to the word.
        return tuple(encode_batch(tokenizer, [f" {word.strip()}"], 512)[0][1:-1])

    return {tokens(word): [tokens(s) for s in others] for _, (word, *others) in lines}
