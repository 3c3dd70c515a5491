"""The queue of earlier batches and the copy of the encoder, from the batch to the checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from simcse_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    NegativesConfig,
    ObjectiveConfig,
    QueueConfig,
    SmoothingConfig,
)
from simcse_jax.data.augment import make_augmenter
from simcse_jax.data.feed import Feed
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.table import TokenTable
from simcse_jax.errors import InputError
from simcse_jax.model import read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.objectives import check_objective
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runtime.mesh import compiler_options, make_mesh
from simcse_jax.training.queue import make_key_encoder
from simcse_jax.training.spec import StepSpec, create_state
from simcse_jax.training.state import document_encoder, from_items, to_items
from simcse_jax.training.step import make_train_step
from tests.conftest import TINY_BERT, full, tree_error, without_key_biases
from tests.test_hard_negatives import tokens_of

N, LENGTH, STEPS = 8, 12, 4
MODEL = read_encoder_config(TINY_BERT | {"num_hidden_layers": 1})
QUEUE = QueueConfig(size=19, momentum=0.7)


@pytest.fixture(scope="module")
def table(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    generator = np.random.default_rng(0)
    words = np.array(["man", "woman", "dog", "cat", "runs", "eats", "sees", "red", "house", "river"])
    rows = [{"query": " ".join(generator.choice(words, 4)), "answer": " ".join(generator.choice(words, 3))}]
    rows += [
        {
            "query": f"{n} {' '.join(generator.choice(words, 3))}",
            "answer": rows[0]["answer"] if n % 7 == 0 else f"{n} dog",
        }
        for n in range(1, 4 * N)
    ]
    return tokens_of(rows, tiny_bert, tmp_path_factory.mktemp("text"))


def trained(
    table: TokenTable,
    queue: QueueConfig = QUEUE,
    *,
    devices: int = 1,
    fsdp: int = 1,
    dcn: int = 1,
    micro_batch: int = 0,
    packed: bool = False,
    implementation: Any = "dense",
    encoders: Any = 1,
    steps: int = STEPS,
    **settings: Any,
) -> Any:
    """The states and metrics of some steps, and what they were made with."""
    settings = {"negatives": NegativesConfig(duplicates=True)} | settings
    objective = ObjectiveConfig(queue=queue, implementation=implementation, block_size=3, **settings)
    data = DataConfig(max_length=LENGTH, packed_length=24 if packed else 0)
    encoder = ModelConfig(pooler="cls", encoders=encoders)
    run = Config(batch_size=N, micro_batch=micro_batch, objective=objective, data=data, model=encoder)
    mesh = make_mesh(fsdp=fsdp, devices=jax.devices()[:devices], dcn=dcn)
    feed = Feed(table, EpochOrder(len(table), N, 1), mesh, compares=True)
    feed = feed.packed(24, steps) if packed else feed
    model = build_model(MODEL, encoder)
    spec = StepSpec(run, model, mesh, 2, steps, packing=feed.packing, text_columns=2)
    state = create_state(spec, lambda: init_params(model, 7))
    step = make_train_step(spec, state)
    states, logs = [jax.tree.map(np.asarray, state)], []
    for n in range(steps):
        state, metrics = step(state, feed.batch(n))
        states.append(jax.tree.map(np.asarray, state))
        logs.append({name: float(x) for name, x in metrics.items()})
    return states, logs, spec, feed


def test_the_queue_holds_the_latest_batches_as_the_copy_encodes_them(table: TokenTable) -> None:
    states, logs, spec, feed = trained(table)
    encode = jax.jit(make_key_encoder(spec.compiled_model, spec.mesh, 0))
    copy = document_encoder(states[0].params)
    for n in range(STEPS):
        queue = states[n].queue
        assert tree_error(queue.encoder, copy) < 1e-6
        assert queue.valid.shape == (3, N)
        filled = [k for k in range(3) if np.any(queue.valid[k])]
        assert filled == list(range(max(0, 3 - n), 3))
        # Batch m was encoded by the copy as it was before step m.
        for place, m in zip(filled, range(max(0, n - 3), n), strict=True):
            np.testing.assert_allclose(
                queue.vectors[place], encode(states[m].queue.encoder, feed.batch(m)), rtol=1e-5, atol=1e-6
            )
            np.testing.assert_array_equal(queue.texts[place], np.asarray(feed.batch(m).texts))
        trained_to = document_encoder(states[n + 1].params)
        copy = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, copy, trained_to)
    # 8 + 8 + 3 of earlier batches count, besides the 7 others, of which some texts are the anchor's own.
    assert logs[0]["effective_negatives"] <= N - 1
    assert N - 1 < logs[3]["effective_negatives"] <= N - 1 + QUEUE.size


def test_the_loss_counts_no_more_than_the_size_asks_for(table: TokenTable) -> None:
    """Sentences that no longer count, and an empty queue, change nothing."""
    plain = trained(table, QueueConfig())[1]
    whole, part = trained(table, replace(QUEUE, size=24))[1], trained(table)[1]
    assert plain[0] == pytest.approx(whole[0], rel=1e-6)
    assert [x["loss"] for x in whole[:3]] == pytest.approx([x["loss"] for x in part[:3]], rel=1e-6)
    assert whole[3]["loss"] != pytest.approx(part[3]["loss"], rel=1e-6)
    assert plain[1]["loss"] < part[1]["loss"]


@pytest.mark.parametrize(
    "how",
    [
        {"devices": 8, "implementation": "tiled"},
        full({"devices": 8, "fsdp": 2, "dcn": 2, "implementation": "tiled"}),
        full({"devices": 4, "fsdp": 2, "micro_batch": 1, "packed": True, "implementation": "tiled"}),
        full({"micro_batch": 3, "packed": True}),
        full({"devices": 2, "fsdp": 2}),
    ],
)
@pytest.mark.parametrize("positives", ["encoder", full("copy")])
def test_steps_are_those_of_one_device(how: dict[str, Any], positives: Any, table: TokenTable) -> None:
    how = how if isinstance(how, dict) else how.values[0]
    queue = replace(QUEUE, positives=positives)
    expected, ours = trained(table, queue), trained(table, queue, **how)
    for a, b in zip(expected[1], ours[1], strict=True):
        assert b == pytest.approx(a, rel=2e-5, abs=1e-6)
    for a, b in zip(expected[0][-1].queue[1:], ours[0][-1].queue[1:], strict=True):
        assert a is b is None or np.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert tree_error(*(without_key_biases(x[0][-1].queue.encoder) for x in (expected, ours))) < 1e-4


@pytest.mark.full
@pytest.mark.parametrize(("devices", "dcn"), [(4, 1), (4, 2)])
def test_all_settings_at_once_are_those_of_one_device(table: TokenTable, devices: int, dcn: int) -> None:
    """Many rings in one step."""
    directions = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")
    masks = {"duplicates": True, "margin": 0.05, "hardness": 0.7, "debias": 0.01}
    settings = {
        "negatives": NegativesConfig(**masks, directions=directions, softmax="anchor"),
        "widths": (8, 16, 32),
        "smoothing": SmoothingConfig(weight=0.5, buffer_size=12, neighbours=3),
        "learned": ("temperature",),
    }
    expected = trained(table, **settings)
    ours = trained(table, devices=devices, fsdp=2, dcn=dcn, micro_batch=1, implementation="tiled", **settings)
    for a, b in zip(expected[1], ours[1], strict=True):
        assert b == pytest.approx(a, rel=2e-5, abs=1e-6)


@pytest.mark.full
def test_positives_of_the_copy_carry_no_gradient(table: TokenTable) -> None:
    """With a second encoder for the positives, that gets no gradient then."""
    for positives, moves in (("encoder", True), ("copy", False)):
        states, *_ = trained(table, replace(QUEUE, positives=positives), encoders=2, steps=2)
        first, last = (x.params["second"]["head"]["dense"]["bias"] for x in (states[0], states[-1]))
        assert np.any(first != last) == moves


def test_a_state_is_what_its_checkpoint_holds(table: TokenTable) -> None:
    states, *_ = trained(table, steps=2)
    again = from_items(to_items(states[-1]))
    assert jax.tree.structure(again) == jax.tree.structure(states[-1])
    assert tree_error(again, states[-1]) == 0


def test_settings_that_a_queue_does_not_go_with() -> None:
    with pytest.raises(InputError, match=r"no negatives of other sentences: set objective\.queue\.size to 0"):
        check_objective(ObjectiveConfig("own_negative", queue=QUEUE))
    with pytest.raises(InputError, match=r"objective\.queue\.size is set but objective\.contrastive_weight is 0"):
        Config(objective=ObjectiveConfig(contrastive_weight=0.0, queue=QUEUE), data=DataConfig("x.txt")).validate()
    for objective in (
        ObjectiveConfig(contrastive_weight=0.0, negatives=NegativesConfig(margin=0.1)),
        ObjectiveConfig(contrastive_weight=0.0, learned=("temperature",)),
    ):
        with pytest.raises(InputError, match=r"is set but objective\.contrastive_weight is 0"):
            Config(objective=objective, data=DataConfig("x.txt")).validate()


def test_repetition_doubles_tokens_in_their_places(tiny_bert: Path) -> None:
    augmenter = make_augmenter(DataConfig(augment="repetition", augment_share=0.5), load_tokenizer(tiny_bert), 0)
    assert augmenter is not None
    n, length, most = 400, 12, 12
    lengths = np.random.default_rng(0).integers(3, length + 1, n)
    ids = np.where(np.arange(length) < lengths[:, None], np.arange(10, 10 + length), augmenter.pad_id)
    grown, sizes = augmenter(ids, lengths, augmenter.draws(0, n, length))
    doubled = []
    for row, size, new, count in zip(ids, lengths, grown, sizes, strict=True):
        tokens, rest = new[:count].tolist(), new[count:]
        assert np.all(rest == augmenter.pad_id)
        assert tokens[0] == row[0]
        assert tokens[-1] == row[size - 1]
        assert tokens == sorted(tokens)
        times = np.unique(tokens, return_counts=True)[1]
        assert max(times) <= 2
        assert tokens.count(row[0]) == tokens.count(row[size - 1]) == 1
        if count < most:  # nothing was cut
            assert set(tokens) == set(row[:size].tolist())
            inner = size - 2
            assert count - size <= min(max(2, inner // 2), inner)
            doubled.append((count - size) / min(max(2, inner // 2), inner))
    # As many as are drawn from 0 to the most.
    assert 0.4 < np.mean(doubled) < 0.6


def test_programs_for_several_cpu_devices_run_one_message_at_a_time() -> None:
    """Else a step with a guide, all masks and all directions was aborted on four."""
    one, four = (make_mesh(devices=jax.devices()[:n]) for n in (1, 4))
    assert compiler_options(one) is None
    assert compiler_options(four) == {"xla_cpu_enable_concurrency_optimized_scheduler": False}
