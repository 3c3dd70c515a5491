"""Text from many files, from the hub and its copies, and from TFDS."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from simcse_jax.config import DataConfig
from simcse_jax.data import tfds as tfds_module
from simcse_jax.data.corpus import open_corpus, open_source
from simcse_jax.data.rows import Example
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.evaluation.sts import format_table, load_task
from simcse_jax.pretrained.tokenizers import load_tokenizer
from tests.conftest import write_tfds

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAIRS = {"premise": ["a", "c", "e"], "hypothesis": ["b", "d", "f"], "label": [0, 1, 0]}
CARD = """---
dataset_info:
  features:
  - name: premise
    dtype: string
  - name: hypothesis
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': entailment
          '1': neutral
          '2': contradiction
---
"""


def read(train: Path | str, **settings: Any) -> list[Example]:
    return list(open_corpus(DataConfig(train=str(train), **settings)))


def fingerprint(train: Path | str, **settings: Any) -> str:
    return open_corpus(DataConfig(train=str(train), **settings)).fingerprint


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of text, one of them packed, whose order of names is not that of their making."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "b.txt").write_text("three\nfour\n")
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"five\n"))
    (folder / "_SUCCESS").touch()
    (folder / ".a.txt.crc").touch()
    return folder


def test_shards_are_read_in_the_order_of_their_names(shards: Path) -> None:
    assert read(shards) == [("one",), ("two",), ("three",), ("four",), ("five",)]
    assert read(shards / "[ab].txt") == [("one",), ("two",), ("three",), ("four",)]
    assert read(shards.parent / "**" / "*.gz") == [("five",)]


def test_shards_are_known_by_their_content(shards: Path) -> None:
    before = fingerprint(shards)
    assert fingerprint(shards.rename(shards.with_name("moved"))) == before
    moved = shards.with_name("moved")
    assert fingerprint(moved / "a.txt") == fingerprint(moved / "a*")
    assert fingerprint(moved / "*.txt") != before
    (moved / "b.txt").write_text("three\nfive\n")
    assert fingerprint(moved) != before


def test_the_identity_of_a_single_file_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """Caches of tokens are found by it, and runs continued."""
    (tmp_path / "a.csv").write_text("a,b,label\none,two,x\n")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert fingerprint(tmp_path / "a.csv", columns=("b", "a"), where={"label": "x"}) == "e1d40341bfe6a462"
    assert fingerprint(tmp_path / "a.txt") == "bab5ac8b8bfff6a7"
    assert fingerprint(tmp_path / "a.txt", neighbours=2) == "45cd9f8d834a1480"


def test_columns_of_shards_go_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\none,two\n")
    (tmp_path / "b.csv").write_text("y,x\nfour,three\n")
    assert read(tmp_path) == [("one", "two"), ("three", "four")]
    (tmp_path / "c.csv").write_text("x\nfive\n")
    with pytest.raises(InputError, match=r"c\.csv has no column y; it has x"):
        read(tmp_path)


def test_documents_end_with_their_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    assert read(tmp_path, neighbours=3) == [("a1", "a2"), ("b1", "b2")]


def test_a_folder_that_is_no_text_is_refused(shards: Path) -> None:
    empty = shards.parent / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no file"):
        read(empty)
    with pytest.raises(InputError, match=r"pattern .*\*\.none holds no file"):
        read(shards / "*.none")
    (shards / "d.csv").write_text("a\nsix\n")
    with pytest.raises(InputError, match=r"several formats \(\.csv, \.txt\); give a pattern"):
        read(shards)
    (shards / "notes.md").touch()
    with pytest.raises(InputError, match=r"notes\.md ends in '\.md'.*give a pattern"):
        read(shards)


def test_folders_in_a_folder_of_shards_are_not_passed_over(shards: Path) -> None:
    for name in (".git", "_temporary"):
        (shards / name).mkdir()
    assert len(read(shards)) == 5
    (shards / "more").mkdir()
    (shards / "more" / "d.txt").write_text("six\n")
    with pytest.raises(InputError, match=r"shards has subfolders \(more\).*'.*/shards/\*\*/\*\.(txt|gz)' to read them"):
        read(shards)
    assert len(read(shards / "**" / "*.txt")) == 5


def test_an_empty_object_is_no_row(tiny_bert: Path, tmp_path: Path) -> None:
    """Neither first, where it would be taken for the names of the columns, nor alone."""
    path = tmp_path / "a.jsonl"
    for text, number in (("{}\n{}\n", 1), ('{}\n{"text": "a"}\n', 1), ('{"text": "a"}\n{}\n', 2)):
        path.write_text(text)
        corpus = open_corpus(DataConfig(train=str(path)))
        with pytest.raises(InputError, match=rf"a\.jsonl, line {number} is an empty object"):
            tokenize_corpus(corpus, load_tokenizer(tiny_bert), 8, tmp_path / "cache", progress=False)


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2 is not JSON \(it is nested more than 64 deep\)"):
        read(tmp_path / "a.jsonl")


def write_hub_folder(folder: Path) -> Path:
    """A copy of a data set's repository: a card, and two splits as parquet."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    pyarrow.parquet.write_table(pyarrow.table(PAIRS), folder / "data" / "train-00000-of-00001.parquet")
    other = pyarrow.table({name: values[:1] for name, values in PAIRS.items()})
    pyarrow.parquet.write_table(other, folder / "data" / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The package, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return datasets


def test_a_copy_of_a_hub_data_set(datasets: Any, tmp_path: Path) -> None:
    """Splits by name, classes by name or number; known by its content."""
    folder = write_hub_folder(tmp_path / "nli")
    columns = ("premise", "hypothesis")
    assert read(folder, columns=columns) == [("a", "b"), ("c", "d"), ("e", "f")]
    assert read(folder, columns=columns, split="validation") == [("a", "b")]
    assert read(folder, columns=columns, split="train[1:]") == [("c", "d"), ("e", "f")]  # not streamed
    for label in ("entailment", "0"):
        assert read(folder, where={"label": label}) == [("a", "b"), ("e", "f")]
    before = fingerprint(folder)
    assert fingerprint(folder, split="validation") != before
    assert fingerprint(folder.rename(tmp_path / "moved")) == before
    (tmp_path / "moved" / "README.md").write_text(CARD + "changed")
    assert fingerprint(tmp_path / "moved") != before
    with pytest.raises(InputError, match=r"moved' is not a local file.*other.*its subset and split"):
        read(tmp_path / "moved", split="other")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, datasets: Any) -> Callable[..., list[Any]]:
    """Makes the hub give the columns it is handed, and returns the list of what it was asked for."""
    import huggingface_hub

    calls: list[Any] = []
    at = SimpleNamespace(commit=COMMIT)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: SimpleNamespace(sha=at.commit, id=name)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)

    def install(commit: str = COMMIT, **columns: list[Any]) -> list[Any]:
        at.commit = commit

        def load_dataset(path: str, name: str | None = None, **settings: Any) -> Any:
            calls.append((path, name, settings))
            return datasets.Dataset.from_dict(columns).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


def test_a_hub_data_set_is_asked_for_as_configured(hub: Any, tiny_bert: Path, tmp_path: Path) -> None:
    calls = hub(premise=["a", "c", " "], label=[0, 1, 1], hypothesis=["b", "d", "f"])
    config = DataConfig(train="org/nli", subset="pairs", split="validation", columns=("premise", "hypothesis"))
    corpus = open_corpus(config)
    assert calls == []  # to know a data set, nothing is loaded
    assert list(corpus) == [("a", "b"), ("c", "d"), (" ", "f")]
    assert calls == [("org/nli", "pairs", {"split": "validation", "revision": COMMIT, "streaming": True})]
    table = tokenize_corpus(corpus, load_tokenizer(tiny_bert), 8, tmp_path / "cache", progress=False)
    assert (len(table), table.columns, table.skipped) == (2, 2, 1)
    others = [replace(config, split="train"), replace(config, subset=None), replace(config, columns=("premise",))]
    prints = {open_corpus(c).fingerprint for c in others}
    hub(commit=COMMIT[::-1])
    assert len(prints | {corpus.fingerprint, open_corpus(config).fingerprint}) == 5


def test_a_hub_data_set_can_be_narrowed_by_a_number(hub: Any) -> None:
    hub(**PAIRS)
    assert read("org/nli", where={"label": "0"}) == [("a", "b"), ("e", "f")]


def test_a_hub_column_that_is_no_text_is_named(hub: Any) -> None:
    hub(text=["a"], label=[0])
    with pytest.raises(InputError, match=r"org/set has .* column label holds numbers; .*: --data\.columns text$"):
        read("org/set")
    with pytest.raises(InputError, match="org/set, row 1 has no text in column label, but 0"):
        read("org/set", columns=("label",))
    with pytest.raises(InputError, match=r"no column premise; its columns are text \('a'\), label \('0'\)"):
        read("org/set", columns=("premise",))


def test_a_stream_that_breaks_off(hub: Any, datasets: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was tokenised of it is not taken for the whole."""

    def rows() -> Any:
        yield {"text": "a"}
        raise ConnectionResetError("the line was cut")

    hub(text=["a"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(InputError, match=r"'org/set' could not be read to its end"):
        read("org/set")


PROGRAM = """
import json, sys, time
import datasets, huggingface_hub
from simcse_jax.config import DataConfig
from simcse_jax.data.corpus import open_corpus
from simcse_jax.errors import InputError
slept = []
time.sleep = slept.append  # what is tried again is tried after a while
for name in ("no-such/data-set", "org/nli"):
    try:
        found = list(open_corpus(DataConfig(train=name, columns=("premise",))))
    except InputError as error:
        found = str(error)
    print(json.dumps([found, sum(slept)]))
"""


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_network(setting: dict[str, str], tmp_path: Path) -> None:
    """A quick error, or what the cache of Hugging Face holds. In a process: the libraries read these at import."""
    repository = tmp_path / "hub" / "datasets--org--nli"
    write_hub_folder(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= setting | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (message, _), (cached, slept) = map(json.loads, done.stdout.splitlines())
    assert "'no-such/data-set' is not a local file" in message
    assert "check the path or name" in message
    assert slept == 0  # `datasets` itself: 23 s a name
    assert cached == [["a"], ["c"], ["e"]]


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch, datasets: Any, tmp_path: Path) -> Path:
    """An empty snapshot of org/nli in a cache of its own, and no network."""
    import huggingface_hub

    def refused(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refused)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--org--nli"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT / "data").mkdir(parents=True)
    return repository / "snapshots" / COMMIT


SHARDS = [f"data/train-0000{n}-of-00002.jsonl" for n in range(2)]


def download(snapshot: Path, *names: str) -> None:
    for name in names:
        (snapshot / name).write_text(json.dumps({"text": sentence_of(name)}) + "\n")


def sentence_of(name: str) -> str:
    return f"the text of {name}"


def list_files(snapshot: Path, *names: str) -> None:
    """What the hub's client notes of a commit whose download it begins."""
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in (".gitattributes", "README.md", *names)}
    trees = snapshot.parents[1] / "trees"
    trees.mkdir()
    (trees / f"{snapshot.name}.json").write_text(json.dumps({"format_version": 1, "files": files}))


def version(snapshot: Path) -> Any:
    assert snapshot.name == COMMIT
    return open_source(DataConfig(train="org/nli")).identity()[1]


def test_a_download_that_lacks_files_is_refused(snapshot: Path) -> None:
    """The client's list of files says which; the commit is known all the same, so that a cache of tokens serves."""
    (snapshot / "README.md").write_text(CARD)
    list_files(snapshot, *SHARDS)
    assert version(snapshot) == COMMIT  # of the card alone
    download(snapshot, SHARDS[0])
    assert version(snapshot) == COMMIT
    with pytest.raises(InputError, match=r"refused; the download .* lacks data/train-00001-of-00002\.jsonl, one of 1"):
        read("org/nli")
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    download(snapshot, SHARDS[1])
    assert version(snapshot) == COMMIT
    assert read("org/nli") == [(sentence_of(name),) for name in SHARDS]


def test_a_download_that_may_lack_files_is_known_by_its_content(snapshot: Path) -> None:
    """As those of clients that keep no list."""
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    assert version(snapshot) == COMMIT
    download(snapshot, SHARDS[0])
    part = version(snapshot)
    assert read("org/nli") == [(sentence_of(SHARDS[0]),)]
    download(snapshot, SHARDS[1])
    assert len({COMMIT, part, version(snapshot)}) == 3


def test_tfds_data_prepared_without_tensorflow(tfds_folder: Path) -> None:
    assert "tensorflow" not in sys.modules
    columns = ("premise", "hypothesis")
    rows = read("tfds:tiny_nli/plain", columns=columns)
    assert sorted(rows) == [("p0 é", "h0"), ("p0 é", "h1"), ("p0 é", "h2"), ("p1 é", "h3"), ("p1 é", "h4")]
    assert read("tfds:tiny_nli/plain:1.0.0", columns=columns) == rows
    assert read("tfds:tiny_nli", columns=columns) == rows  # its only configuration
    assert read("tfds:tiny_nli/plain", columns=columns, split="train[:2]") == rows[:2]
    for label in ("contradiction", "2"):
        assert read("tfds:tiny_nli/plain", columns=columns, where={"label": label}) == [("p0 é", "h2")]
    with pytest.raises(InputError, match="row 1 has no text in column label"):
        read("tfds:tiny_nli/plain", columns=("label",))
    with pytest.raises(InputError, match="has no split 'validation'; it has train: take"):
        read("tfds:tiny_nli/plain", split="validation")


def test_tfds_data_is_known_by_its_content(tfds_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint("tfds:tiny_nli/plain")
    assert fingerprint("tfds:tiny_nli/plain", split="train[:2]") != before
    rows = [{"premise": "other", "hypothesis": "h", "label": 0}]
    monkeypatch.setenv("TFDS_DATA_DIR", str(write_tfds(tmp_path, rows)))
    assert fingerprint("tfds:tiny_nli/plain") != before


def test_tfds_bytes_that_are_no_text(tfds_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(DataConfig(train="tfds:tiny_nli/plain"))
    monkeypatch.setattr(
        type(source.builder), "as_data_source", lambda *_, **__: [{"premise": b"a"}, {"premise": b"\xff"}]
    )
    with pytest.raises(InputError, match=r"tfds:tiny_nli/plain, row 2 has bytes that are not UTF-8 text .*0xff"):
        list(source.rows(("premise",)))


def test_tfds_takes_the_newest_version(tmp_path: Path) -> None:
    for name in ("1.0.0", "10.0.0", "9.0.0", "11.0.0", "10.0.0.incompleteA1B2"):
        (tmp_path / name).mkdir()
        if name != "11.0.0":
            (tmp_path / name / "dataset_info.json").touch()
    assert tfds_module._prepared(tmp_path, None) == tmp_path / "10.0.0"
    assert tfds_module._prepared(tmp_path, "9.0.0") == tmp_path / "9.0.0"
    assert tfds_module._prepared(tmp_path, "2.0.0") is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tfds:glue/stsb", "no network to download it: prepare it elsewhere .*TFDS_DATA_DIR"),
        ("tfds:multi_nli", "no network to download it"),
        ("tfds:tiny_nli/other", "in .*tiny_nli are plain, nor known to TFDS"),
        ("tfds:no_such_set", "nor known to TFDS .*check the name"),
        ("tfds:a/b/c", "not a name of TFDS; expected tfds:NAME"),
    ],
)
def test_tfds_data_that_cannot_be_had(
    name: str, problem: str, tfds_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: TFDS itself would try for minutes."""

    def refused(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError

    monkeypatch.setattr(tfds_module, "urlopen", refused)
    with pytest.raises(InputError, match=problem):
        open_corpus(DataConfig(train=name))


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_a_package_that_tfds_data_needs_is_absent(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"not installed .*{package}.*: pip install tensorflow-datasets array-record"):
        open_source(DataConfig(train="tfds:tiny_nli/plain"))


def test_tfds_data_is_prepared_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder of glue/stsb itself, given its files in place of the download."""
    import tensorflow_datasets as tfds

    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    folder = tmp_path / "files" / "STS-B"
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        rows = [f"{n}\tm\tm\t2\t{n}\tn\tn\tA man in {split}.\tA woman.\t{n + 0.5}\n" for n in range(2)]
        text = header + "".join(rows)
        if split == "test":  # whose scores are kept back
            text = "".join(line.rpartition("\t")[0] + "\n" for line in text.splitlines())
        (folder / f"{split}.tsv").write_text(text)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(tfds_module, "_reachable", lambda _: True)
    monkeypatch.setattr(
        tfds.download.DownloadManager, "download_and_extract", lambda *_: tmp_path / "files", raising=True
    )
    columns = ("sentence1", "sentence2")
    assert read("tfds:glue/stsb", columns=columns) == [("A man in train.", "A woman.")] * 2
    monkeypatch.setattr(tfds_module, "_reachable", lambda _: False)  # now it is there
    (dev,) = load_task("tfds:glue/stsb", "", "dev").subsets
    assert (dev.first, dev.second) == (["A man in dev."] * 2, ["A woman."] * 2)
    assert sorted(dev.gold) == [0.5, 1.5]
    with pytest.raises(InputError, match=r"split test: the score of all its pairs is -1; take another split"):
        load_task("tfds:glue/stsb", "", "test")


GRADED = {"sentence1": ["a b", "c"], "sentence2": ["d", 'e "f"'], "score": [1.5, 4]}


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl", "parquet", "tsv", "tsv.gz"])
def test_graded_pairs_in_files_are_a_task(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"own.{ending}"
    rows = list(zip(*GRADED.values(), strict=True))
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(GRADED), path)
    else:
        text = 'sentence1,sentence2,score\na b,d,1.5\nc,"e ""f""",4\n'
        if ending.startswith("tsv"):
            text = "".join("\t".join(map(str, row)) + "\n" for row in [tuple(GRADED), *rows])
        if ending == "jsonl":
            text = "".join(json.dumps(dict(zip(GRADED, row, strict=True))) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    task = load_task(str(path), "")
    (subset,) = task.subsets
    assert (subset.first, subset.second, subset.gold.tolist()) == tuple(GRADED.values())
    assert (task.reported, format_table({"now": {str(path): 1.0}}).split()[0]) == ("all", "own")


def test_graded_pairs_of_a_hub_data_set(datasets: Any, tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "sts")
    for split, first in (("validation", "dev"), ("test", "test")):
        table = pyarrow.table(GRADED | {"sentence1": [first, "c"]})
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "data" / "train-00000-of-00001.parquet").unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for mode in ("dev", "test"):
        assert load_task(str(folder), "", mode).subsets[0].first == [mode, "c"]


def test_pairs_without_scores_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("sentence1,sentence2\na,b\n")
    with pytest.raises(InputError, match=r"must have the columns .*; it has sentence1, sentence2"):
        load_task(str(tmp_path / "own.csv"), "")
    (tmp_path / "own.csv").write_text("sentence1,sentence2,score\na,b,much\n")
    with pytest.raises(InputError, match="score that is no number"):
        load_task(str(tmp_path / "own.csv"), "")


def test_blank_rows_of_graded_pairs_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\n\nc,d,0\n,,\n\n")
    assert load_task(str(path), "").subsets[0].gold.tolist() == [1, 0]
    path.write_text("sentence1,sentence2,score\na,b,1\nc,d,\n")
    with pytest.raises(InputError, match="score that is no number"):
        load_task(str(path), "")


def test_tfds_data_of_another_format_is_refused(tfds_folder: Path, tmp_path: Path) -> None:
    source = tfds_folder / "tiny_nli" / "plain" / "1.0.0"
    copy = tmp_path / "tiny_nli" / "1.0.0"
    copy.mkdir(parents=True)
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    about = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(about | {"fileFormat": "tfrecord"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path))
        with pytest.raises(InputError, match="prepared as tfrecord, which only TensorFlow reads"):
            open_corpus(DataConfig(train="tfds:tiny_nli"))


def test_any_answer_of_a_host_is_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import HTTPError, URLError

    def answer(request: Any, timeout: float) -> Any:
        if "there" in request.full_url:
            raise HTTPError(request.full_url, 404, "not found", None, None)  # type: ignore[arg-type]
        raise URLError("no such host")

    monkeypatch.setattr(tfds_module, "urlopen", answer)
    assert tfds_module._reachable(["https://gone/a", "https://there/b"])
    assert not tfds_module._reachable(["https://gone/a", "https://gone/b"])
    assert tfds_module._reachable([])
