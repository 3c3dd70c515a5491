"""Model folders made to harm: each is one error that says what is wrong, before memory is taken or another file read.

What a case would allocate is bounded by the small files that it is made of, so a test that ends has shown it.
"""

import json
import os
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simcse_jax.errors import InputError
from simcse_jax.inference.loading import load_model
from simcse_jax.postprocess import read_saved
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.pooling import modules
from simcse_jax.pretrained.tensors import find_tensors
from simcse_jax.pretrained.tokenizers import check_tokenizer, encodings, load_tokenizer
from simcse_jax.pretrained.weights import load_params
from simcse_jax.storage.files import inside


@pytest.fixture(scope="module", autouse=True)
def _imported(tiny_bert: Path) -> None:
    """What a first use imports is no memory of a case."""
    check_tokenizer(load_tokenizer(tiny_bert), 120)
    load_params(read_checkpoint(tiny_bert))


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


@contextmanager
def refused(words: str) -> Iterator[None]:
    """A block that raises one `InputError` with these words, and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=words):
            yield
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES += ("max_position_embeddings", "type_vocab_size")
WRONG: dict[str, list[Any]] = {
    **{key: [0, -4, 2**31, 2**60, 10**400, "12", True, 32.0, [1], {"a": 1}, float("nan")] for key in SIZES},
    "pad_token_id": [-1, "0", 0.5, 120, 2**60],
    "hidden_act": ["silu", "exec", 1, ["gelu"]],
    "layer_norm_eps": [float("nan"), -1e-12, 1, 7, float("inf"), "1e-12", 10**400],
    "initializer_range": [float("nan"), -0.02, float("inf"), 10**400, "x"],
    "hidden_dropout_prob": [7, 1, -0.1, float("nan"), "0.1", True],
    "attention_probs_dropout_prob": [7, 1.0, float("-inf"), [0.1]],
    "model_type": ["gpt2", 1, ["bert"], {"bert": 1}],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values])
def test_a_value_is_refused_by_its_name(field: str, value: Any, model: Path) -> None:
    change(model / "config.json", **{field: value})
    with refused(rf"(?s)config\.json: {field} is .{{1,200}}(expected|must be|reads|does not divide)"):
        read_checkpoint(model)


def test_heads_divide_the_width(model: Path) -> None:
    change(model / "config.json", num_attention_heads=5)
    with refused(r"hidden_size is 32, which num_attention_heads \(5\) does not divide"):
        read_checkpoint(model)


def test_all_values_are_named_at_once(model: Path) -> None:
    change(model / "config.json", hidden_dropout_prob=7, layer_norm_eps=-1, vocab_size="9")
    with refused("3 problems"):
        read_checkpoint(model)


LARGE = {
    "words": {"vocab_size": 2**31 - 1},
    "width": {"hidden_size": 2**30},
    "layers": {"num_hidden_layers": 256},
    "positions": {"max_position_embeddings": 2**31 - 1},
    "types": {"type_vocab_size": 2**31 - 1},
    "inner width": {"intermediate_size": 2**31 - 1},
}


@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
def test_sizes_are_those_of_the_weights_before_memory_is_taken(sizes: dict[str, int], model: Path) -> None:
    change(model / "config.json", **sizes)
    with refused("do not fit its config.json"):
        load_params(read_checkpoint(model))


@pytest.mark.parametrize(
    ("file", "field", "value", "words"),
    [
        ("sentence_bert_config.json", "max_seq_length", True, "max_seq_length is True; expected float"),
        ("sentence_bert_config.json", "max_seq_length", -3, "max_seq_length is -3; it must be 1 or more"),
        ("sentence_bert_config.json", "max_seq_length", 0.5, "must be 1 or more"),
        ("sentence_bert_config.json", "do_lower_case", "false", "do_lower_case is 'false'; expected bool"),
        ("tokenizer_config.json", "model_max_length", "12", "model_max_length is '12'; expected float"),
        ("tokenizer_config.json", "model_max_length", 10**400, "must be a finite number"),
        ("1_Pooling/config.json", "include_prompt", "no", "include_prompt is 'no'; expected bool"),
        ("config_sentence_transformers.json", "default_prompt_name", ["a"], "default_prompt_name is .*; expected str"),
        ("config_sentence_transformers.json", "prompts", {"a": 1}, "prompts is .*; expected dict"),
        ("config_sentence_transformers.json", "similarity_fn_name", 3, "similarity_fn_name is 3; expected str"),
        ("config.json", "simcse_jax", {"pooler": "avg", "mlp_only_train": 1}, "mlp_only_train is 1; expected bool"),
        (
            "config.json",
            "simcse_jax",
            {"pooler": "avg", "mlp_only_train": False, "max_length": -1},
            "max_length is -1; it must be greater than 0",
        ),
    ],
)
def test_values_beside_config_json(file: str, field: str, value: Any, words: str, model: Path) -> None:
    sentence_transformers(model)
    change(model / file, **{field: value})
    with refused(words):
        checkpoint = read_checkpoint(model)
        load_tokenizer(checkpoint.folder)


def test_a_tokenizer_without_limit_has_that_of_the_positions(model: Path) -> None:
    sentence_transformers(model)
    for limit in (10**9, 10**30, 1e30):
        change(model / "tokenizer_config.json", model_max_length=limit)
        assert read_checkpoint(model).max_length == 40


def sentence_transformers(model: Path, pooling: str = "1_Pooling", encoder: str = "") -> None:
    """Makes a folder one of sentence-transformers."""
    kinds = ((encoder, "Transformer"), (pooling, "Pooling"))
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (model / "modules.json").write_text(json.dumps(listed))
    (model / "1_Pooling").mkdir(exist_ok=True)
    change(model / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True)


OUTSIDE = ("../other", "/etc", "a/../../other", "..", "1_Pooling/../..", "\0", "a" * 300, "\ud800", "a/" * 2000)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_in_a_file_leads_out_of_its_folder(name: str, model: Path) -> None:
    shutil.copytree(model, model.parent / "other")
    with pytest.raises(InputError, match=r"file\.json names the file"):
        inside(model, name, "file.json")
    for parts in ({"pooling": name}, {"encoder": name}):
        sentence_transformers(model, **parts)
        with refused(r"modules\.json names the file"):
            load_model(model)
    (model / "modules.json").unlink()
    (model / "model.safetensors").rename(model / "hidden.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with refused(r"index\.json names the file"):
        find_tensors(model)


def test_links_of_a_hub_cache_are_followed(model: Path) -> None:
    sentence_transformers(model)
    blobs = model.parent / "blobs"
    for file in [path for path in model.rglob("*") if path.is_file()]:
        blob = blobs / file.relative_to(model)
        blob.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        file.symlink_to(blob)
    assert [module.kind for module in modules(model)] == ["Transformer", "Pooling"]
    assert load_model(model).pooler == "avg"


def header(model: Path, content: dict[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (model / "model.safetensors").write_bytes(size + text + body)


def one(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"embeddings.word_embeddings.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an endless header": (lambda m: header(m, one(), bytes(4), 2**63), "truncated or damaged"),
    "a long header": (lambda m: header(m, one(), bytes(4), 10**8), "truncated or damaged"),
    "deep": (lambda m: header(m, b"[" * 10**5), "truncated or damaged"),
    "an overflow": (lambda m: header(m, one(shape=(2**40, 2**40)), bytes(4)), "truncated or damaged"),
    "beyond the end": (lambda m: header(m, one(shape=(2**30,), offsets=(0, 2**32)), bytes(4)), "truncated or damaged"),
    "nothing, wide": (
        lambda m: header(m, one(shape=(0, 2**60), offsets=(0, 0))),
        r"has shape \[0, 1152921504606846976\]",
    ),
    "100 dimensions": (lambda m: header(m, one(shape=[1] * 100), bytes(4)), "has shape"),
    "a type of few bits": (lambda m: header(m, one("F8_E4M3", (4,)), bytes(4)), "holds F8_E4M3"),
    "no such type": (lambda m: header(m, one("X"), bytes(4)), "truncated or damaged"),
    "overlapping": (
        lambda m: header(m, one() | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "truncated or damaged",
    ),
    "empty": (lambda m: (m / "model.safetensors").write_bytes(b""), "truncated or damaged"),
}


@pytest.mark.parametrize(("damage", "words"), FILES.values(), ids=FILES)
def test_headers_of_weights(damage: Callable[[Path], Any], words: str, model: Path) -> None:
    damage(model)
    with refused(words):
        load_params(read_checkpoint(model))


def test_weights_outside_of_the_encoder_are_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"classifier.weight": np.ones((2, 32), np.float32)}, model / "model.safetensors")
    found = find_tensors(model)
    read = []
    kept = {n: type(t)(t.shape, lambda n=n, t=t: read.append(n) or t.read(), t.problem) for n, t in found.items()}
    monkeypatch.setattr("simcse_jax.pretrained.weights.find_tensors", lambda folder: kept)
    load_params(read_checkpoint(model))
    assert sorted(read) == sorted(tensors)


def pickled(model: Path, change: Callable[[dict[str, Any]], Any] = lambda tensors: None) -> Path:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(x) for name, x in load_file(model / "model.safetensors").items()}
    change(tensors)
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    return model / "pytorch_model.bin"


def test_a_packed_pickle(model: Path) -> None:
    """PyTorch does not pack; zeros in a zip would be unpacked to a thousand times their size."""
    file = pickled(model)
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.writestr("archive/data/99", bytes(2**24))
    with refused("bytes are packed into"):
        load_params(read_checkpoint(model))


def test_a_tensor_larger_than_its_data(model: Path) -> None:
    torch = pytest.importorskip("torch")
    name = "embeddings.word_embeddings.weight"
    pickled(model, lambda tensors: tensors.update({name: torch.zeros(1, 1, dtype=torch.float16).expand(2**30, 2**10)}))
    with refused(f"{name} is larger than what the file holds of it"):
        load_params(read_checkpoint(model))


@pytest.mark.parametrize("size", [0, 1, 100, 9000])
def test_a_truncated_pickle(size: int, model: Path) -> None:
    file = pickled(model)
    file.write_bytes(file.read_bytes()[:size])
    with refused("cannot be read as weights"):
        load_params(read_checkpoint(model))


WHITENING = {"method": "whitening", "folder": "3_Dense", "sentences": 9, "width": 5}
POSTS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "a method": ({"method": "exec"}, {}, "method is 'exec'; expected one of"),
    "a folder outside": ({"folder": "../other"}, {}, r"names the file '\.\./other', which leads out"),
    "a number as folder": ({"folder": 1}, {}, "folder is 1; expected str"),
    "a large width": ({"width": 2**60}, {}, "width is 1152921504606846976; it must be"),
    "another width": (
        {"width": 2**30},
        {},
        r"linear\.weight of shape \[5, 32\], config\.json asks for \[1073741824, 32\]",
    ),
    "no width": ({"width": None}, {}, "lacks width"),
    "sentences": ({"sentences": -1}, {}, "sentences is -1; it must be 0 or more"),
    "a bias that is long": ({}, {"linear.bias": (6,)}, r"linear\.bias of shape \[6\], config\.json asks for \[5\]"),
    "a flow": ({"method": "flow", "width": 32}, {}, "lacks 'bias'"),
}


@pytest.mark.parametrize(("about", "shapes", "message"), POSTS.values(), ids=POSTS)
def test_post_processors(about: dict[str, Any], shapes: dict[str, tuple[int, ...]], message: str, model: Path) -> None:
    settings = {"pooler": "avg", "mlp_only_train": False, "postprocess": WHITENING | about}
    change(model / "config.json", simcse_jax=settings)
    (model / "3_Dense").mkdir()
    given = {"linear.weight": (5, 32), "linear.bias": (5,)} | shapes
    save_file({n: np.zeros(s, np.float32) for n, s in given.items()}, model / "3_Dense" / "model.safetensors")
    with refused(message):
        read_saved(read_checkpoint(model), np.float32)


FLOW: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("bias", "scale", "diagonal", "fixed.sign"), (2, 32)),
    **{"lower": (2, 32, 32), "upper": (2, 32, 32), "w0": (2, 16, 8), "b0": (2, 8), "w1": (2, 8, 8), "b1": (2, 8)},
    **{"w2": (2, 8, 32), "b2": (2, 32)},
}


@pytest.mark.parametrize(("name", "shape"), [("w2", (2, 8, 33)), ("lower", (2, 32)), ("b1", (0, 8)), ("", ())])
def test_flows(name: str, shape: tuple[int, ...], model: Path) -> None:
    """Each array has the shape that the widths ask for; what is permuted is a permutation."""
    about = WHITENING | {"method": "flow", "width": 32}
    change(model / "config.json", simcse_jax={"pooler": "avg", "mlp_only_train": False, "postprocess": about})
    (model / "3_Dense").mkdir()
    arrays = {n: np.zeros(s, np.float32) for n, s in (FLOW | ({name: shape} if name else {})).items()}
    order = np.tile(np.arange(32, dtype=np.int32), (2, 1))
    for permutation in (order, np.zeros_like(order)):
        save_file(arrays | {"fixed.permutation": permutation}, model / "3_Dense" / "model.safetensors")
        if name or not permutation.any():
            with refused("asks for|is no permutation of 32"):
                read_saved(read_checkpoint(model), np.float32)
        else:
            assert read_saved(read_checkpoint(model), np.float32)[0] is not None


RULES: dict[str, Any] = {
    "version": "1.0",
    **dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")),
    "added_tokens": [],
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4},
    },
}
ABOUT = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}


def write_rules(model: Path, rules: dict[str, Any] | str, **about: Any) -> Path:
    for name in ("vocab.txt", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    (model / "tokenizer.json").write_text(rules if isinstance(rules, str) else json.dumps(RULES | rules))
    change(model / "tokenizer_config.json", **ABOUT, **about)
    return model


def words(**vocabulary: int) -> dict[str, Any]:
    return {"model": RULES["model"] | {"vocab": RULES["model"]["vocab"] | vocabulary}}


def doubled(times: int, pattern: dict[str, str], content: str) -> dict[str, Any]:
    rule = {"type": "Replace", "pattern": pattern, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [rule] * times}}


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
MISSING = {"type": "SpecialToken", "SpecialToken": {"id": "[Q]", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[Q]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
TOKENIZERS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "no unknown token": (
        {"model": RULES["model"] | {"vocab": {"[PAD]": 0, "a": 1}}},
        r"cannot encode the text \(.*Missing \[UNK\]",
    ),
    "an id beyond": (words(b=2**32 - 1), "with id 4,294,967,295 but"),
    "a negative id": (words(b=-1), "no readable tokenizer"),
    "a deep one": (
        json.dumps(RULES).replace('"normalizer": null', '"normalizer": ' + '{"type":"Sequence","normalizers":[' * 9999),
        "no readable tokenizer",
    ),
    "no such special token": ({"post_processor": TEMPLATE}, "cannot encode the text"),
    "a normalizer that doubles": (doubled(60, {"String": "a"}, "aa"), "makes texts up to 1e[+]18 times as long"),
    "one by expressions": (doubled(60, {"Regex": ""}, "a"), "times as long"),
    "an expression that is none": ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "("}}}, "no readable tokenizer"),
    "not an object": ("[]", "no readable tokenizer"),
}


@pytest.mark.parametrize(("rules", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers(rules: dict[str, Any] | str, message: str, model: Path) -> None:
    write_rules(model, rules)
    with refused(message):
        check_tokenizer(load_tokenizer(model), 120)


def test_an_expression_that_does_not_end(model: Path) -> None:
    """The engine gives up after 10 million steps, by a panic of the Rust side."""
    tokenizer = load_tokenizer(write_rules(model, {"pre_tokenizer": SPLIT}))
    check_tokenizer(tokenizer, 120)
    with refused("cannot encode the text .*retry-limit"):
        encodings(tokenizer, ["a" * 40 + "b"])


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a side": ({"padding_side": "middle"}, "Padding side"),
    "another": ({"truncation_side": ["left"]}, "Truncation side"),
    "a class that is no text": ({"tokenizer_class": ["a"]}, "tokenizer_class is .*; expected str"),
    "no class of tokenizers": ({"tokenizer_class": "os"}, "no readable tokenizer"),
    "a truth": ({"split_special_tokens": "false"}, "no readable tokenizer"),
    "code": ({"auto_map": "tokenizer.Own"}, "no readable tokenizer"),
    "code that is trusted": (
        {"auto_map": {"AutoTokenizer": ["tokenizer.Own", None]}, "trust_remote_code": True, "tokenizer_class": "Own"},
        "no readable tokenizer",
    ),
    "a vocabulary elsewhere": ({"vocab": "../secret.txt"}, "has vocab"),
    "a file of another kind": ({"gguf_file": "../secret.txt"}, "has gguf_file"),
    "arguments": ({"init_inputs": ["../secret.txt"]}, "has init_inputs"),
    "files of releases": ({"fast_tokenizer_files": ["../tokenizer.1.0.json"]}, "leads out of its folder"),
}


@pytest.mark.parametrize(("about", "message"), CONFIGS.values(), ids=CONFIGS)
def test_tokenizer_configs(about: dict[str, Any], message: str, model: Path) -> None:
    ran = model.parent / "ran"
    (model / "tokenizer.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    change(model / "tokenizer_config.json", **about)
    with refused(message):
        load_tokenizer(model)
    assert not ran.exists()


def test_a_pipe_is_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "special_tokens_map.json")
    with refused("special_tokens_map.json is a pipe or a device"):
        load_tokenizer(model)


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file"])
def test_paths_of_another_machine_are_passed_over(key: str, model: Path) -> None:
    """transformers has written them; what they name here is not read."""
    before = load_tokenizer(model).get_vocab()
    secret = model.parent / "secret.txt"
    secret.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsecret\n")
    change(model / "tokenizer_config.json", **{key: str(secret)})
    assert load_tokenizer(model).get_vocab() == before


def test_a_template_longer_than_the_sentence(model: Path) -> None:
    from simcse_jax.data.tokens import encode_batch

    pieces = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}] * 9 + [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}}
    template = TEMPLATE | {"single": pieces, "special_tokens": special}
    tokenizer = load_tokenizer(write_rules(model, {"post_processor": template}))
    with refused(r"adds 9 special tokens to a sentence, which leaves it no room in max_length \(8\)"):
        encode_batch(tokenizer, ["a"], 8)
