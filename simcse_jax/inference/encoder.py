"""Sentences to vectors, several sentences per row, on every device."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from simcse_jax.config import ENCODE_ROW, MIN_LENGTH, LongText
from simcse_jax.data.packing import first_fit, lay
from simcse_jax.data.tokens import encode_counted, encode_windows
from simcse_jax.errors import InputError
from simcse_jax.inference.shapes import _FEW_LENGTHS, _LENGTHS, padded_length, power_of_two
from simcse_jax.model import SentenceEncoder, fused_attention
from simcse_jax.model.params import Params
from simcse_jax.postprocess import KEY
from simcse_jax.pretrained.tokenizers import check_tokenizer
from simcse_jax.reports.progress import note, progress_bar
from simcse_jax.runtime.mesh import put_batch, replicated

_CHUNK = 8192  # sentences tokenised and packed at a time

_Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Sentences of a batch, the place of each among the batch's rows × slots, the rows' token ids, and lengths by slot."""

# Mean length of STS sentences, in tokens; a packed batch of n sentences has n times as many tokens.
_MEAN_LENGTH = 16
# Tokens per slot of a row: the shortest sentences are the special tokens and one word.
_TOKENS_A_SLOT = 8


def check_max_length(length: Any, positions: int) -> None:
    """Raises `InputError` for a number of tokens that is too small for a sentence, or too large for the encoder."""
    if not isinstance(length, int | np.integer) or length < MIN_LENGTH:
        raise InputError(
            f"max_length is {length}; it must be at least {MIN_LENGTH}, a whole number: "
            "two special tokens and one of the sentence"
        )
    if length > positions:
        raise InputError(
            f"max_length is {length} but the model has positions for {positions} tokens: use at most that, and "
            "long_text 'windows' for longer texts"
        )


class BatchEncoder:
    """Encodes any number of sentences with the parameters of each call; compiles once per shape of rows.

    No call changes the encoder, so that threads may share it.
    """

    def __init__(
        self,
        model: SentenceEncoder,
        tokenizer: Any,
        mesh: Mesh,
        max_length: int | None = None,
        batch_size: int = 64,
        packed_length: int = ENCODE_ROW,
        long_text: LongText = "cut",
        prompt: str = "",
    ) -> None:
        """Prepares the forward pass.

        Args:
          model: the module.
          tokenizer: its fast tokenizer.
          mesh: devices; the batch is split over all of them.
          max_length: most tokens per sentence; as many as the encoder has positions for where None. `encoder_of` takes
            the model's own limit.
          batch_size: sentences per forward pass, over all devices; packed, as many tokens as that number of sentences
            with 16 tokens each.
          packed_length: tokens per row. Sentences of at most that length share rows, one after the other; longer ones
            have rows of their own, and all have where it is 0. The vectors agree up to rounding.
          long_text: treatment of longer texts, see `LongText`.
          prompt: text to put before each sentence.

        Raises:
          InputError: `max_length` leaves no room for a token or exceeds the encoder's positions, `packed_length`,
            `batch_size` or `long_text` cannot be used, or see `check_tokenizer`.
        """
        whole = isinstance(packed_length, int | np.integer)
        if not whole or (packed_length and not _TOKENS_A_SLOT <= packed_length <= _LENGTHS[-1]):
            raise InputError(
                f"packed_length is {packed_length}; it must be 0 (one sentence per row) or {_TOKENS_A_SLOT} to "
                f"{_LENGTHS[-1]} tokens per row"
            )
        check_tokenizer(tokenizer, model.config.vocab_size)
        self.mesh = mesh
        self.tokenizer = tokenizer
        self._limit = model.config.max_length
        self._set(batch_size, max_length, long_text, prompt)
        self.packed_length = packed_length
        self._lengths: tuple[int, ...] = _LENGTHS
        model = model.clone(attention=fused_attention(mesh))

        def forward(params: Params, batch: tuple[Int[Array, "B L"], Int[Array, "B S"]]) -> Float[Array, "B*S D"]:
            vectors = jnp.asarray(model.apply({"params": params}, *batch))
            vectors = vectors.reshape(-1, vectors.shape[-1])
            vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
            return params[KEY](vectors) if KEY in params else vectors

        self._forward = jax.jit(forward, out_shardings=replicated(mesh))

    def __repr__(self) -> str:
        """Its settings."""
        return f"BatchEncoder(max_length={self.max_length}, batch_size={self.batch_size}, long_text={self.long_text!r})"

    def with_limits(
        self, batch_size: int, max_length: int | None, long_text: LongText, prompt: str = ""
    ) -> "BatchEncoder":
        """The same encoder with other settings, see the constructor; both share their compiled programs."""
        other = copy.copy(self)
        other._set(batch_size, max_length, long_text, prompt)
        return other

    def _set(self, batch_size: int, max_length: int | None, long_text: LongText, prompt: str) -> None:
        length = self._limit if max_length is None else max_length
        check_max_length(length, self._limit)
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be a whole number greater than 0")
        if long_text not in get_args(LongText):
            raise InputError(f"long_text is '{long_text}'; choose one of {', '.join(get_args(LongText))}")
        self.max_length = length
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        self.long_text = long_text
        self.prompt = prompt

    def with_few_programs(self) -> "BatchEncoder":
        """The same encoder with rows of few lengths, shared by sentences of all lengths: about nine programs instead of
        dozens, at the price of some padding. Both encoders share their compiled programs."""
        other = copy.copy(self)
        other.packed_length = min(self.max_length, _LENGTHS[-1])
        other._lengths = _FEW_LENGTHS
        return other

    def compile(self, params: Params) -> None:
        """Compiles every program that a call may need, so that no call waits for a compilation."""
        for rows, width, slots in self._shapes():
            ids = np.full((rows, width), self.tokenizer.pad_token_id, np.int32)
            batch = put_batch(self.mesh, rows, partial(_share, ids, np.zeros((rows, slots), np.int32)))
            jax.block_until_ready(self._forward(params, batch))

    def _shapes(self) -> set[tuple[int, int, int]]:
        """Rows, tokens and slots of every possible batch."""
        shapes, specials = set(), max(self.tokenizer.num_special_tokens_to_add(), 1)
        for longest in range(1, self.max_length + 1):
            if longest > self.packed_length:
                width, slots, most = padded_length(longest, self.max_length, self._lengths), 1, self.batch_size
            else:
                width = padded_length(longest, self.packed_length, self._lengths)
                slots, most = self._slots(width), self._most_rows(width)
            # Sentences packed into shorter rows have one row's tokens; their number alone may need more rows.
            needed = -(-(width // specials) // slots) if width < self.packed_length else most
            shapes |= {(self._rows(number, most), width, slots) for number in range(1, min(needed, most) + 1)}
        return shapes

    def __call__(self, params: Params, sentences: list[str], progress: bool | str = False) -> Float[np.ndarray, "S D"]:
        """Vectors of the sentences, in their order, not normalised, float32 (float64 for a float64 model).

        The encoder puts its prompt before each sentence, and applies a post-processor that is among the parameters.
        In a command, with `progress`, a line says how many sentences were cut.

        Each process of a multi-host job must call this with the same sentences; each gets all vectors.

        Args:
          params: of the model, and of a post-processor, where it has one.
          sentences: any number.
          progress: show a progress bar, with this name for the work where it is a string.

        Raises:
          InputError: with `long_text` error, a sentence of more than `max_length` tokens.
        """
        what = progress if isinstance(progress, str) else "encoding"
        with progress_bar(len(sentences), "sentences", what, shown=bool(progress)) as bar:
            return self._encode_texts(params, sentences, bar)

    def _encode_texts(self, params: Params, sentences: list[str], bar: Any) -> Float[np.ndarray, "S D"]:
        tokens: list[np.ndarray] = []
        owners: list[int] = []
        cut = 0
        for start in range(0, len(sentences), _CHUNK):
            chunk = [self.prompt + sentence for sentence in sentences[start : start + _CHUNK]]
            if self.long_text == "cut":
                ids, counts = encode_counted(self.tokenizer, chunk, self.max_length)
                cut += sum(count > self.max_length for count in counts)
            else:
                ids, places = encode_windows(self.tokenizer, chunk, self.max_length)
                owners += [start + place for place in places]
            # A Python list of ints takes eight times the memory of an array.
            tokens += [np.asarray(x, np.uint32) for x in ids]
        if cut and not bar.disable:
            note(
                f"{cut:,} of {len(sentences):,} texts have more than {self.max_length} tokens: only their beginning is "
                "encoded"
            )
        if len(tokens) == len(sentences):
            return self._encode(params, tokens, bar)
        windows = np.bincount(owners)
        if self.long_text == "error":
            long = int(np.argmax(windows > 1))
            raise InputError(
                f"{np.sum(windows > 1):,} of {len(sentences):,} sentences have more than {self.max_length} tokens, the "
                f"first is '{sentences[long][:60]}…' (number {long + 1}): shorten them, or set long_text to cut or "
                "windows"
            )
        specials = self.tokenizer.num_special_tokens_to_add()
        weights = np.array([max(len(ids) - specials, 1) for ids in tokens], np.float64)[:, None]
        bar.total = len(tokens)
        vectors = self._encode(params, tokens, bar)
        # The windows of a sentence are neighbours.
        starts = np.cumsum(windows) - windows
        means: Float[np.ndarray, "S D"] = np.add.reduceat(vectors * weights, starts) / np.add.reduceat(weights, starts)
        return means.astype(vectors.dtype)

    def are_cut(self, sentences: list[str]) -> list[bool]:
        """Whether each sentence has more tokens than are encoded, so that only its beginning counts."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        # A token takes a byte at least: most sentences need not be tokenised again.
        long = [s for s in sentences if len((self.prompt + s).encode()) > room] if self.long_text == "cut" else []
        _, counts = encode_counted(self.tokenizer, [self.prompt + s for s in long], self.max_length)
        cut = {s for s, count in zip(long, counts, strict=True) if count > self.max_length}
        return [s in cut for s in sentences]

    def _encode(self, params: Params, tokens: list[np.ndarray], bar: Any) -> Float[np.ndarray, "S D"]:
        results: list[Any] = []
        order: list[np.ndarray] = []
        for chosen, places, ids, lengths in self._batches(tokens):
            batch = put_batch(self.mesh, len(ids), partial(_share, ids, lengths))
            results.append((self._forward(params, batch), places))
            order.append(chosen)
            if len(results) > 2:  # fetched two batches late, so that the devices are never idle
                results[-3] = _fetched(*results[-3])
            bar.update(len(chosen))
        results[-2:] = [_fetched(*result) for result in results[-2:]]
        vectors = np.concatenate(results)
        result = np.empty_like(vectors)
        result[np.concatenate(order)] = vectors
        return result

    def _batches(self, tokens: list[np.ndarray]) -> Iterator[_Batch]:
        lengths = np.array([len(ids) for ids in tokens])
        if not lengths.all():
            raise InputError(
                "a sentence has no token, which has no vector: this tokenizer adds no special tokens, so leave out "
                "empty sentences"
            )
        packed = lengths <= self.packed_length
        yield from self._alone(tokens, lengths, np.flatnonzero(~packed))
        if packed.any():
            yield from self._packed(tokens, lengths, np.flatnonzero(packed))

    def _alone(self, tokens: list[np.ndarray], lengths: np.ndarray, group: np.ndarray) -> Iterator[_Batch]:
        """Batches of one sentence per row, of similar length, the longest first."""
        group = group[np.argsort(-lengths[group], kind="stable")]
        for start in range(0, len(group), self.batch_size):
            chosen = group[start : start + self.batch_size]
            width = padded_length(int(lengths[chosen[0]]), self.max_length, self._lengths)
            rows = self._rows(len(chosen), self.batch_size)
            yield self._batch(tokens, lengths, chosen, np.arange(len(chosen)), np.zeros_like(chosen), (rows, width, 1))

    def _packed(self, tokens: list[np.ndarray], lengths: np.ndarray, group: np.ndarray) -> Iterator[_Batch]:
        """Batches of several sentences per row."""
        # Sentences that fill less than a row (a query) get a shorter one.
        width = padded_length(int(lengths[group].sum()), self.packed_length, self._lengths)
        slots, most = self._slots(width), self._most_rows(width)
        for start in range(0, len(group), _CHUNK):
            chunk = group[start : start + _CHUNK]
            rows, places = (x[0] for x in first_fit(lengths[None, chunk], width, slots))
            for first in range(0, int(rows.max()) + 1, most):
                inside = (rows >= first) & (rows < first + most)
                count = self._rows(int(rows[inside].max()) + 1 - first, most)
                shape = (count, width, slots)
                yield self._batch(tokens, lengths, chunk[inside], rows[inside] - first, places[inside], shape)

    def _batch(
        self,
        tokens: list[np.ndarray],
        lengths: Int[np.ndarray, " all"],
        chosen: Int[np.ndarray, " N"],
        rows: Int[np.ndarray, " N"],
        slots: Int[np.ndarray, " N"],
        shape: tuple[int, int, int],
    ) -> _Batch:
        flat = np.concatenate([tokens[i] for i in chosen])
        laid = lay(flat, lengths[chosen], rows, slots, shape, self.tokenizer.pad_token_id)
        return chosen, rows * shape[2] + slots, *laid

    def _slots(self, width: int) -> int:
        """Sentences that a packed row of `width` tokens has room for."""
        return -(-width // _TOKENS_A_SLOT)

    def _most_rows(self, width: int) -> int:
        """Most packed rows of `width` tokens in a batch."""
        return -(-self.batch_size * _MEAN_LENGTH // (width * self.mesh.size)) * self.mesh.size

    def _rows(self, needed: int, most: int) -> int:
        """Rows of a batch; few (a query, the last batch) are padded to the next power of two, not to a whole batch."""
        return min(self.mesh.size * power_of_two(-(-needed // self.mesh.size)), most)


def _share(ids: np.ndarray, lengths: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    return ids[rows], lengths[rows]


def _fetched(vectors: Array, places: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N D"]:
    chosen: np.ndarray = np.asarray(vectors)[places]
    return chosen
