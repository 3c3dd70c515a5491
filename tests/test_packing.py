"""Several sentences a row: the same figures as one a row, padded."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simcse_jax import rng
from simcse_jax.config import Config, DataConfig, MLMConfig, ModelConfig, ObjectiveConfig, SmoothingConfig
from simcse_jax.data.batch import Batch, Packing
from simcse_jax.data.feed import Feed, fit_packing
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.packing import first_fit, pack
from simcse_jax.data.table import TokenTable
from simcse_jax.errors import InputError
from simcse_jax.inference import encoder as encode
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.inference.loading import load_model
from simcse_jax.model import SentenceEncoder, init_mlm_head, read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.poolers import POOLERS
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runtime.mesh import make_mesh, put, put_batch, state_sharding
from simcse_jax.runtime.preemption import StopRequest
from simcse_jax.training.loss import encode_views, make_loss
from simcse_jax.training.spec import StepSpec
from simcse_jax.training.trainer import train
from tests.conftest import TINY_BERT, TINY_ROBERTA, full, tree_error, without_key_biases

N, LENGTH = 16, 12
PACKING = Packing(length=24, slots=5, rows=9)
LAYERS = {"num_hidden_layers": 2}  # the last, which has its own rules, and one before it
CONFIGS = {"bert": TINY_BERT | LAYERS, "roberta": TINY_ROBERTA | LAYERS}
VOCABULARY = Vocabulary(mask=4, special=(0, 1, 2, 3, 4), size=120)


def batch(columns: int, pad: int = 0, devices: int = 1) -> tuple[Batch, Batch]:
    """Random sentences of 3 to 12 tokens, one a row and packed for so many devices."""
    generator = np.random.default_rng(columns)
    lengths = generator.integers(3, LENGTH + 1, (N, columns)).astype(np.int32)
    ids = generator.integers(5, 120, (N, columns, LENGTH)).astype(np.int32)
    ids = np.where(np.arange(LENGTH) < lengths[..., None], ids, pad)
    valid = np.arange(N) < N - 3
    packing = PACKING._replace(rows=-(-PACKING.rows // devices) + 1)
    parts = [
        pack(i, n, n, packing, pad) for i, n in zip(np.split(ids, devices), np.split(lengths, devices), strict=True)
    ]
    packed, sizes, places = (np.concatenate(x) for x in zip(*parts, strict=True))
    return Batch(ids, lengths[..., None], valid), Batch(packed, sizes, valid, places)


@cache
def model_of(architecture: str, pooler: str) -> tuple[SentenceEncoder, Any]:
    model = build_model(read_encoder_config(CONFIGS[architecture]), ModelConfig(pooler=pooler))  # type: ignore[arg-type]
    return model, jax.jit(lambda: init_params(model, 7))()


def test_first_fit_by_hand() -> None:
    lengths = np.array([[3, 7, 4, 5, 10, 1], [1, 1, 1, 1, 1, 1]])
    rows, slots = first_fit(lengths, 10, 3)
    # 10 | 7 + 3 | 5 + 4 + 1; six ones, of which three fill the slots of a row.
    np.testing.assert_array_equal(rows[0], [1, 1, 2, 2, 0, 2])
    np.testing.assert_array_equal(slots[0], [1, 0, 1, 0, 0, 2])
    np.testing.assert_array_equal(rows[1], [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_packed_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n, slots = int(generator.integers(1, 60)), int(generator.integers(1, 8))
    lengths = generator.integers(1, LENGTH + 1, (n, 2))
    ids = np.where(np.arange(LENGTH) < lengths[..., None], generator.integers(5, 999, (n, 2, LENGTH)), 0)
    reserved = np.minimum(lengths + generator.integers(0, 3, (n, 2)), LENGTH)
    rows = 1 + int(first_fit(reserved.T, 16, slots)[0].max())
    packed, sizes, places = pack(ids, lengths, reserved, Packing(16, slots, rows), 0)
    assert sizes.sum(axis=2).max() <= 16
    assert np.count_nonzero(packed) == lengths.sum() == sizes.sum()
    starts = np.cumsum(sizes, axis=2) - sizes
    for i in range(n):
        for c in range(2):
            row, slot = divmod(places[i, c], slots)
            assert sizes[row, c, slot] == lengths[i, c]
            found = packed[row, c, starts[row, c, slot] :][: lengths[i, c]]
            np.testing.assert_array_equal(found, ids[i, c, : lengths[i, c]])


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_vectors_without_dropout(architecture: str, pooler: str) -> None:
    model, params = model_of(architecture, pooler)
    padded, packed = batch(1, CONFIGS[architecture].get("pad_token_id", 0))
    expected, vectors = (
        model.apply({"params": params}, jnp.asarray(x.input_ids[:, 0]), jnp.asarray(x.lengths[:, 0]))
        for x in (padded, packed)
    )
    assert vectors.shape == (PACKING.rows + 1, PACKING.slots, 32)
    np.testing.assert_allclose(vectors.reshape(-1, 32)[packed.places[:, 0]], expected[:, 0], atol=2e-6)


VIEWS = [(1, False, False, 5), (2, True, True, 0), (3, False, True, 5)]
"""Columns, a second encoder, a view without noise and the micro-batch: each value with most values of the others."""


@cache
def views(columns: int, second: bool, clean: bool, micro_batch: int, packed: bool) -> Any:
    """The views of a batch under dropout."""
    model, params = model_of("bert", "cls")
    if second:
        params = {**params, "second": jax.jit(lambda: init_params(model, 1))()}
    key = rng.key(0, "dropout", 0)
    encode = jax.jit(lambda p, x: encode_views(model, p, x, key, micro_batch=micro_batch, clean=clean))
    return encode(params, batch(columns)[packed])


@pytest.mark.parametrize(
    ("columns", "second", "clean", "micro_batch"),
    [
        *VIEWS,
        *(
            full(*columns, clean, micro_batch)
            for columns in ((1, False), (2, True), (3, False))
            for clean in (False, True)
            for micro_batch in (0, 5)
            if (*columns, clean, micro_batch) not in VIEWS
        ),
    ],
)
def test_views_under_dropout(columns: int, second: bool, clean: bool, micro_batch: int) -> None:
    """The noise of a sentence is the same in whatever row it lies."""
    expected, found = views(columns, second, clean, 0, False), views(columns, second, clean, micro_batch, True)
    assert found.shape == (N, max(columns, 2) + clean, 32)
    np.testing.assert_allclose(found, expected, atol=3e-6)


@cache
def gradients(devices: int, micro_batch: int, columns: int, packed: bool) -> tuple[dict[str, float], Any]:
    """Metrics and gradients of contrast, smoothing and masked language model together."""
    objective = ObjectiveConfig(mlm=MLMConfig(weight=0.3), smoothing=SmoothingConfig(weight=0.1, buffer_size=32))
    run = Config(batch_size=N, objective=objective, micro_batch=micro_batch)
    model, params = model_of("bert", "cls")
    table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    params = {**params, "mlm": init_mlm_head(jax.random.key(1), table, 0.2)}
    buffer = jax.random.normal(jax.random.key(2), (32, 32))
    buffer /= jnp.linalg.norm(buffer, axis=1, keepdims=True)
    mesh, given = make_mesh(devices=jax.devices()[:devices]), batch(columns, devices=devices)[packed]
    placed = put(params, state_sharding(mesh, params))
    rows = given.input_ids.shape[0] // mesh.size

    def share(part: slice) -> Batch:
        """What one device has of a batch."""
        device = (part.start or 0) // (N // mesh.size)
        mine = slice(device * rows, (device + 1) * rows)
        places = None if given.places is None else given.places[part]
        return Batch(given.input_ids[mine], given.lengths[mine], given.valid[part], places)

    loss = make_loss(StepSpec(run, model, mesh, 1, 1, VOCABULARY), placed)
    function = jax.jit(jax.grad(loss, has_aux=True))
    grads, (metrics, _) = function(placed, buffer, np.int32(1), put_batch(mesh, N, share))
    return {name: float(x) for name, x in metrics.items()}, jax.tree.map(np.asarray, grads)


@pytest.mark.parametrize(
    ("devices", "micro_batch", "columns"),
    [(1, 5, 1), (8, 0, 1), full(1, 0, 1), full(1, 5, 3), full(8, 1, 2)],
)
def test_loss_and_gradient(devices: int, micro_batch: int, columns: int) -> None:
    """Packed on any devices and in any chunk, they are those of the padded batch on one device."""
    expected, expected_grads = gradients(1, 0, columns, False)
    metrics, grads = gradients(devices, micro_batch, columns, True)
    assert metrics == pytest.approx(expected, rel=5e-6)
    assert tree_error(without_key_biases(grads), without_key_biases(expected_grads)) < 2e-5


def table_of(lengths: np.ndarray) -> TokenTable:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenTable(np.arange(offsets[-1]) % 100 + 5, offsets, 1, 0, LENGTH, 0, "")


def test_every_batch_of_a_run_fits() -> None:
    table = table_of(np.random.default_rng(0).integers(3, LENGTH + 1, 150))
    order = EpochOrder(150, 16, 1)
    packing = fit_packing(table, order, 2, 25, 24)
    fullest = 0
    for step in range(25):
        for part in (slice(0, 8), slice(8, 16)):
            packed, padded = (Feed(table, order, make_mesh(), packing=p).rows(step, part) for p in (packing, None))
            assert packed.input_ids.shape == (packing.rows, 1, 24)
            assert packed.lengths.sum() == padded.lengths.sum()
            np.testing.assert_array_equal(packed.valid, padded.valid)
            fullest = max(fullest, int((packed.lengths.sum(axis=2) > 0).sum()))
    assert packing.rows == fullest < 8


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("augment", [full("none"), full("delete_words"), "synonyms"])
def test_a_packed_run_is_the_padded_one(tiny_bert: Path, tmp_path: Path, augment: str) -> None:
    """Metrics of every step, also of the short last batch."""
    words = np.array(["man", "dog", "cat", "runs", "red", "river", "the", "sleeps", "sings"])
    generator = np.random.default_rng(0)
    sentences = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(44)]
    (tmp_path / "text.txt").write_text("\n".join(sentences))
    (tmp_path / "synonyms.tsv").write_text("man\tred river dog\ndog\tcat\n")
    data = DataConfig(
        train=str(tmp_path / "text.txt"),
        max_length=LENGTH,
        cache=str(tmp_path / "cache"),
        augment=augment,  # type: ignore[arg-type]
        synonyms=str(tmp_path / "synonyms.tsv") if augment == "synonyms" else "",
    )
    logs = []
    for length in (0, 32):
        run = Config(
            output=str(tmp_path / f"run{length}"),
            batch_size=16,
            epochs=2,
            log_every=1,
            model=ModelConfig(path=str(tiny_bert), mlp_only_train=True),
            data=replace(data, packed_length=length),
        )
        train(run)
        lines = (tmp_path / f"run{length}" / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert len(logs[0]) == 6
    for a, b in zip(*logs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-4)


@pytest.mark.full
@pytest.mark.usefixtures("two_devices")
def test_a_run_goes_on_packed(tiny_bert: Path, tmp_path: Path) -> None:
    """Packing moves no parameter by more than rounding, so a padded run may go on with it."""
    sentences = [" ".join(["man", "runs", "red", "dog", "river", "cat"][: 1 + i % 6]) for i in range(96)]
    (tmp_path / "text.txt").write_text("\n".join(sentences))
    run = Config(
        output=str(tmp_path / "run"),
        batch_size=32,
        log_every=1,
        model=ModelConfig(path=str(tiny_bert), mlp_only_train=True),
        data=DataConfig(train=str(tmp_path / "text.txt"), max_length=8, cache=str(tmp_path / "cache")),
    )
    losses = {}
    for name in ("whole", "parts"):
        config = replace(run, output=str(tmp_path / name))
        if name == "parts":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StopRequest, "__call__", lambda self, step: step == 2)
                assert train(config) == {"stopped": 2}
            config = replace(config, data=replace(run.data, packed_length=16))
        train(config)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_rows_longer_than_the_table_of_positions(architecture: str) -> None:
    """Also rows of padding alone; gradients are finite and those of the padded batch."""
    model, params = model_of(architecture, "cls")
    padded, packed = batch(1, CONFIGS[architecture].get("pad_token_id", 0))
    wide = np.pad(packed.input_ids, ((0, 1), (0, 0), (0, 100)), constant_values=padded.input_ids.min())
    assert wide.shape[2] > model.config.max_position_embeddings
    sizes = np.pad(packed.lengths, ((0, 1), (0, 0), (0, 0)))

    def total(params: Any, given: Batch) -> Any:
        return jnp.sum(jnp.sin(encode_views(model, params, given, rng.key(0, "dropout", 0))))

    expected = jax.jit(jax.grad(total))(params, padded)
    found = jax.jit(jax.grad(total))(params, packed._replace(input_ids=wide, lengths=sizes))
    assert tree_error(without_key_biases(found), without_key_biases(expected)) < 2e-5


def test_rows_are_no_longer_than_their_sentences_could_be() -> None:
    table = table_of(np.full(40, LENGTH))
    assert fit_packing(table, EpochOrder(40, 2, 0), 1, 20, 128) == Packing(2 * LENGTH, 2, 1)


def test_a_row_must_hold_the_longest_sentence() -> None:
    with pytest.raises(InputError, match=r"packed_length is 16 and data.max_length 32"):
        Config(data=DataConfig(train="x.txt", packed_length=16)).validate()


@pytest.mark.parametrize(("row", "devices", "pooler"), [(16, 8, "cls"), (64, 1, "avg"), (64, 8, "cls")])
def test_encoding_packed_is_a_sentence_a_row(tiny_bert: Path, row: int, devices: int, pooler: str) -> None:
    """Sentences of 2 to 40 tokens, as many as the model has positions; 16 is shorter than many of them."""
    generator = np.random.default_rng(row)
    sentences = ["".join(generator.choice(list("abcdefghij"), n)) for n in generator.integers(0, 50, 300)]
    loaded, tokenizer = load_model(tiny_bert, pooler), load_tokenizer(tiny_bert)
    params = jax.device_get(loaded.params)
    mesh = make_mesh(devices=jax.devices()[:devices])
    packed, alone = (BatchEncoder(loaded.model, tokenizer, mesh, packed_length=n) for n in (row, 0))
    expected = alone(params, sentences)
    assert len(np.unique(expected.round(4), axis=0)) > 250
    np.testing.assert_allclose(packed(params, sentences), expected, rtol=0, atol=2e-6)
    # A few sentences, and one, take other shapes.
    for few in (sentences[:3], sentences[:1]):
        np.testing.assert_allclose(packed(params, few), expected[: len(few)], rtol=0, atol=2e-6)


def test_encoding_packed_takes_few_rows_of_one_shape(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    placing = encode.put_batch
    monkeypatch.setattr(
        encode, "put_batch", lambda mesh, n, rows: shapes.append(rows(slice(0, n))[0].shape) or placing(mesh, n, rows)
    )
    loaded, tokenizer = load_model(tiny_bert, "cls"), load_tokenizer(tiny_bert)
    sentences = ["x" * n for n in np.random.default_rng(0).integers(4, 20, 1000)]
    tokens = sum(len(x) for x in tokenizer(sentences)["input_ids"])
    BatchEncoder(loaded.model, tokenizer, make_mesh(devices=jax.devices()[:1]))(
        jax.device_get(loaded.params), sentences
    )
    assert len(set(shapes[:-1])) == 1
    assert sum(rows * width for rows, width in shapes) < 1.1 * tokens


@pytest.mark.parametrize("row", [-1, 7, 513])
def test_a_row_of_no_use_is_refused(tiny_bert: Path, row: int) -> None:
    loaded, tokenizer = load_model(tiny_bert, "cls"), load_tokenizer(tiny_bert)
    with pytest.raises(InputError, match=f"packed_length is {row}; it must be 0 .* or 8 to 512 tokens per row"):
        BatchEncoder(loaded.model, tokenizer, make_mesh(), packed_length=row)
