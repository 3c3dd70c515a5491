"""Instance smoothing: the buffer, the groups and their aggregates against NumPy; any mesh, any chunk; resuming."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simcse_jax.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, SmoothingConfig
from simcse_jax.config.values import with_settings
from simcse_jax.model import read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.objectives import unit
from simcse_jax.objectives.smoothing import is_full, push, smooth, smoothing_weight
from simcse_jax.runtime.mesh import make_mesh, put_batch
from simcse_jax.training.spec import StepSpec, create_state
from simcse_jax.training.step import make_train_step
from simcse_jax.xla.collectives import collectives
from simcse_jax.xla.hlo import parse
from tests.conftest import full, relative_error, tree_error, without_key_biases
from tests.test_step import BERT, batches

N, STEPS = 16, 6


def rows(n: int, width: int = 8, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("size", "counts"), [(10, (4, 4, 4, 2)), (6, (16, 3, 16)), (8, (8, 8)), (5, (0, 3, 5))])
def test_buffer_holds_the_latest_rows(size: int, counts: tuple[int, ...]) -> None:
    """Whatever the batch: smaller, larger, or with rows that do not count at its end."""
    buffer, seen = jnp.zeros((size, 8)), np.zeros((size, 8))
    for step, count in enumerate(counts):
        batch = rows(16, seed=step)
        buffer = push(buffer, jnp.asarray(batch, jnp.float32), jnp.arange(16) < count)
        seen = np.concatenate([seen, batch[:count]])[-size:]
        np.testing.assert_allclose(buffer, seen, atol=1e-7)
        assert bool(is_full(buffer)) == (sum(counts[: step + 1]) >= size)


def test_weight_over_a_run() -> None:
    constant = SmoothingConfig(weight=0.1)
    assert float(smoothing_weight(constant, jnp.int32(7), 10)) == pytest.approx(0.1)
    rising = SmoothingConfig(weight=0.05, schedule="cosine", start_weight=0.005)
    weights = [float(smoothing_weight(rising, jnp.int32(t), 40)) for t in range(41)]
    assert weights[0] == pytest.approx(0.005)
    assert weights[1] == pytest.approx(0.05 - 0.045 * np.cos(np.pi / 40))
    assert np.all(np.diff(weights[:21]) > 0)
    assert weights[20:] == pytest.approx([0.05] * 21)


def statement(config: SmoothingConfig, u: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """The aggregate of each row's nearest, written out."""
    result = []
    for row in u:
        order = np.argsort(-(buffer @ row))[1 : config.neighbours + 1]
        group = np.concatenate([row[None], buffer[order]])
        scores = np.zeros(len(group)) if config.aggregation == "mean" else group @ row / config.temperature
        weights = np.exp(scores) / np.sum(np.exp(scores))
        result.append(weights @ group)
    return np.array(result)


@pytest.mark.parametrize("aggregation", ["attention", "mean"])
def test_aggregate_and_its_gradient(aggregation: Any) -> None:
    config = SmoothingConfig(neighbours=5, temperature=0.5, aggregation=aggregation)
    u, buffer, weight = rows(7), np.concatenate([rows(20, seed=1), rows(7)]), rows(7, seed=2)
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(lambda u, b: jnp.sum(smooth(config, u, b) * weight), argnums=(0, 1))(
            jnp.asarray(u), jnp.asarray(buffer)
        )
        assert relative_error(smooth(config, jnp.asarray(u), jnp.asarray(buffer)), statement(config, u, buffer)) < 1e-14
    assert not np.any(np.asarray(gradient[1])), "nothing flows into the buffer"
    direction = rows(7, seed=3)
    difference = np.sum(
        weight * (statement(config, u + 1e-6 * direction, buffer) - statement(config, u - 1e-6 * direction, buffer))
    )
    assert np.sum(np.asarray(gradient[0]) * direction) == pytest.approx(difference / 2e-6, rel=1e-7)
    assert np.isfinite(float(value))


def test_clusters_are_the_groups() -> None:
    """Well separated bundles: a row's group is its own bundle, whatever the number of its members."""
    config = SmoothingConfig(grouping="kmeans", clusters=3, aggregation="mean", buffer_size=12)
    centres, sizes = np.eye(3, 8), (5, 4, 3)
    bundle = np.concatenate([np.repeat(c[None], s, axis=0) for c, s in zip(centres, sizes, strict=True)])
    noise = 0.02 * np.random.default_rng(0).normal(size=bundle.shape)
    buffer = np.asarray(unit(jnp.asarray(bundle + noise, jnp.float32)))
    got = smooth(config, jnp.asarray(buffer), jnp.asarray(buffer))
    ends = np.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        # A row is in its group once: as itself, not as a member of the buffer, too.
        np.testing.assert_allclose(got[start:end], np.tile(buffer[start:end].mean(axis=0), (end - start, 1)), atol=1e-6)


def run_of(**changes: Any) -> Config:
    smoothing = SmoothingConfig(weight=0.5, buffer_size=40, neighbours=6)
    return Config(
        batch_size=N,
        model=ModelConfig(dtype=changes.pop("dtype", "float32")),
        objective=ObjectiveConfig(smoothing=smoothing, block_size=5, **changes.pop("objective", {})),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        **changes,
    )


def train(mesh_shape: tuple[int, int], run: Config) -> tuple[np.ndarray, Any, Any]:
    """Loss, smoothing term, its weight and gradient norm by step; the parameters and the buffer at the end."""
    mesh = make_mesh(*mesh_shape, jax.devices()[: mesh_shape[0] * mesh_shape[1]])
    model = build_model(read_encoder_config(BERT), run.model)
    spec = StepSpec(run, model, mesh, 1, STEPS)
    state = create_state(spec, lambda: init_params(model, 7))
    step = make_train_step(spec, state)
    figures = []
    for batch in batches(1, STEPS):
        placed = put_batch(mesh, N, lambda rows, b=batch: jax.tree.map(lambda x: x[rows], b))
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, placed)
        figures.append([float(metrics[n]) for n in ("loss", "smoothing", "smoothing_weight", "grad_norm")])
    return np.array(figures), jax.tree.map(np.asarray, state.params), np.asarray(state.buffer)


@pytest.fixture(scope="module")
def one_device() -> tuple[np.ndarray, Any, Any]:
    return train((1, 1), run_of())


def test_smoothing_waits_for_the_buffer(one_device: Any) -> None:
    """40 rows, 16 a step: full at the third step."""
    assert one_device[0][:, 2] == pytest.approx([0, 0, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        full((8, 1), {}),
        ((4, 2), {"objective": {"implementation": "tiled"}}),
        full((1, 8), {"micro_batch": 1}),
        ((1, 1), {"micro_batch": 5, "objective": {"implementation": "tiled"}}),
    ],
    ids=str,
)
def test_any_mesh_and_chunk_smooths_as_one_device(
    one_device: Any, mesh: tuple[int, int], changes: dict[str, Any]
) -> None:
    figures, params, buffer = train(mesh, run_of(**changes))
    assert np.max(np.abs(figures - one_device[0]) / np.maximum(np.abs(one_device[0]), 1e-9)) < 5e-6
    assert tree_error(without_key_biases(params), without_key_biases(one_device[1])) < 1e-5
    assert relative_error(buffer, one_device[2]) < 1e-5


@pytest.mark.full
def test_any_mesh_smooths_as_one_device_to_float64_rounding() -> None:
    with jax.enable_x64(True):
        figures, _, buffer = train((4, 2), run_of(dtype="float64", objective={"implementation": "tiled"}))
        expected, _, expected_buffer = train((1, 1), run_of(dtype="float64"))
    assert buffer.dtype == np.float64
    assert np.max(np.abs(figures - expected) / np.maximum(np.abs(expected), 1e-9)) < 1e-12
    assert relative_error(buffer, expected_buffer) < 1e-12


@pytest.mark.program
def test_the_batch_is_not_gathered_for_the_buffer() -> None:
    """In tiles no device ever holds all positives: those that enter the buffer are summed into it."""
    n = 56
    run = replace(run_of(objective={"implementation": "tiled"}), batch_size=n)
    run = with_settings(run, {"objective.smoothing.buffer_size": 72})
    mesh = make_mesh(8, 1, jax.devices()[:8])
    model = build_model(read_encoder_config(BERT), run.model)
    spec = StepSpec(run, model, mesh, 1, STEPS)
    state = create_state(spec, lambda: init_params(model, 7))
    batch = batches(1, 1, n)[0]
    placed = put_batch(mesh, n, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    program = make_train_step(spec, state).lower(state, placed).compile().as_text()
    shapes = [shape for c in collectives(parse(program)) for _, shape in c.arrays]
    assert (n, BERT["hidden_size"]) not in shapes
    assert (72, BERT["hidden_size"]) in shapes
