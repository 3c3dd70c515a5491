"""Modules built from settings, and their fresh parameters."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simcse_jax import rng
from simcse_jax.config import ModelConfig
from simcse_jax.errors import InputError
from simcse_jax.model import EncoderConfig, SentenceEncoder
from simcse_jax.model.params import Params


def build_model(config: EncoderConfig, settings: ModelConfig) -> SentenceEncoder:
    """The module that a run's settings describe.

    Raises:
      InputError: float64 without JAX_ENABLE_X64.
    """
    if settings.dtype == "float64" and jnp.zeros(0).dtype != "float64":
        raise InputError("model.dtype float64 needs 64-bit JAX: set the environment variable JAX_ENABLE_X64=1")
    return SentenceEncoder(
        with_dropout(config, settings.dropout),
        pooler=settings.pooler or "cls",
        mlp_only_train=settings.mlp_only_train,
        dtype=jnp.dtype(settings.dtype),
        param_dtype=param_dtype(settings.dtype),
        remat=settings.remat,
        scan=settings.scan is not False,
    )


def param_dtype(dtype: str) -> Any:
    """Type of the weights for a compute type."""
    return jnp.dtype("float64") if dtype == "float64" else jnp.dtype("float32")


def init_params(model: SentenceEncoder, seed: int) -> Params:
    """Fresh weights: matrices from N(0, initializer_range), biases 0, LayerNorm scales 1. May be jitted."""
    ids = jnp.zeros((1, 2), jnp.int32)
    params: Params = model.init(rng.key(seed, "init"), ids, jnp.full((1, 1), 2))["params"]
    return params


def with_fresh_head(params: Params, model: SentenceEncoder, seed: int) -> Params:
    """Host parameters with a fresh head, the same as that of `init_params`, without tracing the encoder for it."""
    vectors = jnp.zeros((1, model.config.hidden_size), model.dtype)
    key = rng.key(seed, "init")
    drawn = jax.jit(lambda: model.init(key, vectors, method=lambda model, x: model.head(x))["params"])()
    return {**params, **jax.tree.map(np.asarray, drawn)}


def with_dropout(config: EncoderConfig, probability: float | None) -> EncoderConfig:
    """The config with both dropout probabilities set, unchanged for None."""
    if probability is None:
        return config
    return replace(config, hidden_dropout_prob=probability, attention_probs_dropout_prob=probability)
