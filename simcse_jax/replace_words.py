"""Words replaced by what a masked language model expects there: the augmentation "MLM" of SimCSE's table 1."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from simcse_jax import hf
from simcse_jax.data.tokens import pad
from simcse_jax.embedder import load_model
from simcse_jax.encode import padded_length
from simcse_jax.errors import InputError
from simcse_jax.hf import Params
from simcse_jax.model import SentenceEncoder, build_mlm_head


class Hidden(NamedTuple):
    """A tokenised sentence with words hidden."""

    tokens: list[int]
    """[MASK] in their places."""
    places: list[int]
    """Where."""
    words: list[int]
    """The tokens that stood there."""
    spans: list[tuple[int, int]]
    """Their characters in the sentence."""


class WordReplacer:
    """Hides a share of the words of sentences and puts others in their place."""

    def __init__(self, model: str | Path, max_length: int | None = None, batch_size: int = 64) -> None:
        """Loads a masked language model.

        Args:
          model: a run that trained one (pretrain_mlm), its export, a Hugging Face folder or a name on the hub, of
            BERT or RoBERTa with its prediction head.
          max_length: words beyond so many tokens stay as they are; the model's own limit where None.
          batch_size: sentences a forward pass.

        Raises:
          InputError: no such model, or one without a prediction head or a mask token.
        """
        loaded = load_model(model, pooler="avg")
        head: Any = loaded.mlm
        if head is None and loaded.run is None:
            head = hf.load_params(loaded.checkpoint, mlm=True).get("mlm")
        if head is None:
            raise InputError(
                f"{model} has no head of a masked language model: give one that predicts words, such as "
                "bert-base-uncased or the export of a run of pretrain_mlm"
            )
        self._params = {"encoder": loaded.params["encoder"], "mlm": head}
        self._tokenizer = hf.load_tokenizer(loaded.checkpoint.folder)
        if self._tokenizer.mask_token_id is None:
            raise InputError(f"the tokenizer of {model} has no mask token: give another model")
        limit = loaded.model.config.max_length
        self._max_length = limit if max_length is None else min(limit, max_length)
        self._batch_size = batch_size
        self._words = self._whole_words(loaded.model.config.vocab_size)
        self._predict = jax.jit(lambda *given: _predict(loaded.model, jnp.asarray(self._words), *given))

    def _whole_words(self, size: int) -> Bool[np.ndarray, "V"]:
        """Tokens that are a word by themselves: they begin one and hold a letter or a digit."""
        names = self._tokenizer.convert_ids_to_tokens(range(min(size, len(self._tokenizer))))
        wordpiece = any(name.startswith("##") for name in names)
        whole = np.zeros(size, bool)
        for token, name in enumerate(names):
            begins = not name.startswith("##") if wordpiece else name.startswith("Ġ")
            whole[token] = begins and name.removeprefix("Ġ").isalnum()
        whole[self._tokenizer.all_special_ids] = False
        return whole

    def __call__(self, sentences: list[str], share: float, seed: int = 42) -> Iterator[str]:
        """The sentences with words replaced, one after the other.

        Of the words that are a single token, the share (of all words, rounded, one at least) is drawn and hidden at
        once; each is replaced by the likeliest other word. What is not replaced stays as it is written.

        Args:
          sentences: text.
          share: of the words, above 0 and at most 1.
          seed: of the draws; a sentence's depend on it, the share and the sentence's place alone.

        Raises:
          InputError: a share out of range.
        """
        if not 0 < share <= 1:
            raise InputError(f"share is {share}; it must be above 0 and at most 1")
        for start in range(0, len(sentences), self._batch_size):
            part = sentences[start : start + self._batch_size]
            tokens = self._tokenizer(part, truncation=True, max_length=self._max_length, return_offsets_mapping=True)
            hidden = [self._hide(tokens, n, share, np.random.default_rng((seed, start + n))) for n in range(len(part))]
            yield from self._replace(part, hidden)

    def _hide(self, tokens: Any, row: int, share: float, generator: np.random.Generator) -> Hidden:
        ids, numbers = list(tokens["input_ids"][row]), tokens.word_ids(row)
        sizes = np.bincount([n for n in numbers if n is not None], minlength=1)
        single = [i for i, n in enumerate(numbers) if n is not None and sizes[n] == 1 and self._words[ids[i]]]
        count = min(len(single), max(1, round(share * np.count_nonzero(sizes))))
        places = sorted(generator.choice(single, count, replace=False).tolist()) if count else []
        words = [ids[i] for i in places]
        for i in places:
            ids[i] = self._tokenizer.mask_token_id
        return Hidden(ids, places, words, [tokens["offset_mapping"][row][i] for i in places])

    def _replace(self, sentences: list[str], hidden: list[Hidden]) -> Iterator[str]:
        rows = self._batch_size  # few shapes, few compilations
        filled = hidden + [hidden[0]] * (rows - len(hidden))
        length = padded_length(max(len(h.tokens) for h in hidden), self._max_length)
        most = 2 ** (max(1, *(len(h.places) for h in hidden), 1) - 1).bit_length()
        ids, lengths = pad([h.tokens for h in filled], length, self._tokenizer.pad_token_id)
        places, _ = pad([h.places for h in filled], most, 0)
        words, _ = pad([h.words for h in filled], most, 0)
        found = np.asarray(self._predict(self._params, ids, lengths, places, words))
        for sentence, h, tokens in zip(sentences, hidden, found, strict=False):
            # From the end, so that the spans before stay where they are.
            for (start, end), token in reversed(list(zip(h.spans, tokens.tolist(), strict=False))):
                word = self._tokenizer.convert_ids_to_tokens(token).removeprefix("Ġ")
                sentence = sentence[:start] + word + sentence[end:]
            yield sentence


def _predict(
    model: SentenceEncoder,
    allowed: Bool[Array, "V"],
    params: Params,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    places: Int[Array, "B K"],
    words: Int[Array, "B K"],
) -> Int[Array, "B K"]:
    """The likeliest allowed word other than the one given, at each place."""
    inside = jnp.arange(ids.shape[1])[None, :] < lengths[:, None]
    encoder = {"params": {"encoder": params["encoder"]}}
    states: Any = model.apply(encoder, ids, inside, method=SentenceEncoder.hidden_states)
    at: Float[Array, "B K H"] = jnp.take_along_axis(states[-1], places[:, :, None], axis=1)
    table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    head = build_mlm_head(model.config, model.dtype, model.param_dtype)
    logits = jnp.asarray(head.apply({"params": params["mlm"]}, at.reshape(-1, at.shape[-1]), table))
    logits = jnp.where(allowed[None, :], logits, -jnp.inf)
    logits = jnp.where(jnp.arange(logits.shape[1])[None, :] == words.reshape(-1, 1), -jnp.inf, logits)
    return jnp.argmax(logits, axis=1).reshape(places.shape)
