"""Columns that are no text never become sentences unless they are named, and a run says which column each sentence is
from."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from simcse_jax.cli import main
from simcse_jax.config import DataConfig
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.rows import Example
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.pretrained.tokenizers import load_tokenizer


def read(path: Path, content: str | None = None, **data: Any) -> tuple[list[Example], tuple[str, ...]]:
    """The examples of a file, and the lines that say where their sentences are from."""
    if content is not None:
        path.write_text(content)
    corpus = open_corpus(DataConfig(train=str(path), **data))
    examples = list(corpus)
    return examples, corpus.describe(examples[0])


def refused(path: Path, content: str | None = None, **data: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, content, **data)
    return str(caught.value)


QA = [("How do I sort a list?", "Call sorted on it."), ("How is a file read?", "Open it.")]


def table(header: str, *extra: str) -> str:
    """A .csv file of question and answer, with more cells at the start of each row."""
    rows = [f"{one},{question},{answer}" for one, (question, answer) in zip(extra, QA, strict=True)]
    return "\n".join([header, *rows]) + "\n"


@pytest.mark.parametrize(
    ("name", "cells", "why"),
    [
        ("id", ("17", "18"), "holds numbers"),
        ("", ("0", "1"), "has no name"),
        ("", ("one", "two"), "has no name"),
        ("Unnamed: 0", ("0", "1"), "has no name"),
        ("__index_level_0__", ("x", "y"), "has no name"),
        ("level_0", ("x", "y"), "has no name"),
        ("row.names", ("x", "y"), "has no name"),
        ("Speaker", ("Ann", "Bo"), "name of an id"),
        ("confidence", ("high", "low"), "name of a score"),
        ("pair_id", ("a-x", "b-y"), "name of an id"),
        ("questionID", ("abc", "xyz"), "name of an id"),
        ("row", ("q-001", "q-002"), "holds ids"),
        ("row", ("5f0a6c1e9b", "77ab01c2de"), "holds ids"),
        ("link_to", ("https://a.org/1", "https://a.org/b"), "holds addresses"),
        ("label", ("sports", "politics"), "name of a label"),
        ("outcome", ("entailment", "Neutral"), "holds labels"),
        ("is_answer", ("True", "False"), "holds labels"),
        ("gold-label", ("a", "b"), "name of a label"),
        ("score", ("high", "low"), "name of a score"),
        ("x", ("0.5", "-1.25e-3"), "holds numbers"),
        ("x", ("2024-01-31", "2024-02-29T12:00:00Z"), "holds numbers"),
        ("x", ("$5", "7 %"), "holds numbers"),
        ("notes", ("", ""), "is empty"),
        ("lang", ("en", "de"), "name of a label"),
        ("author", ("Ann Lee", "Bo Ek"), "name of an id"),
        ("origin", ("left.txt", "notes/right.PDF"), "holds addresses"),
        ("writer", ("ann@a.org", "bo.ek@b.org"), "holds addresses"),
    ],
)
def test_a_column_that_is_no_text_is_refused_unless_it_is_named(
    name: str, cells: tuple[str, str], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "qa.csv"
    message = refused(path, table(f"{name},question,answer", *cells))
    assert str(path) in message
    assert why in message
    assert "question ('How do I sort a list?'), answer ('Call sorted on it.')" in message
    assert message.endswith("in this order: --data.columns question answer")
    columns = ("question", "answer")
    assert read(path, columns=columns)[0] == QA
    assert read(path, columns=(name, "answer"))[0] == [(cell, a) for cell, (_, a) in zip(cells, QA, strict=True)]


def test_labels_are_told_by_how_few_they_are(tmp_path: Path) -> None:
    words = ["card arrival", "lost card", "exchange rate"]
    rows = [f"some words number {n},{words[n % 3]}" for n in range(9)]
    message = refused(tmp_path / "a.csv", "\n".join(["utterance,intended", *rows]))
    assert "column intended holds few different values" in message
    assert message.endswith("--data.columns utterance")
    rows = [f"some words number {n},my card is not {['here', 'working'][n % 2]}" for n in range(9)]
    message = refused(tmp_path / "b.csv", "\n".join(["text,category", *rows]))
    assert "column category has the name of a label" in message


@pytest.mark.parametrize(
    "content",
    [
        "sent0,sent1,hard_neg\nA man sleeps.,Someone sleeps.,Nobody sleeps.\nA dog.,An animal.,A cat.\n",
        "sentence,positive\na man,someone\n",
        "en,id\nThe book is on it.,Buku itu ada di atas.\nGood morning to all of you.,Selamat pagi semua orang.\n",
        "question,answer\nWhat is six times seven?,42\nWho wrote it?,Ann Lee\nWhere?,In the year 1999 in Rome\n",
        "question,answer\n今天天气怎么样,很好\n你是谁,我是我\n",
        "query,passage\nshoes,red shoes\nshoes,blue shoes\nshoes,big shoes\nshoes,old shoes\n",
        "word,meaning\ncat,a small animal\nbank,a place for money\n",
        "a,b,negatives\np,h,x\np,i,z\np,j,v\n",
        "question1,question2\na b,c d\n",
        "context,question\na b,c d\n",
        "query,query_rewritten,negative\na b,c d,e f\n",
    ],
)
def test_text_is_not_refused(content: str, tmp_path: Path) -> None:
    header, *rows = content.splitlines()
    examples, lines = read(tmp_path / "a.csv", content)
    assert examples == [tuple(row.split(",")) for row in rows]
    roles = ("sentence", "positive", "hard negative")
    assert lines == tuple(
        f"{role} ← {name}: {text}" for role, name, text in zip(roles, header.split(","), examples[0], strict=False)
    )


def test_types_are_told_in_parquet_and_jsonl(tmp_path: Path) -> None:
    text = [f"{a} says {b}" for a, b in QA]
    for values, why in (
        ([1, 2], "numbers"),
        ([0.5, 1.5], "numbers"),
        ([True, False], "truth values"),
        ([["a"], []], "lists"),
    ):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": text, "extra": values}), path)
        message = refused(path)
        assert f"column extra holds {why}" in message
        assert message.endswith("--data.columns text")
    path = tmp_path / "index.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "__index_level_0__": ["x", "y"]}), path)
    assert "__index_level_0__ has no name" in refused(path)
    assert "column id holds numbers" in refused(tmp_path / "a.jsonl", '{"text": "some words", "id": 7}\n')


def test_columns_of_one_name_never_play_two_roles(tmp_path: Path) -> None:
    """Nor do two without a name."""
    message = refused(tmp_path / "a.csv", ",,text\n1,x,a man\n")
    assert "two columns without a name" in message
    assert message.endswith("--data.columns text")
    assert read(tmp_path / "a.csv", columns=("text",))[0] == [("a man",)]
    assert "two columns without a name" in refused(tmp_path / "a.csv", columns=("",))
    assert "two columns 'text'" in refused(tmp_path / "a.csv", "text,text\na,b\n")


@pytest.mark.parametrize(
    ("header", "right"),
    [
        ("anchor,negative,positive", "anchor positive negative"),
        ("hard_neg,sent0,sent1", "sent0 sent1 hard_neg"),
        ("positive,text", "text positive"),
        ("passage,query,negative", "query passage negative"),
        ("question,negative", "question"),
        ("answer,question", "question answer"),
        ("title,question,answer", "question answer"),
    ],
)
def test_columns_whose_names_claim_other_roles_are_refused(header: str, right: str, tmp_path: Path) -> None:
    """As those of data whose columns were sorted by name."""
    cells = ",".join("abc"[: header.count(",") + 1])
    message = refused(tmp_path / "a.csv", f"{header}\n{cells}\n")
    assert "in the place of the" in message
    assert message.endswith(f"in this order: --data.columns {right}")


def test_what_the_third_of_three_texts_is_must_be_said(tmp_path: Path) -> None:
    """The advice makes no hard negative of just any text, and the first lines say so of one that is taken."""
    _, lines = read(tmp_path / "b.csv", "title,text,summary\na,b,c\n")
    assert lines[3].startswith("NOTE: summary is taken for hard negatives")
    assert lines[3].endswith("--data.columns title text")
    assert len(read(tmp_path / "b.csv", columns=("title", "text", "summary"))[1]) == 3
    message = refused(tmp_path / "a.csv", "id,title,text,summary\n1,a,b,c\n")
    assert message.endswith("in this order, for example: --data.columns title text")
    message = refused(tmp_path / "a.csv", "id,question,A,B,answer\n1,a,b,c,d\n")
    assert message.endswith("in this order: --data.columns question answer")
    message = refused(tmp_path / "a.csv", "id,sent0,sent1,hard_neg\n1,a,b,c\n")
    assert message.endswith("in this order: --data.columns sent0 sent1 hard_neg")


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_with_another_delimiter_is_refused_with_the_option_that_reads_it(
    delimiter: str, ending: str, tmp_path: Path
) -> None:
    import gzip

    if delimiter == {"csv": ",", "tsv": "\t"}[ending.removesuffix(".gz")]:
        return
    rows = [("question", "answer"), *QA, ("Is it so, then", "Yes no")]
    quote = '"' if delimiter == "," else ""
    text = "".join(f"{quote}{a}{quote}{delimiter}{b}\n" for a, b in rows).encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    message = refused(path)
    shown = r"\t" if delimiter == "\t" else delimiter
    assert f"--data.delimiter '{shown}'" in message
    for given in (shown, delimiter):
        assert read(path, delimiter=given)[0] == rows[1:]
    assert (
        open_corpus(DataConfig(train=str(path), delimiter=shown)).fingerprint
        != open_corpus(DataConfig(train=str(path))).fingerprint
    )


def test_quoted_cells_with_another_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    content = '"question";"answer"\n"How; do I?";"So, ""thus""."\n'
    assert "--data.delimiter ';'" in refused(path, content)
    assert read(path, delimiter=";")[0] == [("How; do I?", 'So, "thus".')]


@pytest.mark.parametrize("name", ["a.tsv", "a.txt"])
def test_tabs_with_quotes_around_names_and_text(name: str, tmp_path: Path) -> None:
    """As R and spreadsheets write them. Without quotes around the names, those in the text are its own."""
    option = {"delimiter": "\t"} if name.endswith("txt") else {}
    content = '"question"\t"answer"\n"How?"\t"So, ""thus""."\n"Tabs\t?"\tyes\n'
    assert read(tmp_path / name, content, **option)[0] == [("How?", 'So, "thus".'), ("Tabs\t?", "yes")]
    quoted = open_corpus(DataConfig(train=str(tmp_path / name), **option)).fingerprint
    assert read(tmp_path / name, 'question\tanswer\n"How?"\t"a" or "b"\n', **option)[0] == [('"How?"', '"a" or "b"')]
    (tmp_path / name).write_text(content)
    plain = open_corpus(DataConfig(train=str(tmp_path / name), header=False, **option))
    assert next(iter(plain)) == ('"question"', '"answer"')
    assert plain.fingerprint != quoted


def test_one_column_with_delimiters_in_its_text_is_one_column(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "text\none; two\nthree; four\n")[0] == [("one; two",), ("three; four",)]
    assert read(tmp_path / "b.csv", "a;b\none;two\n", columns=("a;b",))[0] == [("one;two",)]


def test_a_delimiter_makes_a_table_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    _, lines = read(path, "question\tanswer\nHow?\tSo.\n")
    assert lines[-1].startswith("NOTE: lines hold tabs")
    assert read(path, delimiter="\t")[0] == [("How?", "So.")]


def test_a_delimiter_that_cannot_be_used(tmp_path: Path) -> None:
    for delimiter in (";;", '"', "\n"):
        message = refused(tmp_path / "a.csv", "a;;b\nc;;d\n", delimiter=delimiter)
        assert message.startswith(f"data.delimiter is {delimiter!r}; it must be one character")
    for data in ({"delimiter": ";"}, {"header": False}):
        path = tmp_path / "a.jsonl"
        message = refused(path, '{"text": "a"}\n', **data)
        assert message == f"data.delimiter and data.header are for .csv and .tsv files, which {path} is not"


def test_a_file_without_a_header_says_so_and_can_be_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    content = "".join(f"{question},{answer}\n" for question, answer in QA)
    examples, lines = read(path, content)
    assert examples == QA[1:]
    assert lines[-1].startswith(
        "NOTE: the first row is taken for the names of the columns, but 'How do I sort a list?'"
    )
    assert "--data.no-header" in lines[-1]
    examples, lines = read(path, header=False)
    assert examples == QA
    assert lines == (f"sentence ← 1: {QA[0][0]}", f"positive ← 2: {QA[0][1]}")
    numbered = "".join(f"{n},{question},{answer}\n" for n, (question, answer) in enumerate(QA, 1))
    assert "--data.no-header" in refused(path, numbered)
    assert refused(path, header=False).endswith("--data.columns 2 3")
    assert read(path, header=False, columns=("2", "3"))[0] == QA
    assert "--data.no-header" in refused(path, columns=("question",))


@pytest.fixture
def options(tiny_bert: Path, tmp_path: Path) -> list[str]:
    """Options of a run on questions and answers that have ids."""
    path = tmp_path / "qa.csv"
    path.write_text(table("id,question,answer", "17", "18"))
    options = ["--model.path", str(tiny_bert), "--data.train", str(path), "--data.cache", str(tmp_path / "cache")]
    return [*options, "--batch-size", "8", "--data.columns", "question", "answer"]


FIRST = r"sentence ← question: How do I sort a list\?\s+positive ← answer: Call sorted on it\.\s"


def test_the_first_lines_of_an_inspection_show_the_columns(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "inspect", "unsup_bert_base", *options])
    assert re.search(FIRST, "".join(capsys.readouterr().out.splitlines(True)[:4]))


@pytest.mark.full
def test_the_first_lines_of_a_run_show_the_columns(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "unsup_bert_base", *options, "--evaluation.dev", "", "--output", str(tmp_path / "run")])
    assert re.search(FIRST, "".join(capsys.readouterr().out.splitlines(True)[:6]))


def test_tokens_from_the_cache_know_their_columns(tiny_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    path.write_text(table("id,question,answer", "17", "18"))
    tokenizer, config = load_tokenizer(tiny_bert), DataConfig(train=str(path), columns=("answer",))
    tables = [tokenize_corpus(open_corpus(config), tokenizer, 8, tmp_path / "cache", progress=False) for _ in "ab"]
    assert [t.origin for t in tables] == [("sentence ← answer: Call sorted on it.",)] * 2


def test_hard_negatives_may_begin_late(tiny_bert: Path, tmp_path: Path) -> None:
    """As in a mined file, of which few examples have many."""
    rows = [{"sentence": f"a dog {n}", "positive": f"dog {n}", "negative_1": None} for n in range(1500)]
    rows[1400]["negative_1"] = "a red house"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tokenize_corpus(
        open_corpus(DataConfig(train=str(tmp_path / "rows.jsonl"))),
        load_tokenizer(tiny_bert),
        8,
        tmp_path / "cache",
        progress=False,
    )
    present = table.present(np.arange(1500))
    assert present is not None
    assert np.flatnonzero(present[:, 2]).tolist() == [1400]
