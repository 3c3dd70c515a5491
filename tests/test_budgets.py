"""What the train step of BERT-base takes of hardware that is not here, by the compilers of that hardware: budgets.

Four of the twelve layers, bfloat16, 512 sentences of 32 tokens twice: all layers but the last are alike, so that more
of them would show nothing else. A figure beyond its budget says that a change made the step multiply, launch, move or
keep more; one far below it asks for a smaller budget.
"""

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from simcse_jax.config import Config, DataConfig, ModelConfig
from simcse_jax.plan.plan import PUBLISHED, plan

BATCH, LENGTH, LAYERS, WIDTH, INNER = 512, 32, 4, 768, 3072


class Budget(NamedTuple):
    """The most that a step may take of one device."""

    kernels: int
    gigabytes: float
    """Moved."""
    memory: float
    """Gigabytes at most at once."""


BUDGETS = {
    ("h200:1", "padded"): Budget(600, 30.0, 4.05),
    ("h200:1", "packed"): Budget(600, 35.0, 4.9),
    ("v5e:1x1", "padded"): Budget(820, 29.0, 5.15),
}
PACKAGES = {"h200:1": "jax_cuda13_plugin", "v5e:1x1": "libtpu"}


def arithmetic(row: int) -> int:
    """Multiplications and additions of the step's matrix products, by hand.

    Args:
      row: tokens that attention meets at once: a sentence's, or a packed row's.
    """
    tokens, sentences = 2 * BATCH * LENGTH, 2 * BATCH
    linear = 2 * (4 * WIDTH**2 + 2 * WIDTH * INNER)
    keys_and_values = 2 * 2 * WIDTH**2
    layer = tokens * (linear + 4 * row * WIDTH)
    # Of the last layer, keys and values everywhere, and the rest at [CLS] alone.
    last = tokens * keys_and_values + sentences * (linear - keys_and_values + 4 * row * WIDTH)
    head, loss = sentences * 2 * WIDTH**2, 2 * BATCH**2 * WIDTH
    return 3 * ((LAYERS - 1) * layer + last + head + loss)


@pytest.mark.release
@pytest.mark.parametrize(("topology", "rows"), BUDGETS)
def test_budget(topology: str, rows: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[topology]) is None:
        pytest.skip(f"{PACKAGES[topology]}, which compiles for {topology}, is not installed")
    encoder = PUBLISHED["bert-base-uncased"] | {"num_hidden_layers": LAYERS}
    (tmp_path / "config.json").write_text(json.dumps(encoder))
    row = LENGTH if rows == "padded" else 128
    config = Config(
        batch_size=BATCH,
        model=ModelConfig(path=str(tmp_path), dtype="bfloat16"),
        data=DataConfig(train="nowhere.txt", max_length=LENGTH, packed_length=0 if rows == "padded" else row),
    )
    found, budget = plan(config, topology), BUDGETS[topology, rows]
    assert found.work is not None
    assert found.memory is not None
    # Of the last layer of a packed row, one query a sentence slot.
    assert found.work.flops == pytest.approx(arithmetic(row), rel=0.005)
    assert sum(found.flops.values()) == pytest.approx(found.work.flops, rel=0.001)
    taken = Budget(found.work.kernels, found.work.bytes / 1e9, found.memory.total / 1e9)
    assert all(is_now <= most for is_now, most in zip(taken, budget, strict=True)), (taken, budget)
    # A budget that nothing comes near holds nothing.
    assert all(is_now > 0.8 * most for is_now, most in zip(taken, budget, strict=True)), (taken, budget)
