"""The tiled InfoNCE against the dense one: values, gradients, metrics, on one device and in a ring."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from simcse_jax.objectives import dense, info_nce, tiled
from simcse_jax.runtime.mesh import AXES, batch_sharding, compiler_options, make_mesh
from tests.conftest import relative_error

TOLERANCE = {"float32": 5e-6, "float64": 1e-12}

ONE, FOUR = (1, 1, 1), (1, 2, 2)
# Rows, kinds of sentences, mesh (dcn, data, fsdp), block, τ, log α. Compiled once each.
SHAPES = [
    (8, 2, ONE, 3, 1.0, 0.0),
    (8, 3, (1, 4, 2), 1024, 0.05, 0.7),
    (37, 2, ONE, 16, 0.05, 0.0),
    (37, 3, ONE, 37, 0.01, -1.5),
    (64, 2, FOUR, 5, 0.01, 0.0),
    (104, 3, (1, 4, 2), 4, 0.1, 3.0),
    (104, 3, (2, 2, 2), 4, 0.1, 3.0),
    (40, 2, (2, 4, 1), 3, 0.05, 0.0),
    (72, 3, (4, 2, 1), 16, 0.05, 0.7),
    (18, 2, (3, 1, 1), 5, 0.3, 0.0),
    (210, 2, (1, 1, 2), 32, 0.3, 0.0),
    (1000, 2, (1, 4, 2), 64, 0.02, 0.0),
    (1536, 3, ONE, 500, 0.05, 0.7),
]


def mesh_of(dcn: int, data: int, fsdp: int) -> Mesh:
    return make_mesh(data, fsdp, jax.devices()[: dcn * data * fsdp], dcn)


def differentiated(pairs: Any, temperature: float, log_weight: float, mesh: Mesh | None = None) -> Any:
    def loss(z: tuple[jax.Array, ...], valid: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        options = {"temperature": temperature, "hard_negative_log_weight": log_weight}
        return info_nce(*z, **options, valid=valid, pairs=pairs)

    options = None if mesh is None else compiler_options(mesh)
    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)


@cache
def both(sizes: tuple[int, int, int], block: int, temperature: float, log_weight: float) -> tuple[Any, Any, Any]:
    """The dense form on one device, the tiled form on a mesh, and that mesh."""
    mesh = None if sizes == ONE else mesh_of(*sizes)
    axes = () if mesh is None else AXES
    ours = partial(tiled, block=block, mesh=mesh, axes=axes, across=axes[:1])
    return differentiated(dense, temperature, log_weight), differentiated(ours, temperature, log_weight, mesh), mesh


def compare(z: list[np.ndarray], valid: np.ndarray, *shape: Any) -> float:
    """Checks the two against each other; returns the loss."""
    expected, actual, mesh = both(*shape)
    # A cosine near 1 differs by an ulp or two from one order of summation to another; over τ, that is the relative
    # difference of its exponential, and below τ = 0.05 in float32 more than the tolerance.
    temperature, eps = shape[2], float(np.finfo(z[0].dtype).eps)
    tolerance = max(TOLERANCE[str(z[0].dtype)], 2 * eps / temperature)
    on_one = tuple(map(jnp.asarray, z)), jnp.asarray(valid)
    (value, metrics), gradients = expected(*on_one)
    placed = on_one if mesh is None else jax.device_put(on_one, batch_sharding(mesh))
    (our_value, our_metrics), our_gradients = actual(*placed)
    assert our_value.dtype == value.dtype == z[0].dtype
    smallest = float(jnp.finfo(value.dtype).tiny)
    assert float(our_value) == pytest.approx(float(value), rel=tolerance, abs=smallest)
    for ours, theirs in zip(our_gradients, gradients, strict=True):
        assert relative_error(ours, theirs) < tolerance
    for name, figure in metrics.items():
        slack = 100 * eps
        assert float(our_metrics[name]) == pytest.approx(float(figure), rel=slack, abs=slack), name
    return float(value)


def sentences(seed: int, n: int, kinds: int, likeness: float, width: int = 24) -> list[np.ndarray]:
    """Vectors whose positives have about the given cosine: −1 gives large losses, 1 small ones."""
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(kinds, n, width))
    z[1] = likeness * z[0] + np.sqrt(1 - likeness**2) * z[1]
    # Rows of one batch differ in length, too.
    return list(z * np.exp(generator.normal(size=(kinds, n, 1))))


problems = st.tuples(
    st.sampled_from(SHAPES),
    st.integers(0, 2**32 - 1),
    st.sampled_from([-1.0, -0.5, 0.0, 0.5, 0.9, 0.999]),
    st.sampled_from([0.7, 1.0]),
)
"""Shape and settings, seed, cosine of the positives, share of the rows that count."""


def check(problem: Any, dtype: str) -> None:
    (n, kinds, *shape), seed, likeness, share = problem
    valid = np.random.default_rng(seed).random(n) < share
    valid[:2] = True
    compare([x.astype(dtype) for x in sentences(seed, n, kinds, likeness)], valid, *shape)


@pytest.mark.full
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(problem=problems)
def test_tiled_is_dense_in_float32(problem: Any) -> None:
    check(problem, "float32")


@pytest.mark.full
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(problem=problems)
def test_tiled_is_dense_in_float64(problem: Any) -> None:
    with jax.enable_x64(True):
        check(problem, "float64")


def test_losses_from_small_to_large() -> None:
    """Nearly orthogonal rows for the smallest losses, opposite positives at a low temperature for the largest."""
    first = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0][:40]
    other = np.random.default_rng(1).normal(size=first.shape) / 8
    losses = [
        compare(
            [np.asarray(x, np.float32) for x in (first, first + noise * other)],
            np.ones(40, bool),
            (1, 2, 2),
            7,
            tau,
            0.0,
        )
        for noise, tau in ((0.0, 0.05), (0.3, 0.05), (1.0, 0.05), (3.0, 0.05))
    ]
    opposite = sentences(3, 40, 2, -0.1)
    losses.append(compare([np.asarray(x, np.float32) for x in opposite], np.ones(40, bool), FOUR, 7, 0.02, 0.0))
    assert losses[0] < 1e-6
    assert losses[-1] > 20


@pytest.mark.release
@pytest.mark.parametrize("sizes", [ONE, (1, 4, 2), (2, 4, 1)], ids=str)
def test_tiled_is_dense_for_16384_rows(sizes: tuple[int, int, int]) -> None:
    z = [x.astype(np.float32) for x in sentences(0, 16384, 2, 0.5)]
    compare(z, np.ones(16384, bool), sizes, 1000, 0.05, 0.0)


def test_heavy_hard_negatives_and_padding() -> None:
    """exp(log α) overflows float32; a tile's padding must not meet it."""
    z = [x.astype(np.float32) for x in sentences(0, 20, 3, 0.5)]
    valid = np.ones(20, bool)
    assert np.isfinite(compare(z, valid, FOUR, 3, 0.05, 100.0))
    _, ring, mesh = both(FOUR, 3, 0.05, 100.0)
    _, gradients = ring(*jax.device_put((tuple(z), valid), batch_sharding(mesh)))
    assert np.all(np.isfinite(gradients))


@pytest.mark.parametrize("n", [1, 5])
def test_a_single_pair_has_nothing_to_learn(n: int) -> None:
    z = [jnp.asarray(x, jnp.float32) for x in sentences(0, n, 2, 0.5)]
    (value, metrics), gradients = differentiated(partial(tiled, block=2), 0.05, 0.0)(tuple(z), jnp.arange(n) == n - 1)
    assert float(value) == 0
    assert not np.any(np.asarray(gradients))
    assert float(metrics["effective_negatives"]) == 1


def test_effective_negatives() -> None:
    """All negatives equally hard count in full; one that outweighs the rest counts alone."""
    alike = jnp.concatenate([jnp.eye(4), jnp.zeros((4, 12))], axis=1)
    for pairs in (dense, partial(tiled, block=3)):
        loss = partial(info_nce, temperature=0.05, pairs=pairs)
        assert float(loss(alike, alike)[1]["effective_negatives"]) == pytest.approx(3)
        near = alike[jnp.array([1, 0, 3, 2])]
        assert float(loss(alike, near)[1]["effective_negatives"]) == pytest.approx(1, abs=1e-6)


def test_bfloat16_products_are_close_and_accumulated_in_float32() -> None:
    z = tuple(jnp.asarray(x, jnp.float32) for x in sentences(0, 512, 3, 0.7, width=256))
    valid = jnp.ones(512, bool)
    (value, _), gradients = differentiated(dense, 0.05, 0.0)(z, valid)
    (rough, _), rough_gradients = differentiated(partial(tiled, block=100, dtype="bfloat16"), 0.05, 0.0)(z, valid)
    assert 1e-6 < abs(float(rough) / float(value) - 1) < 5e-3
    for ours, theirs in zip(rough_gradients, gradients, strict=True):
        assert ours.dtype == jnp.float32
        assert relative_error(ours, theirs) < 1e-2


def test_bfloat16_vectors_are_computed_in_float32() -> None:
    z = tuple(jnp.asarray(x, jnp.bfloat16) for x in sentences(0, 50, 2, 0.7))
    valid = jnp.ones(50, bool)
    (value, _), gradients = differentiated(partial(tiled, block=16), 0.05, 0.0)(z, valid)
    (expected, _), expected_gradients = differentiated(dense, 0.05, 0.0)(z, valid)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=2**-7, atol=1e-6)


@pytest.mark.program
def test_the_logits_never_exist() -> None:
    """65,536 rows of width 768: besides arguments and results under 1 GB, where the logits alone take 17 GB."""
    n, width = 65536, 768
    z = (jax.ShapeDtypeStruct((n, width), jnp.float32),) * 2
    valid = jax.ShapeDtypeStruct((n,), bool)
    compiled = differentiated(partial(tiled, block=1024), 0.05, 0.0).lower(z, valid).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1e9


@pytest.mark.program
def test_the_ring_passes_keys_on_and_gathers_nothing() -> None:
    n, width, mesh = 64, 16, make_mesh()
    sharding = batch_sharding(mesh)
    z = (jax.ShapeDtypeStruct((n, width), jnp.float32, sharding=sharding),) * 2
    valid = jax.ShapeDtypeStruct((n,), bool, sharding=sharding)
    ring = partial(tiled, block=4, mesh=mesh, axes=mesh.axis_names)
    program = differentiated(ring, 0.05, 0.0).lower(z, valid).compile().as_text()
    assert "collective-permute" in program
    assert "all-gather" not in program
    assert "all-to-all" not in program
