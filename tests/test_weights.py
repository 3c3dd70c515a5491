"""Weights of others: encoders under every prefix and beside every head, in every form, and what is not an encoder."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simcse_jax.errors import InputError
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.pretrained import tensors
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params, to_tensors
from tests.conftest import SENTENCES, TINY_BERT, TINY_ROBERTA, write_model
from tests.test_loading import Tensors, assert_same, load, variant


def same(tensors: Tensors) -> Tensors:
    return tensors


def test_a_model_is_found_by_its_relative_path(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file, and shards with their index."""
    monkeypatch.chdir(variant(tiny_bert, tmp_path / "whole", same).parent)
    assert_same(load(Path("whole")), load(tiny_bert))
    shutil.copytree("whole", "sharded")
    Path("sharded/model.safetensors").rename("sharded/a.safetensors")
    names = load_file("sharded/a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
    Path("sharded/model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load(Path("sharded")), load(tiny_bert))


PREFIXES = {
    "DataParallel": "module.bert.",
    "DataParallel of the base model": "module.",
    "a module named model": "model.",
    "a module named encoder": "encoder.",
    "Lightning": "model.bert.",
    "torch.compile": "_orig_mod.encoder.",
    "sentence-transformers": "0.auto_model.",
    "another family's name": "roberta.",
    "all of it": "module.model.encoder.bert.",
}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_an_encoder_is_found_behind_any_prefix(prefix: str, tiny_bert: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {prefix + name: x for name, x in tensors.items()}

    assert_same(load(variant(tiny_bert, tmp_path, change)), load(tiny_bert))


@pytest.mark.parametrize("form", ["DataParallel", "state_dict", "module", "model_state_dict"])
def test_pickles_of_wrapped_models(form: str, tiny_bert: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writes the file")
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    tensors = {name: torch.tensor(x) for name, x in load_file(tiny_bert / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    wrapped = {f"module.{n}": x for n, x in tensors.items()}
    if form != "DataParallel":
        wrapped = {"epoch": 3, "optimizer": {"state": {}}, form: {f"model.bert.{n}": x for n, x in tensors.items()}}
    torch.save(wrapped, tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path), load(tiny_bert))


HEADS = {
    "ForSequenceClassification": {"Bert": "classifier", "Roberta": "classifier.dense, classifier.out_proj"},
    "ForTokenClassification": {"Bert": "classifier", "Roberta": "classifier"},
    "ForQuestionAnswering": {"Bert": "qa_outputs", "Roberta": "qa_outputs"},
    "ForMultipleChoice": {"Bert": "classifier", "Roberta": "classifier"},
    "ForMaskedLM": {"Bert": "", "Roberta": ""},
}


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("head", HEADS)
def test_other_heads_are_left_out_and_named_once(
    family: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch", reason="writes the checkpoint")
    import transformers

    config = {k: v for k, v in (TINY_BERT if family == "Bert" else TINY_ROBERTA).items() if k != "model_type"}
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**config))
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    params = load_params(checkpoint)
    load_params(checkpoint)
    encoder = {name: x.numpy() for name, x in getattr(model, family.lower()).state_dict().items()}
    assert ("head" in params) == ("pooler.dense.weight" in encoder)
    head_of_zeros = {"dense": {"kernel": np.zeros((32, 32), np.float32), "bias": np.zeros(32, np.float32)}}
    ours = to_tensors({"head": head_of_zeros} | params, checkpoint.config)
    for name in encoder.keys() - {"embeddings.position_ids", "embeddings.token_type_ids"}:
        np.testing.assert_array_equal(ours[name], encoder[name], err_msg=name)
    left_out = HEADS[head][family]
    expected = [f"{tmp_path}: not read, as outside of the encoder: {left_out}"] if left_out else []
    assert caplog.messages == expected


def original(tensors: Tensors, parent: str = "") -> Tensors:
    """The names of IS-CSE's code: no pooler in the encoder, a head beside it, and the buffer of latest positives."""
    named = {f"{parent}bert.{n}".replace("bert.pooler.", "mlp."): x for n, x in tensors.items()}
    return named | {f"{parent}lbuf": np.ones((1024, 32), np.float32)}


@pytest.mark.parametrize("parent", ["", "module."])
def test_checkpoints_of_is_cse(parent: str, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their names say that the head was for training only."""
    folder = tmp_path / "iscse-bert-base-constant-alpha-0.1"
    variant(tiny_bert, folder, lambda tensors: original(tensors, parent), architectures=["BertForCL"])
    assert_same(load(folder), load(tiny_bert))
    assert caplog.messages == [f"{folder}: not read, as outside of the encoder: {parent}lbuf"]
    expected = SimCSE(tiny_bert, pooler="cls_before_pooler").encode(SENTENCES)
    np.testing.assert_array_equal(SimCSE(folder).encode(SENTENCES), expected)


def test_a_pooler_beside_the_encoder_is_its_head(tiny_bert: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {n if n.startswith("pooler.") else f"bert.{n}": x for n, x in tensors.items()}

    assert_same(load(variant(tiny_bert, tmp_path, change)), load(tiny_bert))


def test_the_trained_head_takes_the_place_of_the_encoders(tiny_bert: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        poolers = {f"bert.{n}": np.ones_like(x) for n, x in tensors.items() if n.startswith("pooler.")}
        return original(tensors) | poolers

    assert_same(load(variant(tiny_bert, tmp_path, change)), load(tiny_bert))


WORDS = "embeddings.word_embeddings.weight"
REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "two encoders": (
        lambda t: {f"query.{n}": x for n, x in t.items()} | {f"passage.{n}": x for n, x in t.items()},
        r"hold 2 encoders \('passage.', 'query.'\): save the one",
    ),
    "a weight twice": (
        lambda t: t | {"embeddings.LayerNorm.gamma": t["embeddings.LayerNorm.weight"] + 1},
        r"hold embeddings\.LayerNorm\.gamma and embeddings\.LayerNorm\.weight, which differ",
    ),
    "a head twice": (
        lambda t: {f"m.bert.{n}": x for n, x in t.items()} | {"m.pooler.dense.bias": t["pooler.dense.bias"] + 1},
        r"hold m\.bert\.pooler\.dense\.bias and m\.pooler\.dense\.bias, which differ",
    ),
    "whole numbers": (
        lambda t: t | {"encoder.layer.0.output.dense.weight": np.ones((32, 48), np.int8)},
        r"encoder\.layer\.0\.output\.dense\.weight holds I8: quantised",
    ),
    "no encoder": (
        lambda t: {f"transformer.{n.removeprefix('encoder.')}": x for n, x in t.items() if n != WORDS},
        r"missing embeddings\.word_embeddings\.weight",
    ),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_weights_that_are_no_single_encoder(
    change: Callable[[Tensors], Tensors], words: str, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        load(variant(tiny_bert, tmp_path, change))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tiny_bert: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["encoder.layer.1.output.dense.weight"][2, 3] = value
        return tensors

    with pytest.raises(InputError, match=r"not finite, in encoder\.layer\.1\.output\.dense\.weight: "):
        load(variant(tiny_bert, tmp_path, spoil))


def test_large_weights_are_finite(tiny_bert: Path, tmp_path: Path) -> None:
    """The sum of their squares overflows."""
    name = "encoder.layer.1.output.dense.weight"
    large = load(variant(tiny_bert, tmp_path, lambda tensors: tensors | {name: tensors[name] * np.float32(1e30)}))
    assert large is not None


def test_an_adapter_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    variant(tiny_bert, tmp_path, same)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has an adapter.*merge it"):
        load(tmp_path)


@pytest.mark.parametrize("older", ["model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_of_several_forms_one_is_read_and_the_others_named(
    older: str, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that transformers reads: the single file, whatever is left from before."""
    variant(tiny_bert, tmp_path, same)
    tensors = load_file(tiny_bert / "model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    content = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (tmp_path / older).write_text(json.dumps(content))
    assert_same(load(tmp_path), load(tiny_bert))
    assert caplog.messages == [f"{tmp_path}: the weights are those of model.safetensors; not read: {older}"]
    if older == "model.safetensors.index.json":
        pytest.importorskip("torch", reason="the reference")
        import transformers

        theirs = transformers.AutoModel.from_pretrained(tmp_path).state_dict()[WORDS].numpy()
        np.testing.assert_array_equal(load(tmp_path)["encoder"]["embeddings"]["word_embeddings"]["embedding"], theirs)
        (tmp_path / "model.safetensors").unlink()  # then the index is read
        assert_same(load(tmp_path), jax.tree.map(lambda x: x + 1, load(tiny_bert)))


def test_a_shard_gives_what_the_index_takes_from_it(tiny_bert: Path, tmp_path: Path) -> None:
    variant(tiny_bert, tmp_path, same)
    (tmp_path / "model.safetensors").unlink()
    tensors = load_file(tiny_bert / "model.safetensors")
    shards = {"b.safetensors": tensors, "inside/a.safetensors": {WORDS: tensors[WORDS]}, "c.safetensors": {}}
    where = dict.fromkeys(tensors, "b.safetensors") | {WORDS: "inside/a.safetensors", "c": "c.safetensors"}
    (tmp_path / "inside").mkdir()
    for name, held in shards.items():
        stale = {n: x + 1 for n, x in tensors.items() if n not in held or where[n] != name}
        save_file(stale | {n: x for n, x in held.items() if where[n] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same(load(tmp_path), load(tiny_bert))


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a decoder": ({"is_decoder": True}, "is_decoder is True, which this encoder lacks: set it to false if"),
    "cross-attention": ({"add_cross_attention": True}, "add_cross_attention is True"),
    "relative positions": ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    "quantisation": ({"quantization_config": {"bits": 8}}, r"quantization_config is {'bits': 8}"),
    "code of its own": ({"auto_map": {"AutoModel": "m.Alibi"}}, r"code of its own \('m\.Alibi'\)"),
    "another activation": ({"hidden_act": "silu"}, "hidden_act is 'silu'; .*expected one of"),
    "another model": ({"model_type": "electra"}, "model_type is 'electra'"),
    "no such padding": ({"pad_token_id": 120}, "pad_token_id is 120; expected a token below vocab_size"),
    "no token type": ({"type_vocab_size": 0}, "type_vocab_size is 0; it must be 1 or more"),
    "a truth": ({"num_hidden_layers": True}, "num_hidden_layers is True; expected int"),
    "no room": ({"model_type": "roberta", "pad_token_id": 39}, r"below max_position_embeddings \(40\) - 1"),
}


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_change_the_vectors_are_refused(
    options: dict[str, Any], words: str, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        load_model(variant(tiny_bert, tmp_path, same, **options), "avg")


def test_options_that_change_nothing_are_read(tiny_bert: Path, tmp_path: Path) -> None:
    options = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
    more = {"use_cache": True, "tie_word_embeddings": False, "auto_map": {"AutoTokenizer": ["t.Own", None]}}
    folder = variant(tiny_bert, tmp_path, same, **options, **more, pad_token_id=None, quantization_config=None)
    assert read_checkpoint(folder).config == read_checkpoint(tiny_bert).config


def test_positions_of_a_roberta_without_a_padding_id(tmp_path: Path) -> None:
    """They begin where transformers has them begin."""
    torch = pytest.importorskip("torch", reason="the reference")
    import transformers

    folder = write_model(tmp_path / "roberta", {k: v for k, v in TINY_ROBERTA.items() if k != "pad_token_id"})
    assert read_checkpoint(folder).config.max_length == 40
    tokens = load_tokenizer(folder)(SENTENCES[:1], return_tensors="pt")
    with torch.no_grad():
        peer = transformers.AutoModel.from_pretrained(folder).eval()
        out = peer(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    ours = SimCSE(folder, pooler="cls_before_pooler").encode(SENTENCES[:1], normalize=False)
    np.testing.assert_allclose(ours, out.last_hidden_state[:, 0].numpy(), atol=1e-5)


def test_warnings_go_through_logging(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    variant(tiny_bert, tmp_path, lambda tensors: tensors | {"scale": np.ones(1, np.float32)})
    load(tmp_path)
    assert [(r.name, r.levelno) for r in caplog.records] == [("simcse_jax", logging.WARNING)]


@pytest.mark.parametrize("at_once", [1, 10, 50, 10**6])
def test_large_tensors_are_read_in_parts(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other threads between them: safetensors holds Python's lock while it reads, and a job's processes beat."""
    generator = np.random.default_rng(0)
    shapes = {"scalar": (), "empty": (0, 4), "vector": (100,), "matrix": (101, 7), "block": (50, 3, 2)}
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16)
    expected = {
        f"{name} {np.dtype(kind)}": np.asarray(generator.normal(size=shape)).astype(kind)
        for name, shape in shapes.items()
        for kind in kinds
    }
    save_file(expected, tmp_path / "a.safetensors")
    monkeypatch.setattr(tensors, "_AT_ONCE", at_once)
    for name, stored in tensors.find_safetensors(tmp_path / "a.safetensors").items():
        found = stored.read()
        assert found.dtype == expected[name].dtype
        np.testing.assert_array_equal(found, expected[name])
