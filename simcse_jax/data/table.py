"""The tokens of a corpus, as flat arrays."""

from dataclasses import dataclass

import numpy as np
import xxhash
from jaxtyping import Bool, Int, Integer, UInt32

from simcse_jax.data.pieces import Pieces


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a corpus: sentence s of example e is `ids[offsets[e·C + s] : offsets[e·C + s + 1]]`.

    Attributes:
      ids: all tokens, one sentence after the other, specials included, sentences cut to the requested length.
      offsets: where each sentence starts, and the end of the last.
      columns: C, sentences per example.
      pad_id: token that fills up short rows.
      max_length: longest sentence.
      skipped: number of examples left out because a sentence was blank.
      fingerprint: a digest of the text, the tokenizer and the length.
      origin: lines that say which column each sentence is from, with the first example.
      missing: numbers of the sentences that are not there, hard negatives of some examples, in ascending order; each
        stands as one token.
    """

    ids: Integer[np.ndarray, " T"] | Pieces
    offsets: Int[np.ndarray, " S"] | Pieces
    columns: int
    pad_id: int
    max_length: int
    skipped: int
    fingerprint: str
    origin: tuple[str, ...] = ()
    missing: Int[np.ndarray, " M"] | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return (len(self.offsets) - 1) // self.columns

    @property
    def mean_length(self) -> float:
        """Tokens of a sentence on average."""
        return int(self.offsets[-1]) / (len(self.offsets) - 1)

    def present(self, examples: Int[np.ndarray, " N"]) -> Bool[np.ndarray, "N C"] | None:
        """Whether the given examples have each of their sentences; None where no example of the text lacks any."""
        if self.missing is None:
            return None
        sentences = self._sentences(examples)
        at = np.minimum(np.searchsorted(self.missing, sentences), len(self.missing) - 1)
        return np.asarray(self.missing[at] != sentences)

    def texts(self, examples: Int[np.ndarray, " N"]) -> UInt32[np.ndarray, "N C 2"]:
        """64-bit ids of the sentences of the given examples, in two words: the digest xxh3-64 of their tokens.

        The id of a sentence that is missing is no other's.
        """
        tokens, lengths = self._tokens(examples)
        content, ends = memoryview(tokens.tobytes()), (np.cumsum(lengths) * tokens.itemsize).tolist()
        digests = [xxhash.xxh3_64_intdigest(content[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        found = np.array(digests, np.uint64).reshape(lengths.shape)
        if (present := self.present(examples)) is not None:
            found = np.where(present, found, self._sentences(examples).astype(np.uint64))
        return found[..., None].view(np.uint32)

    def _sentences(self, examples: Int[np.ndarray, "*N"]) -> Int[np.ndarray, "*N C"]:
        """Numbers of the sentences of the given examples."""
        return np.asarray(examples[..., None] * self.columns + np.arange(self.columns))

    def spans(self, examples: Int[np.ndarray, "*N"]) -> tuple[Int[np.ndarray, "*N C"], Int[np.ndarray, "*N C"]]:
        """The starts of the sentences of the given examples among the tokens, and their lengths."""
        # One run of numbers for each example.
        bounds = self.offsets[examples[..., None] * self.columns + np.arange(self.columns + 1)]
        return bounds[..., :-1], np.diff(bounds)

    def _tokens(self, examples: Int[np.ndarray, " N"]) -> tuple[Integer[np.ndarray, " T"], Int[np.ndarray, "N C"]]:
        """The tokens of the sentences of the given examples, one after the other, and the length of each sentence."""
        starts, lengths = self.spans(examples)
        before = np.cumsum(lengths) - lengths.ravel()
        places = np.arange(lengths.sum()) + np.repeat(starts.ravel() - before, lengths.ravel())
        return np.asarray(self.ids[places]), lengths

    def rows(self, examples: Int[np.ndarray, " N"]) -> tuple[Int[np.ndarray, "N C L"], Int[np.ndarray, "N C"]]:
        """Padded ids and lengths of the given examples."""
        tokens, lengths = self._tokens(examples)
        padded = np.full((*lengths.shape, self.max_length), self.pad_id, np.int32)
        padded[np.arange(self.max_length) < lengths[..., None]] = tokens
        return padded, lengths.astype(np.int32)
