"""The BERT and RoBERTa encoder (Devlin et al., arXiv 1810.04805; Liu et al., arXiv 1907.11692)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from simcse_jax.errors import InputError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


@dataclass(frozen=True)
class EncoderConfig:
    """What of a Hugging Face `config.json` shapes the encoder. Names are Hugging Face's."""

    model_type: Literal["bert", "roberta"]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    pad_token_id: int = 0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    @property
    def max_length(self) -> int:
        """Most tokens a sentence can have: RoBERTa's positions start behind its padding index."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)


def read_encoder_config(config: dict[str, Any]) -> EncoderConfig:
    """Takes what the encoder needs from a parsed `config.json`.

    Raises:
      InputError: not a BERT or RoBERTa config, or one with an option this encoder does not have.
    """
    model_type = config.get("model_type")
    if model_type not in ("bert", "roberta"):
        raise InputError(f"config.json says model_type {model_type!r}; this encoder reads 'bert' and 'roberta'")
    fields = dataclasses.fields(EncoderConfig)
    values = {f.name: config[f.name] for f in fields if config.get(f.name) is not None}
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}")
    kinds: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}
    for f in fields:
        if f.name in values and f.type in kinds and not isinstance(values[f.name], kinds[f.type]):
            raise InputError(f"config.json says {f.name} {values[f.name]!r}; expected {kinds[f.type][-1].__name__}")
    result = EncoderConfig(**values)
    if result.hidden_act not in ACTIVATIONS:
        raise InputError(f"config.json says hidden_act '{result.hidden_act}'; known: {', '.join(ACTIVATIONS)}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(
            f"config.json says position_embedding_type '{config['position_embedding_type']}'; only 'absolute' is read"
        )
    if result.hidden_size % result.num_attention_heads:
        raise InputError(
            f"config.json says hidden_size {result.hidden_size}, which num_attention_heads "
            f"{result.num_attention_heads} does not divide"
        )
    return result


# Flax's default takes the variance as E[x²] − E[x]², which cancels: ten times the rounding error of PyTorch's.
LayerNorm = partial(nn.LayerNorm, use_fast_variance=False)


class Dropout(nn.Module):
    """Inverted dropout whose noise belongs to the sentence.

    Each sentence draws from its own key, folded from the pass's key and its number in the global batch, so the noise
    does not depend on how the batch is cut into devices or chunks. A sentence of negative number has none.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B *rest"], rows: Int[Array, "B"] | None) -> Float[Array, "B *rest"]:
        if rows is None or self.rate == 0:
            return x
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self.make_rng("dropout"), rows)
        bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint32))(keys)
        dropped = bits < jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        noisy = jnp.where(dropped, jnp.zeros((), x.dtype), x / (1 - self.rate))
        return jnp.where((rows >= 0).reshape(-1, *[1] * (x.ndim - 1)), noisy, x)


class Embeddings(nn.Module):
    """Word + position + token type 0, LayerNorm, dropout."""

    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B L"], rows: Int[Array, "B"] | None) -> Float[Array, "B L H"]:
        c = self.config
        embed = partial(
            nn.Embed,
            features=c.hidden_size,
            embedding_init=nn.initializers.normal(c.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if c.model_type == "roberta":
            tokens = (input_ids != c.pad_token_id).astype(jnp.int32)
            positions = jnp.cumsum(tokens, axis=1) * tokens + c.pad_token_id
        else:
            positions = jnp.arange(input_ids.shape[1])[None, :]
        x = (
            embed(c.vocab_size, name="word_embeddings")(input_ids)
            + embed(c.max_position_embeddings, name="position_embeddings")(positions)
            + embed(c.type_vocab_size, name="token_type_embeddings")(jnp.zeros((1, 1), jnp.int32))
        )
        x = LayerNorm(c.layer_norm_eps, self.dtype, self.param_dtype, name="layer_norm")(x)
        return Dropout(c.hidden_dropout_prob)(x, rows)


class Layer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L H"], mask: Bool[Array, "B L"], rows: Int[Array, "B"] | None
    ) -> Float[Array, "B L H"]:
        c = self.config
        dense = partial(
            nn.Dense,
            kernel_init=nn.initializers.normal(c.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        norm = partial(LayerNorm, c.layer_norm_eps, self.dtype, self.param_dtype)
        heads = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)

        query = dense(c.hidden_size, name="query")(x).reshape(heads)
        key = dense(c.hidden_size, name="key")(x).reshape(heads)
        value = dense(c.hidden_size, name="value")(x).reshape(heads)
        # The softmax is taken in float32 (or wider) whatever the compute type.
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.promote_types(self.dtype, jnp.float32))
        scores = scores / heads[-1] ** 0.5
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = Dropout(c.attention_probs_dropout_prob)(nn.softmax(scores).astype(self.dtype), rows)
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        attention = Dropout(c.hidden_dropout_prob)(dense(c.hidden_size, name="attention_output")(context), rows)
        x = norm(name="attention_norm")(x + attention)

        hidden = ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, name="intermediate")(x))
        output = Dropout(c.hidden_dropout_prob)(dense(c.hidden_size, name="output")(hidden), rows)
        return norm(name="output_norm")(x + output)


class Encoder(nn.Module):
    """BERT or RoBERTa without pooler.

    Attributes:
      config: sizes and probabilities.
      dtype: compute type; LayerNorm statistics and softmax are float32 at least.
      param_dtype: type of the weights.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "B L"], mask: Bool[Array, "B L"], rows: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B L H"], ...]:
        """Encodes token ids.

        Args:
          input_ids: token ids, padded on the right.
          mask: True at tokens, False at padding.
          rows: number of each sentence in the global batch. Given, dropout is on and the stream `rngs={"dropout": key}`
            is required; not given, dropout is off. A sentence of negative number has no dropout.

        Returns:
          The hidden states hs[0..n], n the number of layers: embedding output first, last layer last.
        """
        x = Embeddings(self.config, self.dtype, self.param_dtype, name="embeddings")(input_ids, rows)
        names = [f"layer_{i}" for i in range(self.config.num_hidden_layers)]
        if rows is None:
            hidden_states = [x]
            for name in names:
                x = Layer(self.config, self.dtype, self.param_dtype, name=name)(x, mask, rows)
                hidden_states.append(x)
            return tuple(hidden_states)

        # In training a layer is compiled once, not once each: a large model takes a compiler for TPUs minutes
        # otherwise. The stack is a copy of the weights, small beside activations, which evaluation does not keep.
        layer = Layer(self.config, self.dtype, self.param_dtype, parent=None)
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(self.variables["params"][name] for name in names))
        key = self.make_rng("dropout")

        def body(x: Array, at: tuple[Any, Array]) -> tuple[Array, Array]:
            weights, i = at
            noise = {"dropout": jax.random.fold_in(key, i)}
            return jnp.asarray(layer.apply({"params": weights}, x, mask, rows, rngs=noise)), x

        body = jax.checkpoint(body) if self.remat else body
        # Each step gives what went in: where only the last state is used, the others are then never kept.
        last, states = jax.lax.scan(body, x, (params, jnp.arange(len(names))))
        return (*states, last)
