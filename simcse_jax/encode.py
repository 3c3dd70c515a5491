"""Sentences to vectors in batches of like length, on every device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from simcse_jax.config import MIN_LENGTH
from simcse_jax.data.tokens import encode_batch, pad
from simcse_jax.errors import InputError
from simcse_jax.hf import Params
from simcse_jax.model import SentenceEncoder
from simcse_jax.postprocess import KEY
from simcse_jax.sharding import put_batch, replicated

_CHUNK = 8192  # sentences tokenised at a time

# Padded lengths: each is one compilation, and the gaps are the padding that is computed for nothing.
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def padded_length(longest: int, limit: int) -> int:
    """Tokens that sentences of at most `longest` are padded to, one of a few lengths; at most `limit`."""
    return min(next((n for n in _LENGTHS if n >= longest), longest), limit)


def check_vocabulary(tokenizer: Any, size: int) -> None:
    """Raises `InputError` if the tokenizer has tokens that a model with `size` word embeddings lacks."""
    if len(tokenizer) > size:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} has {len(tokenizer):,} tokens but the model's vocabulary "
            f"has {size:,}: they are not of one model"
        )


class BatchEncoder:
    """Encodes any number of sentences with whatever parameters it is given; compiled once a length."""

    def __init__(
        self, model: SentenceEncoder, tokenizer: Any, mesh: Mesh, max_length: int | None = None, batch_size: int = 64
    ) -> None:
        """Prepares the forward pass.

        Args:
          model: the module.
          tokenizer: its fast tokenizer.
          mesh: devices; the batch is split over all of them.
          max_length: longer sentences are cut to this many tokens; the model's own limit where None.
          batch_size: sentences a forward pass over all devices.

        Raises:
          InputError: `max_length` leaves no room for a token, or the tokenizer has tokens that the model lacks.
        """
        if max_length is not None and max_length < MIN_LENGTH:
            raise InputError(
                f"max_length is {max_length}; it must be at least {MIN_LENGTH}: "
                "two special tokens and one of the sentence"
            )
        check_vocabulary(tokenizer, model.config.vocab_size)
        self.mesh = mesh
        self.tokenizer = tokenizer
        limit = model.config.max_length
        self.max_length = limit if max_length is None else min(max_length, limit)
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

        def forward(params: Params, batch: tuple[Int[Array, "B L"], Int[Array, "B"]]) -> Float[Array, "B D"]:
            ids, lengths = batch
            vectors = jnp.asarray(model.apply({"params": params}, ids, lengths[:, None]))[:, 0]
            vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
            return params[KEY](vectors) if KEY in params else vectors

        self._forward = jax.jit(forward, out_shardings=replicated(mesh))

    def __call__(self, params: Params, sentences: list[str], progress: bool = False) -> Float[np.ndarray, "S D"]:
        """Vectors of the sentences, in their order, not normalised, float32 (float64 for a float64 model).

        A post-processor among the parameters is applied.

        Each process of a multi-host job must call this with the same sentences; each gets all vectors.
        """
        # A Python list of ints takes eight times the room of an array.
        tokens = [
            np.asarray(ids, np.uint32)
            for start in range(0, len(sentences), _CHUNK)
            for ids in encode_batch(self.tokenizer, sentences[start : start + _CHUNK], self.max_length)
        ]
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        results: list[Any] = []
        with tqdm(total=len(tokens), desc="encoding", unit=" sentences", disable=not progress) as bar:
            for start in range(0, len(order), self.batch_size):
                chosen = [tokens[i] for i in order[start : start + self.batch_size]]
                results.append(self._forward(params, self._batch(chosen))[: len(chosen)])
                if len(results) > 2:  # fetched two batches late, so that the devices are never idle
                    results[-3] = np.asarray(results[-3])
                bar.update(len(chosen))
        vectors = np.concatenate([np.asarray(r) for r in results])
        result = np.empty_like(vectors)
        result[order] = vectors
        return result

    def _batch(self, tokens: list[np.ndarray]) -> Any:
        length = padded_length(max(map(len, tokens)), self.max_length)
        # Few sentences (a query, the last batch) take the next power of two of rows, not a whole batch.
        rows = min(self.mesh.size * 2 ** max(0, (len(tokens) - 1) // self.mesh.size).bit_length(), self.batch_size)
        filled = tokens + [tokens[0]] * (rows - len(tokens))
        ids, lengths = pad(filled, length, self.tokenizer.pad_token_id)
        return put_batch(self.mesh, rows, lambda index: (ids[index], lengths[index]))
