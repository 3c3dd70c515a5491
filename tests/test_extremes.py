"""Objectives and unit vectors at extremes, against float64: any scale, zero, alike and masked rows, τ low and high."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simcse_jax.evaluation.geometry import alignment, average_cosine, uniformity
from simcse_jax.evaluation.mteb import MTEBEncoder
from simcse_jax.evaluation.retrieval import RetrievalTask, retrieve
from simcse_jax.evaluation.sts import cosine
from simcse_jax.inference.vectors import cosines, unit
from simcse_jax.objectives import dense, find_loss, tiled, wants_clean
from simcse_jax.objectives import unit as jax_unit
from simcse_jax.postprocess.modules import Normalize
from simcse_jax.runtime.mesh import batch_sharding, make_mesh
from simcse_jax.training.micro_batch import map_chunks
from tests.conftest import full

EPS = float(np.finfo(np.float32).eps)
N, WIDTH, LOG_ALPHA = 16, 12, 0.4
SCALES = [1e-30, 1e-20, 1e-12, 1e-7, 1.0, 1e7, 1e12, 1e20, 1e30]


def logsumexp(x: np.ndarray) -> np.ndarray:
    top = np.max(x, axis=1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return (safe + np.log(np.sum(np.exp(x - safe), axis=1, keepdims=True)))[:, 0]


def sigma(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


class Statement:
    """A loss and its gradient with respect to every cosine, in float64, of the rows that count."""

    def __init__(self, z: dict[str, np.ndarray], tau: float) -> None:
        lengths = {name: np.linalg.norm(x, axis=1, keepdims=True) for name, x in z.items()}
        self.unit = {name: x / np.where(lengths[name] > 0, lengths[name], 1) for name, x in z.items()}
        self.tau, self.n, self.loss = tau, len(z["z1"]), 0.0
        self.gradients = {name: np.zeros(x.shape) for name, x in z.items()}
        """Of the unit vectors' directions: the gradient of a row times its length."""
        self.sizes = {name: np.zeros(len(x)) for name, x in z.items()}
        """The same if nothing in a gradient's sum cancelled: what its rounding error is relative to."""

    def cosine(self, a: str, b: str) -> np.ndarray:
        return self.unit[a] @ self.unit[b].T

    def add(self, a: str, b: str, gradient: np.ndarray) -> None:
        """The gradient of the cosines of all `a` with all `b`."""
        for name, other, g in ((a, b, gradient), (b, a, gradient.T)):
            d, u = g @ self.unit[other], self.unit[name]
            self.gradients[name] += d - u * np.sum(u * d, axis=1, keepdims=True)
            self.sizes[name] += np.abs(g).sum(axis=1)

    def logits(self, a: str, b: str, hard: str | None, f: Any = lambda c: c) -> np.ndarray:
        """Of the negatives: all b but the own one, then all hard ones."""
        first = f(self.cosine(a, b)) / self.tau
        first[np.eye(self.n, dtype=bool)] = -np.inf
        return (
            first
            if hard is None
            else np.concatenate([first, f(self.cosine(a, hard)) / self.tau + LOG_ALPHA * np.eye(self.n)], axis=1)
        )

    def add_negatives(self, a: str, b: str, hard: str | None, gradient: np.ndarray, slope: Any = np.ones_like) -> None:
        for name, g in zip([b] if hard is None else [b, hard], np.split(gradient, 1 + bool(hard), axis=1), strict=True):
            self.add(a, name, g * slope(self.cosine(a, name)) / self.tau)


def in_one_direction(s: Statement, a: str, b: str, hard: str | None, name: str, share: float = 1.0) -> None:
    """InfoNCE, decoupled, focal, and off_dropout, whose positives are those of z1 and z2."""
    margin = 0.3
    f = (lambda c: c * (c + margin)) if name == "focal" else (lambda c: c)
    slope = (lambda c: 2 * c + margin) if name == "focal" else np.ones_like
    logits = s.logits(a, b, hard, f)
    positives = ("z1", "z2") if name == "off_dropout" else (a, b)
    c = np.diag(s.cosine(*positives))
    positive, own_slope = (c * c / s.tau, 2 * c) if name == "focal" else (c / s.tau, np.ones(s.n))
    lse = logsumexp(logits)
    d = np.where(np.isfinite(lse), lse - positive, -np.inf)
    weight = np.where(np.isfinite(lse), 1.0, 0.0) if name == "decoupled" else np.where(np.isfinite(d), sigma(d), 0)
    losses = np.where(np.isfinite(lse), d, 0) if name == "decoupled" else np.logaddexp(0, d)
    s.loss += share * float(np.mean(losses))
    softmax = np.exp(logits - np.where(np.isfinite(lse), lse, 0)[:, None])
    s.add_negatives(a, b, hard, share * softmax * weight[:, None] / s.n, slope)
    s.add(*positives, np.diag(-share * weight * own_slope / (s.n * s.tau)))


def statement(name: str, z: dict[str, np.ndarray], tau: float) -> Statement:
    s = Statement(z, tau)
    hard = "z3" if "z3" in z else None
    if name == "symmetric":
        in_one_direction(s, "z1", "z2", hard, "info_nce", 0.5)
        in_one_direction(s, "z2", "z1", None, "info_nce", 0.5)
    elif name == "sigmoid":
        logits, positive = s.logits("z1", "z2", hard) - 10, np.diag(s.cosine("z1", "z2")) / tau - 10
        s.loss = float(np.mean(np.logaddexp(0, -positive) + np.sum(np.logaddexp(0, logits), axis=1)))
        s.add_negatives("z1", "z2", hard, sigma(logits) / s.n)
        s.add("z1", "z2", np.diag(-sigma(-positive) / (s.n * tau)))
    elif name == "own_negative":
        d = np.diag(s.cosine("z1", "z3") - s.cosine("z1", "z2")) / tau + LOG_ALPHA
        s.loss = float(np.mean(np.logaddexp(0, d)))
        s.add("z1", "z3", np.diag(sigma(d) / (s.n * tau)))
        s.add("z1", "z2", np.diag(-sigma(d) / (s.n * tau)))
    else:
        a, b = ("clean", "clean") if name == "off_dropout" else ("z1", "z2")
        in_one_direction(s, a, b, hard, name)
    return s


@cache
def differentiated(name: str, how: str, tau: float) -> Any:
    mesh = make_mesh(data=4, fsdp=2) if how == "ring" else None
    axes = () if mesh is None else mesh.axis_names
    pairs = dense if how in ("dense", "chunks") else partial(tiled, block=5, mesh=mesh, axes=axes)

    def loss(z: dict[str, jax.Array], valid: jax.Array) -> Any:
        if how == "chunks":  # GradCache: a few rows at a time, encoded again in the backward pass
            z = {kind: map_chunks(lambda x: x[0] * 1, (x,), 5) for kind, x in z.items()}
        return find_loss(name)(**z, temperature=tau, hard_negative_log_weight=LOG_ALPHA, valid=valid, pairs=pairs)

    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return function if mesh is None else lambda *x: function(*jax.device_put(x, batch_sharding(mesh)))


KINDS = ("scales", "bfloat16", "identical", "zero", "masked", "alone", "opposite", "near")


def vectors(kind: str, names: list[str], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    generator = np.random.default_rng(seed)
    z = {name: generator.normal(size=(N, WIDTH)) for name in names}
    valid = np.ones(N, bool)
    if kind == "identical":
        z = {name: np.tile(z["z1"][:1], (N, 1)) for name in names}
    if kind == "near":
        z = {name: z["z1"] + 1e-3 * x for name, x in z.items()}
    if kind == "opposite":
        z["z2"] = -z["z1"]
    if kind == "masked":
        valid = generator.random(N) < 0.4
    if kind == "alone":
        valid = np.arange(N) == generator.integers(N)
    # Rows of one batch differ in length, the masked ones as well.
    z = {name: x * 10.0 ** generator.uniform(-30, 30, (N, 1)) for name, x in z.items()}
    if kind == "zero":
        for x in z.values():
            x[generator.random(N) < 0.3] = 0
    valid[generator.integers(N) if not valid.any() else np.flatnonzero(valid)[0]] = True
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    return {name: np.asarray(jnp.asarray(x, dtype)) for name, x in z.items()}, valid


def check(name: str, how: str, tau: float, hard: bool, kind: str, seed: int) -> None:
    extra = ["clean"] if wants_clean(find_loss(name)) else []
    z, valid = vectors(kind, ["z1", "z2", *(["z3"] if hard else []), *extra], seed)
    (value, metrics), gradients = differentiated(name, how, tau)(
        {n: jnp.asarray(x) for n, x in z.items()}, jnp.asarray(valid)
    )
    wide = {n: x[valid].astype(np.float64) for n, x in z.items()}
    expected = statement(name, wide, tau)
    # A cosine is off by a few eps; over τ, that is the error of a logit and so the relative error of its exponential.
    slope = 2.3 if name == "focal" else 1  # the greatest derivative of the score, 2 c + 0.3
    tolerance = 8 * EPS * (2 + slope / tau)
    assert float(value) == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
    for n, ours in gradients.items():
        given, ours = wide[n], np.asarray(ours, np.float64)
        assert np.all(np.isfinite(ours))
        assert not np.any(ours[~valid])
        lengths = np.linalg.norm(given, axis=1, keepdims=True)
        error = np.linalg.norm(ours[valid] * lengths - expected.gradients[n], axis=1)
        rounding = 2**-8 * np.linalg.norm(expected.gradients[n], axis=1) if kind == "bfloat16" else 0
        # Weights and gradients below the smallest normal number are 0.
        smallest = float(np.finfo(np.float32).tiny) / EPS * (1 / tau + lengths[:, 0])
        # A gradient's part along its row passes through gradient / length², of rows that are not scaled.
        along = float(np.finfo(np.float32).tiny) * np.minimum(lengths[:, 0], 2.0**30 * np.sqrt(WIDTH)) ** 2
        allowed = tolerance * expected.sizes[n] + rounding + smallest + along
        assert np.all((error <= allowed) | (lengths[:, 0] == 0)), (n, kind, np.max(error / allowed))
    with_pairs = np.sum(valid) > 1
    assert {key for key, x in metrics.items() if not np.isfinite(x)} == (
        set() if with_pairs else {"negative_similarity", "uniformity"}
    )


LOSSES = ("info_nce", "symmetric", "decoupled", "sigmoid", "focal", "off_dropout", "own_negative")
HOW = ("dense", "tiled", "ring", "chunks")
FAST = {
    *(("info_nce", how, 0.001, True) for how in HOW),
    *(("symmetric", "dense", 0.001, True), ("decoupled", "ring", 0.05, True), ("sigmoid", "tiled", 0.001, False)),
    *(("focal", "dense", 0.05, True), ("off_dropout", "tiled", 0.001, False), ("own_negative", "chunks", 0.05, True)),
}


@pytest.mark.parametrize(
    ("name", "how", "tau", "hard"),
    [
        case if case in FAST else full(*case)
        for name in LOSSES
        for how in HOW
        for tau in (0.001, 0.05, 100.0)
        for hard in (False, True)
        if name != "own_negative" or hard
        for case in [(name, how, tau, hard)]
    ],
)
def test_an_objective_is_its_statement_at_every_extreme(name: str, how: str, tau: float, hard: bool) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
    def each(kind: str, seed: int) -> None:
        check(name, how, tau, hard, kind, seed)

    each()


def of_length(scale: float, dtype: Any = np.float32, rows: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of a length, and the float64 vectors of length 1 that they are multiples of."""
    x = np.random.default_rng(0).normal(size=(rows, 48))
    given = (x / np.linalg.norm(x, axis=1, keepdims=True) * scale).astype(dtype)
    wide = given.astype(np.longdouble)
    return given, (wide / np.sqrt(np.sum(wide * wide, axis=1, keepdims=True))).astype(np.float64)


@pytest.mark.parametrize("scale", SCALES)
def test_a_vector_of_any_length_keeps_direction_and_gradient(scale: float) -> None:
    given, expected = of_length(scale)
    weights = np.random.default_rng(1).normal(size=given.shape)
    value, back = jax.vjp(jax_unit, jnp.asarray(given))
    np.testing.assert_allclose(value, expected, atol=2 * EPS)
    gradient = (weights - expected * np.sum(expected * weights, axis=1, keepdims=True)) / scale
    ours = np.asarray(back(jnp.asarray(weights, jnp.float32))[0], np.float64)
    np.testing.assert_allclose(ours * scale, gradient * scale, atol=16 * EPS)
    for other in (unit(given), Normalize()(jnp.asarray(given))):
        np.testing.assert_allclose(other, expected, atol=2 * EPS)
    for other in (cosines(given, given[:3]), MTEBEncoder.similarity(None, given, given[:3])):  # type: ignore[arg-type]
        np.testing.assert_allclose(other, expected @ expected[:3].T, atol=6e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_vectors_at_the_ends_of_a_type_keep_their_direction(dtype: Any) -> None:
    info = np.finfo(dtype)
    for scale in (float(info.max) / 2, float(info.tiny) * 100, 1.0):
        given, expected = of_length(scale, dtype)
        found = unit(given)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, atol=4 * float(info.eps))
    assert not np.any(unit(np.zeros((3, 4), dtype)))
    assert unit(np.zeros((0, 4), dtype)).shape == (0, 4)


def test_unit_vectors_keep_every_bit_of_ordinary_rows() -> None:
    """The formulas without scaling, compiled and in NumPy."""

    def plain(x: jax.Array) -> jax.Array:
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1))

    def both(f: Any, x: jax.Array, g: jax.Array) -> Any:
        value, back = jax.vjp(f, x)
        return value, back(g)[0]

    generator = np.random.default_rng(0)
    x = generator.normal(size=(20000, 48)) * 10.0 ** generator.uniform(-8, 8, (20000, 1))
    x[::100] = 0
    x, g = jnp.asarray(x, jnp.float32), jnp.asarray(generator.normal(size=x.shape), jnp.float32)
    for ours, expected in zip(*(jax.jit(partial(both, f))(x, g) for f in (jax_unit, plain)), strict=True):
        np.testing.assert_array_equal(ours, expected)
    rows = np.asarray(x)
    np.testing.assert_array_equal(unit(rows), rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def test_a_vector_too_short_for_a_gradient_counts_as_zero() -> None:
    x = jnp.full((3, 8), jnp.finfo(jnp.float32).tiny)
    value, back = jax.vjp(jax_unit, x)
    assert np.max(np.abs(value)) < 1e-30
    np.testing.assert_array_equal(back(jnp.ones_like(x))[0], 1)
    assert np.any(np.isnan(jax_unit(x.at[0, 0].set(jnp.nan))[0]))


@pytest.mark.parametrize("scale", SCALES)
def test_evaluation_takes_vectors_of_any_length(scale: float) -> None:
    given, expected = of_length(scale)
    pairs = np.sum(expected[:10] * expected[10:], axis=1)
    np.testing.assert_allclose(cosine(given[:10], given[10:]), pairs, atol=1e-6)
    np.testing.assert_allclose(cosine(given[:10].astype(np.float64) * scale**8, given[10:]), pairs, atol=1e-6)
    assert alignment(given[:10], given[10:]) == pytest.approx(float(np.mean(2 - 2 * pairs)))
    assert uniformity(given) == pytest.approx(uniformity(expected), rel=1e-6)
    assert average_cosine(given) == pytest.approx(average_cosine(expected), rel=1e-5)


def test_retrieval_finds_answers_by_vectors_of_any_length() -> None:
    texts = [f"text {i}" for i in range(20)]
    task = RetrievalTask("t", ("q", "a"), texts[:10], texts[10:], np.array([[i, i] for i in range(10)]), 0)
    x, _ = of_length(1.0)
    x[10:] = x[:10]
    scales = np.array([10.0 ** (3 * i - 30) for i in range(20)])[:, None]
    vectors = dict(zip(texts, (x * scales).astype(np.float32), strict=True))
    assert retrieve(task, lambda asked: np.stack([vectors[t] for t in asked]))["recall@1"] == 100
