"""Files that are damaged, or made to harm: one clear error, and no more memory than their size asks for."""

import gzip
import json
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.config import Config, DataConfig
from simcse_jax.config.values import to_dict
from simcse_jax.data import delimited, files, reading
from simcse_jax.data.corpus import open_corpus, read_sentences
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.evaluation.sts import load_task
from simcse_jax.inference.index import Index
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runs.checkpoints import read_progress
from simcse_jax.runs.folder import Run, open_run
from simcse_jax.runs.metrics_log import MetricsLog, read_log
from simcse_jax.storage.files import write_json
from simcse_jax.storage.manifest import MANIFEST, Damage, _seal, verify, write_manifest
from simcse_jax.storage.records import DEEPEST, LARGEST, open_array, parse_json, parse_record, read_record

DEEP = "[" * 100_000 + "]" * 100_000


@contextmanager
def little_memory(mib: int = 256) -> Iterator[None]:
    """A block in which the process may not reach a new peak of memory that is much above the last."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mib * 1024


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (DEEP, f"nested more than {DEEPEST} deep"),
        ('{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), f"nested more than {DEEPEST} deep"),
        (" " * (LARGEST + 1), "more than 16,777,216 bytes"),
        (b"\xff\xfe{", "can't decode"),
        ("{", "Expecting"),
        ('{"a": 1, "a": 2}', "a key twice"),
        ("[NaN]", "NaN is no finite number"),
        ("[-Infinity]", "is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("[9223372036854775808]", "more than 64 bits"),
        (f"[{'9' * 5000}]", "more than 64 bits"),
        (r'["\ud800"]', "surrogates not allowed"),
    ],
)
def test_json_that_no_run_writes(text: str | bytes, problem: str) -> None:
    with little_memory(), pytest.raises(ValueError, match=problem):
        parse_record(text)


def test_json_that_others_write() -> None:
    """Text and models of others may have what our records never have."""
    deepest = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(parse_json(deepest)) == deepest
    assert parse_json('{"a": 1, "a": 1e999}') == {"a": float("inf")}
    assert parse_json("9" * 31) == int("9" * 31)
    assert parse_record('{"\\u00e9": [-9223372036854775808, 1.5, null, true]}') == {"é": [-(2**63), 1.5, None, True]}


def test_a_record_that_is_no_file(tmp_path: Path) -> None:
    """Neither a pipe nor a device holds its reader up."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with little_memory(), pytest.raises(ValueError, match=r"Expecting value|more than 16"):
            read_record(path)


def _header(text: str) -> bytes:
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3",  # TokenError of Python's tokenizer
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000000), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 3), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<c8', 'fortran_order': False, 'shape': (1, 1), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }",
        "{'descr': 7, 'fortran_order': 7, 'shape': 7, }",
        "(" * 100,
        "\\",
    ],
)
def test_headers_of_arrays(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.npy").write_bytes(_header(header) + bytes(24))
    with little_memory(), pytest.raises(ValueError, match=r"a\.npy"):
        open_array(tmp_path / "a.npy", np.float32, 2)


def test_arrays_of_other_kinds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    for name in "ab":
        with pytest.raises(ValueError, match=rf"{name}\.npy"):
            open_array(tmp_path / f"{name}.npy", np.float32, 2)
    np.save(tmp_path / "c.npy", np.eye(2, 3, dtype=np.float32))
    np.testing.assert_array_equal(open_array(tmp_path / "c.npy", np.float32, 2), np.eye(2, 3))


def test_a_small_file_that_unpacks_to_one_huge_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", 1) as file:
        for _ in range(400):
            file.write(b"a" * 2**20)
    assert path.stat().st_size < 2**21
    with little_memory(64), pytest.raises(InputError, match=r"line 1 has more than 4,194,304 characters"):
        read_sentences(path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.csv.gz", "a.jsonl.gz"])
def test_a_file_that_unpacks_to_far_more_than_text_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = b'{"sentence": "a man runs"}\n' if "jsonl" in name else b"a man runs\n"
    (tmp_path / name).write_bytes(gzip.compress(line * 100_000))
    assert sum(1 for _ in open_corpus(DataConfig(train=str(tmp_path / name)))) >= 99_999
    monkeypatch.setattr(reading, "_UNPACKED", 1000)
    with pytest.raises(InputError, match=r"unpacks to more than 250 times its size.* unpack it with gunzip"):
        for _ in open_corpus(DataConfig(train=str(tmp_path / name))):
            pass


def test_a_parquet_that_unpacks_to_far_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PACKED", 1000)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(bytes(10_000)))
    with pytest.raises(InputError, match=r"unpacks to more than 1,000 bytes"):
        list(open_corpus(DataConfig(train=str(tmp_path / "a.parquet.gz"))))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", 'sentence\n"' + "a man runs\n" * 500_000, "line 2: a row of more than 4,194,304 characters begins"),
        ("a.csv", "sentence\n" + "a" * 5_000_000, "line 2 has more than 4,194,304 characters"),
        ("a.csv", "a," * 20_000 + "\n", "line 1 has 20,001 columns; expected 16,384 at most"),
        ("a.tsv", "a\t" * 20_000 + "\n", "line 1 has 20,001 columns; expected 16,384 at most"),
        ("a.jsonl", json.dumps({str(n): n for n in range(20_000)}), "has objects of 20,000 keys; expected 16,384"),
        ("a.jsonl", DEEP, "line 1 is not JSON .*nested more than 64 deep"),
        ("a.jsonl", '{"sentence": ' + DEEP + "}", "line 1 is not JSON .*nested more than 64 deep"),
        ("a.jsonl", '{"sentence": ' + "9" * 5000 + "}", "line 1 is not JSON"),
    ],
)
def test_text_without_bounds(name: str, content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with little_memory(), pytest.raises(InputError, match=problem) as error:
        list(open_corpus(DataConfig(train=str(tmp_path / name))))
    assert len(str(error.value)) < 2000


def test_a_message_names_few_of_many_columns(tmp_path: Path) -> None:
    header = [f"column {n} {'x' * 200}" for n in range(1000)]
    (tmp_path / "a.csv").write_text("\n".join([",".join(header), ",".join("a" * 1000)]))
    for columns in ((), ("b",)):
        with pytest.raises(InputError) as error:
            list(open_corpus(DataConfig(train=str(tmp_path / "a.csv"), columns=columns)))
        assert len(str(error.value)) < 8000
        assert "1,000 in all" in str(error.value)


def test_few_rows_are_held_where_they_are_long() -> None:
    taken = reading.few(iter(["a" * 2**21] * 100), 50, len)
    assert len(list(taken)) == 3
    assert len(list(reading.few(iter("ab" * 100), 50, len))) == 50


def test_a_row_may_span_lines(tmp_path: Path) -> None:
    """As long as it is no longer than any line may be; the bound starts anew with every row."""
    rows = "".join(f'"a man\nruns {n}"\n' for n in range(1000))
    (tmp_path / "a.csv").write_text("sentence\n" + rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "LONGEST", 100)
        assert len(list(open_corpus(DataConfig(train=str(tmp_path / "a.csv"))))) == 1000


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 10**9},
        {"columns": 2},
        {"columns": 0},
        {"columns": "1"},
        {"dtype": "float64"},
        {"dtype": "O"},
        {"skipped": None},
        {"origin": 5},
        {"origin": [5]},
    ],
)
def test_a_token_cache_that_is_whole_and_wrong(
    change: dict[str, Any], tiny_bert: Path, text_file: Path, tmp_path: Path
) -> None:
    """It is made again, whatever its manifest says."""
    tokenizer, corpus = load_tokenizer(tiny_bert), open_corpus(DataConfig(train=str(text_file)))
    expected = tokenize_corpus(corpus, tokenizer, 12, tmp_path, progress=False)
    rows = expected.rows(np.arange(5))
    (folder,) = tmp_path.iterdir()
    content = json.loads((folder / MANIFEST).read_text())
    content.pop("seal")
    content["about"] |= change
    (folder / MANIFEST).write_text(json.dumps(content | {"seal": _seal(content)}))
    with little_memory():
        found = tokenize_corpus(corpus, tokenizer, 12, tmp_path, progress=False)
        for array, wanted in zip(found.rows(np.arange(5)), rows, strict=True):
            np.testing.assert_array_equal(array, wanted)
    assert (found.columns, found.max_length, found.skipped) == (1, 12, 0)
    assert found.origin == expected.origin


@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, 10**12], [5, 9], [0, -5, 9], [0, 13, 26]])
def test_offsets_that_lead_outside(offsets: list[int], tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    tokenizer, corpus = load_tokenizer(tiny_bert), open_corpus(DataConfig(train=str(text_file)))
    expected = np.array(tokenize_corpus(corpus, tokenizer, 12, tmp_path, progress=False).offsets)
    (folder,) = tmp_path.iterdir()
    about = json.loads((folder / MANIFEST).read_text())["about"]
    np.array(offsets, np.int64).tofile(folder / "offsets-0.bin")
    write_manifest(folder, about)
    found = tokenize_corpus(corpus, tokenizer, 12, tmp_path, progress=False)
    np.testing.assert_array_equal(found.offsets, expected)


def test_an_index_of_one_endless_vector(tmp_path: Path) -> None:
    """Whose file has no more blocks than it has numbers: none."""
    header = _header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 10000000), }")
    (tmp_path / "vectors.npy").write_bytes(header)
    os.truncate(tmp_path / "vectors.npy", len(header) + 40_000_000)
    about = {"format": 1, "sentences": 1, "width": 10_000_000, "backend": "jax", "about": {}}
    (tmp_path / "index.json").write_text(json.dumps(about))
    (tmp_path / "sentences.jsonl").write_text('"a"\n')
    with little_memory(), pytest.raises(InputError, match=r"vectors of width 10,000,000; expected 65,536 at most"):
        Index.load(tmp_path)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm here")
def test_files_in_memory_are_replaced_as_others_are() -> None:
    """And not appended to, as /dev/stdout is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "results.json"
        for value in ({"before": 1}, {"after": 2}):
            write_json(file, value)
            assert json.loads(file.read_text()) == value


def test_a_score_that_no_float_can_hold(tmp_path: Path) -> None:
    pairs = {"sentence1": "a man", "sentence2": "a dog", "score": int("1" * 400)}
    (tmp_path / "a.jsonl").write_text(json.dumps(pairs))
    with pytest.raises(InputError, match=r"line 1 has a score that is no number, '1{60}' in column score"):
        load_task(tmp_path / "a.jsonl", "")


RESULTS = {"step": 8, "best_step": 4, "dev": 80.0, "metric": "spearman", "after": {"a": 1.0, "Avg.": 1.0}}


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "null", "5", '"a"', "{", "", DEEP, '{"step": NaN}', "{" + '"step": 8}' * 2, "\0" * 100),
        *(json.dumps(RESULTS | {"step": step}) for step in (None, "8", [8], 8.5)),
        *(json.dumps(RESULTS | {"dev": dev}) for dev in ("80", [], {})),
        *(json.dumps(RESULTS | {"after": after}) for after in (None, [], {"a": "1"}, {"a": [1]}, {"a": {}})),
        *(json.dumps(RESULTS | {"before": before}) for before in ({"b": 1.0}, {}, 5)),
        json.dumps(RESULTS | {"metric": 5}),
        json.dumps({"step": 8}),
        json.dumps({"dev": "80"}),
        json.dumps({"dev": 80.0}),
    ],
)
def test_odd_results(text: str, tmp_path: Path) -> None:
    run = Run(tmp_path, Config(), "")
    run.results_file.write_text(text)
    with pytest.raises(InputError, match=r"results\.json is damaged \(.*\): give the command"):
        run.results()


def test_results_as_runs_write_them(tmp_path: Path) -> None:
    run = Run(tmp_path, Config(), "")
    before = {"before": {"a": None, "Avg.": 2.0}}
    for results in (
        before,
        RESULTS,
        RESULTS | before | {"untrained": "no", "memory": None, "best_step": None, "dev": None},
    ):
        run.results_file.write_text(json.dumps(results))
        assert run.results().keys() == results.keys()
    assert run.results()["before"] == before["before"]


def test_odd_lines_of_a_log(tmp_path: Path) -> None:
    """They are left out, as half a line is."""
    odd = [
        *("5", "[]", "null", '"a"', "{}", '{"loss": 1}', '{"step": "3"}', '{"step": NaN}', '{"step": true}'),
        *('{"step": 1e400}', f'{{"step": {"9" * 400}}}', '{"step": 3.5}', '{"step": 3, "loss": "a"}'),
        *('{"step": 3, "loss": [1]}', '{"step": 3, "loss": {}}', '{"step": 3, "step": 4}', '{"step": 3, "loss": NaN}'),
        *(DEEP, '{"step": 3, "lo', "\0\0\0"),
    ]
    good = ['{"step": 1, "loss": 1.5}', '{"step": 2, "loss": null}']
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([good[0], *odd, good[1]]) + "\n")
    assert read_log(path) == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": None}]
    path.write_text('{"step": 3, "loss": 2}\n' + "\n".join([good[0], *odd, good[1]]) + "\n")
    assert type(read_log(path)[0]["loss"]) is float
    MetricsLog(path, 1).close()
    assert path.read_text() == good[0] + "\n"


@pytest.mark.parametrize(
    "change",
    [
        {"config": []},
        {"config": {"batch_size": "16"}},
        {"config": {"data": []}},
        {"config": {"data": {"columns": [5]}}},
        {"config": {"data": {"max_length": 10**400}}},
        {"config": {"no_such_field": 1}},
        {"data_fingerprint": 5},
        {"contents": [1]},
    ],
)
def test_odd_settings_of_a_run(change: dict[str, Any], tmp_path: Path) -> None:
    about = {"config": to_dict(Config()), "data_fingerprint": "a", "contents": {}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert open_run(tmp_path).config == Config()
    (tmp_path / "run.json").write_text(json.dumps(about | change))
    with pytest.raises(InputError, match=r"run\.json is not a run's config"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    "progress",
    [
        {"best_step": "4", "best_score": 70.0, "stale": 1},
        {"best_step": 4, "best_score": [], "stale": 1},
        {"best_step": 4, "best_score": 70.0, "stale": None},
        {"best_step": 4},
        [],
        None,
    ],
)
def test_odd_progress(progress: Any, tmp_path: Path) -> None:
    folder = tmp_path / "5"
    folder.mkdir()
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"custom_metadata": progress}))
    with pytest.raises(Damage):
        read_progress(folder)


@pytest.mark.parametrize(
    "files",
    [{"../a": [0, "x"]}, {"/dev/zero": [0, "x"]}, {"a": 5}, {"a": [0]}, {"a": ["0", "x"]}, {"a": [0, None]}, []],
)
def test_a_manifest_of_another_form(files: Any, tmp_path: Path) -> None:
    """It is damage, and no file outside of the folder is read."""
    content = {"about": {}, "files": files}
    (tmp_path / MANIFEST).write_text(json.dumps(content | {"seal": _seal(content)}))
    with pytest.raises(Damage, match="cannot be read"):
        verify(tmp_path)


def test_a_manifest_that_names_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    content = {"about": {}, "files": {"pipe": [0, "x"]}}
    (tmp_path / MANIFEST).write_text(json.dumps(content | {"seal": _seal(content)}))
    with pytest.raises(Damage, match="pipe cannot be read"):
        verify(tmp_path)
