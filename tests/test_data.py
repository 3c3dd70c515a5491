"""Text in: files of every format, tokens on disk, and the order in which examples reach the devices."""

import gzip
import json
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from simcse_jax.config import DataConfig
from simcse_jax.data import tokens as tokens_module
from simcse_jax.data.corpus import open_corpus, read_sentences
from simcse_jax.data.feed import Feed
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.rows import Example
from simcse_jax.data.table import TokenTable
from simcse_jax.data.tokens import encode_batch, tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.pretrained.tokenizers import load_tokenizer, save_tokenizer
from simcse_jax.runtime.mesh import make_mesh
from tests.conftest import SENTENCES

HEADER = ("sentence", "positive", "negative")
ROWS = [("one, two", 'say "three"', "naïve"), ("four", "five\tsix", "東京 🙂"), ("seven", "eight", "nine")]


def write_txt(rows: list[Example]) -> bytes:
    return "".join(f"{row[0]}\n" for row in rows).encode()


def write_csv(rows: list[Example]) -> bytes:
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    return "\n".join([",".join(HEADER[: len(rows[0])]), *quoted]).encode()


def write_tsv(rows: list[Example]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in [HEADER[: len(rows[0])], *rows]).encode()


def write_jsonl(rows: list[Example]) -> bytes:
    return "".join(json.dumps(dict(zip(HEADER, row, strict=False))) + "\n" for row in rows).encode()


def write_parquet(rows: list[Example]) -> bytes:
    names = HEADER[: len(rows[0])]
    sink = pyarrow.BufferOutputStream()
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=2)
    return bytes(sink.getvalue())


WRITERS = {"txt": write_txt, "csv": write_csv, "tsv": write_tsv, "jsonl": write_jsonl, "parquet": write_parquet}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path, *columns: str) -> list[Example]:
    return list(open_corpus(DataConfig(train=str(path), columns=columns)))


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return load_tokenizer(tiny_bert)


def tokenize(path: Path, tokenizer: Any, cache: Path, max_length: int = 12) -> TokenTable:
    return tokenize_corpus(open_corpus(DataConfig(train=str(path))), tokenizer, max_length, cache, progress=False)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(("ending", "columns"), [("txt", 1), *((e, c) for e in list(WRITERS)[1:] for c in (1, 2, 3))])
def test_every_format_gives_the_same_examples(ending: str, columns: int, packed: str, tmp_path: Path) -> None:
    rows = [tuple(cell.replace("\t", " ") if ending == "tsv" else cell for cell in row[:columns]) for row in ROWS]
    assert read(write(tmp_path / f"text.{ending}{packed}", WRITERS[ending](rows))) == rows


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_columns_are_chosen_by_name_and_in_order(ending: str, tmp_path: Path) -> None:
    rows = [("a", "b", "c"), ("d", "e", "f")]
    path = write(tmp_path / f"text.{ending}", WRITERS[ending](rows))
    assert read(path, "negative", "sentence") == [("c", "a"), ("f", "d")]
    with pytest.raises(
        InputError, match=r"no column anchor; its columns are sentence \('a'\), positive \('b'\), negative"
    ):
        read(path, "anchor")


def test_more_than_three_columns_can_be_narrowed(tmp_path: Path) -> None:
    path = write(tmp_path / "nli.csv", b"id,premise,hypothesis,label\n1,p,h,0\n")
    assert read(path, "premise", "hypothesis") == [("p", "h")]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_are_chosen_by_the_values_of_columns(ending: str, tmp_path: Path) -> None:
    rows = [("p", "h", "entailment"), ("q", "i", "neutral"), ("r", "j", "entailment")]
    path = write(tmp_path / f"nli.{ending}", WRITERS[ending](rows))
    config = DataConfig(train=str(path), where={"negative": "entailment"})
    assert list(open_corpus(config)) == [("p", "h"), ("r", "j")]  # the other columns are the sentences
    assert list(open_corpus(replace(config, columns=("positive",)))) == [("h",), ("j",)]
    both = replace(config, where={"negative": "entailment", "sentence": "r"})
    assert list(open_corpus(both)) == [("j",)]
    prints = {open_corpus(c).fingerprint for c in (config, both, replace(config, where={}))}
    assert len(prints) == 3
    with pytest.raises(InputError, match="no column label; it has sentence, positive, negative"):
        list(open_corpus(replace(config, where={"label": "entailment"})))


def test_no_row_has_the_value(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "nli.csv", WRITERS["csv"]([("p", "h", "neutral")]))
    corpus = open_corpus(DataConfig(train=str(path), where={"negative": "entailment"}))
    with pytest.raises(InputError, match=r"no row has negative entailment \(data.where\)"):
        tokenize_corpus(corpus, tokenizer, 8, tmp_path / "cache", progress=False)


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "two.csv", b"text,text\na,b\n")
    with pytest.raises(InputError, match="two columns 'text'"):
        read(path)


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "jsonl"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_byte_order_mark_and_carriage_returns_are_no_text(ending: str, packed: str, tmp_path: Path) -> None:
    rows = [("first",), ("second",)]
    content = b"\xef\xbb\xbf" + WRITERS[ending](rows).replace(b"\n", b"\r\n")
    path = write(tmp_path / f"text.{ending}{packed}", content)
    assert read(path) == rows
    if ending == "txt":
        assert read_sentences(path) == ["first", "second"]


def test_quoted_csv_may_hold_commas_quotes_and_newlines(tmp_path: Path) -> None:
    path = write(tmp_path / "text.csv", b'sentence,positive\n"one,\ntwo","a ""b"" c"\nplain,"x, y"\n')
    assert read(path) == [("one,\ntwo", 'a "b" c'), ("plain", "x, y")]


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "text.tsv", b'sentence\tpositive\n"unclosed\tb "c" d\n"e"\tf,g\n')
    assert read(path) == [('"unclosed', 'b "c" d'), ('"e"', "f,g")]


@pytest.mark.parametrize(
    ("name", "content", "kept", "skipped"),
    [
        ("a.txt", b"one\n\n \t \ntwo\n\n", [["one"], ["two"]], 3),
        ("a.csv", b"a,b\none,two\n,two\nthree,  \n\nfour,five\n", [["one", "two"], ["four", "five"]], 3),
        ("a.tsv", b"a\tb\none\ttwo\n\ttwo\n\nfour\tfive\n", [["one", "two"], ["four", "five"]], 2),
        ("a.jsonl", b'{"a": "one"}\n\n{"a": " "}\n{"a": "two"}\n', [["one"], ["two"]], 1),
        ("a.parquet", write_parquet([("one", ""), ("two", "three")]), [["two", "three"]], 1),
    ],
)
def test_examples_with_a_blank_cell_are_left_out_and_counted(
    name: str, content: bytes, kept: list[list[str]], skipped: int, tokenizer: Any, tmp_path: Path
) -> None:
    table = tokenize(write(tmp_path / name, content), tokenizer, tmp_path / "cache")
    assert (len(table), table.columns, table.skipped) == (len(kept), len(kept[0]), skipped)
    ids, lengths = table.rows(np.arange(len(table)))
    for example, row, length in zip(kept, ids, lengths, strict=True):
        for sentence, r, n in zip(example, row, length, strict=True):
            assert r[:n].tolist() == tokenizer(sentence)["input_ids"]


@pytest.mark.parametrize("max_length", [3, 9, 40])
def test_token_rows_are_the_tokenizers_own(max_length: int, tokenizer: Any, tmp_path: Path) -> None:
    """Cut with the specials kept, and padded on the right with the tokenizer's padding token."""
    path = write(tmp_path / "text.txt", "\n".join(SENTENCES).encode())
    table = tokenize(path, tokenizer, tmp_path / "cache", max_length)
    chosen = np.array([5, 0, 3, 3])
    ids, lengths = table.rows(chosen)
    expected = tokenizer(
        [SENTENCES[i] for i in chosen],
        max_length=max_length,
        truncation=True,
        padding="max_length",
        return_tensors="np",
    )
    np.testing.assert_array_equal(ids[:, 0], expected["input_ids"])
    np.testing.assert_array_equal(lengths[:, 0], expected["attention_mask"].sum(axis=1))
    last = ids[np.arange(4), 0, lengths[:, 0] - 1]
    assert set(last.tolist()) == {tokenizer.sep_token_id}
    assert set(ids[:, 0, 0].tolist()) == {tokenizer.cls_token_id}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("split", [False, True])
def test_tokens_are_those_of_a_call(side: str, split: bool, tiny_bert: Path) -> None:
    """Whatever the tokenizer says of cutting and of special tokens in text, and whatever it was used for before."""
    tokenizer = load_tokenizer(tiny_bert)
    tokenizer.truncation_side, tokenizer.split_special_tokens = side, split
    sentences = [*SENTENCES, "", f"{SENTENCES[0]} [SEP] {SENTENCES[1]}"]
    for length in (40, 7, 2**30):
        tokenizer(sentences[:3], padding="max_length", max_length=50, truncation=True)
        got = encode_batch(tokenizer, sentences, length)
        tokenizer(sentences[:3], padding=True)
        assert got == tokenizer(sentences, max_length=length, truncation=True)["input_ids"]
    assert encode_batch(tokenizer, [], 40) == []


def test_chunks_join_seamlessly(
    text_file: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus of many chunks has the table of one chunk."""
    whole = tokenize(text_file, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(tokens_module, "_CHUNK", 7)
    chunked = tokenize(text_file, tokenizer, tmp_path / "chunked")
    np.testing.assert_array_equal(whole.ids, chunked.ids)
    np.testing.assert_array_equal(whole.offsets, chunked.offsets)


def refuse(*_: Any) -> Any:
    raise AssertionError("the tokenizer was called")


def test_the_cache_is_reused(text_file: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by another object of the same tokenizer, and by one saved after use, as a run folder has it."""
    tokenizer = load_tokenizer(tiny_bert)
    first = tokenize(text_file, tokenizer, tmp_path / "cache")
    save_tokenizer(tokenizer, tmp_path / "saved")
    monkeypatch.setattr(tokens_module, "encode_batch", refuse)
    for again in (tokenizer, load_tokenizer(tiny_bert), load_tokenizer(tmp_path / "saved")):
        table = tokenize(text_file, again, tmp_path / "cache")
        assert table.fingerprint == first.fingerprint
        np.testing.assert_array_equal(table.ids, first.ids)
        np.testing.assert_array_equal(table.offsets, first.offsets)
        for name in ("columns", "pad_id", "max_length", "skipped"):
            assert getattr(table, name) == getattr(first, name)


def test_the_cache_key_holds_content_tokenizer_and_length(tiny_bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "text.csv", b"a,b\nHello,you\n")
    tokenizer = load_tokenizer(tiny_bert)

    def fingerprint(tokenizer: Any, max_length: int = 12, *columns: str) -> str:
        corpus = open_corpus(DataConfig(train=str(path), columns=columns))
        return tokenize_corpus(corpus, tokenizer, max_length, tmp_path / "cache", progress=False).fingerprint

    cased = tmp_path / "cased"
    cased.mkdir()
    (cased / "vocab.txt").write_text((tiny_bert / "vocab.txt").read_text())
    settings = json.loads((tiny_bert / "tokenizer_config.json").read_text())
    (cased / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    found = [
        fingerprint(tokenizer),
        fingerprint(tokenizer, 11),
        fingerprint(tokenizer, 12, "b"),
        fingerprint(load_tokenizer(cased)),
    ]
    path.write_bytes(b"a,b\nHello,me\n")
    found.append(fingerprint(tokenizer))
    assert len(set(found)) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_the_cache_does_not_depend_on_the_files_place(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path / name, b"one\ntwo\n") for name in ("a.txt", "other/b.txt")]
    fingerprints = {tokenize(path, tokenizer, tmp_path / "cache").fingerprint for path in paths}
    assert len(fingerprints) == 1


def test_a_failure_half_way_leaves_nothing(text_file: Path, tokenizer: Any, tmp_path: Path) -> None:
    """And the next call starts over."""
    cache = tmp_path / "cache"

    encode_batch = tokens_module.encode_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "_CHUNK", 50)
        for error in (KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError()):
            calls = count()

            def breaks(*args: Any, calls: Any = calls, error: BaseException = error) -> list[list[int]]:
                if next(calls) == 1:
                    assert any(cache.iterdir())
                    raise error
                return encode_batch(*args)

            patch.setattr(tokens_module, "encode_batch", breaks)
            with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
                tokenize(text_file, tokenizer, cache)
            assert list(cache.iterdir()) == []
    assert len(tokenize(text_file, tokenizer, cache)) == 203


@pytest.mark.parametrize(("n", "batch_size"), [(203, 16), (32, 16), (5, 8), (1, 1)])
def test_an_epoch_is_a_permutation_with_a_short_last_batch(n: int, batch_size: int) -> None:
    order = EpochOrder(n, batch_size, seed=3)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.examples(step) for step in steps]
        assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert len(batches[-1]) == (n % batch_size or batch_size)
        epochs.append(np.concatenate(batches))
        np.testing.assert_array_equal(np.sort(epochs[-1]), np.arange(n))
    if n > 1:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[1], epochs[2])


def test_the_order_is_a_pure_function_of_seed_and_step() -> None:
    """Asked for in any order, more than once, and from a fresh object."""
    order = EpochOrder(203, 16, seed=3)
    forward = [order.examples(step).copy() for step in range(60)]
    for step in np.random.default_rng(0).permutation(60):
        np.testing.assert_array_equal(order.examples(int(step)), forward[step])
        np.testing.assert_array_equal(EpochOrder(203, 16, seed=3).examples(int(step)), forward[step])
    assert not np.array_equal(EpochOrder(203, 16, seed=4).examples(0), forward[0])


def test_an_epoch_is_numpys_permutation() -> None:
    """Bit for bit, though it is drawn in half the memory."""
    for epoch, n in enumerate((2, 203, 70_001)):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, epoch))))
        order = EpochOrder(n, n, seed=3)
        np.testing.assert_array_equal(order.examples(epoch), generator.permutation(n))
        assert order.examples(epoch).dtype == np.int64


def table_of(n: int, columns: int = 2, max_length: int = 6) -> TokenTable:
    """Examples whose tokens say which sentence they belong to."""
    lengths = 1 + np.arange(n * columns) % max_length
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.repeat(np.arange(1, n * columns + 1), lengths)
    return TokenTable(ids, offsets, columns, pad_id=0, max_length=max_length, skipped=0, fingerprint="")


@pytest.mark.parametrize("step", [0, 12, 20])
@pytest.mark.parametrize("hosts", [1, 2, 4, 16])
def test_slices_of_hosts_make_the_global_batch(hosts: int, step: int) -> None:
    """Step 12 is the last of its epoch, with 11 examples: the other rows are not valid."""
    table, order = table_of(203), EpochOrder(203, 16, seed=0)
    whole = Feed(table, order, make_mesh()).rows(step, slice(0, 16))
    size = 16 // hosts
    parts = [Feed(table, order, make_mesh()).rows(step, slice(h * size, (h + 1) * size)) for h in range(hosts)]
    for name in ("input_ids", "lengths", "valid"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))
    examples = order.examples(step)
    assert whole.valid.tolist() == [True] * len(examples) + [False] * (16 - len(examples))
    np.testing.assert_array_equal(whole.input_ids[: len(examples), :, 0], examples[:, None] * 2 + [1, 2])
    assert np.all(whole.lengths > 0)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("start", [0, 1, 12, 14])
def test_prefetch_gives_the_batches_of_any_start(start: int, devices: int) -> None:
    table, order = table_of(203), EpochOrder(203, 16, seed=0)
    mesh = make_mesh(devices=jax.devices()[:devices])
    batches = list(Feed(table, order, mesh).batches(start, 16))
    assert len(batches) == 16 - start
    for step, batch in enumerate(batches, start):
        expected = jax.tree.leaves(Feed(table, order, make_mesh()).rows(step, slice(None)))
        for actual, value in zip(jax.tree.leaves(batch), expected, strict=True):
            assert len(actual.sharding.device_set) == devices
            np.testing.assert_array_equal(np.asarray(actual), value)


def test_prefetch_ends_its_thread_when_closed() -> None:
    batches = Feed(table_of(203), EpochOrder(203, 16, seed=0), make_mesh()).batches(0, 10**9)
    next(batches)
    assert any(t.name.startswith("prefetch") for t in threading.enumerate())
    batches.close()
    assert not any(t.name.startswith("prefetch") for t in threading.enumerate())


def test_batches_are_loaded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step runs, the next two are loaded, and no more."""
    feed = Feed(table_of(203), EpochOrder(203, 16, seed=0), make_mesh())
    loaded: list[int] = []
    monkeypatch.setattr(Feed, "_placed", lambda self, step: loaded.append(step))
    monkeypatch.setattr(Feed, "_guided", lambda self, batch: batch)
    batches = feed.batches(0, 9)
    for step in range(7):
        next(batches)
        deadline = time.monotonic() + 5
        while len(loaded) < step + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert loaded == list(range(step + 3))
    assert len(list(batches)) == 2
    assert loaded == list(range(9))


def test_a_failed_read_reaches_the_consumer() -> None:
    table = replace(table_of(203), offsets=np.zeros(3, np.int64))
    with pytest.raises(IndexError):
        next(Feed(table, EpochOrder(203, 16, seed=0), make_mesh()).batches(0, 3))
