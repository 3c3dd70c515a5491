"""The BERT and RoBERTa encoder (Devlin et al., arXiv 1810.04805; Liu et al., arXiv 1907.11692)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from simcse_jax.config.values import BELOW_ONE, FINITE, NOT_NEGATIVE, SIZE, Bound, from_json, shown
from simcse_jax.errors import InputError
from simcse_jax.model.attention import Noise, attend
from simcse_jax.model.layout import Layout, lay_out
from simcse_jax.model.long_attention import SHORT, Attention, allowed_keys, attend_in_blocks
from simcse_jax.model.norm import LayerNorm
from simcse_jax.model.product import Dense
from simcse_jax.noise import Drawn, drawn, dropout


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Φ(x), Φ the standard normal distribution (Hendrycks and Gimpel, arXiv 1606.08415), exact, in float32 at least.

    The forward pass also computes the derivative Φ(x) + x φ(x), where Φ is at hand; only this is kept for the backward
    pass.
    """
    return _gelu_forward(x)[0]


@jax.named_scope("gelu")
def _gelu_forward(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # By erf, as PyTorch has it: erfc, which has more digits where Φ is near 0, takes CPUs twice as long.
    cdf = 0.5 + 0.5 * jax.lax.erf(wide * np.sqrt(0.5).astype(wide.dtype))
    derivative = cdf + wide * jnp.exp(-0.5 * wide * wide) * np.asarray(1 / np.sqrt(2 * np.pi), wide.dtype)
    return (wide * cdf).astype(x.dtype), derivative.astype(x.dtype)


@jax.named_scope("gelu")
def _gelu_backward(derivative: Array, g: Array) -> tuple[Array]:
    return (g * derivative,)


gelu.defvjp(_gelu_forward, _gelu_backward)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


_LAYERS = Bound(lambda x: 1 <= x <= 256, "from 1 to 256")


@dataclass(frozen=True)
class EncoderConfig:
    """The fields of a Hugging Face `config.json` that shape the encoder, under their names there."""

    model_type: Literal["bert", "roberta"]
    vocab_size: Annotated[int, SIZE]
    hidden_size: Annotated[int, SIZE]
    num_hidden_layers: Annotated[int, _LAYERS]
    num_attention_heads: Annotated[int, SIZE]
    intermediate_size: Annotated[int, SIZE]
    max_position_embeddings: Annotated[int, SIZE]
    type_vocab_size: Annotated[int, SIZE]
    pad_token_id: Annotated[int, NOT_NEGATIVE] = 0
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "gelu"
    layer_norm_eps: Annotated[float, BELOW_ONE] = 1e-12
    initializer_range: Annotated[float, NOT_NEGATIVE, FINITE] = 0.02
    hidden_dropout_prob: Annotated[float, BELOW_ONE] = 0.1
    attention_probs_dropout_prob: Annotated[float, BELOW_ONE] = 0.1

    @property
    def max_length(self) -> int:
        """Most tokens a sentence can have: RoBERTa's positions start behind its padding index."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)


# Options of config.json that change what an encoder computes: the value that this one has, and what to do about others.
_PLAIN: dict[str, tuple[Any, str]] = {
    "is_decoder": (False, "set it to false if, in training, each token saw those behind it, too"),
    "add_cross_attention": (False, "set it to false if the weights were trained without"),
    "position_embedding_type": ("absolute", "only 'absolute' is read"),
    "quantization_config": (None, "save the model with weights of float32, float16 or bfloat16"),
}


def read_encoder_config(config: dict[str, Any], where: str = "config.json") -> EncoderConfig:
    """Reads the encoder's fields from a parsed `config.json`.

    Args:
      config: the object in the file.
      where: the file, for messages.

    Raises:
      InputError: not a BERT or RoBERTa config, a value of another type or out of bounds, or an option that this encoder
        does not have.
    """
    model_type = config.get("model_type")
    if model_type not in ("bert", "roberta"):
        raise InputError(f"{where}: model_type is {shown(model_type)}; this encoder reads 'bert' and 'roberta'")
    # As transformers has it; a RoBERTa's positions begin behind its padding.
    default = {"pad_token_id": 1} if model_type == "roberta" and config.get("pad_token_id") is None else {}
    result: EncoderConfig = from_json(EncoderConfig, config | default, where)
    for name, (plain, advice) in _PLAIN.items():
        if (value := config.get(name) or plain) != plain:
            raise InputError(f"{where}: {name} is {shown(value)}, which this encoder lacks: {advice}")
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and "AutoModel" in auto_map:
        raise InputError(
            f"{where}: the model is computed by code of its own ({shown(auto_map['AutoModel'])}), which is not run "
            f"here: if it is a plain {model_type}, remove auto_map"
        )
    if result.pad_token_id >= result.vocab_size or result.max_length < 1:
        raise InputError(
            f"{where}: pad_token_id is {result.pad_token_id}; expected a token below vocab_size "
            f"({result.vocab_size}), and for RoBERTa, whose positions begin behind it, below max_position_embeddings "
            f"({result.max_position_embeddings}) - 1"
        )
    if result.hidden_size % result.num_attention_heads:
        raise InputError(
            f"{where}: hidden_size is {result.hidden_size}, which num_attention_heads "
            f"({result.num_attention_heads}) does not divide"
        )
    return result


class Dropout(nn.Module):
    """The noise of sentences under the key of this place in the network; see `drawn`."""

    @nn.compact
    def __call__(self, sentences: Int[Array, "*leading"]) -> Drawn:
        return drawn(self.make_rng("dropout"), sentences)


def _drop_features(
    rate: float, x: Float[Array, "B T H"], owners: Int[Array, "B _"] | None, position: Int[Array, "#B T"]
) -> Float[Array, "B T H"]:
    """Dropout of token vectors, where element (place, feature) has the number place · H + feature; the identity without
    owners."""
    if owners is None or not rate:
        return x
    feature = jnp.arange(x.shape[-1], dtype=jnp.uint32)[None, None, :]
    counter = position.astype(jnp.uint32)[:, :, None] * np.uint32(x.shape[-1]) + feature
    return dropout(x, Dropout()(owners[:, :, None]), counter, rate)


class Embeddings(nn.Module):
    """Word + position + token type 0, LayerNorm, dropout."""

    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B L"], layout: Layout) -> Float[Array, "B L H"]:
        c = self.config
        # Rows are rounded once summed, not the whole table; their gradients are then summed in the table's type.
        embed = partial(
            nn.Embed,
            features=c.hidden_size,
            embedding_init=nn.initializers.normal(c.initializer_range),
            dtype=self.param_dtype,
            param_dtype=self.param_dtype,
        )
        position = layout.position
        if c.model_type == "roberta":
            # Counted over the tokens that are not padding, as Hugging Face does, also where text spells out "<pad>".
            tokens = (input_ids != c.pad_token_id).astype(jnp.int32)
            before = jnp.cumsum(tokens, axis=1) - tokens
            first = jnp.arange(input_ids.shape[1])[None, :] - position
            position = (before - jnp.take_along_axis(before, first, axis=1) + 1) * tokens + c.pad_token_id
        x = (
            embed(c.vocab_size, name="word_embeddings")(input_ids)
            + embed(c.max_position_embeddings, name="position_embeddings")(position)
            + embed(c.type_vocab_size, name="token_type_embeddings")(jnp.zeros((1, 1), jnp.int32))
        )
        x = LayerNorm(c.layer_norm_eps, self.dtype, self.param_dtype, name="layer_norm")(x.astype(self.dtype))
        return _drop_features(c.hidden_dropout_prob, x, layout.owners, layout.position)


class Layer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    config: EncoderConfig
    dtype: Any
    param_dtype: Any
    attention: Attention = attend_in_blocks

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L H"], layout: Layout, first_only: bool = False
    ) -> Float[Array, "B L H"] | Float[Array, "B S H"]:
        """Every token attends to those of its sentence.

        Args:
          x: token vectors.
          layout: the sentences that the tokens belong to.
          first_only: compute the output only at the first token of each sentence: the same numbers for less work.
        """
        c = self.config
        dense = partial(
            Dense,
            kernel_init=nn.initializers.normal(c.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        norm = partial(LayerNorm, c.layer_norm_eps, self.dtype, self.param_dtype)
        size = c.hidden_size // c.num_attention_heads

        def heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], c.num_attention_heads, size).swapaxes(1, 2)

        key, value = (heads(dense(c.hidden_size, name=name)(x)) for name in ("key", "value"))
        sentence, position, owners = layout.sentence, layout.position, layout.owners
        if first_only:
            x = jnp.take_along_axis(x, layout.start[:, :, None], axis=1, mode="clip")
            sentence, position = jnp.arange(x.shape[1])[None, :], jnp.zeros((1, x.shape[1]), jnp.int32)
            owners = layout.numbers
        query = heads(dense(c.hidden_size, name="query")(x))
        noise = None
        if owners is not None and c.attention_probs_dropout_prob:
            most = np.uint32(c.max_position_embeddings)
            head = jnp.arange(c.num_attention_heads, dtype=jnp.uint32)[None, :, None, None]
            q, k = position.astype(jnp.uint32), layout.position.astype(jnp.uint32)
            counter = (head * most + q[:, None, :, None]) * most + k[:, None, None, :]
            noise = Noise(Dropout()(owners[:, None, :, None]), counter)
        if layout.numbers is None and not first_only and x.shape[1] > SHORT:
            context = self.attention(query, key, value, layout)
        else:
            allowed = allowed_keys(sentence, layout)
            context = attend(query, key, value, allowed, noise, c.attention_probs_dropout_prob)
        context = context.swapaxes(1, 2).reshape(x.shape)

        rate = c.hidden_dropout_prob
        attention = _drop_features(rate, dense(c.hidden_size, name="attention_output")(context), owners, position)
        x = norm(name="attention_norm")(x + attention)
        # Token by token, so that the activation's result is kept as it is multiplied: reshaped, it is written twice.
        hidden = ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, name="intermediate")(x.reshape(-1, x.shape[-1])))
        output = dense(c.hidden_size, name="output")(hidden).reshape(x.shape)
        output = _drop_features(rate, output, owners, position)
        return norm(name="output_norm")(x + output)


class Encoder(nn.Module):
    """BERT or RoBERTa without pooler.

    Attributes:
      config: sizes and probabilities.
      dtype: compute type; LayerNorm statistics and softmax are float32 at least.
      param_dtype: type of the weights.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      scan: in training, compile one layer for all of them.
      attention: how rows of more than 128 tokens are attended to without dropout.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = True
    attention: Attention = attend_in_blocks

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        lengths: Int[Array, "B S"],
        numbers: Int[Array, "B S"] | None = None,
        first_only: bool = False,
    ) -> tuple[Float[Array, "B _ H"], ...]:
        """Encodes token ids.

        Args:
          input_ids: token ids: in each row its sentences, one after the other, then padding.
          lengths: tokens of each sentence; 0 where a row has fewer than S. S is 1 where a row is a sentence.
          numbers: number of each sentence in the global batch. If given, dropout is on and the stream
            `rngs={"dropout": key}` is required; if not, dropout is off. A sentence with a negative number has none.
          first_only: compute only the first token of each sentence in the last layer.

        Returns:
          The hidden states hs[0..n], [B, L, H], n the number of layers: embedding output first, last layer last; with
          `first_only`, hs[n] is [B, S, H].
        """
        layout = lay_out(lengths, input_ids.shape[1], numbers)
        x = Embeddings(self.config, self.dtype, self.param_dtype, name="embeddings")(input_ids, layout)
        names = [f"layer_{i}" for i in range(self.config.num_hidden_layers)]
        if numbers is None:
            hidden_states = [x]
            for name in names:
                layer = Layer(self.config, self.dtype, self.param_dtype, self.attention, name=name)
                x = layer(x, layout, first_only and name == names[-1])
                hidden_states.append(x)
            return tuple(hidden_states)

        # Scanned, one layer is compiled for all: otherwise compiling a large model for TPUs takes minutes. The stack is
        # a copy of the weights, small beside activations, which evaluation does not keep.
        layer = Layer(self.config, self.dtype, self.param_dtype, parent=None)
        weights = [self.variables["params"][name] for name in names]
        key = self.make_rng("dropout")

        def apply(x: Array, weights: Any, i: Array | int, first_only: bool) -> Array:
            noise = {"dropout": jax.random.fold_in(key, i)}
            return jnp.asarray(layer.apply({"params": weights}, x, layout, first_only, rngs=noise))

        apply = jax.checkpoint(apply, static_argnums=3) if self.remat else apply
        scanned = len(names) - first_only if self.scan else 0
        states: list[Array] = []
        if scanned:
            # Each step returns its input: where only the last state is used, the others are then never kept.
            stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights[:scanned])
            x, entered = jax.lax.scan(lambda x, at: (apply(x, *at, False), x), x, (stack, jnp.arange(scanned)))
            states.extend(entered)
        states.append(x)
        for i in range(scanned, len(names)):
            states.append(apply(states[-1], weights[i], i, first_only and i == len(names) - 1))
        return tuple(states)
