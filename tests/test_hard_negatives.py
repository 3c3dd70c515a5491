"""Several hard negatives, some missing, and masks of the contrast, from the file to the gradient; distinct batches."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from simcse_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    NegativesConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QueueConfig,
)
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.feed import Feed
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.table import TokenTable
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.model import read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.objectives import check_objective
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runtime.mesh import make_mesh, put, state_sharding
from simcse_jax.training import guide as guide_module
from simcse_jax.training.describe import _describe_distinct
from simcse_jax.training.guide import make_guide
from simcse_jax.training.loss import make_loss
from simcse_jax.training.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.training.prepare import _check_learns
from simcse_jax.training.spec import StepSpec, create_state
from simcse_jax.training.step import make_train_step
from simcse_jax.training.trainer import train
from tests.conftest import TINY_BERT, full, tree_error, without_key_biases, write_model

N, LENGTH = 16, 12
COLUMNS = ("query", "answer", "negative_1", "negative_2", "negative_3")


def rows_of(count: int) -> list[dict[str, str | None]]:
    """Examples of up to three hard negatives; every fifth answer is that of the example before it."""
    generator = np.random.default_rng(count)
    words = np.array(["man", "woman", "dog", "cat", "runs", "eats", "sees", "red", "house", "river"])
    rows: list[dict[str, str | None]] = []
    for n in range(count):
        texts: list[Any] = [
            f"{n // 10} {n % 10} {c} {' '.join(generator.choice(words, generator.integers(0, 3)))}" for c in "abcde"
        ]
        texts[2:] = [None if generator.random() < 0.3 else text for text in texts[2:]]
        if n % 5 == 4:
            texts[1] = rows[-1]["answer"]
        rows.append(dict(zip(COLUMNS, texts, strict=True)))
    return rows


@pytest.fixture(scope="module")
def table(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    return tokens_of(rows_of(40), tiny_bert, tmp_path_factory.mktemp("text"))


def tokens_of(
    rows: list[dict[str, str | None]],
    model: Path,
    folder: Path,
    settings: DataConfig = DataConfig(),  # noqa: B008
) -> TokenTable:
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = open_corpus(replace(settings, train=str(folder / "text.jsonl")))
    return tokenize_corpus(corpus, load_tokenizer(model), LENGTH, folder / "cache", progress=False)


def test_missing_hard_negatives_are_known(table: TokenTable) -> None:
    rows = rows_of(40)
    assert (len(table), table.columns, table.skipped) == (40, 5, 0)
    examples = np.array([3, 39, 0])
    expected = [[rows[n][name] is not None for name in COLUMNS] for n in examples]
    found = table.present(examples)
    assert found is not None
    assert found.tolist() == expected
    assert np.all((table.rows(examples)[1] > 1) == expected)


def test_texts_are_known_by_their_tokens(table: TokenTable) -> None:
    ids = table.texts(np.arange(40))
    rows = rows_of(40)
    by_id: dict[tuple[int, int], set[str | None]] = {}
    for row, of_row in zip(rows, ids.tolist(), strict=True):
        for name, words in zip(COLUMNS, of_row, strict=True):
            if row[name] is not None:
                by_id.setdefault(tuple(words), set()).add(row[name])
    assert all(len(texts) == 1 for texts in by_id.values())
    assert tuple(ids[4, 1]) == tuple(ids[3, 1])
    # What is missing is nobody's text.
    missing = [
        tuple(x)
        for row, of_row in zip(rows, ids.tolist(), strict=True)
        for name, x in zip(COLUMNS, of_row, strict=True)
        if row[name] is None
    ]
    assert len(set(missing)) == len(missing)
    assert not set(missing) & by_id.keys()


def test_examples_without_sentence_or_positive_are_left_out(tiny_bert: Path, tmp_path: Path) -> None:
    rows = rows_of(6)
    rows[1]["query"], rows[2]["answer"] = " ", None
    for name in COLUMNS[2:]:
        rows[3][name] = None
    table = tokens_of(rows, tiny_bert, tmp_path)
    assert (len(table), table.skipped) == (4, 2)
    for row in rows:
        row["negative_2"] = ""
    columns = DataConfig(columns=COLUMNS)
    with pytest.raises(InputError, match=r"column negative_2 of .* is blank in all 4 examples"):
        tokens_of(rows, tiny_bert, tmp_path, columns)


OBJECTIVES = {
    "masks": ObjectiveConfig(
        negatives=NegativesConfig(duplicates=True, margin=0.02, directions=("query_to_document", "query_to_query")),
        hard_negative_log_weight=0.5,
        block_size=5,
    ),
    "learned": ObjectiveConfig(loss="sigmoid", learned=("temperature", "bias"), options={"bias": -3.0}, block_size=5),
}
MODEL = read_encoder_config(TINY_BERT | {"num_hidden_layers": 1})


@cache
def gradients(name: str, devices: int, micro_batch: int, packed: bool, implementation: Any, table: Any) -> Any:
    """Metrics and gradients of the second step, dropout on."""
    objective = replace(OBJECTIVES[name], implementation=implementation)
    data = DataConfig(max_length=LENGTH, packed_length=24 if packed else 0)
    run = Config(batch_size=N, micro_batch=micro_batch, objective=objective, data=data, model=ModelConfig(pooler="cls"))
    mesh = make_mesh(devices=jax.devices()[:devices])
    feed = Feed(table.value, EpochOrder(40, N, 1), mesh, compares=objective.negatives.duplicates)
    feed = feed.packed(24, 3) if packed else feed
    model = build_model(MODEL, run.model)
    spec = StepSpec(run, model, mesh, 5, 3, packing=feed.packing, ragged=True, text_columns=5)
    state = create_state(spec, lambda: init_params(model, 7))
    batch = feed.batch(1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype), spec.batch_shapes()
    )
    params = put(jax.tree.map(np.asarray, state.params), state_sharding(mesh, state.params))
    grads, (metrics, _) = jax.jit(jax.grad(make_loss(spec, params), has_aux=True))(params, None, np.int32(1), batch)
    return {name: float(x) for name, x in metrics.items()}, jax.tree.map(np.asarray, grads)


class Held:
    """A value for a cache, the same however it compares."""

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.fixture(scope="module")
def held(table: TokenTable) -> Held:
    return Held(table)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("masks", (8, 0, False, "tiled")),
        ("masks", (1, 5, True, "dense")),
        ("learned", (8, 1, True, "tiled")),
        *(full(n, (d, m, p, "tiled")) for n in OBJECTIVES for d in (1, 2) for m in (0, 3) for p in (False, True)),
    ],
)
def test_gradients_are_those_of_the_whole_batch(name: str, how: Any, held: Held) -> None:
    """On any devices, in any chunk, packed or not, whole or in a ring."""
    expected, expected_grads = gradients(name, 1, 0, False, "dense", held)
    metrics, grads = gradients(name, *how, held)
    assert metrics == pytest.approx(expected, rel=5e-6, abs=1e-6)
    assert tree_error(without_key_biases(grads), without_key_biases(expected_grads)) < 1e-5
    if name == "masks":
        assert 0 < metrics["masked_share"] < 0.9
    else:
        assert metrics["temperature"] == pytest.approx(0.05)
        assert metrics["bias"] == -3


def test_a_learned_temperature_stays_in_its_range(held: Held) -> None:
    """A learning rate that would carry it far beyond."""
    objective = ObjectiveConfig(learned=("temperature",), temperature_range=(0.04, 0.06))
    run = Config(batch_size=N, objective=objective, optimizer=OptimizerConfig(learning_rate=1.0, weight_decay=0.5))
    model = build_model(MODEL, ModelConfig(pooler="cls"))
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = StepSpec(run, model, mesh, 5, 3, ragged=True, text_columns=5)
    state = create_state(spec, lambda: init_params(model, 7))
    _, metrics = (step := make_train_step(spec, state))(state, Feed(held.value, EpochOrder(40, N, 1), mesh).batch(0))
    assert float(metrics["temperature"]) == pytest.approx(0.05)
    state, _ = step(
        create_state(spec, lambda: init_params(model, 7)), Feed(held.value, EpochOrder(40, N, 1), mesh).batch(0)
    )
    tau = float(np.exp(-state.params["contrast"]["log_scale"]))
    assert tau == pytest.approx(0.04) or tau == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("warmup_stable_decay", [0.0, 0.5, 1.0, 1.0, 0.0]),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=20, schedule=schedule, decay_share=0.25)
    rate = learning_rate_schedule(config, 100)
    assert [float(rate(step)) / 2 for step in (0, 10, 20, 60, 100)] == pytest.approx(expected, abs=1e-6)
    if schedule == "cosine":
        assert float(rate(40)) == pytest.approx(1 + np.cos(np.pi / 4), rel=1e-6)
    if schedule == "warmup_stable_decay":
        assert [float(rate(step)) / 2 for step in (80, 90)] == pytest.approx([1.0, 0.5])


def test_lamb_is_optax_lamb() -> None:
    params = {"a": np.full((3, 4), 0.5, np.float32), "b": np.arange(5, dtype=np.float32)}
    config = OptimizerConfig(name="lamb", learning_rate=0.1, weight_decay=0.01, clip_norm=0.0, schedule="constant")
    mask = {"a": True, "b": False}
    ours, theirs = (
        make_optimizer(config, optax.constant_schedule(0.1)),
        optax.lamb(0.1, eps=1e-8, weight_decay=0.01, mask=mask),
    )
    states, values = [x.init(params) for x in (ours, theirs)], [params, params]
    generator = np.random.default_rng(0)
    for _ in range(3):
        grads = jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32), params)
        for n, optimizer in enumerate((ours, theirs)):
            updates, states[n] = optimizer.update(grads, states[n], values[n])
            values[n] = optax.apply_updates(values[n], updates)
    assert tree_error(*values) < 1e-6


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (ObjectiveConfig(negatives=NegativesConfig(directions=("document_to_query",))), "query_to_document first"),
        (ObjectiveConfig(negatives=NegativesConfig(directions=())), "query_to_document first"),
        (
            ObjectiveConfig("symmetric", negatives=NegativesConfig(directions=("query_to_document", "query_to_query"))),
            "'symmetric' says itself",
        ),
        (ObjectiveConfig("sigmoid", negatives=NegativesConfig(hardness=1.0)), "does not weigh its negatives"),
        (ObjectiveConfig("focal", negatives=NegativesConfig(debias=0.1)), "does not debias its negatives"),
        (ObjectiveConfig("off_dropout", negatives=NegativesConfig(debias=0.1)), "does not debias its negatives"),
        (ObjectiveConfig("own_negative", negatives=NegativesConfig(margin=0.1)), "leave out what masks negatives"),
        (ObjectiveConfig(learned=("bias",)), "which objective.loss 'info_nce' does not have"),
        (ObjectiveConfig(temperature=2.0, learned=("temperature",)), "and a temperature between them"),
        (ObjectiveConfig(temperature_range=(0.1,)), "give the least and the greatest value"),
    ],
)
def test_settings_that_do_not_go_together(objective: ObjectiveConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_objective(objective)


@pytest.mark.parametrize(("devices", "packed", "micro_batch"), [(8, False, 0), (1, True, 3)])
def test_the_guide_gives_the_vectors_that_the_model_gives(
    devices: int, packed: bool, micro_batch: int, tiny_bert: Path, tmp_path: Path
) -> None:
    rows = rows_of(N)
    table = tokens_of(rows, tiny_bert, tmp_path)
    negatives = NegativesConfig(guide=str(tiny_bert), guide_margin=-0.1)
    run = Config(batch_size=N, objective=ObjectiveConfig(negatives=negatives), data=DataConfig(max_length=LENGTH))
    mesh = make_mesh(devices=jax.devices()[:devices])
    feed = Feed(table, EpochOrder(N, N, 1), mesh)
    feed = feed.packed(24, 1) if packed else feed
    guide = load_guide_of(run, tiny_bert)
    batch = replace(feed, guide=make_guide(guide, mesh, micro_batch)).batch(0)
    encode = guide.encoder(LENGTH)
    for place, example in enumerate(feed.order.examples(0)):
        texts = {n: rows[example][name] for n, name in enumerate(COLUMNS) if rows[example][name]}
        expected = encode(guide.params, list(texts.values()))
        np.testing.assert_allclose(np.asarray(batch.guide)[place, list(texts)], expected, atol=2e-5)


def patch_guide(patched: pytest.MonkeyPatch) -> None:
    """Lets a model without a pooler be a guide."""
    own = guide_module.load_model
    patched.setattr(guide_module, "load_model", lambda path: own(path, "avg"))


def load_guide_of(run: Config, model: Path) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patch_guide(patched)
        return guide_module.load_guide(run, load_tokenizer(model))


def test_a_guide_must_read_the_same_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", TINY_BERT)
    (other / "vocab.txt").write_text("".join(reversed((other / "vocab.txt").read_text().splitlines(keepends=True))))
    short = write_model(tmp_path / "short", TINY_BERT | {"max_position_embeddings": 8})
    for path, message in ((other, "has another tokenizer than"), (short, "has positions for 8 tokens")):
        negatives = NegativesConfig(guide=str(path))
        run = Config(objective=ObjectiveConfig(negatives=negatives), data=DataConfig(max_length=LENGTH))
        with pytest.raises(InputError, match=message):
            load_guide_of(run, tiny_bert)


def test_a_guide_of_sentences_alone_needs_a_margin(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    """The positive is the sentence itself: nothing is more similar, and nothing would be masked."""
    objective = ObjectiveConfig(negatives=NegativesConfig(guide=str(tiny_bert)))
    config = Config(
        output=str(tmp_path / "run"),
        batch_size=N,
        objective=objective,
        model=ModelConfig(path=str(tiny_bert), pooler="cls"),
        data=DataConfig(train=str(text_file), max_length=LENGTH, cache=str(tmp_path / "cache")),
    )
    with pytest.MonkeyPatch.context() as patched:
        patch_guide(patched)
        with pytest.raises(InputError, match=r"set objective\.negatives\.guide_margin below 0"):
            train(config)
    with pytest.raises(InputError, match=r"objective\.negatives\.guide: .* does not say how"):
        train(config)


@pytest.mark.full
def test_a_run_keeps_its_guide(small_run: Config, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_guide(monkeypatch)
    plain = replace(small_run, batch_size=N)
    negatives = NegativesConfig(guide=str(tiny_bert), guide_margin=-0.1)
    guided = replace(plain, objective=ObjectiveConfig(negatives=negatives))
    with monkeypatch.context() as patched:
        patched.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 4)
        assert train(guided) == {"stopped": 4}
    # Without it, but with what is said of it.
    without = replace(guided, objective=ObjectiveConfig(negatives=replace(negatives, guide="")))
    with pytest.raises(InputError, match=r"other weights than objective\.negatives\.guide names now"):
        train(without)
    assert train(guided)["step"] == 8


def test_what_distinct_batches_leave_out_is_said() -> None:
    texts = np.stack([np.zeros(20), np.arange(20) + 1], axis=1).astype(np.uint64)
    assert "17 of 20 examples left out" in _describe_distinct(EpochOrder(20, 8, 1, texts))[0]
    assert not _describe_distinct(EpochOrder(20, 8, 1))


def test_an_example_alone_learns_from_a_queue() -> None:
    config = Config(batch_size=1, objective=ObjectiveConfig(queue=QueueConfig(size=8)))
    _check_learns(config, 2, 8)
    with pytest.raises(InputError, match="batch_size is 1"):
        _check_learns(replace(config, objective=ObjectiveConfig()), 2, 8)


def test_a_batch_for_the_guide_has_its_type_in_float64_too(tiny_bert: Path) -> None:
    run = Config(batch_size=N, data=DataConfig(max_length=LENGTH), objective=ObjectiveConfig(queue=QueueConfig(size=8)))
    spec = StepSpec(run, build_model(MODEL, ModelConfig(pooler="cls")), make_mesh(), 2, 3, guide_width=7)
    with jax.enable_x64(True):
        assert spec.batch_shapes().guide.dtype == np.float32
