"""Words replaced by the predictions of a masked language model: the augmentation "MLM" of SimCSE's table 1."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from simcse_jax.config import MIN_LENGTH
from simcse_jax.data.tokens import pad
from simcse_jax.errors import InputError
from simcse_jax.inference.encoder import check_max_length
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.shapes import padded_length, power_of_two
from simcse_jax.model import SentenceEncoder, build_mlm_head
from simcse_jax.model.params import Params
from simcse_jax.pretrained.tokenizers import check_tokenizer, load_tokenizer, token_names
from simcse_jax.pretrained.weights import load_params


class Hidden(NamedTuple):
    """A tokenised sentence with words hidden."""

    tokens: list[int]
    """Token ids, with [MASK] in the places of the hidden words."""
    places: list[int]
    """Places of the hidden words."""
    words: list[int]
    """The tokens that stood there."""
    spans: list[tuple[int, int]]
    """The characters of the sentence that they span."""


def check_settings(share: float, seed: int, max_length: int | None, batch_size: int) -> None:
    """Raises `InputError` for settings that a `WordReplacer` cannot use."""
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; it must be above 0 and at most 1")
    if seed < 0:
        raise InputError(f"seed is {seed}; it must be 0 or more")
    if max_length is not None and max_length < MIN_LENGTH:
        raise InputError(f"max_length is {max_length}; it must be at least {MIN_LENGTH}: two special tokens and a word")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be greater than 0")


class WordReplacer:
    """Hides a share of the words of each sentence and puts others in their place."""

    def __init__(self, model: str | Path, max_length: int | None = None, batch_size: int = 64) -> None:
        """Loads a masked language model.

        Args:
          model: a run that trained one (pretrain_mlm), its export, a Hugging Face folder or a name on the hub, of
            BERT or RoBERTa with its prediction head.
          max_length: words beyond this number of tokens stay as they are; the model's own limit where None.
          batch_size: sentences per forward pass.

        Raises:
          InputError: no such model, one without a prediction head or a mask token, or sizes out of range.
        """
        check_settings(1.0, 0, max_length, batch_size)
        loaded = load_model(model, pooler="avg")
        head: Any = loaded.mlm
        if head is None and loaded.run is None:
            head = load_params(loaded.checkpoint, mlm=True).get("mlm")
        if head is None:
            raise InputError(
                f"{model} has no head of a masked language model: give a model that predicts words, such as "
                "bert-base-uncased or the export of a run of pretrain_mlm"
            )
        self._params = {"encoder": loaded.params["encoder"], "mlm": head}
        self._tokenizer = load_tokenizer(loaded.checkpoint.folder)
        if self._tokenizer.mask_token_id is None:
            raise InputError(f"the tokenizer of {model} has no mask token: give another model")
        vocabulary = loaded.model.config.vocab_size
        check_tokenizer(self._tokenizer, vocabulary)
        self._max_length = loaded.checkpoint.max_length if max_length is None else max_length
        check_max_length(self._max_length, loaded.model.config.max_length)
        self._batch_size = batch_size
        self._texts, self._words = self._whole_words(vocabulary)
        self._predict = jax.jit(lambda *given: _predict(loaded.model, jnp.asarray(self._words), *given))

    def _whole_words(self, size: int) -> tuple[list[str], Bool[np.ndarray, " V"]]:
        """The text of each token, and whether it is a whole word: it begins one and has letters and digits alone."""
        names = token_names(self._tokenizer)
        if json.loads(self._tokenizer.backend_tokenizer.to_str())["model"]["type"] == "WordPiece":
            texts, begins = names, [not name.startswith("##") for name in names]
        else:  # byte-level BPE writes bytes as characters of its own, a space as Ġ
            texts = [self._tokenizer.convert_tokens_to_string([name]).strip() for name in names]
            begins = [name.startswith("Ġ") for name in names]
        whole = np.zeros(size, bool)
        whole[: len(names)] = [begin and text.isalnum() for begin, text in zip(begins, texts, strict=True)]
        whole[self._tokenizer.all_special_ids] = False
        return texts, whole

    def __call__(self, sentences: list[str], share: float, seed: int = 42) -> Iterator[str]:
        """Yields the sentences with words replaced, in their order.

        The number of words to replace is the share of all words of a sentence, rounded, at least one. They are drawn
        from the single-token words and hidden at once; the likeliest other word replaces each. All else stays as it is
        written. With RoBERTa so do the first word of a sentence and a word after a bracket or quote, whose tokens do
        not mark the start of a word.

        Args:
          sentences: text.
          share: share of the words to replace, above 0 and at most 1.
          seed: seed of the draws; those of a sentence depend on it, the share and the sentence's place alone.

        Raises:
          InputError: a share or seed out of range.
        """
        check_settings(share, seed, None, self._batch_size)
        return self._all(sentences, share, seed)

    def _all(self, sentences: list[str], share: float, seed: int) -> Iterator[str]:
        for start in range(0, len(sentences), self._batch_size):
            part = sentences[start : start + self._batch_size]
            tokens = self._tokenizer(part, return_offsets_mapping=True, verbose=False)
            hidden = [
                self._hide(part[n], tokens, n, share, np.random.default_rng((seed, start + n)))
                for n in range(len(part))
            ]
            yield from self._replace(part, hidden)

    def _hide(self, sentence: str, tokens: Any, row: int, share: float, generator: np.random.Generator) -> Hidden:
        ids, numbers = list(tokens["input_ids"][row]), tokens.word_ids(row)
        sizes = np.bincount([n for n in numbers if n is not None], minlength=1)
        # Cut here, not by the tokenizer: it would take the beginning of a longer word for a word.
        ids = ids if len(ids) <= self._max_length else [*ids[: self._max_length - 1], ids[-1]]
        inside = list(enumerate(numbers))[1 : len(ids) - 1]
        single = [i for i, n in inside if n is not None and sizes[n] == 1 and self._words[ids[i]]]
        seen = len({n for _, n in inside if n is not None})
        count = min(len(single), max(1, round(share * seen)))
        places = sorted(generator.choice(single, count, replace=False).tolist()) if count else []
        words = [ids[i] for i in places]
        spans = []
        for i in places:
            ids[i] = self._tokenizer.mask_token_id
            start, end = tokens["offset_mapping"][row][i]
            spans.append((end - len(sentence[start:end].lstrip()), end))
        return Hidden(ids, places, words, spans)

    def _replace(self, sentences: list[str], hidden: list[Hidden]) -> Iterator[str]:
        rows = self._batch_size  # few shapes, few compilations
        filled = hidden + [hidden[0]] * (rows - len(hidden))
        length = padded_length(max(len(h.tokens) for h in hidden), self._max_length)
        most = power_of_two(max(1, *(len(h.places) for h in hidden)))
        ids, lengths = pad([h.tokens for h in filled], length, self._tokenizer.pad_token_id)
        places, _ = pad([h.places for h in filled], most, 0)
        words, _ = pad([h.words for h in filled], most, 0)
        found = np.asarray(self._predict(self._params, ids, lengths, places, words))
        for sentence, h, tokens in zip(sentences, hidden, found, strict=False):
            # From the end, so that the earlier spans stay in place.
            for (start, end), token in reversed(list(zip(h.spans, tokens.tolist(), strict=False))):
                sentence = sentence[:start] + self._texts[token] + sentence[end:]
            yield sentence


def _predict(
    model: SentenceEncoder,
    allowed: Bool[Array, " V"],
    params: Params,
    ids: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    places: Int[Array, "B K"],
    words: Int[Array, "B K"],
) -> Int[Array, "B K"]:
    """The likeliest allowed word other than the one given, at each place."""
    encoder = {"params": {"encoder": params["encoder"]}}
    states: Any = model.apply(encoder, ids, lengths[:, None], method=SentenceEncoder.hidden_states)
    at: Float[Array, "B K H"] = jnp.take_along_axis(states[-1], places[:, :, None], axis=1)
    table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    head = build_mlm_head(model.config, model.dtype, model.param_dtype)
    logits = jnp.asarray(head.apply({"params": params["mlm"]}, at.reshape(-1, at.shape[-1]), table))
    logits = jnp.where(allowed[None, :], logits, -jnp.inf)
    logits = jnp.where(jnp.arange(logits.shape[1])[None, :] == words.reshape(-1, 1), -jnp.inf, logits)
    return jnp.argmax(logits, axis=1).reshape(places.shape)
