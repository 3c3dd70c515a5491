"""Every reader of text takes what users have: nulls, long cells, capital endings, pipes; and names what is damaged."""

import gzip
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from simcse_jax.config import DataConfig
from simcse_jax.data.augment import make_augmenter
from simcse_jax.data.corpus import open_corpus, open_source, read_sentences
from simcse_jax.data.nli import read_pairs
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.data.vocabulary import learn_words
from simcse_jax.errors import InputError
from simcse_jax.evaluation.retrieval import load_retrieval
from simcse_jax.evaluation.sentences import unlabelled_sentences
from simcse_jax.evaluation.sts import Subset, load_task
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.storage.objects import local_path

FORMATS = ("csv", "tsv", "jsonl", "parquet")


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """A table in the format of the path's ending; None is a null, or an empty cell."""
    packed = path.suffix.lower() == ".gz"
    ending = (path.with_suffix("") if packed else path).suffix.lower()
    rows = list(zip(*columns.values(), strict=True))
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path
    if ending == ".jsonl":
        text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    else:
        delimiter = "," if ending == ".csv" else "\t"
        lines = [columns, *(["" if cell is None else str(cell) for cell in row] for row in rows)]
        text = "".join(delimiter.join(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def examples(path: Path, **data: Any) -> list[tuple[str, ...]]:
    return list(open_corpus(DataConfig(train=str(path), **data)))


def subset(path: Path) -> Subset:
    (found,) = load_task(str(path), "").subsets
    return found


@pytest.mark.parametrize("ending", FORMATS)
def test_nulls_are_left_out_and_counted_in_every_format(ending: str, tiny_bert: Path, tmp_path: Path) -> None:
    columns = {"text": ["a man", None, "a dog", "a cat"], "positive": [None, "one", "an animal", "a pet"]}
    path = write(tmp_path / f"a.{ending}", columns)
    corpus = open_corpus(DataConfig(train=str(path)))
    table = tokenize_corpus(corpus, load_tokenizer(tiny_bert), 8, tmp_path / "cache", progress=False)
    assert (len(table), table.columns, table.skipped) == (2, 2, 2)
    assert table.origin == ("sentence ← text: a dog", "positive ← positive: an animal")
    assert len(examples(path, where={"positive": "a pet"})) == 1
    assert learn_words(str(path), 60)


def test_the_nan_of_pandas_is_a_null(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a man"}\n{"text": NaN}\n')
    assert examples(path) == [("a man",), ("",)]


@pytest.mark.parametrize("ending", FORMATS)
def test_pairs_with_nulls_are_left_out_in_every_format(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences = {"sentence1": ["a", None, "c", "d"], "sentence2": ["w", "x", None, "z"]}
    found = subset(write(tmp_path / f"a.{ending}", {**sentences, "score": [1, 2, 3, 4.5]}))
    assert (found.first, found.second, found.gold.tolist()) == (["a", "d"], ["w", "z"], [1, 4.5])
    assert capsys.readouterr().out == f"{tmp_path / f'a.{ending}'}: 2 pairs with a blank sentence are left out\n"
    with pytest.raises(InputError, match=r"(line|row) \d has a score that is no number"):
        subset(write(tmp_path / f"a.{ending}", {**sentences, "score": [1, 2, 3, None]}))
    labelled = {"premise": ["a", None], "hypothesis": ["b", "c"], "label": [None, "neutral"]}
    pairs = list(read_pairs(open_source(DataConfig(train=str(write(tmp_path / f"b.{ending}", labelled))))))
    assert [(pair.premise, pair.hypothesis, pair.label) for pair in pairs] == [("a", "b", ""), ("", "c", "neutral")]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "names",
    [
        ("score", "sentence2", "sentence1"),
        ("label", "sentence2", "sentence1"),
        ("relatedness_score", "sentence_B", "sentence_A"),
        ("Similarity Score", "Sentence 2", "Sentence 1"),
    ],
)
def test_graded_pairs_go_by_the_names_of_their_columns(names: tuple[str, ...], ending: str, tmp_path: Path) -> None:
    """In any order, with others beside them."""
    values = dict(zip(names, ([1.5, 4.0], ["B one", "D two"], ["A", "C"]), strict=True))
    found = subset(write(tmp_path / f"a.{ending}", {"index": [1, 2], **values, "genre": ["news", "news"]}))
    assert (found.first, found.second, found.gold.tolist()) == (["A", "C"], ["B one", "D two"], [1.5, 4])


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_named_columns_is_found(delimiter: str, ending: str, tmp_path: Path) -> None:
    graded, labelled = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    rows = [("sentence1", "sentence2", "score"), ("a b", "c", "1"), ("d", "e", "0")]
    graded.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    assert subset(graded).gold.tolist() == [1, 0]
    labelled.write_text(delimiter.join(("gold_label", "sentence1", "sentence2")) + "\n" + delimiter.join("-ab") + "\n")
    (pair,) = read_pairs(open_source(DataConfig(train=str(labelled))))
    assert (pair.premise, pair.hypothesis, pair.label) == ("a", "b", "")


@pytest.mark.parametrize("ending", FORMATS)
def test_questions_with_nulls_are_left_out_in_every_format(ending: str, tmp_path: Path) -> None:
    columns = {"question": ["a", None, "c", "d"], "answer": ["w", "x", None, "z"]}
    task = load_retrieval(str(write(tmp_path / f"a.{ending}", columns)))
    assert task is not None
    assert (task.questions, task.corpus, task.blank) == (["a", "d"], ["w", "z"], 2)


def test_the_delimiter_of_questions_and_answers_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id;question;answer\n1;Who, then?;I\n2;Where?;Here, now\n")
    task = load_retrieval(str(path), columns=("question", "answer"))
    assert task is not None
    assert (task.questions, task.corpus) == (["Who, then?", "Where?"], ["I", "Here, now"])
    path.write_text("question;answer\nWho, then?;I\nWhere?;Here, now\n")
    task = load_retrieval(str(path))
    assert task is not None
    assert task.columns == ("question", "answer")


def test_pairs_without_the_columns_are_refused(tmp_path: Path) -> None:
    for name, content, there in (
        ("a.tsv", "A man runs.\tA man walks.\t3.0\n", "it has A man runs., A man walks., 3.0"),
        ("b.csv", "sentence1,sentence1,score\na,b,1\n", "it has sentence1, sentence1, score"),
        ("c.txt", "A man runs.\tA man walks.\t3.0\n", "it is plain text"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=rf"must have the columns sentence1, sentence2 and score .*; {there}"):
            subset(tmp_path / name)


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
def test_cells_may_be_long(ending: str, tmp_path: Path) -> None:
    """Python's own limit is 131,072 characters."""
    text = "word " * 40_000
    path = write(tmp_path / f"a.{ending}", {"text": [text, "b"], "positive": ["a", text]})
    assert examples(path) == [(text, "a"), ("b", text)]


@pytest.mark.parametrize("ending", ["CSV", "Tsv", "JSONL", "PARQUET", "CSV.GZ", "jsonl.Gz"])
def test_endings_may_have_capitals(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"A.{ending}", {"text": ["a man"], "positive": ["someone"]})
    assert examples(path) == [("a man", "someone")]
    graded = write(tmp_path / f"B.{ending}", {"sentence1": ["a"], "sentence2": ["b"], "score": [1]})
    assert subset(graded).first == ["a"]


@pytest.mark.parametrize("name", ["A.TXT", "A.Txt.GZ"])
def test_endings_of_plain_text_may_have_capitals(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"one\ntwo\n") if name.endswith("GZ") else b"one\ntwo\n")
    assert read_sentences(path) == unlabelled_sentences(str(path)) == ["one", "two"]
    assert examples(path) == [("one",), ("two",)]


@pytest.fixture
def pipe() -> Iterator[Any]:
    """Puts bytes into a pipe, and gives the name under which a command would get it, such as /dev/fd/5."""
    opened: list[int] = []

    def make(content: bytes) -> Path:
        end, start = os.pipe()
        opened.append(end)
        os.write(start, content)
        os.close(start)
        return Path(f"/dev/fd/{end}")

    yield make
    for end in opened:
        os.close(end)


def test_pipes_are_text(pipe: Any) -> None:
    assert read_sentences(pipe(b"one\ntwo\n")) == ["one", "two"]
    assert read_sentences(pipe(gzip.compress(b"one\ntwo\n"))) == ["one", "two"]
    assert unlabelled_sentences(str(pipe(b"one\none\n"))) == ["one"]
    corpus = open_corpus(DataConfig(train=str(pipe(b"one\ntwo\n"))))
    assert list(corpus) == list(corpus) == [("one",), ("two",)]
    assert examples(pipe(b"a;b\nx;y\n"), delimiter=";") == [("x", "y")]
    graded = pipe(b"sentence1\tsentence2\tscore\na\tb\t1\nc\td\t0\n")
    for _ in range(2):  # as a command that asks first what kind of task it is
        assert subset(graded).gold.tolist() == [1, 0]
    with pytest.raises(InputError, match="is empty"):
        read_sentences(pipe(b""))


def test_folders_of_devices_are_folders(tmp_path: Path) -> None:
    """Users keep text and models in /dev/shm."""
    assert local_path("/dev") == Path("/dev")
    assert local_path("/dev/no-such-file.txt") == Path("/dev/no-such-file.txt")
    with pytest.raises(InputError, match="cannot be read or copied"):
        local_path("/dev/fd/987")


def test_a_redirected_file_is_read_in_its_own_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", {"text": ["a man"], "positive": ["someone"]})
    with path.open() as file:
        assert examples(Path(f"/dev/fd/{file.fileno()}")) == [("a man", "someone")]


def test_a_named_pipe_has_a_format(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    os.mkfifo(path)
    for text in ("a man", "a dog"):
        writer = threading.Thread(target=path.write_text, args=(f"text,positive\n{text},someone\n",))
        writer.start()
        assert examples(path) == [(text, "someone")]
        writer.join()


def test_columns_that_the_first_object_lacks_are_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"anchor": "a"}\n{"anchor": "b", "negative": "c"}\n')
    with pytest.raises(
        InputError, match=r"line 1 has no text in column negative; .* with null where a text is missing"
    ):
        examples(path)
    assert examples(path, columns=("anchor",)) == [("a",), ("b",)]


def test_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ntext,positive\n"one\n\nmore",two\n\n"three\n3",four,five\n')
    with pytest.raises(InputError, match="line 7 has 3 columns but the header has 2"):
        examples(path)


def test_parquet_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": [f"some words {n}" for n in range(2000)]})
    content = bytearray(path.read_bytes())
    for at in range(20, 400):
        content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet is not a readable parquet file"):
        examples(path)


def test_the_table_of_synonyms_is_read_like_other_text(tiny_bert: Path, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "synonyms.tsv.GZ", load_tokenizer(tiny_bert)
    config = DataConfig(augment="synonyms", synonyms=str(path))
    path.write_bytes(gzip.compress("\ufeffman\tdog\r\n\r\nred\tblue\r\n".encode()))
    augmenter = make_augmenter(config, tokenizer, 0)
    assert augmenter is not None
    assert len(augmenter.synonyms) == 2
    path.write_bytes(gzip.compress(b"man\tdog\n\nred\n"))
    with pytest.raises(InputError, match="line 3 has no synonym"):
        make_augmenter(config, tokenizer, 0)
    path.write_bytes(b"no gzip")
    with pytest.raises(InputError, match="not a complete gzip file"):
        make_augmenter(config, tokenizer, 0)


def test_a_vocabulary_is_learnt_from_all_columns_of_text(tmp_path: Path) -> None:
    columns = {name: [f"{name} here and there", "and again"] for name in ("aaa", "bbb", "ccc", "ddd")}
    words = learn_words(str(write(tmp_path / "a.jsonl", {"id": [911, 912], **columns})), 100)
    assert {"a", "##a", "d", "##d"} <= set(words)
    assert "9" not in words
    with pytest.raises(InputError, match="no column of text"):
        learn_words(str(write(tmp_path / "b.csv", {"id": [911, 912]})), 100)
