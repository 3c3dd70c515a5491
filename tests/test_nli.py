"""Triplets from the labelled pairs of SNLI and MultiNLI, in every format they come in."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from simcse_jax.cli import main
from simcse_jax.config import DataConfig
from simcse_jax.data.corpus import open_corpus, open_source
from simcse_jax.data.nli import CLASSES, Pair, build_triplets, read_pairs
from simcse_jax.errors import InputError

OFFICIAL = ["gold_label", "sentence1_parse", "sentence1", "sentence2", "pairID"]
PAIRS = [
    Pair("A man runs.", "Someone moves.", "entailment"),
    Pair("A man runs.", "He is late.", "neutral"),
    Pair("A man runs.", "A man sleeps.", "contradiction"),
    Pair("Two dogs, wet.", "Dogs.", "entailment"),
    Pair("Two dogs, wet.", "Cats.", ""),
]


def official(pair: Pair) -> list[str]:
    return [pair.label or "-", "(ROOT)", pair.premise, pair.hypothesis, "1"]


def write(path: Path, pairs: list[Pair]) -> Path:
    """In SNLI's own columns."""
    rows = [official(pair) for pair in pairs]
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(OFFICIAL, row, strict=True)) | {"annotator_labels": ["neutral"]}) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(row) + "\n" for row in [OFFICIAL, *rows]))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([OFFICIAL, *rows])
    return path


def pairs_of(path: Path | str) -> list[Pair]:
    return list(read_pairs(open_source(DataConfig(train=str(path)))))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_official_formats(ending: str, tmp_path: Path) -> None:
    assert pairs_of(write(tmp_path / f"snli.{ending}", PAIRS)) == PAIRS


def test_labels_as_numbers(tmp_path: Path) -> None:
    """As JSON numbers and as text; −1 is no label."""
    rows = [{"premise": "p", "hypothesis": str(n), "label": n} for n in (0, 1, 2, -1)]
    path = tmp_path / "nli.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [pair.label for pair in pairs_of(path)] == [*CLASSES, ""]
    path = tmp_path / "nli.csv"
    path.write_text("premise,hypothesis,label\n" + "".join(f"p,h,{n}\n" for n in (0, 1, 2, -1)))
    assert [pair.label for pair in pairs_of(path)] == [*CLASSES, ""]


def test_classes_are_named_by_the_data_set(tmp_path: Path) -> None:
    """Where it names them, in another order than the usual."""
    names = ("contradiction", "entailment", "neutral")

    class Source:
        name = "set"

        def header(self) -> tuple[str, ...]:
            return ("premise", "hypothesis", "label")

        def labels(self, column: str) -> tuple[str, ...]:
            assert column == "label"
            return names

        def identity(self) -> list[Any]:
            return []

        def rows(self, columns: tuple[str, ...]) -> Any:
            yield from (("set, row", n, ("p", "h", n)) for n in (0, 1, 2, -1))

    assert [pair.label for pair in read_pairs(Source())] == [*names, ""]


def test_tfds_rows(tfds_folder: Path) -> None:
    found = build_triplets(pairs_of("tfds:tiny_nli/plain"), seed=0)
    assert found.rows == [("p0 é", "h0", "h2")]
    assert found.pairs == {"entailment": 2, "neutral": 1, "contradiction": 1, "": 1}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a,b\n1,2\n", "has the columns a, b; expected premise, hypothesis and label, or"),
        ("premise,hypothesis,label\np,h,yes\n", "line 2 has the label 'yes' in column label; expected entailment"),
        ("premise,hypothesis,label\np,h,3\n", "line 2 has the label '3'"),
    ],
)
def test_rows_that_are_no_labelled_pairs(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "nli.csv").write_text(content)
    with pytest.raises(InputError, match=problem):
        pairs_of(tmp_path / "nli.csv")
    (tmp_path / "nli.txt").write_text(content.partition("\n")[2])  # a header would make a table of it
    with pytest.raises(InputError, match="has plain text; expected"):
        pairs_of(tmp_path / "nli.txt")


def test_a_triplet_for_each_premise_with_both_kinds() -> None:
    found = build_triplets(PAIRS, seed=0)
    assert found.rows == [("A man runs.", "Someone moves.", "A man sleeps.")]
    assert (found.premises, found.blank, found.pairs.total()) == (2, 0, 5)


def test_several_hypotheses_of_a_kind_are_drawn_from() -> None:
    """One triplet a premise all the same; the draw is the seed's; premises stay in their order."""
    pairs = [Pair(f"p{p}", f"{kind}{n}", kind) for n in range(4) for p in range(50) for kind in CLASSES]
    found = build_triplets(pairs, seed=1)
    assert [row[0] for row in found.rows] == [f"p{p}" for p in range(50)]
    for place, kind in ((1, "entailment"), (2, "contradiction")):
        assert {row[place] for row in found.rows} == {f"{kind}{n}" for n in range(4)}
    assert build_triplets(pairs, seed=1).rows == found.rows
    assert build_triplets(pairs, seed=2).rows != found.rows


def test_what_cannot_be_a_triplet_is_left_out() -> None:
    pairs = [
        Pair("p", "h", "entailment"),
        Pair("p", "h", "contradiction"),  # annotators did not agree
        Pair("q", "", "entailment"),
        Pair("q", "h", "contradiction"),
    ]
    found = build_triplets(pairs, seed=0)
    assert (found.rows, found.blank) == ([], 1)
    assert build_triplets([*pairs, Pair("p", "i", "contradiction")], seed=0).rows == [("p", "h", "i")]


def test_the_command_joins_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A premise of two files is one premise; what is written can be trained on."""
    first = write(tmp_path / "snli.jsonl", PAIRS)
    second = write(
        tmp_path / "more.tsv", [Pair("Two dogs, wet.", 'A "cat".', "contradiction"), Pair(" ", "x", "neutral")]
    )
    output = tmp_path / "nli.csv"
    main(["data", "nli", str(first), str(second), str(output), "--seed", "3"])
    assert list(open_corpus(DataConfig(train=str(output)))) == [
        ("A man runs.", "Someone moves.", "A man sleeps."),
        ("Two dogs, wet.", "Dogs.", 'A "cat".'),
    ]
    assert output.read_text().startswith("sent0,sent1,hard_neg")
    assert capsys.readouterr().out.splitlines() == [
        "7 pairs: 2 entailment, 2 neutral, 2 contradiction, 1 without a label",
        "left out: 1 pairs with a blank sentence",
        f"{output}: 2 triplets, one for each of 2 premises that has both kinds",
    ]


def test_a_command_that_fails_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, new = tmp_path / "nli.csv", tmp_path / "new.csv"
    output.write_text("before")
    good, bad = write(tmp_path / "good.jsonl", PAIRS), tmp_path / "bad.jsonl"
    bad.write_text(good.read_text() + "{broken\n")
    cases: list[tuple[list[str | Path], str]] = [
        ([good, bad, new], "line 6 is not JSON"),
        ([good, tmp_path / "none.jsonl", new], "no file"),
        ([write(tmp_path / "half.tsv", PAIRS[:2]), new], "no premise of .* has both"),
        ([output], "give one source or more"),
        ([good, output], r"nli\.csv exists: choose another .csv file to write, or remove it"),
        ([output, output], r"nli\.csv exists"),
        ([good, tmp_path / "out.tsv"], "give one source or more"),
        ([good, tmp_path / "none" / "out.csv"], "cannot be written"),
    ]
    for arguments, problem in cases:
        with pytest.raises(SystemExit):
            main(["data", "nli", *map(str, arguments)])
        message = capsys.readouterr().err
        assert re.search(problem, message), message
    assert output.read_text() == "before"
    assert {p.name for p in tmp_path.iterdir()} == {"nli.csv", "good.jsonl", "bad.jsonl", "half.tsv"}
