"""The train step: the same on any mesh, exact on short batches, and nothing moved between devices that need not be."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from simcse_jax import rng
from simcse_jax.config import Config, ModelConfig, OptimizerConfig
from simcse_jax.data.batch import Batch
from simcse_jax.model import SentenceEncoder, read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.noise import drawn, dropout, random_bits
from simcse_jax.runtime.mesh import make_mesh, put_batch
from simcse_jax.training.loss import encode_views
from simcse_jax.training.spec import StepSpec, create_state
from simcse_jax.training.state import TrainState
from simcse_jax.training.step import make_train_step
from simcse_jax.xla.collectives import collectives
from simcse_jax.xla.hlo import parse
from tests.conftest import TINY_BERT, TINY_ROBERTA, full, tree_error, without_key_biases

N, LENGTH, STEPS = 16, 12, 20
BERT = TINY_BERT | {"num_hidden_layers": 2}
MESHES = {
    **{"1": (1, 1, 1), "data8": (8, 1, 1), "data4_fsdp2": (4, 2, 1), "fsdp8": (1, 8, 1)},
    **{"dcn2_data2_fsdp2": (2, 2, 2), "dcn2_data4": (4, 1, 2), "dcn4_data2": (2, 1, 4)},
}
"""Sizes of data, fsdp and dcn."""


def batches(columns: int, steps: int = STEPS, n: int = N) -> list[Batch]:
    """Random ids; the last batch is short, as the last of an epoch is."""
    generator = np.random.default_rng(columns)
    made = []
    for step in range(steps):
        lengths = generator.integers(3, LENGTH + 1, (n, columns)).astype(np.int32)
        ids = generator.integers(5, 120, (n, columns, LENGTH)).astype(np.int32)
        ids = np.where(np.arange(LENGTH) < lengths[..., None], ids, 0)
        made.append(Batch(ids, lengths[..., None], np.arange(n) < (n - 5 if step == steps - 1 else n)))
    return made


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    data, fsdp, dcn = (*sizes, 1)[:3]
    return make_mesh(data, fsdp, jax.devices()[: math.prod(sizes)], dcn)


def train(
    mesh_shape: tuple[int, ...],
    made: list[Batch],
    dtype: str = "float32",
    config: dict[str, Any] = BERT,
    **settings: Any,
) -> tuple[np.ndarray, Any]:
    """Losses and gradient norms by step, and the parameters at the end."""
    mesh = mesh_of(mesh_shape)
    run = Config(
        batch_size=len(made[0].valid),
        model=ModelConfig(pooler="cls", dtype=dtype, **settings),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.01, warmup_steps=3),
    )
    model = build_model(read_encoder_config(config), run.model)
    spec = StepSpec(run, model, mesh, 1, len(made))
    state = create_state(spec, lambda: init_params(model, 7))
    step = make_train_step(spec, state)
    figures = []
    for batch in made:
        placed = put_batch(mesh, run.batch_size, lambda rows, b=batch: jax.tree.map(lambda x: x[rows], b))
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, placed)
        figures.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(figures), jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def one_device() -> Callable[[int, str], tuple[np.ndarray, Any]]:
    """Training on one device, by columns and type; computed once."""
    known: dict[tuple[int, str], tuple[np.ndarray, Any]] = {}

    def get(columns: int, dtype: str) -> tuple[np.ndarray, Any]:
        if (columns, dtype) not in known:
            known[columns, dtype] = train(MESHES["1"], batches(columns), dtype)
        return known[columns, dtype]

    return get


@pytest.mark.parametrize(
    ("mesh", "columns"),
    [
        ("data8", 1),
        ("data4_fsdp2", 3),
        ("dcn2_data2_fsdp2", 1),
        full("dcn2_data4", 3),
        full("dcn4_data2", 1),
        full("data8", 3),
        full("data4_fsdp2", 1),
        full("fsdp8", 1),
        full("fsdp8", 3),
    ],
)
def test_any_mesh_trains_as_one_device(one_device: Any, mesh: str, columns: int) -> None:
    figures, params = train(MESHES[mesh], batches(columns))
    expected_figures, expected_params = one_device(columns, "float32")
    assert np.max(np.abs(figures / expected_figures - 1)) < 5e-6
    assert tree_error(without_key_biases(params), without_key_biases(expected_params)) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["data4_fsdp2", "dcn2_data2_fsdp2"])
def test_any_mesh_trains_as_one_device_to_float64_rounding(one_device: Any, mesh: str) -> None:
    with jax.enable_x64(True):
        figures, params = train(MESHES[mesh], batches(3), "float64")
        expected_figures, expected_params = one_device(3, "float64")
    assert np.max(np.abs(figures / expected_figures - 1)) < 1e-12
    assert tree_error(params, expected_params) < 1e-12


def compile_step(mesh_shape: tuple[int, ...], columns: int, n: int = N) -> Any:
    """The compiled step on a mesh."""
    mesh = mesh_of(mesh_shape)
    run = Config(batch_size=n)
    model = build_model(read_encoder_config(BERT), run.model)
    spec = StepSpec(run, model, mesh, 1, STEPS)
    state = create_state(spec, lambda: init_params(model, 7))
    batch = batches(columns, 1, n)[0]
    placed = put_batch(mesh, n, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    return make_train_step(spec, state).lower(state, placed).compile()


@pytest.mark.program
@pytest.mark.parametrize("columns", [full(1), 3])
def test_collectives_of_the_step(columns: int) -> None:
    """One gather of the normalised keys, the sum of their gradient, the sum of the weights' gradients."""
    # A number of rows that no weight has.
    n, width, keys = 56, BERT["hidden_size"], max(columns, 2) - 1
    found = collectives(parse(compile_step((8, 1), columns, n).as_text()))
    gathers = [(kind, np.prod(shape)) for c in found if c.kind == "all-gather" for kind, shape in c.arrays]
    assert sorted(gathers) == [("f32", keys * n * width), ("pred", keys * n)]
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    sums = [shape for c in found if c.kind != "all-gather" for type_, shape in c.arrays if type_ == "f32"]
    model = build_model(read_encoder_config(BERT), ModelConfig())
    weights = [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(model, 0)))]
    summed_keys = [shape for shape in sums if n in shape or keys * n in shape]
    assert sum(np.prod(shape) for shape in summed_keys) == keys * n * width
    # Each weight's gradient once; what else is summed are scalars of the metrics.
    matrices = Counter(shape for shape in sums if len(shape) == 2 and shape not in summed_keys)
    # The position table has as many gradients as there are positions in the batch.
    expected = Counter(shape for shape in weights if len(shape) == 2)
    assert sum(np.prod(s) * n for s, n in matrices.items()) <= sum(np.prod(s) * n for s, n in expected.items())
    assert matrices.total() <= expected.total()


@pytest.mark.program
@pytest.mark.parametrize("mesh", [full("data8"), "fsdp8"])
def test_work_and_state_are_split_over_the_devices(mesh: str) -> None:
    whole, split = compile_step((1, 1), 1, 128), compile_step(MESHES[mesh], 1, 128)
    assert split.cost_analysis()["flops"] < whole.cost_analysis()["flops"] / 8 * 1.1
    if mesh == "fsdp8":
        sizes = [c.memory_analysis().argument_size_in_bytes for c in (whole, split)]
        assert sizes[1] < sizes[0] / 8 * 1.5


def test_short_batch_equals_a_smaller_one() -> None:
    """Rows that are not valid change nothing: neither loss nor gradient sees them."""
    whole = batches(3)[-1]
    count = int(whole.valid.sum())
    small = jax.tree.map(lambda x: x[:count], whole)
    changed = whole._replace(input_ids=np.where(whole.valid[:, None, None], whole.input_ids, 9))
    expected, _ = train(MESHES["1"], [small])
    for batch in (whole, changed):
        figures, _ = train(MESHES["1"], [batch])
        np.testing.assert_allclose(figures, expected, rtol=1e-5)


@pytest.mark.parametrize("settings", [full({"remat": True}), {"scan": True}], ids=str)
def test_how_layers_are_compiled_changes_nothing(settings: dict[str, bool]) -> None:
    figures, params = train(MESHES["1"], batches(1, steps=5), config=TINY_BERT)
    other_figures, other_params = train(MESHES["1"], batches(1, steps=5), config=TINY_BERT, **settings)
    np.testing.assert_allclose(other_figures, figures, rtol=1e-5)
    assert tree_error(without_key_biases(other_params), without_key_biases(params)) < 1e-5


def test_bfloat16_trains_close_to_float32() -> None:
    figures, _ = train(MESHES["1"], batches(3, steps=5))
    bfloat16, params = train(MESHES["1"], batches(3, steps=5), "bfloat16")
    np.testing.assert_allclose(bfloat16[:, 0], figures[:, 0], rtol=0.05)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


views_of = jax.jit(encode_views, static_argnums=0, static_argnames=("micro_batch", "shared_noise", "clean"))


@pytest.fixture(scope="module")
def tiny() -> tuple[SentenceEncoder, Any]:
    model = SentenceEncoder(read_encoder_config(TINY_ROBERTA | {"hidden_dropout_prob": 0.3}))
    return model, jax.jit(lambda: init_params(model, 0))()


def test_views_of_a_sentence_differ_by_their_noise_alone(tiny: tuple[SentenceEncoder, Any]) -> None:
    model, params = tiny
    batch = batches(1)[0]
    first = views_of(model, params, batch, rng.key(0, "dropout", 0))
    again = views_of(model, params, batch, rng.key(0, "dropout", 0))
    later = views_of(model, params, batch, rng.key(0, "dropout", 1))
    np.testing.assert_array_equal(first, again)
    assert np.min(np.linalg.norm(first[:, 0] - first[:, 1], axis=-1)) > 0.1
    assert np.min(np.linalg.norm(first - later, axis=-1)) > 0.1
    quiet = SentenceEncoder(replace(model.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    same = views_of(quiet, params, batch, rng.key(0, "dropout", 0))
    np.testing.assert_array_equal(same[:, 0], same[:, 1])


def test_noise_of_a_sentence_does_not_depend_on_its_neighbours(tiny: tuple[SentenceEncoder, Any]) -> None:
    model, params = tiny
    ids = jnp.asarray(batches(1)[0].input_ids[:, 0])
    lengths = jnp.full((N, 1), ids.shape[1])

    @jax.jit
    def apply(*of_rows: Any) -> Any:
        return model.apply({"params": params}, *of_rows, rngs={"dropout": jax.random.key(3)})

    def encode(rows: slice) -> Any:
        return apply(ids[rows], lengths[rows], jnp.arange(N)[rows, None])

    np.testing.assert_allclose(encode(slice(4, 8)), encode(slice(0, N))[4:8], atol=1e-5)


def counters(*shape: int) -> Any:
    """The number of each element of a sentence."""
    return jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(1, *shape)


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_dropout_rate_and_scale(rate: float) -> None:
    x = jnp.ones((64, 50, 40))
    noise = drawn(jax.random.key(0), jnp.arange(64)[:, None, None])
    kept = dropout(x, noise, counters(50, 40), rate)
    share = float(jnp.mean(kept == 0))
    # Three standard deviations of 128,000 draws.
    assert abs(share - rate) < 3 * (rate * (1 - rate) / x.size) ** 0.5
    np.testing.assert_allclose(np.unique(kept), [0, 1 / (1 - rate)], rtol=1e-6)
    rows = np.asarray(kept == 0).reshape(64, -1)
    assert abs(np.corrcoef(rows)[np.triu_indices(64, 1)]).max() < 0.15


def test_dropout_without_a_key_is_an_error(tiny: tuple[SentenceEncoder, Any]) -> None:
    model, params = tiny
    ids = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(Exception, match='needs PRNG for "dropout"'):
        model.apply({"params": params}, ids, jnp.full((2, 1), 4), jnp.arange(2)[:, None])


def test_a_state_of_the_step_is_consumed() -> None:
    """The state is donated: its buffers hold the next one."""
    mesh = make_mesh(devices=jax.devices()[:1])
    run = Config(batch_size=N)
    model = build_model(read_encoder_config(BERT), run.model)
    spec = StepSpec(run, model, mesh, 1, STEPS)
    state = create_state(spec, lambda: init_params(model, 7))
    after, _ = make_train_step(spec, state)(state, batches(1)[0])
    assert isinstance(after, TrainState)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_shared_noise_makes_both_views_one(tiny: tuple[SentenceEncoder, Any]) -> None:
    model, params = tiny
    z = views_of(model, params, batches(1)[0], rng.key(0, "dropout", 0), shared_noise=True)
    np.testing.assert_array_equal(z[:, 0], z[:, 1])
    usual = views_of(model, params, batches(2)[0], rng.key(0, "dropout", 0), shared_noise=True)
    assert usual.shape == (N, 2, 32)


@pytest.mark.parametrize("micro_batch", [0, 5])
def test_the_clean_view_has_no_noise(tiny: tuple[SentenceEncoder, Any], micro_batch: int) -> None:
    """It is what the model without dropout gives, and the other views stay what they were."""
    model, params = tiny
    batch, key = batches(1)[0], rng.key(0, "dropout", 0)
    z = views_of(model, params, batch, key, micro_batch=micro_batch, clean=True)
    quiet = SentenceEncoder(replace(model.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    expected = views_of(quiet, params, batch, key)[:, 0]
    assert z.shape == (N, 3, 32)
    np.testing.assert_allclose(z[:, 2], expected, atol=2e-6)
    np.testing.assert_allclose(z[:, :2], views_of(model, params, batch, key), atol=2e-6)


@pytest.mark.parametrize("clean", [False, True])
def test_a_second_encoder_encodes_positives(tiny: tuple[SentenceEncoder, Any], clean: bool) -> None:
    model, params = tiny
    other = jax.jit(lambda: init_params(model, 1))()
    batch, key = batches(3)[0], rng.key(0, "dropout", 0)
    z = views_of(model, {**params, "second": other}, batch, key, clean=clean)
    first, second = (views_of(model, p, batch, key, clean=clean) for p in (params, other))
    np.testing.assert_allclose(z[:, 0], first[:, 0], atol=2e-6)
    np.testing.assert_allclose(z[:, 1:3], second[:, 1:3], atol=2e-6)
    if clean:
        np.testing.assert_allclose(z[:, 3], first[:, 3], atol=2e-6)


@pytest.mark.full
def test_two_encoders_train_apart_on_any_mesh() -> None:
    figures, params = train(MESHES["1"], batches(1, 4), encoders=2)
    assert tree_error(params["second"], {n: params[n] for n in ("encoder", "head")}) > 1e-4
    sharded, _ = train((4, 2), batches(1, 4), encoders=2)
    assert np.max(np.abs(sharded / figures - 1)) < 5e-6


@pytest.mark.parametrize(("settings", "scans"), [({}, False), ({"scan": True}, True), ({"remat": True}, True)], ids=str)
def test_layers_are_scanned_where_it_pays(settings: dict[str, bool], scans: bool) -> None:
    """On CPUs each layer is compiled by itself, unless told otherwise or where `remat` needs the loop."""
    run = Config(batch_size=N, model=ModelConfig(**settings))  # type: ignore[arg-type]
    model = build_model(read_encoder_config(TINY_BERT), run.model)
    spec = StepSpec(run, model, make_mesh(devices=jax.devices()[:1]), 1, 1)
    state = spec.state_shapes()
    traced = make_train_step(spec, state).trace(state, spec.batch_shapes())
    assert (" scan[" in str(traced.jaxpr)) == scans


def test_the_noise_is_that_of_every_version() -> None:
    """A run that goes on with another version draws the same masks: both words of the key count, each in its place."""
    words, counter = (jnp.uint32(1), jnp.uint32(2)), jnp.arange(4, dtype=jnp.uint32)
    assert random_bits(words, counter).tolist() == [3599786941, 3636836253, 2711265970, 1176591317]
    assert random_bits(words[::-1], counter).tolist() == [4151441615, 168625938, 2014284410, 448378537]


def test_a_stream_without_a_step_is_that_of_step_0() -> None:
    first, later = (jax.random.key_data(rng.key(1, "init", step)) for step in (0, 1))
    np.testing.assert_array_equal(jax.random.key_data(rng.key(1, "init")), first)
    assert not np.array_equal(first, later)
