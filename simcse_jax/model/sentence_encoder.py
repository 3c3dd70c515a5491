"""Encoder, pooler and the SimCSE head as one module."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simcse_jax.model.encoder import Encoder, EncoderConfig
from simcse_jax.model.long_attention import Attention, attend_in_blocks
from simcse_jax.model.pooling import pool
from simcse_jax.poolers import needs_first_only


class Head(nn.Module):
    """tanh(x W + b), W ~ N(0, initializer_range), b = 0: the MLP over the [CLS] vector (SimCSE, section 6.3)."""

    initializer_range: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        init = nn.initializers.normal(self.initializer_range)
        dense = nn.Dense(x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name="dense")
        return nn.tanh(dense(x))


class SentenceEncoder(nn.Module):
    """The module that turns token ids into sentence vectors.

    Attributes:
      config: the encoder's sizes.
      pooler: one of `POOLERS`.
      mlp_only_train: with pooler `cls`, apply the head while training only; afterwards the vector is
        `cls_before_pooler` (the unsupervised setting of SimCSE).
      dtype, param_dtype, remat, scan, attention: see `Encoder`.

    The head always has weights, used or not, because a Hugging Face BERT has them (`pooler.dense`).
    """

    config: EncoderConfig
    pooler: str = "cls"
    mlp_only_train: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = True
    attention: Attention = attend_in_blocks

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype, self.param_dtype, self.remat, self.scan, self.attention)
        self.head = Head(self.config.initializer_range, self.dtype, self.param_dtype)

    def __call__(
        self, input_ids: Int[Array, "B L"], lengths: Int[Array, "B S"], numbers: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S H"]:
        """One vector per sentence, not normalised.

        Args:
          input_ids: token ids: in each row its sentences, one after the other, then padding.
          lengths: tokens of each sentence; 0, whose vector has no meaning, where a row has fewer than S.
          numbers: number of each sentence in the global batch while training (dropout on, head on), None after.
        """
        training = numbers is not None
        first_only = needs_first_only(self.pooler)
        states = self.encoder(input_ids, lengths, numbers, first_only)
        vectors = states[-1] if first_only else pool(states, lengths, self.pooler)
        use_head = self.pooler == "cls" and (training or not self.mlp_only_train)
        return self.head(vectors) if use_head or self.is_initializing() else vectors

    def hidden_states(
        self, input_ids: Int[Array, "B L"], lengths: Int[Array, "B S"], numbers: Int[Array, "B S"] | None = None
    ) -> tuple[Float[Array, "B L H"], ...]:
        """The encoder's hidden states; see `Encoder`."""
        states: tuple[Float[Array, "B L H"], ...] = self.encoder(input_ids, lengths, numbers)
        return states
