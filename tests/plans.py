"""The tiny step whose plans the tests look at."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from simcse_jax.config import Config, DataConfig, ModelConfig
from tests.conftest import TINY_BERT

LAYERS, WIDTH, INNER, LENGTH = 2, 32, 48, 12
NO_TPU = importlib.util.find_spec("libtpu") is None
NO_GPU = importlib.util.find_spec("jax_cuda13_plugin") is None


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but config.json: neither weights nor tokenizer are needed."""
    folder = tmp_path_factory.mktemp("plan") / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_BERT | {"num_hidden_layers": LAYERS}))
    return folder


def run_of(encoder: Path, batch_size: int = 32, **model: Any) -> Config:
    return Config(
        batch_size=batch_size,
        # Without dropout, of which most of the program would be.
        model=ModelConfig(path=str(encoder), dropout=0.0, **model),
        data=DataConfig(train="nowhere.csv", columns=("a", "b", "c"), max_length=LENGTH),
    )


def encoder_flops(sentences: int) -> int:
    """Forward and, twice that, backward: projections and feed-forward, attention, head.

    Of the last layer, keys and values of all tokens, and the rest at [CLS] alone.
    """
    keys_and_values = 2 * 2 * WIDTH**2
    rest = 2 * (2 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * LENGTH * WIDTH
    layer, last = LENGTH * (keys_and_values + rest), LENGTH * keys_and_values + rest
    return 3 * sentences * ((LAYERS - 1) * layer + last + 2 * WIDTH**2)
