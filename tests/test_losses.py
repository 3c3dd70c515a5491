"""Each contrastive loss against a plain NumPy statement, whole and in tiles; objectives by name."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simcse_jax.errors import InputError
from simcse_jax.objectives import check_options, dense, find_loss, tiled, wants_clean
from tests.conftest import relative_error

TAU, LOG_ALPHA = 0.1, 0.4


def logits(z: dict[str, np.ndarray], f: Any = lambda c: c) -> tuple[np.ndarray, np.ndarray]:
    """Positive logits [N], and negative logits [N, N−1 or 2N−1] as lists of rows."""
    unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in z.items()}
    n = len(z["z1"])
    s = f(unit["z1"] @ unit["z2"].T) / TAU
    hard = f(unit["z1"] @ unit["z3"].T) / TAU + LOG_ALPHA * np.eye(n) if "z3" in z else np.zeros((n, 0))
    off = [np.concatenate([np.delete(s[i], i), hard[i]]) for i in range(n)]
    return np.diag(s), np.array(off)


def lse(x: np.ndarray) -> np.ndarray:
    return np.log(np.sum(np.exp(x), axis=1))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def info_nce(z: dict[str, np.ndarray]) -> float:
    positive, negative = logits(z)
    return float(np.mean(-positive + np.log(np.exp(positive) + np.sum(np.exp(negative), axis=1))))


def symmetric(z: dict[str, np.ndarray]) -> float:
    return (info_nce(z) + info_nce({"z1": z["z2"], "z2": z["z1"]})) / 2


def decoupled(z: dict[str, np.ndarray]) -> float:
    positive, negative = logits(z)
    return float(np.mean(lse(negative) - positive))


def sigmoid(z: dict[str, np.ndarray], bias: float = -10.0) -> float:
    positive, negative = logits(z)
    return float(np.mean(softplus(-(positive + bias)) + np.sum(softplus(negative + bias), axis=1)))


def focal(z: dict[str, np.ndarray], margin: float = 0.3) -> float:
    cosine = logits(z)[0] * TAU
    _, negative = logits(z, lambda c: c * (c + margin))
    return float(np.mean(softplus(lse(negative) - cosine**2 / TAU)))


def off_dropout(z: dict[str, np.ndarray], negative_weight: float = 1.0) -> float:
    positive, _ = logits({"z1": z["z1"], "z2": z["z2"]})
    _, negative = logits({"z1": z["clean"], "z2": z["clean"]} | ({"z3": z["z3"]} if "z3" in z else {}))
    rest = negative_weight * np.sum(np.exp(negative), axis=1)
    return float(np.mean(-np.log(np.exp(positive) / (np.exp(positive) + rest))))


def own_negative(z: dict[str, np.ndarray]) -> float:
    positive, _ = logits(z)
    hard, _ = logits({"z1": z["z1"], "z2": z["z3"]})
    return float(np.mean(softplus(hard + LOG_ALPHA - positive)))


CASES = [
    (info_nce, {}),
    (symmetric, {}),
    (decoupled, {}),
    (sigmoid, {}),
    (sigmoid, {"bias": -2.0}),
    (focal, {}),
    (focal, {"margin": 0.1}),
    (off_dropout, {}),
    (off_dropout, {"negative_weight": 2.5}),
    (own_negative, {}),
]
PAIRS = {"dense": dense, "tiled": partial(tiled, block=4)}


def vectors(names: list[str]) -> dict[str, np.ndarray]:
    """Rows of which the last two do not count."""
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=(11, 6)) for name in names}


def ours(name: str, pairs: Any, options: dict[str, float], z: dict[str, jax.Array]) -> jax.Array:
    settings = {"temperature": TAU, "hard_negative_log_weight": LOG_ALPHA, "valid": jnp.arange(11) < 9}
    return find_loss(name)(**z, **settings, pairs=PAIRS[pairs], **options)[0]


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("hard", [False, True], ids=["pairs", "triplets"])
@pytest.mark.parametrize(("statement", "options"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_loss_is_what_its_equation_says(statement: Any, options: dict[str, float], hard: bool, pairs: str) -> None:
    name = statement.__name__
    if name == "own_negative" and not hard:
        pytest.skip("needs hard negatives")
    extra = ["clean"] if wants_clean(find_loss(name)) else []
    z = vectors(["z1", "z2", *(["z3"] if hard else []), *extra])
    counted = {n: x[:9] for n, x in z.items()}
    with jax.enable_x64(True):
        arrays = {n: jnp.asarray(x) for n, x in z.items()}
        value, gradients = jax.jit(jax.value_and_grad(partial(ours, name, pairs, options)))(arrays)
        assert float(value) == pytest.approx(statement(counted, **options), rel=1e-12)
        # A step along each direction changes the statement as the gradient says.
        generator = np.random.default_rng(1)
        for n, x in counted.items():
            direction = generator.normal(size=x.shape)
            step = 1e-5 * direction
            difference = statement(counted | {n: x + step}, **options) - statement(counted | {n: x - step}, **options)
            assert np.sum(np.asarray(gradients[n])[:9] * direction) == pytest.approx(difference / 2e-5, rel=1e-6)
            assert not np.any(np.asarray(gradients[n])[9:])


@pytest.mark.parametrize(("statement", "options"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_tiles_give_the_gradient_of_the_whole_in_float32(statement: Any, options: dict[str, float]) -> None:
    name = statement.__name__
    names = ["z1", "z2", "z3", *(["clean"] if wants_clean(find_loss(name)) else [])]
    z = {n: jnp.asarray(x, jnp.float32) for n, x in vectors(names).items()}
    values = {pairs: jax.jit(jax.value_and_grad(partial(ours, name, pairs, options)))(z) for pairs in PAIRS}
    assert float(values["tiled"][0]) == pytest.approx(float(values["dense"][0]), rel=5e-6)
    for n in names:
        assert relative_error(values["tiled"][1][n], values["dense"][1][n]) < 5e-6 or not np.any(values["dense"][1][n])


def test_off_dropout_reports_the_positives_that_it_contrasts() -> None:
    """Similarity and alignment are those of the two noisy views, not of the clean vectors."""
    z = vectors(["z1", "z2", "clean"])
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in z.items()}
    _, metrics = find_loss("off_dropout")(**arrays, temperature=TAU, valid=jnp.arange(11) < 9)
    unit = {name: x[:9] / np.linalg.norm(x[:9], axis=1, keepdims=True) for name, x in z.items()}
    similarity = np.mean(np.sum(unit["z1"] * unit["z2"], axis=1))
    assert float(metrics["positive_similarity"]) == pytest.approx(similarity, rel=1e-5)
    assert float(metrics["alignment"]) == pytest.approx(2 - 2 * similarity, rel=1e-5)


def test_one_example_has_no_contrast() -> None:
    """An anchor without negatives gives a finite loss and no gradient, whatever the loss."""
    z = jnp.ones((1, 4))
    for name in ("info_nce", "symmetric", "decoupled", "focal"):
        value, gradient = jax.value_and_grad(lambda x, name=name: find_loss(name)(x, z, temperature=TAU)[0])(2 * z)
        assert float(value) == 0
        assert not np.any(np.asarray(gradient))


def test_objectives_of_ones_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def loss(z1, z2, z3=None, *, scale=1.0, **settings):\n    return scale, {}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_loss("mine:loss")(1, 2) == (1.0, {})
    check_options("mine:loss", {"scale": 2.0})
    with pytest.raises(InputError, match="'mine:loss' takes scale"):
        check_options("mine:loss", {"size": 2.0})
    with pytest.raises(InputError, match="'info_nce' takes no options"):
        check_options("info_nce", {"margin": 0.1})
    with pytest.raises(InputError, match="no objective 'infonce'"):
        find_loss("infonce")
    with pytest.raises(InputError, match="its first argument must be z1"):
        find_loss("json:dumps")
    with pytest.raises(InputError, match="needs a hard negative with every example"):
        find_loss("own_negative")(jnp.ones((2, 2)), jnp.ones((2, 2)), temperature=TAU)
