"""Masks, directions and weights of negatives: each against a plain NumPy statement, whole, in tiles and in a ring."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simcse_jax.config import NegativesConfig
from simcse_jax.errors import InputError
from simcse_jax.objectives import Earlier, Marks, dense, find_loss, tiled
from simcse_jax.objectives.negatives import debiased
from simcse_jax.runtime.mesh import batch_sharding, make_mesh
from tests.conftest import full, relative_error

TAU, LOG_ALPHA, ROWS = 0.2, 0.4, 16

ALL = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")
MASKS = {"duplicates": True, "margin": -0.05, "guide": "a model", "guide_margin": 0.1}
# Settings of the negatives, hard negatives of each example, loss; "earlier": batches of a queue.
CASES: list[Any] = [
    ({"duplicates": True}, 0, "info_nce"),
    full({"margin": 0.1}, 1, "info_nce"),
    ({"margin": -0.2, "margin_kind": "relative"}, 0, "decoupled"),
    full({"guide": "a model"}, 3, "info_nce"),
    ({**MASKS, "guide_margin_kind": "relative"}, 2, "info_nce"),
    full({"directions": ALL}, 1, "info_nce"),
    full({"directions": ALL, "softmax": "anchor"}, 0, "info_nce"),
    full({"directions": ALL, "softmax": "direction"}, 2, "info_nce"),
    full({**MASKS, "directions": ALL[:3], "softmax": "anchor", "hardness": 1.5}, 1, "info_nce"),
    ({"hardness": 2.0, "debias": 0.1}, 2, "info_nce"),
    full({**MASKS, "directions": ALL}, 8, "sigmoid"),
    (MASKS, 2, "symmetric"),
    full(MASKS, 2, "focal"),
    full(MASKS, 1, "off_dropout"),
    full(MASKS, 3, "own_negative"),
    ({**MASKS, "directions": ALL, "softmax": "anchor", "earlier": 2}, 1, "info_nce"),
    full({"earlier": 3, "hardness": 1.0, "debias": 0.05}, 0, "info_nce"),
    ({"earlier": 1}, 2, "sigmoid"),
    full({"directions": ALL[:2], "softmax": "anchor"}, 0, "decoupled"),
    full({**MASKS, "earlier": 2}, 0, "symmetric"),
    full({**MASKS, "earlier": 2}, 2, "off_dropout"),
    full({"directions": ALL[::2]}, 4, "info_nce"),
    full({**MASKS, "debias": 0.05, "directions": ALL, "softmax": "direction"}, 3, "info_nce"),
    full({**MASKS, "hardness": 0.5, "debias": 0.02}, 8, "info_nce"),
]


def lse(x: list[float]) -> float:
    return float(np.log(np.sum(np.exp(x)))) if x else -np.inf


def softplus(x: Any) -> Any:
    return np.logaddexp(0, x)


class Statement:
    """The losses in loops over pairs, from the equations of `NegativesConfig`."""

    def __init__(self, views: list[np.ndarray], facts: dict[str, np.ndarray], config: NegativesConfig) -> None:
        self.views = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in views]
        self.valid, self.present, self.texts = facts["valid"], facts["present"], facts["texts"]
        self.guide = facts["guide"] / np.linalg.norm(facts["guide"], axis=2, keepdims=True)
        self.config = config
        of_earlier = [
            facts[f"earlier_{name}"] for name in ("vectors", "texts", "guide", "valid") if "earlier_valid" in facts
        ]
        self.earlier = [
            (x / np.linalg.norm(x), t, g / np.linalg.norm(g))
            for x, t, g, counts in zip(*(a.reshape(-1, *a.shape[2:]) for a in of_earlier), strict=True)
            if counts
        ]
        self.positive = np.sum(self.views[0] * self.views[1], axis=1)

    def is_false(self, anchor: int, i: int, key: np.ndarray, texts: np.ndarray, guide: np.ndarray) -> bool:
        c = self.config
        if c.duplicates and {tuple(x) for x in self.texts[i, :2]} & {tuple(x) for x in texts}:
            return True
        if c.margin is not None:
            scale = abs(self.positive[i]) if c.margin_kind == "relative" else 1
            if self.views[anchor][i] @ key > self.positive[i] + c.margin * scale:
                return True
        if c.guide:
            own = self.guide[i, 0] @ self.guide[i, 1]
            scale = abs(own) if c.guide_margin_kind == "relative" else 1
            return bool(self.guide[i, anchor] @ guide > own + c.guide_margin * scale)
        return False

    def negatives(self, anchor: int, kinds: list[int], i: int) -> tuple[list[float], list[float]]:
        """Cosines of the negatives of anchor i, and what is added to their logits."""
        cosine, added = [], []
        for kind in kinds:
            for j in range(len(self.valid)):
                if not (self.valid[j] and self.present[j, kind]) or (kind < 2 and i == j):
                    continue
                texts = self.texts[j, :2] if kind < 2 else self.texts[j, [kind]]
                if not self.is_false(anchor, i, self.views[kind][j], texts, self.guide[j, kind]):
                    cosine.append(float(self.views[anchor][i] @ self.views[kind][j]))
                    added.append(LOG_ALPHA if i == j else 0.0)
        if (anchor, kinds[0]) == (0, 1):
            for key, texts, guide in self.earlier:
                if not self.is_false(0, i, key, texts, guide):
                    cosine.append(float(self.views[0][i] @ key))
                    added.append(0.0)
        return cosine, added

    def softmaxes(self, i: int) -> list[list[tuple[list[float], list[float]]]]:
        """For each softmax of example i, the negatives of each of its groups."""
        hard = list(range(2, len(self.views)))
        sides = {ALL[0]: (0, [1, *hard]), ALL[1]: (1, [0]), ALL[2]: (0, [0]), ALL[3]: (1, [1])}
        chosen = [sides[name] for name in self.config.directions]
        if self.config.softmax == "direction":
            return [[self.negatives(*group, i)] for group in chosen]
        groups = [
            self.negatives(anchor, [k for a, kinds in chosen if a == anchor for k in kinds], i)
            for anchor in sorted({a for a, _ in chosen})
        ]
        return [groups] if self.config.softmax == "joint" else [[group] for group in groups]

    def reduced(self, groups: list[tuple[list[float], list[float]]], positive: float, f: Any) -> float:
        """log of the sum over the negatives, weighed and debiased."""
        total, count = 0.0, 0
        for cosine, added in groups:
            c, a = np.array(cosine), np.array(added)
            weights = np.exp(self.config.hardness * c)
            total += np.sum(np.exp(f(c) / TAU + a) * weights / np.mean(weights)) if len(c) else 0
            count += len(c)
        share = self.config.debias
        if share and count:
            g = max((total / count - share * np.exp(positive)) / (1 - share), np.exp(-1 / TAU))
            total = count * g
        return float(np.log(total)) if count else -np.inf

    def loss(self, name: str) -> float:
        config = self.config
        losses = []
        for i in np.flatnonzero(self.valid):
            cosine = self.positive[i]
            if name == "own_negative":
                kinds = [k for k in range(2, len(self.views)) if self.present[i, k]]
                hard = [float(self.views[0][i] @ self.views[k][i]) / TAU for k in kinds]
                losses.append(softplus(lse(hard) + LOG_ALPHA - cosine / TAU))
                continue
            f = (lambda c: c * (c + 0.3)) if name == "focal" else (lambda c: c)
            positive = cosine**2 / TAU if name == "focal" else cosine / TAU
            for groups in self.softmaxes(i):
                if name == "sigmoid":
                    every = [np.sum(softplus(np.array(c) / TAU + np.array(a) - 10)) for c, a in groups]
                    losses.append(softplus(10 - positive) + sum(every))
                    continue
                n = self.reduced(groups, positive, f)
                losses.append(
                    (n - positive if np.isfinite(n) else 0) if name == "decoupled" else softplus(n - positive)
                )
        if name == "symmetric":
            back = {"valid": self.valid, "present": self.present[:, :2], "texts": self.texts[:, [1, 0]]}
            views = [self.views[1], self.views[0]]
            other = Statement(views, {**back, "guide": self.guide[:, [1, 0]]}, config).loss("info_nce")
            return (float(np.mean(losses)) + other) / 2
        return float(np.mean(losses))


def of_off_dropout(views: list[np.ndarray], facts: dict[str, np.ndarray], config: NegativesConfig) -> float:
    """Negatives among the clean vectors, margins from the noisy positives."""
    clean = Statement([views[0], views[0], *views[2:]], facts, config)
    clean.positive = Statement(views, facts, config).positive
    return clean.loss("info_nce")


def statement(name: str, views: list[np.ndarray], facts: dict[str, np.ndarray], config: NegativesConfig) -> float:
    """The loss; `off_dropout` is given its first vectors as the clean ones, too."""
    return of_off_dropout(views, facts, config) if name == "off_dropout" else Statement(views, facts, config).loss(name)


def example(seed: int, hard: int, earlier: int = 0) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Vectors with positives near their anchors, few texts, a guide that agrees in part, missing hard negatives."""
    g = np.random.default_rng(seed)
    n, views = ROWS, 2 + hard
    first = g.normal(size=(n, 12))
    z = [first, *(0.7 * first + g.normal(size=(views - 1, n, 12)))]
    guide = np.stack([x @ g.normal(size=(12, 7)) + g.normal(size=(n, 7)) for x in z], axis=1)
    present = g.random((n, views)) < 0.8
    present[:, :2] = True
    if hard:
        present[:, 2] = True  # of own_negative, which needs one
    valid = np.arange(n) < n - g.integers(0, 4)
    words = g.integers(0, 12, size=(n, views, 1)).astype(np.uint32)
    texts = np.concatenate([words % 3, words // 3], axis=2).astype(np.uint32)
    facts = {"valid": valid, "present": present, "texts": texts, "guide": guide}
    if earlier:  # by row and batch, as rows are what is split over devices
        near = 0.5 * first[:, None] + g.normal(size=(n, earlier, 12))
        facts |= {"earlier_vectors": near, "earlier_valid": g.random((n, earlier)) < 0.8}
        facts |= {"earlier_texts": np.stack([np.roll(texts[:, :2], k + 1, axis=0) for k in range(earlier)], axis=1)}
        facts |= {"earlier_guide": g.normal(size=(n, earlier, 7))}
    return z, facts


@cache
def differentiated(case: int, devices: int, block: int) -> Any:
    """`views, facts -> (loss, metrics), gradients`, dense where `block` is 0."""
    options, hard, name, _ = unmarked(CASES[case])
    mesh = make_mesh(data=devices, fsdp=1, devices=jax.devices()[:devices]) if devices > 1 else None
    pairs: Any = (
        partial(tiled, block=block, mesh=mesh, axes=() if mesh is None else mesh.axis_names) if block else dense
    )

    def loss(z: list[jax.Array], facts: dict[str, jax.Array]) -> Any:
        z3 = jnp.stack(z[2:], axis=1) if hard else None
        return find_loss(name)(
            z[0],
            z[1],
            z3,
            temperature=TAU,
            hard_negative_log_weight=LOG_ALPHA,
            valid=facts["valid"],
            negatives=NegativesConfig(**options),
            marks=Marks(facts["present"], facts["texts"], facts["guide"]),
            earlier=earlier_of(facts),
            pairs=pairs,
            **({"clean": z[0]} if name == "off_dropout" else {}),
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), mesh


def earlier_of(facts: dict[str, jax.Array]) -> Earlier | None:
    if "earlier_valid" not in facts:
        return None
    return Earlier(*(jnp.moveaxis(facts[f"earlier_{name}"], 0, 1) for name in Earlier._fields))


def unmarked(case: Any) -> tuple[dict[str, Any], int, str, int]:
    """Settings, hard negatives, loss and earlier batches of a case."""
    options, hard, name = getattr(case, "values", case)
    return {key: x for key, x in options.items() if key != "earlier"}, hard, name, options.get("earlier", 0)


def evaluated(case: int, form: tuple[int, int], z: list[np.ndarray], facts: dict[str, np.ndarray], dtype: str) -> Any:
    function, mesh = differentiated(case, *form)
    given = [jnp.asarray(x, dtype) for x in z], {name: jnp.asarray(x) for name, x in facts.items()}
    for key in {"guide", "earlier_guide", "earlier_vectors"} & facts.keys():
        given[1][key] = given[1][key].astype(dtype)
    return function(*(given if mesh is None else jax.device_put(given, batch_sharding(mesh))))


FORMS = [(1, 0), (1, 5), (2, 8), (8, 2)]
"""Devices and side of a tile; 0 for the whole matrix."""


@pytest.mark.parametrize("case", [pytest.param(i, marks=getattr(c, "marks", ())) for i, c in enumerate(CASES)])
def test_a_loss_is_what_its_equations_say(case: int) -> None:
    options, hard, name, earlier = unmarked(CASES[case])
    config = NegativesConfig(**options)
    z, facts = example(case, hard, earlier)
    with jax.enable_x64(True):
        (expected, metrics), gradients = evaluated(case, FORMS[0], z, facts, "float64")
        assert float(expected) == pytest.approx(statement(name, z, facts, config), rel=1e-11)
        # A step along each direction changes the statement as the gradient says.
        generator = np.random.default_rng(1)
        for i in range(len(z)):
            direction = generator.normal(size=z[i].shape)
            ahead, behind = ([*z[:i], z[i] + s * direction, *z[i + 1 :]] for s in (1e-6, -1e-6))
            slope = (statement(name, ahead, facts, config) - statement(name, behind, facts, config)) / 2e-6
            assert np.sum(np.asarray(gradients[i]) * direction) == pytest.approx(slope, rel=1e-5, abs=1e-8)
        for form in FORMS[1::2]:
            (value, ours), slopes = evaluated(case, form, z, facts, "float64")
            assert float(value) == pytest.approx(float(expected), rel=1e-11)
            for a, b in zip(slopes, gradients, strict=True):
                assert relative_error(a, b) < 1e-11 or not np.any(b)
            assert {k: float(v) for k, v in ours.items()} == pytest.approx({k: float(v) for k, v in metrics.items()})


@pytest.mark.full
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(case=st.sampled_from([i for i, c in enumerate(CASES) if isinstance(c, tuple)][:6]), seed=st.integers(0, 2**31))
def test_every_way_through_the_pairs_is_the_same(case: int, seed: int) -> None:
    z, facts = example(seed, unmarked(CASES[case])[1])
    (expected, _), gradients = evaluated(case, FORMS[0], z, facts, "float32")
    for form in FORMS[1:3]:
        (value, _), slopes = evaluated(case, form, z, facts, "float32")
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        for a, b in zip(slopes, gradients, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("name", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("form", FORMS[1::2])
def test_a_learned_temperature_has_the_gradient_of_the_whole(name: str, form: tuple[int, int]) -> None:
    z, facts = example(0, 2)
    devices, block = form
    mesh = make_mesh(data=devices, fsdp=1, devices=jax.devices()[:devices]) if devices > 1 else None

    def loss(pairs: Any, learned: dict[str, jax.Array]) -> jax.Array:
        arrays = [jnp.asarray(x) for x in z]
        marks = Marks(jnp.asarray(facts["present"]))
        settings = {"valid": jnp.asarray(facts["valid"]), "marks": marks, "pairs": pairs, **learned}
        settings["negatives"] = NegativesConfig(hardness=0.0 if name == "sigmoid" else 1.0)
        return find_loss(name)(arrays[0], arrays[1], jnp.stack(arrays[2:], axis=1), **settings)[0]

    with jax.enable_x64(True):
        learned = {"temperature": jnp.asarray(0.3)} | ({"bias": jnp.asarray(-1.5)} if name == "sigmoid" else {})
        ring = partial(tiled, block=block, mesh=mesh, axes=() if mesh is None else mesh.axis_names)
        expected, slopes = jax.jit(jax.value_and_grad(partial(loss, dense)))(learned)
        value, ours = jax.jit(jax.value_and_grad(partial(loss, ring)))(learned)
        fixed = {key: float(x) for key, x in learned.items()}
        assert float(loss(dense, fixed)) == pytest.approx(float(expected), rel=1e-12)
        assert float(value) == pytest.approx(float(expected), rel=1e-11)
        for key, slope in slopes.items():
            assert float(ours[key]) == pytest.approx(float(slope), rel=1e-10)
            ahead, behind = (float(loss(dense, {**fixed, key: fixed[key] + s})) for s in (1e-6, -1e-6))
            assert float(slope) == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


def test_a_row_alone_has_no_masked_share() -> None:
    z, facts = example(0, 0)
    marks = Marks(texts=jnp.asarray(facts["texts"]))
    settings: dict[str, Any] = {"negatives": NegativesConfig(duplicates=True), "marks": marks, "temperature": TAU}
    _, metrics = find_loss("info_nce")(*map(jnp.asarray, z), valid=jnp.arange(ROWS) < 1, **settings)
    assert metrics["masked_share"] == 0


@pytest.mark.parametrize("name", ["hardness", "debias"])
def test_only_a_softmax_has_weights_of_its_negatives(name: str) -> None:
    z, _ = example(0, 0)
    with pytest.raises(InputError, match="need the reduction logsumexp"):
        find_loss("sigmoid")(*map(jnp.asarray, z), temperature=TAU, negatives=NegativesConfig(**{name: 0.5}))


def test_debiasing_has_a_finite_gradient_where_nothing_is_left() -> None:
    """The sum over negatives is that of the positives among them, up to rounding."""

    def total(negatives: jax.Array) -> jax.Array:
        return jnp.sum(debiased(negatives, jnp.full(3, 2.0), jnp.full(3, 1e-9), 1.0, 0.5))

    near = jnp.asarray([0.0, 2e-9, 1e-7], jnp.float32)
    assert np.all(np.isfinite(jax.grad(total)(near)))
