"""The prediction head of a masked language model (Devlin et al., arXiv 1810.04805, section 3.1)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from simcse_jax.model.encoder import ACTIVATIONS, EncoderConfig
from simcse_jax.model.norm import LayerNorm


class MLMHead(nn.Module):
    """LayerNorm(activation(x W + b)) Eᵀ + c, with E the encoder's word embeddings: BERT's `cls.predictions`, RoBERTa's
    `lm_head`. W ~ N(0, initializer_range), b = c = 0.

    Attributes:
      activation: one of `ACTIVATIONS`.
      layer_norm_eps: added to the variance.
      initializer_range: standard deviation of fresh weights.
      dtype: compute type; logits are float32 at least.
      param_dtype: type of the weights.
    """

    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "T H"], table: Float[Array, "V H"]) -> Float[Array, "T V"]:
        """Logits of every token of the vocabulary.

        Args:
          x: last hidden states.
          table: the word embeddings.
        """
        init = nn.initializers.normal(self.initializer_range)
        dense = nn.Dense(x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name="dense")
        x = ACTIVATIONS[self.activation](dense(x))
        x = LayerNorm(self.layer_norm_eps, self.dtype, self.param_dtype, name="layer_norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (table.shape[0],), self.param_dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        logits = jnp.einsum("th,vh->tv", x, table.astype(self.dtype), preferred_element_type=wide)
        return logits + bias.astype(wide)[None, :]


def build_mlm_head(config: EncoderConfig, dtype: Any, param_dtype: Any) -> MLMHead:
    """The head for an encoder; RoBERTa's always has the erf GELU and ignores `hidden_act`."""
    activation = config.hidden_act if config.model_type == "bert" else "gelu"
    return MLMHead(activation, config.layer_norm_eps, config.initializer_range, dtype, param_dtype)


def init_mlm_head(key: Array, table: Float[Array, "V H"], initializer_range: float) -> dict[str, Any]:
    """Fresh weights for an encoder whose word embeddings are `table`: {dense, layer_norm, bias}. May be jitted."""
    head = MLMHead(initializer_range=initializer_range, param_dtype=table.dtype)
    params: dict[str, Any] = head.init(key, jnp.zeros((1, table.shape[1]), table.dtype), table)["params"]
    return params
