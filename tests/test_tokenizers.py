"""Tokenizers: ids that the model has, threads that share one, and a cache that knows whatever changes the ids."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from simcse_jax.config import Config, DataConfig, ModelConfig
from simcse_jax.data.augment import make_augmenter
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.table import TokenTable
from simcse_jax.data.tokens import encode_batch, encode_windows, tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.pretrained.tokenizers import load_tokenizer, save_tokenizer
from simcse_jax.training.prepare import prepare
from tests.conftest import SENTENCES

LENGTHS = (8, 32)
TEXT = [*SENTENCES[2:6], "a [SEP] b " * 9]


def in_threads(work: Callable[[int], bool], calls: int) -> int:
    """How many of so many calls, from eight threads at a time, are wrong."""
    with ThreadPoolExecutor(8) as pool:
        return sum(not right for right in pool.map(work, range(calls)))


def test_threads_cut_to_lengths_of_their_own(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    wanted = {n: (encode_batch(tokenizer, TEXT, n), encode_windows(tokenizer, TEXT, n)) for n in LENGTHS}

    def right(call: int) -> bool:
        n = LENGTHS[call % 2]
        return (encode_batch(tokenizer, TEXT, n), encode_windows(tokenizer, TEXT, n)) == wanted[n]

    assert in_threads(right, 600) == 0


def test_threads_load_models_at_once(tiny_bert: Path) -> None:
    """In a process that has loaded none: transformers imports its parts at their first use."""
    code = (
        "from concurrent.futures import ThreadPoolExecutor; "
        "from simcse_jax.pretrained.tokenizers import load_tokenizer; "
        f"print(len(list(ThreadPoolExecutor(8).map(load_tokenizer, [{str(tiny_bert)!r}] * 8))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "8\n", done.stderr[-500:]


@pytest.mark.full
@pytest.mark.usefixtures("two_devices")
def test_threads_share_a_model(tiny_bert: Path) -> None:
    """Two lengths and both treatments of long texts, in 10,000 calls."""
    model = SimCSE(tiny_bert, pooler="avg")
    settings: list[dict[str, Any]] = [
        {"max_length": n, "long_text": how} for n in LENGTHS for how in ("cut", "windows")
    ]
    wanted = [model.encode(TEXT, **given) for given in settings]

    def right(call: int) -> bool:
        n = call % len(settings)
        return bool(np.max(np.abs(model.encode(TEXT, **settings[n]) - wanted[n])) < 1e-5)

    assert in_threads(right, 10_000) == 0


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("split", [False, True])
def test_windows_are_those_of_a_call_and_change_nothing(side: str, split: bool, tiny_bert: Path) -> None:
    ours, theirs = load_tokenizer(tiny_bert), load_tokenizer(tiny_bert)
    for tokenizer in (ours, theirs):
        tokenizer.truncation_side, tokenizer.split_special_tokens = side, split
    before = ours.backend_tokenizer.to_str()
    for length in (3, 7, 40, 2**30):
        called = theirs([*TEXT, ""], max_length=length, truncation=True, return_overflowing_tokens=True)
        assert encode_windows(ours, [*TEXT, ""], length) == (called["input_ids"], called["overflow_to_sample_mapping"])
        encode_batch(ours, TEXT, length)
    assert ours.backend_tokenizer.to_str() == before


SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}


def write_words(folder: Path, words: dict[str, int], end: int = 3, kind: int = 0, **about: Any) -> Path:
    """A tokenizer of whole words with ids of their own, put into a model folder."""
    rules = Tokenizer(models.WordPiece(SPECIAL | words, unk_token="[UNK]"))  # type: ignore[call-arg]
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    template = f"[CLS]:{kind} $A:{kind} [SEP]:{kind}"
    rules.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=template, pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", end)]
    )
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").unlink(missing_ok=True)
    rules.save(str(folder / "tokenizer.json"))
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    settings = names | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 40} | about
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def config_of(model: Path, text_file: Path, tmp_path: Path) -> Config:
    data = DataConfig(train=str(text_file), max_length=12, cache=str(tmp_path / "cache"))
    return Config(output=str(tmp_path / "run"), batch_size=8, model=ModelConfig(path=str(model)), data=data)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # The model has 120 rows.
        ({"words": {"near": 5, "far": 120}}, "the token 'far' with id 120 but the model's vocabulary has 120 rows"),
        ({"words": {"near": 5}, "end": 300}, "with id 300 but"),
        ({"words": {"near": 5}, "pad_token": None}, "has no padding token: name one as pad_token"),
        (
            {"words": {"near": 5}, "kind": 1, "model_input_names": ["input_ids", "token_type_ids"]},
            "a token type other than 0",
        ),
    ],
    ids=["a gap", "a template", "no padding", "token types"],
)
def test_what_the_model_lacks_is_refused(
    settings: dict[str, Any], words: str, tiny_bert: Path, text_file: Path, tmp_path: Path
) -> None:
    """Where it is loaded and where it would be trained, before anything is written."""
    model = tmp_path / "model"
    shutil.copytree(tiny_bert, model)
    write_words(model, **settings)
    with pytest.raises(InputError, match=words):
        SimCSE(model, pooler="avg")
    with pytest.raises(InputError, match=words):
        prepare(config_of(model, text_file, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_gaps_below_the_last_row_are_fine(tiny_bert: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_bert, model)
    write_words(model, {"near": 7, "##far": 119})
    assert np.isfinite(SimCSE(model, pooler="avg").encode(["nearfar", "near", "far"])).all()
    augmenter = make_augmenter(DataConfig(augment="delete_word"), load_tokenizer(model), seed=1)
    assert augmenter is not None
    assert augmenter.starts[[7, 119]].tolist() == [True, False]


def test_a_sentence_without_a_token_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    """A tokenizer without a template adds no special tokens; empty text has the vector of nothing."""
    model = tmp_path / "model"
    shutil.copytree(tiny_bert, model)
    write_words(model, {"near": 7})
    rules = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(rules | {"post_processor": None}))
    loaded = SimCSE(model, pooler="avg")
    assert np.isfinite(loaded.encode(["near", "near near"])).all()
    with pytest.raises(InputError, match="has no token"):
        loaded.encode(["near", ""])


def test_text_without_a_token_is_refused_for_training(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a normalizer that drops what it does not know, and a tokenizer without a template, leave it."""
    monkeypatch.setattr(
        "simcse_jax.data.tokens.encode_batch", lambda _, texts, __: [[5] * (t != "gone") for t in texts]
    )
    with pytest.raises(InputError, match=r"text\.txt has a sentence without a token, 'gone': "):
        tokenize(load_tokenizer(tiny_bert), "near\ngone\n", tmp_path / "cache")


def tokenize(tokenizer: Any, text: str, cache: Path) -> TokenTable:
    file = cache.parent / "text.txt"
    file.write_text(text)
    return tokenize_corpus(open_corpus(DataConfig(train=str(file))), tokenizer, 9, cache, progress=False)


def test_large_ids_are_kept_whole(tmp_path: Path) -> None:
    """The cache has two bytes per id only where the largest id fits them, however few the tokens are."""
    tokenizer = load_tokenizer(write_words(tmp_path / "model", {"far": 70_000, "near": 65_535}))
    table = tokenize(tokenizer, "far near\nnear\n", tmp_path / "cache")
    assert table.ids[:].tolist() == [2, 70_000, 65_535, 3, 2, 65_535, 3]
    near = load_tokenizer(write_words(tmp_path / "model", {"near": 65_535}))
    assert tokenize(near, "near\n", tmp_path / "cache").ids.dtype == np.uint16


PLAIN = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 40}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "the side that is cut": ("tokenizer_config.json", {"truncation_side": "left"}),
    "special tokens in text": ("tokenizer_config.json", {"split_special_tokens": True}),
    "case": ("tokenizer_config.json", {"do_lower_case": False}),
    "accents": ("tokenizer_config.json", {"strip_accents": False}),
    "Chinese characters": ("tokenizer_config.json", {"tokenize_chinese_chars": False}),
    "the unknown token": ("tokenizer_config.json", {"unk_token": "x"}),
    "an added token": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"4": {"content": "man"}}},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_cache_knows_whatever_changes_the_ids(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    """Also once a run has saved the tokenizer; and it does not take for a change what is none."""
    file, change = CHANGES[name]
    text = "A\nnaïve\n[SEP]\n東京 man\na text that is longer than nine tokens\n"
    tables, ids = [], []
    for n, settings in enumerate(({}, change)):
        folder = tmp_path / f"model-{n}"
        folder.mkdir()
        shutil.copy(tiny_bert / "vocab.txt", folder)
        (folder / file).write_text(json.dumps(PLAIN | settings))
        tokenizer = load_tokenizer(folder)
        tables.append(tokenize(tokenizer, text, tmp_path / "cache"))
        ids.append(tables[-1].ids[:].tolist())
        save_tokenizer(tokenizer, folder / "saved")
        saved = load_tokenizer(folder / "saved")
        assert tokenize(saved, text, tmp_path / "cache").fingerprint == tables[-1].fingerprint
        assert saved(["A man [SEP] sees the river"], max_length=7, truncation=True)["input_ids"] == encode_batch(
            tokenizer, ["A man [SEP] sees the river"], 7
        )
    assert ids[0] != ids[1]
    assert tables[0].fingerprint != tables[1].fingerprint


def test_fingerprints_of_runs_that_exist_stay(tiny_bert: Path, tmp_path: Path) -> None:
    """With the usual settings they rest on text, rules and length alone; a run that goes on compares them."""
    tokenizer = load_tokenizer(tiny_bert)
    table = tokenize(tokenizer, "one\ntwo\n", tmp_path / "cache")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    corpus = open_corpus(DataConfig(train=str(tmp_path / "text.txt")))
    identity = json.dumps([1, corpus.fingerprint, rules, 9])
    assert table.fingerprint == hashlib.sha256(identity.encode()).hexdigest()[:16]
    # Padding is no part of the cache, and that of the tokenizer counts.
    tokenizer.pad_token = "x"
    again = tokenize(tokenizer, "one\ntwo\n", tmp_path / "cache")
    assert (again.fingerprint, again.pad_id) == (table.fingerprint, tokenizer.convert_tokens_to_ids("x"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o007, 0o770)])
def test_a_cache_is_shared_as_the_umask_says(umask: int, mode: int, tiny_bert: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        tokenize(load_tokenizer(tiny_bert), "one\ntwo\n", tmp_path / "cache")
    finally:
        os.umask(before)
    (folder,) = (tmp_path / "cache").iterdir()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes.pop(folder.name) == mode
    assert set(modes.values()) == {mode & 0o666}


def test_a_cache_of_another_user_is_named(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    tokenize(tokenizer, "one\ntwo\n", tmp_path / "cache")

    def refused(path: Path, *_: Any) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("simcse_jax.storage.manifest.read_record", refused)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\).*chmod.*or set data\.cache"):
        tokenize(tokenizer, "one\ntwo\n", tmp_path / "cache")
