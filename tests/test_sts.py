"""SentEval's similarity tasks: files in its layout, and scores against a plain statement of them."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

from simcse_jax.cli import main
from simcse_jax.config import EvaluationConfig
from simcse_jax.errors import InputError
from simcse_jax.evaluation import sts
from simcse_jax.evaluation.sts import (
    STS_TASKS,
    Subset,
    Task,
    cosine,
    evaluate,
    format_table,
    load_task,
    mean_of_all,
    reported_pairs,
)
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.training.scores import load_tasks

WORDS = ("man", "woman", "dog", "cat", "runs", "eats", "red", "house", "river", "never")


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def random_pairs(rng: np.random.Generator, n: int) -> list[tuple[str, str, float]]:
    def sentence() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(2, 6)))

    return [(sentence(), sentence(), round(float(rng.uniform(0, 5)), 1)) for _ in range(n)]


@pytest.fixture(scope="module")
def senteval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in SentEval's layout with a few random pairs in every file."""
    root = tmp_path_factory.mktemp("senteval")
    write_similarity(root)
    return root


def write_similarity(root: Path) -> None:
    """Writes all similarity tasks in SentEval's layout, with a few random pairs in every file."""
    rng = np.random.default_rng(0)
    for task, subsets in sts._SUBSETS.items():
        for i, name in enumerate(subsets):
            pairs = random_pairs(rng, 4 + i)
            folder = root / "STS" / f"{task}-en-test"
            write(folder / f"STS.input.{name}.txt", *(f"{a}\t{b}" for a, b, _ in pairs))
            write(folder / f"STS.gs.{name}.txt", *(str(gold) for *_, gold in pairs))
    for split, file in sts._SPLITS["STSBenchmark"].items():
        rows = [
            f"main-news\t{split}\t2016\t{i}\t{gold}\t{a}\t{b}" for i, (a, b, gold) in enumerate(random_pairs(rng, 5))
        ]
        write(root / file, *rows)
    for file in sts._SPLITS["SICKRelatedness"].values():
        rows = [f"{i}\t{a}\t{b}\t{gold}\tNEUTRAL" for i, (a, b, gold) in enumerate(random_pairs(rng, 6))]
        write(root / file, "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment", *rows)


def vectors_of(sentences: list[str]) -> np.ndarray:
    """Counts of letters: equal sentences have equal vectors, and no two words are alike."""
    return np.array([[s.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for s in sentences], np.float32)


def test_pairs_without_gold_are_dropped(tmp_path: Path) -> None:
    for name in sts._SUBSETS["STS13"]:
        folder = tmp_path / "STS" / "STS13-en-test"
        write(folder / f"STS.input.{name}.txt", "a  b\tc ", '"d\te"', "f\tg\textra")
        write(folder / f"STS.gs.{name}.txt", "2.5", "", "0")
    task = load_task("STS13", tmp_path)
    assert [s.name for s in task.subsets] == ["FNWN", "headlines", "OnWN"]
    assert task.reported == "all"
    assert task.subsets[0].first == ["a b", "f"]
    assert task.subsets[0].second == ["c", "g"]
    assert task.subsets[0].gold.tolist() == [2.5, 0]


def test_quotes_are_characters(tmp_path: Path) -> None:
    write(
        tmp_path / "STS/STSBenchmark/sts-test.csv",
        'm\tf\t2012\t1\t3.4\t"An open\tquote" here\tsource',
        "m\tf\ty\t2\t1\ta\tb",
    )
    subset = load_task("STSBenchmark", tmp_path).subsets[0]
    assert (subset.first, subset.second, subset.gold.tolist()) == (['"An open', "a"], ['quote" here', "b"], [3.4, 1])


def test_sick_has_a_header(tmp_path: Path) -> None:
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"
    write(tmp_path / "SICK/SICK_test_annotated.txt", header, "6\tA  dog\tTwo dogs\t3.3\tNEUTRAL")
    subset = load_task("SICKRelatedness", tmp_path).subsets[0]
    assert (subset.first, subset.second, subset.gold.tolist()) == (["A dog"], ["Two dogs"], [3.3])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_of_ones_own(mark: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "own.tsv"
    text = end.join(["sentence1\tsentence2\tscore", "a b\tc\t0.5", "", 'd "e\tf\t1', ""])
    path.write_bytes((mark + text).encode())
    task = load_task(str(path), "")
    assert (task.name, task.reported, len(task.subsets)) == (str(path), "all", 1)
    subset = task.subsets[0]
    assert (subset.first, subset.second, subset.gold.tolist()) == (["a b", 'd "e'], ["c", "f"], [0.5, 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have the columns sentence1, sentence2 and score .*; it has none"),
        (b"a\tb\t1\n", "must have the columns .*; it has a, b, 1. For pairs of a question and its answer"),
        (b"A man eats.\tHe eats.\t4\n", "it has A man eats., He eats., 4. If that row is an example, put the row of"),
        (b"sentence1\tsentence2\tscore\n", "holds no scored pair"),
        (b"sentence1\tsentence2\tscore\na\tb\t1\n\nc\td\n", "line 4 has 2 columns"),
        (b"sentence1\tsentence2\tscore\na\tb\thigh\n", "'high'"),
        (b"sentence1\tsentence2\tscore\na\tb\tnan\n", "not finite"),
        (b"sentence1\tsentence2\tscore\na\tcaf\xe9\t1\n", "not UTF-8 .line 2, byte 31 "),
    ],
)
def test_a_malformed_table_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_task(str(path), "")
    assert str(path) in str(caught.value)


def test_malformed_files_of_the_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*sts-test\.csv.*STS/ and SICK/"):
        load_task("STSBenchmark", tmp_path)
    write(tmp_path / "STS/STSBenchmark/sts-test.csv", "m\tf\t2012\t1\t3.4\ta\tb", "m\tf\t2012\t2\t3.4\ta")
    with pytest.raises(InputError, match=r"sts-test\.csv, line 2 has 6 columns; expected 7"):
        load_task("STSBenchmark", tmp_path)
    write(tmp_path / "SICK/SICK_test_annotated.txt", "header", "1\ta\tb")
    with pytest.raises(InputError, match=r"SICK_test_annotated\.txt, line 2 has 3 columns"):
        load_task("SICKRelatedness", tmp_path)
    for name in sts._SUBSETS["STS13"]:
        write(tmp_path / f"STS/STS13-en-test/STS.input.{name}.txt", "a\tb", "c")
        write(tmp_path / f"STS/STS13-en-test/STS.gs.{name}.txt", "1", "2", "3")
    with pytest.raises(InputError, match="has 2 lines but its gold file has 3"):
        load_task("STS13", tmp_path)
    write(tmp_path / "STS/STS13-en-test/STS.gs.FNWN.txt", "1", "2")
    with pytest.raises(InputError, match=r"FNWN\.txt, line 2 has 1 columns"):
        load_task("STS13", tmp_path)


def test_the_tasks_of_a_run(senteval: Path) -> None:
    found = load_tasks(EvaluationConfig(data=str(senteval), dev="STSBenchmark", test=("sts",)))
    assert [task.name for task in found.test] == list(STS_TASKS)
    assert found.dev is not None
    assert found.dev.name == "STSBenchmark"
    with pytest.raises(InputError) as caught:
        load_tasks(EvaluationConfig(dev="STSBenchmark", test=("STS12", "STSB", "none.tsv")))
    lacking, unknown, missing = caught.value.args
    assert "evaluation.dev STSBenchmark needs SentEval's data" in lacking
    assert "unknown task 'STSB'" in unknown
    assert "no file none.tsv" in missing


def test_task_names(senteval: Path) -> None:
    meant = {
        **dict.fromkeys(("STSbenchmark", "STSB", "STS-B", "stsb", "sts", "stsb_spearman"), "STSBenchmark"),
        **dict.fromkeys(("SICK-R", "sick", "sickr"), "SICKRelatedness"),
        **{"sts12": "STS12", "STS-16": "STS16"},
    }
    for name, task in meant.items():
        with pytest.raises(InputError, match=f"unknown task '{name}': did you mean '{task}'"):
            load_task(name, senteval)
    with pytest.raises(InputError, match="unknown task 'STS12,STS13': separate names by spaces; known are STS12"):
        load_task("STS12,STS13", senteval)
    with pytest.raises(InputError, match="unknown task 'zzz': known are STS12"):
        load_task("zzz", senteval)
    with pytest.raises(InputError, match="STS12 has no dev split"):
        load_task("STS12", senteval, "dev")
    with pytest.raises(InputError, match="STS12 needs SentEval's data"):
        load_task("STS12", "")


def test_dev_and_all_splits(senteval: Path) -> None:
    for name in ("STSBenchmark", "SICKRelatedness"):
        test, dev = load_task(name, senteval), load_task(name, senteval, "dev")
        assert [(t.reported, [s.name for s in t.subsets]) for t in (test, dev)] == [
            ("test", ["test"]),
            ("dev", ["dev"]),
        ]
        assert test.subsets[0].first != dev.subsets[0].first
        every = load_task(name, senteval, "dev", all_splits=True)
        assert every.reported == "dev"
        assert [s.name for s in every.subsets] == ["train", "dev", "test"]


def plain_cosine(a: str, b: str) -> float:
    x, y = (v.astype(np.float64) for v in vectors_of([a, b]))
    return float(round(x @ y / (x @ x) ** 0.5 / (y @ y) ** 0.5, 6))


def test_scores_are_those_of_a_plain_statement(senteval: Path) -> None:
    """Subset by subset, concatenated, and their plain and weighted means; Spearman is Pearson of the ranks."""
    tasks = [load_task(name, senteval, all_splits=True) for name in STS_TASKS]
    results = evaluate(tasks, vectors_of)
    for task in tasks:
        system = [[plain_cosine(a, b) for a, b in zip(s.first, s.second, strict=True)] for s in task.subsets]
        spearman = [100 * spearmanr(x, s.gold).statistic for x, s in zip(system, task.subsets, strict=True)]
        pearson = [100 * pearsonr(x, s.gold).statistic for x, s in zip(system, task.subsets, strict=True)]
        sizes = np.array([len(s.gold) for s in task.subsets])
        everything, gold = np.concatenate(system), np.concatenate([s.gold for s in task.subsets])
        scores = results["tasks"][task.name]
        for kind, parts in (("pearson", pearson), ("spearman", spearman)):
            assert [scores[s.name][kind] for s in task.subsets] == pytest.approx(parts)
            assert scores["all"][kind]["mean"] == pytest.approx(sum(parts) / len(parts))
            assert scores["all"][kind]["wmean"] == pytest.approx((parts @ sizes) / sizes.sum())
        assert scores["all"]["pearson"]["all"] == pytest.approx(100 * np.corrcoef(everything, gold)[0, 1])
        ranks = np.corrcoef(rankdata(everything), rankdata(gold))[0, 1]
        assert scores["all"]["spearman"]["all"] == pytest.approx(100 * ranks)
        assert [scores[s.name]["pairs"] for s in task.subsets] == sizes.tolist()
        wanted = scores["all"]["spearman"]["all"] if task.reported == "all" else scores["test"]["spearman"]
        assert results["reported"][task.name] == wanted
    reported = [results["reported"][name] for name in STS_TASKS]
    assert list(results["reported"]) == [*STS_TASKS, "Avg."]
    assert results["reported"]["Avg."] == pytest.approx(np.mean(reported))


def test_each_distinct_sentence_is_encoded_once(senteval: Path) -> None:
    seen: list[list[str]] = []

    def encode(sentences: list[str]) -> np.ndarray:
        seen.append(sentences)
        return vectors_of(sentences)

    tasks = [load_task(name, senteval) for name in STS_TASKS]
    evaluate([*tasks, tasks[0]], encode)
    assert len(seen) == 1
    assert len(seen[0]) == len(set(seen[0]))
    assert set(seen[0]) == {s for t in tasks for u in t.subsets for s in (*u.first, *u.second)}


def test_a_cosine_that_is_not_a_number_counts_as_zero() -> None:
    a = np.array([[1, 0], [0, 0], [np.nan, 1], [1, 1], [3, 4]], np.float32)
    b = np.array([[-2, 0], [1, 1], [1, 1], [1, 0], [3, 4]], np.float32)
    np.testing.assert_allclose(cosine(a, b), [-1, 0, 0, 0.5**0.5, 1], atol=1e-6)
    subset = Subset("all", ["", "a", "ab", "abc"], ["b", "a", "b", "b"], np.array([0.0, 3, 2, 1]))
    scores = evaluate([Task("own", [subset], "all")], vectors_of)["reported"]
    assert scores["own"] == pytest.approx(100)


def test_a_constant_side_has_no_score() -> None:
    """And a single pair has none; a mean with such a one in it is absent, too."""
    alike = Subset("alike", ["a", "b"], ["a", "b"], np.array([1.0, 2.0]))
    single = Subset("single", ["a"], ["b"], np.array([1.0]))
    fine = Subset("fine", ["a", "b"], ["b", "b"], np.array([1.0, 2.0]))
    tasks = [Task(s.name, [s], "all") for s in (alike, single, fine)] + [Task("two", [fine, alike], "all")]
    found = evaluate(tasks, vectors_of)
    reported = found["reported"]
    assert [reported[name] for name in ("alike", "single", "Avg.")] == [None] * 3
    assert reported["fine"] == pytest.approx(100)
    both = found["tasks"]["two"]["all"]["pearson"]
    assert both["all"] is not None
    assert (both["mean"], both["wmean"]) == (None, None)
    assert mean_of_all([]) is None


def test_reported_pairs_are_the_scores_of_the_model_and_the_gold_scores() -> None:
    """Of the subsets behind the reported figure alone, in their order."""
    subsets = [Subset(name, ["a", "b"], ["b", "a c"], np.array([1.0, gold])) for name, gold in (("x", 2.0), ("y", 5.0))]
    vector_of = {"a": [1.0, 0.0], "b": [1.0, 1.0], "a c": [0.0, 1.0]}

    def encode(sentences: list[str]) -> np.ndarray:
        return np.array([vector_of[sentence] for sentence in sentences])

    cosines = [0.707107, 0.707107]
    for reported, expected, gold in (("y", cosines, [1.0, 5.0]), ("all", cosines * 2, [1.0, 2.0, 1.0, 5.0])):
        system, wanted = reported_pairs(Task("made up", subsets, reported), encode)
        np.testing.assert_allclose(system, expected)
        np.testing.assert_array_equal(wanted, gold)


def test_table() -> None:
    rows = {"before": {"STS12": 1.234, "/far/own.tsv": 100.0}, "now": {"STS12": -5.0, "/far/own.tsv": None}}
    assert format_table(rows).splitlines() == [
        "         STS12     own",
        "before    1.23  100.00",
        "now      -5.00       –",
    ]


def evaluate_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    main(["evaluate", *arguments])
    return capsys.readouterr().out.splitlines()


def test_the_command_prints_a_table_and_writes_json(
    tiny_bert: Path, senteval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the scores of the vectors that the Python interface gives."""
    own = tmp_path / "own.tsv"
    write(
        own, "sentence1\tsentence2\tscore", *(f"{a}\t{b}\t{g}" for a, b, g in random_pairs(np.random.default_rng(1), 9))
    )
    file = tmp_path / "scores.json"
    lines = evaluate_command(
        capsys,
        str(tiny_bert),
        "--pooler",
        "avg",
        "--data",
        str(senteval),
        "--tasks",
        "sts",
        str(own),
        "--json",
        str(file),
    )
    assert lines[0] == "Spearman × 100, test"
    assert lines[1].split() == [*STS_TASKS, "own", "Avg."]
    everything: dict[str, Any] = json.loads(file.read_text())
    assert (everything["mode"], everything["bootstrap"], len(everything["models"])) == ("test", 0, 1)
    assert everything["models"][0]["model"] == str(tiny_bert)
    assert everything["models"][0]["pooler"] == "avg"
    written = everything["models"][0]["sts"]
    label, *figures = lines[2].removeprefix(f"{tiny_bert} ").split()
    assert label == "(avg)"
    assert [float(x) for x in figures] == pytest.approx(list(written["reported"].values()), abs=0.005)
    model = SimCSE(tiny_bert, "avg")
    tasks = [load_task(name, senteval) for name in (*STS_TASKS, str(own))]
    expected = evaluate(tasks, lambda sentences: model.encode(sentences, normalize=False))
    assert jax.tree.structure(written["tasks"]) == jax.tree.structure(expected["tasks"])
    assert jax.tree.leaves(written["tasks"]) == pytest.approx(jax.tree.leaves(expected["tasks"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own.tsv", "scores.json"]


def test_the_command_scores_dev_splits(tiny_bert: Path, senteval: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = evaluate_command(
        capsys, str(tiny_bert), "--pooler", "cls_before_pooler", "--data", str(senteval), "--mode", "dev"
    )
    assert lines[0] == "Spearman × 100, dev"
    assert lines[1].split() == ["STSBenchmark", "SICKRelatedness", "Avg."]
