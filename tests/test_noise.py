"""The battery of tests of the dropout noise: it passes what is sound, and catches what is not."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.noise import Battery, Noise, Shape, battery, training_keys
from simcse_jax.noise import random_bits

SHAPE = Shape(layers=1, sentences=8, positions=4, features=64, heads=2)


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    return np.concatenate([training_keys(SHAPE, seed, 4) for seed in (42, 0)])


def failed(keys: np.ndarray, bits: Any) -> list[str]:
    return [f.name.split(" (")[0] for f in Battery("", [], findings=battery(keys, SHAPE, 0.1, bits)).failed]


def test_the_noise_of_training_is_sound(keys: np.ndarray) -> None:
    assert keys.shape == (8, SHAPE.places, SHAPE.sentences, 2)
    assert len(np.unique(keys.reshape(-1, 2), axis=0)) == keys.size // 2
    assert not failed(keys, random_bits)


def joined_views(words: Any, counter: Any) -> Any:
    """Both sentences of an example draw the same."""
    return random_bits(tuple(jnp.repeat(word[::2], 2, axis=0) for word in words), counter)


def pairs_of_counters(words: Any, counter: Any) -> Any:
    """Neighbours draw the same."""
    return random_bits(words, counter >> 1)


def weak_mixing(words: Any, counter: Any) -> Any:
    """A multiplication, and no more."""
    return (counter ^ words[0]) * np.uint32(0xED5AD4BB) + words[1]


@pytest.mark.parametrize(
    ("bits", "caught"),
    [
        (joined_views, {"views, pair by pair", "views, all pairs"}),
        (pairs_of_counters, {"masks 1 to 13, a position and a head apart", "words whose counters differ in one bit"}),
        (weak_mixing, {"words 1 to 13, a position and a head apart", "spectrum of a mask"}),
    ],
)
def test_weak_noise_is_caught(keys: np.ndarray, bits: Any, caught: set[str]) -> None:
    assert caught <= {*failed(keys, bits)}


def test_keys_of_one_layer_in_another_are_caught(keys: np.ndarray) -> None:
    again = keys.copy()
    again[:, 2] = again[:, 1]
    assert any(name.startswith("places in the network") for name in failed(again, random_bits))


def test_the_command_names_what_fails() -> None:
    found = Noise(draws=1, seeds=(1,), shape=SHAPE).run(None)[0]  # type: ignore[arg-type]
    text = found.markdown()
    assert "It fails 0 of 31 tests." in text
    assert "| rate | 1.64e+04 |" in text
