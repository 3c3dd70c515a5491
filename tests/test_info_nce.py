"""InfoNCE against its formulas, written in NumPy in float64: value, gradient and metrics."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simcse_jax.objectives import info_nce
from tests.conftest import relative_error

EPS = {"float32": float(np.finfo(np.float32).eps), "float64": float(np.finfo(np.float64).eps)}


@dataclass
class Reference:
    """What the formulas give for float64 inputs."""

    loss: float
    gradients: list[np.ndarray]
    sizes: list[float]
    """Norm of each gradient if nothing in its sum over pairs cancelled: what its rounding error is relative to."""
    metrics: dict[str, float]


def reference(z: list[np.ndarray], temperature: float, log_weight: float, valid: np.ndarray) -> Reference:
    """Loss, gradients and metrics; rows that are not valid are left out before anything is computed."""
    kept = [np.asarray(x, np.float64)[valid] for x in z]
    norms = [np.linalg.norm(x, axis=1, keepdims=True) for x in kept]
    units = [x / norm for x, norm in zip(kept, norms, strict=True)]
    n = len(kept[0])
    cosine = units[0] @ np.concatenate(units[1:]).T
    logits = cosine / temperature
    if len(z) == 3:
        logits[:, n:] += log_weight * np.eye(n)
    # Everything relative to the positive: exp(S_ij − S_ii).
    ratios = np.exp(logits - np.diag(logits)[:, None])
    np.fill_diagonal(ratios, 0)
    rest = ratios.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log1p(rest)))
    # softmax − I, whose diagonal is minus the sum of the rest of the row.
    probabilities = ratios / (1 + rest)
    np.fill_diagonal(probabilities, -probabilities.sum(axis=1))
    g = probabilities / (n * temperature)
    d_units, weights = [g @ np.concatenate(units[1:])], [np.abs(g).sum(axis=1)]
    for block in np.split(g, len(z) - 1, axis=1):
        d_units.append(block.T @ units[0])
        weights.append(np.abs(block).sum(axis=0))
    gradients, sizes = [], []
    for d, u, norm, weight in zip(d_units, units, norms, weights, strict=True):
        whole = np.zeros(z[0].shape)
        whole[valid] = (d - u * np.sum(u * d, axis=1, keepdims=True)) / norm
        gradients.append(whole)
        sizes.append(float(np.linalg.norm(weight[:, None] / norm)))
    positive = np.sum(units[0] * units[1], axis=1)
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    distances = [np.sum((units[0][i] - units[1][j]) ** 2) for i, j in others]
    metrics = {
        "positive_similarity": float(positive.mean()),
        "effective_negatives": effective_negatives(ratios),
        "alignment": float(np.mean(np.sum((units[0] - units[1]) ** 2, axis=1))),
    }
    if others:
        metrics["negative_similarity"] = float(np.mean([units[0][i] @ units[1][j] for i, j in others]))
        metrics["uniformity"] = float(np.log(np.mean(np.exp(-2 * np.array(distances)))))
    return Reference(loss, gradients, sizes, metrics)


def effective_negatives(weights: np.ndarray) -> float:
    """Mean perplexity of the rows, each divided by its sum; 1 for a row of zeros."""
    totals = weights.sum(axis=1, keepdims=True)
    p = np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
    return float(np.mean(np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1))))


def compute(
    z: list[Any], temperature: float = 0.05, log_weight: float = 0.0, valid: Any = None
) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, ...]]:
    """Loss, metrics and gradients of ours."""
    mask = None if valid is None else jnp.asarray(valid)
    (value, metrics), gradients = differentiated(temperature, log_weight)(tuple(map(jnp.asarray, z)), mask)
    return value, metrics, gradients


@cache
def differentiated(temperature: float, log_weight: float) -> Any:
    def loss(z: tuple[jax.Array, ...], valid: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        return info_nce(*z, temperature=temperature, hard_negative_log_weight=log_weight, valid=valid)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Vectors of any number, width, scale and likeness, and the settings of the loss."""
    n, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = draw(st.floats(0.01, 3))
    scale = 10 ** draw(st.floats(-6, 6))
    first, other, third = generator.normal(size=(3, n, width))
    spread = np.exp(generator.normal(size=(3, n, 1)))  # rows of one batch differ in length, too
    z = [first, first + noise * other, first + noise * third][: draw(st.integers(2, 3))]
    valid = generator.random(n) < draw(st.sampled_from([0.5, 0.9, 1.0]))
    valid[generator.integers(n)] = True
    return {
        "z": [np.asarray(x * s * scale, np.float32) for x, s in zip(z, spread, strict=False)],
        "temperature": 10 ** draw(st.floats(-2, 0)),
        "log_weight": draw(st.sampled_from([0.0, 0.7, -1.5, 3.0])),
        "valid": valid,
    }


def check(problem: dict[str, Any], dtype: str) -> None:
    # A cosine is off by a few eps; over τ, that is the error of a logit and so the relative error of its exponential.
    tolerance = 8 * EPS[dtype] * (2 + 1 / problem["temperature"])
    z = [np.asarray(x, dtype) for x in problem["z"]]
    expected = reference(z, problem["temperature"], problem["log_weight"], problem["valid"])
    value, metrics, gradients = compute(z, problem["temperature"], problem["log_weight"], problem["valid"])
    assert value.dtype == dtype
    smallest = float(np.finfo(dtype).tiny) / EPS[dtype]
    assert float(value) == pytest.approx(expected.loss, rel=tolerance, abs=smallest)
    for ours, theirs, size in zip(gradients, expected.gradients, expected.sizes, strict=True):
        assert ours.dtype == dtype
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) <= tolerance * size + smallest
        assert not np.any(np.asarray(ours)[~problem["valid"]])
    for name, figure in expected.metrics.items():
        assert float(metrics[name]) == pytest.approx(figure, rel=tolerance, abs=100 * EPS[dtype]), name
    assert metrics.keys() == {
        "positive_similarity",
        "negative_similarity",
        "alignment",
        "uniformity",
        "effective_negatives",
    }


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(problem=problems())
def test_value_gradients_and_metrics_in_float32(problem: dict[str, Any]) -> None:
    check(problem, "float32")


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(problem=problems())
def test_value_gradients_and_metrics_in_float64(problem: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        check(problem, "float64")


@pytest.mark.parametrize("columns", [2, 3])
def test_gradients_are_exact_when_the_loss_is_small(columns: int) -> None:
    """softmax − I cancels there: written so, the gradient of a loss of 1e-6 has one digit in float32."""
    generator = np.random.default_rng(0)
    # Nearly orthogonal rows, so that the loss can become small.
    first = np.linalg.qr(generator.normal(size=(64, 16)))[0].T
    other, third = generator.normal(size=(2, 16, 64)) / 8
    losses = []
    for noise in (3.0, 1.5, 1.0, 0.8, 0.6, 0.45, 0.3, 0.15, 0.0):
        z = [np.asarray(x, np.float32) for x in (first, first + noise * other, third + 0.6 * noise * first)][:columns]
        expected = reference(z, 0.05, 0.0, np.ones(16, bool))
        value, _, gradients = compute(z)
        losses.append(expected.loss)
        assert float(value) == pytest.approx(expected.loss, rel=1e-4)
        for i, (ours, theirs) in enumerate(zip(gradients, expected.gradients, strict=True), 1):
            # Without noise z2 is z1 and only its radial part, which is taken off, would be left.
            assert relative_error(ours, theirs) < 1e-4, (noise, i)
    assert losses[0] > 0.1
    assert 1e-8 < losses[-1] < 1e-6


@pytest.mark.parametrize("n", [1, 5])
def test_a_single_pair_has_nothing_to_learn(n: int) -> None:
    """Alone in its batch, or among rows that do not count."""
    z = list(np.random.default_rng(0).normal(size=(2, n, 8)).astype(np.float32))
    value, metrics, gradients = compute(z, valid=np.arange(n) == n - 1)
    assert float(value) == 0
    assert not np.any(np.asarray(gradients))
    # There is no pair to take a mean of.
    assert np.isnan([metrics["negative_similarity"], metrics["uniformity"]]).all()


def test_a_single_triplet_is_learned_from() -> None:
    z = list(np.random.default_rng(0).normal(size=(3, 1, 8)).astype(np.float32))
    value, _, gradients = compute(z, temperature=1.0, log_weight=0.7)
    cosine = [float(np.sum(z[0] * x) / np.linalg.norm(z[0]) / np.linalg.norm(x)) for x in z[1:]]
    assert float(value) == pytest.approx(np.log1p(np.exp(cosine[1] + 0.7 - cosine[0])), rel=1e-6)
    assert all(np.any(np.asarray(g)) for g in gradients)


def test_a_zero_vector_has_finite_gradients() -> None:
    z = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    z[0, 1], z[1, 2], z[2, 3] = 0, 0, 0
    value, metrics, gradients = compute(list(z))
    assert np.all(np.isfinite([float(value), *map(float, metrics.values())]))
    assert np.all(np.isfinite(gradients))


def test_bfloat16_is_computed_in_float32() -> None:
    z = [jnp.asarray(x, jnp.bfloat16) for x in np.random.default_rng(0).normal(size=(3, 12, 16))]
    wide = [x.astype(jnp.float32) for x in z]
    value, metrics, gradients = compute(z, log_weight=0.7)
    expected, expected_metrics, expected_gradients = compute(wide, log_weight=0.7)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for name, figure in expected_metrics.items():
        assert metrics[name].dtype == jnp.float32
        assert float(metrics[name]) == pytest.approx(float(figure), rel=1e-5), name
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        # The one rounding to bfloat16 is that of the result.
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=2**-8, atol=1e-6)
