"""Encoding in micro-batches: the gradient of the whole batch, in memory that does not grow with it."""

import re
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from simcse_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from simcse_jax.errors import InputError
from simcse_jax.model import read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.runtime.mesh import make_mesh, put, put_batch, state_sharding
from simcse_jax.training.compiled_step import CompiledStep, compile_step
from simcse_jax.training.loss import make_loss
from simcse_jax.training.spec import StepSpec
from tests.conftest import TINY_BERT, full, tree_error, without_key_biases
from tests.test_step import batches

BERT = TINY_BERT | {"num_hidden_layers": 2}
N = 48
WHOLE = (1, 1, 0, "dense")


@cache
def gradients(
    data: int, fsdp: int, micro_batch: int, implementation: Any, columns: int, dtype: Any = "float32"
) -> tuple[dict[str, float], Any, str]:
    """Metrics, gradient of every weight with dropout on, and the compiled program."""
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    objective = ObjectiveConfig(implementation=implementation, block_size=5, hard_negative_log_weight=0.5)
    config = Config(batch_size=N, micro_batch=micro_batch, model=ModelConfig(dtype=dtype), objective=objective)
    model = build_model(read_encoder_config(BERT), config.model)
    params = jax.jit(lambda: init_params(model, 7))()
    params = put(params, state_sharding(mesh, params))
    batch = batches(columns, 1, N)[0]
    placed = put_batch(mesh, N, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    function = jax.jit(jax.grad(make_loss(StepSpec(config, model, mesh, 1, 1), params), has_aux=True))
    compiled = function.lower(params, None, np.int32(1), placed).compile()
    grads, (metrics, _) = compiled(params, None, np.int32(1), placed)
    return {name: float(x) for name, x in metrics.items()}, jax.tree.map(np.asarray, grads), compiled.as_text()


FAST = [((1, 1, 17, "tiled"), 1), ((4, 2, 5, "dense"), 1), ((8, 1, 0, "tiled"), 3)]
HOW = [
    (1, 1, 1, "dense"),
    (1, 1, 17, "tiled"),
    (1, 1, 47, "dense"),
    (8, 1, 0, "tiled"),
    (8, 1, 4, "tiled"),
    (4, 2, 5, "dense"),
    (1, 8, 1, "tiled"),
]


@pytest.mark.parametrize(
    ("how", "columns"),
    [*FAST, *(full(how, columns) for how in HOW for columns in (1, 3) if (how, columns) not in FAST)],
    ids=str,
)
def test_gradients_are_those_of_the_whole_batch(how: tuple[int, int, int, str], columns: int) -> None:
    """Any chunk, any mesh, dense and in a ring."""
    metrics, grads, _ = gradients(*how, columns)
    expected_metrics, expected, _ = gradients(*WHOLE, columns)
    assert metrics == pytest.approx(expected_metrics, rel=2e-6, abs=2e-6)
    assert tree_error(without_key_biases(grads), without_key_biases(expected)) < 3e-6


@pytest.mark.full
def test_gradients_agree_to_float64_rounding() -> None:
    with jax.enable_x64(True):
        metrics, grads, _ = gradients(4, 2, 4, "tiled", 3, "float64")
        expected_metrics, expected, _ = gradients(*WHOLE, 3, "float64")
    assert metrics == pytest.approx(expected_metrics, rel=1e-13)
    assert tree_error(grads, expected) < 1e-13


@pytest.mark.program
def test_weights_gradients_are_summed_over_devices_once_a_step() -> None:
    """Outside the loop over chunks: a sum in the body of a loop would be one a chunk."""
    program = gradients(8, 1, 1, "tiled", 1)[2]
    holders = [part for part in re.split(r"\n\n", program) if re.search(r" all-reduce(-start)?\(", part)]
    assert holders
    assert all(part.lstrip().startswith("ENTRY") for part in holders)


@pytest.mark.program
def test_the_ring_in_the_step_gathers_no_keys() -> None:
    program = gradients(8, 1, 0, "tiled", 3)[2]
    assert "collective-permute" in program
    assert "all-gather" not in program


def compiled(batch_size: int, micro_batch: Any) -> CompiledStep:
    """The step of a small model on one device."""
    objective = ObjectiveConfig(implementation="tiled", block_size=256)
    data = DataConfig(train="unused", max_length=16)
    config = Config(batch_size=batch_size, micro_batch=micro_batch, objective=objective, data=data)
    model = build_model(read_encoder_config(BERT), config.model)
    return compile_step(StepSpec(config, model, make_mesh(devices=jax.devices()[:1]), 1, 10))


@pytest.mark.full
@pytest.mark.program
def test_memory_grows_with_the_embeddings_alone() -> None:
    small, large, whole = (compiled(*sizes).needed for sizes in ((2048, 64), (8192, 64), (8192, 0)))
    assert small
    assert large
    assert whole
    # Vectors, unit vectors and their gradients, tokens: a few hundred bytes a row of width 32, twice.
    assert large - small < 6144 * 2 * 32 * 4 * 8
    assert large < whole / 10


def test_auto_takes_the_largest_chunk_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled(2048, "auto")
    assert whole.micro_batch == 2048
    limit = (compiled(2048, 256).needed or 0) + 1
    monkeypatch.setattr("simcse_jax.training.compiled_step.available_memory", lambda mesh: limit)
    step = compiled(2048, "auto")
    assert step.available == limit
    assert step.fits
    assert 128 <= step.micro_batch <= 256
    with pytest.raises(
        InputError, match=r"a step of 2,048 examples, 2,048 encoded at a time, takes .* GB .*micro-batch"
    ):
        compiled(2048, 0)
