"""Parts of a layer whose backward pass is written by hand, against autodiff of the plain formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from simcse_jax.model import read_encoder_config
from simcse_jax.model.attention import Noise, attend
from simcse_jax.model.encoder import Embeddings, gelu
from simcse_jax.model.layout import lay_out
from simcse_jax.model.norm import layer_norm
from simcse_jax.model.product import affine
from simcse_jax.noise import drawn, drop
from tests.conftest import TINY_BERT, relative_error

RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


def check(function: Any, plain: Any, *arguments: jax.Array, tolerance: float = 2e-6) -> None:
    """The same value and, from any cotangent, the same gradients."""
    (value, pull), (expected, pull_plain) = jax.vjp(function, *arguments), jax.vjp(plain, *arguments)
    assert value.dtype == expected.dtype
    assert relative_error(value, expected) < tolerance
    g = normal(*value.shape)
    for ours, theirs in zip(pull(g), pull_plain(g), strict=True):
        assert relative_error(ours, theirs) < tolerance


def test_layer_norm() -> None:
    def plain(x: Any, scale: Any, bias: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return normed * scale[None, None] + bias[None, None]

    x = 3 + normal(2, 5, 32)
    check(lambda *given: layer_norm(*given, 1e-5, jnp.float32), plain, x, 1 + normal(32), normal(32))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention(rate: float) -> None:
    query, key, value = normal(2, 3, 4, 8), normal(2, 3, 6, 8), normal(2, 3, 6, 8)
    allowed = jnp.arange(6)[None, None, None, :] < jnp.array([6, 4])[:, None, None, None]
    counter = jnp.arange(3 * 4 * 6, dtype=jnp.uint32).reshape(1, 3, 4, 6)
    noise = Noise(drawn(jax.random.key(0), jnp.arange(2).reshape(2, 1, 1, 1)), counter) if rate else None

    def plain(query: Any, key: Any, value: Any) -> Any:
        scores = jnp.where(allowed, jnp.einsum("bhqd,bhkd->bhqk", query, key) / 8**0.5, -jnp.inf)
        weights = jax.nn.softmax(scores)
        weights = drop(weights, noise.drawn, noise.counter, rate) if noise else weights
        return jnp.einsum("bhqk,bhkd->bhqd", weights, value)

    check(lambda *given: attend(*given, allowed, noise, rate), plain, query, key, value)


def test_affine() -> None:
    def plain(x: Any, kernel: Any, bias: Any) -> Any:
        return x @ kernel + bias[None]

    check(lambda *given: affine(*given, jnp.float32), plain, normal(64, 16), normal(16, 24), normal(24))


@pytest.mark.parametrize("width", [16, 17, 32])
def test_weights_gradients_are_not_rounded(width: int) -> None:
    """Of bfloat16 factors, the gradients of weights are sums in float32."""
    x, g = normal(4096, width, dtype=jnp.bfloat16), normal(4096, 24, dtype=jnp.bfloat16)
    y, pull = jax.vjp(lambda *weights: affine(x, *weights, jnp.bfloat16), normal(width, 24), normal(24))
    assert y.dtype == jnp.bfloat16
    for_kernel, for_bias = pull(g)
    exact_x, exact_g = (np.asarray(a, np.float64) for a in (x, g))
    assert for_kernel.dtype == for_bias.dtype == jnp.float32
    assert relative_error(for_kernel, exact_x.T @ exact_g) < 2e-6
    assert relative_error(for_bias, exact_g.sum(0)) < 2e-6


def test_gradient_of_a_frequent_word_is_not_rounded() -> None:
    """A bfloat16 sum of so many stops growing: half a unit in its last place is more than what is added."""
    config = read_encoder_config(TINY_BERT | {"hidden_dropout_prob": 0.0})
    ids = jnp.full((300, 10), 7)
    layout = lay_out(jnp.full((300, 1), 10), 10)
    g = jnp.abs(normal(300, 10, 32))

    def gradient(dtype: Any) -> Any:
        embeddings = Embeddings(config, dtype, jnp.float32)
        params = embeddings.init(jax.random.key(0), ids, layout)
        loss = lambda params: jnp.sum(embeddings.apply(params, ids, layout).astype(jnp.float32) * g)  # noqa: E731
        return jax.grad(loss)(params)["params"]["word_embeddings"]["embedding"][7]

    assert relative_error(gradient(jnp.bfloat16), gradient(jnp.float32)) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_derivative(dtype: str) -> None:
    """To the rounding of the type, in the tails too: x Φ(x) and Φ(x) + x φ(x)."""
    x = jnp.linspace(-9, 9, 4001).astype(dtype)
    y, derivative = jax.vmap(jax.value_and_grad(gelu))(x)
    at = np.asarray(x, np.float64)
    expected = at * ndtr(at), ndtr(at) + at * np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
    for found, wanted in zip((y, derivative), expected, strict=True):
        error = np.abs(np.asarray(found, np.float64) - wanted)
        assert np.all(error <= 1e-6 + float(jnp.finfo(dtype).eps) * np.abs(wanted))
