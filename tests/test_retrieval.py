"""Retrieval: its figures against a statement in NumPy and scikit-learn, its tasks, and how the commands take them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.config import EvaluationConfig
from simcse_jax.errors import InputError
from simcse_jax.evaluation import retrieval
from simcse_jax.evaluation.retrieval import METRICS, RetrievalTask, check_metric, load_retrieval, retrieve
from simcse_jax.evaluation.suite import load_suite
from simcse_jax.training.scores import load_tasks


def task_of(pairs: list[tuple[int, int]], questions: int, corpus: int) -> RetrievalTask:
    texts = [f"q{i}" for i in range(questions)], [f"a{i}" for i in range(corpus)]
    return RetrievalTask("a task", ("question", "answer"), *texts, np.array(pairs, np.int64), 0)


def lookup(questions: np.ndarray, corpus: np.ndarray):
    return lambda texts: np.stack([(questions if text[0] == "q" else corpus)[int(text[1:])] for text in texts])


def stated(task: RetrievalTask, questions: np.ndarray, corpus: np.ndarray) -> dict[str, float]:
    """The definitions, one question after the other, on the whole matrix of cosines."""
    lengths = np.linalg.norm(questions, axis=1)[:, None], np.linalg.norm(corpus, axis=1)
    cosines = np.round(questions @ corpus.T / np.maximum(lengths[0] * lengths[1], 1e-12), 6)
    figures: dict[str, list[float]] = {name: [] for name in METRICS}
    for number in range(len(questions)):
        answers = {int(a) for q, a in task.answers if q == number}
        ranked = sorted(range(len(corpus)), key=lambda i: (-cosines[number, i], i in answers))[:10]
        hits = [i in answers for i in ranked]
        gain = sum(1 / np.log2(rank + 1) for rank, hit in enumerate(hits, 1) if hit)
        figures["ndcg@10"].append(gain / sum(1 / np.log2(rank + 1) for rank in range(1, min(len(answers), 10) + 1)))
        figures["mrr@10"].append(1 / (hits.index(True) + 1) if True in hits else 0)
        for k in (1, 5, 10):
            figures[f"recall@{k}"].append(sum(hits[:k]) / len(answers))
    return {name: 100 * float(np.mean(values)) for name, values in figures.items()}


@pytest.mark.parametrize("width", [2, 24])
@pytest.mark.parametrize("corpus", [4, 60])
@pytest.mark.parametrize("block", [7, 4096])
def test_figures_are_those_of_the_definitions(
    width: int, corpus: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ties, shared answers, questions of up to 20 answers, a zero vector, and block by block."""
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    random = np.random.default_rng(width * corpus)
    pairs = [(q, int(a)) for q in range(30) for a in random.permutation(corpus)[: random.integers(1, 21)]]
    task = task_of(list(dict.fromkeys(pairs)), 30, corpus)
    questions, texts = (
        random.integers(-2, 3, (n, width)).astype(np.float32) for n in (30, corpus)
    )  # many equal cosines
    questions[3] = 0
    found = retrieve(task, lookup(questions, texts))
    assert found == pytest.approx(stated(task, questions, texts), abs=1e-9)
    assert 0 < found["recall@1"] < found["recall@5"] <= found["recall@10"] <= 100


def test_ndcg_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    relevant = random.random((20, 50)) < 0.1
    relevant[:, 0] |= ~relevant.any(axis=1)
    questions, texts = random.standard_normal((20, 8)), random.standard_normal((50, 8))
    task = task_of([(int(q), int(a)) for q, a in np.argwhere(relevant)], 20, 50)
    cosines = questions @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    expected = 100 * metrics.ndcg_score(relevant, cosines, k=10)
    assert retrieve(task, lookup(questions, texts))["ndcg@10"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.0, np.nan])
def test_a_model_that_tells_nothing_apart_scores_nothing(value: float) -> None:
    """Equal cosines put the answers last, however the file is ordered; and vectors that are not finite are no luck."""
    task = task_of([(i, i) for i in range(40)], 40, 40)
    same = np.full((40, 8), value, np.float32)
    assert retrieve(task, lookup(same, same)) == dict.fromkeys(METRICS, 0.0)
    nearly = same + np.float32(1e-8) * np.arange(8, dtype=np.float32)  # rounding is no luck either
    assert retrieve(task, lookup(nearly, nearly)) == dict.fromkeys(METRICS, 0.0)


def test_a_perfect_model_scores_100() -> None:
    task = task_of([(i, i) for i in range(40)], 40, 40)
    vectors = np.eye(40, dtype=np.float32)
    assert retrieve(task, lookup(vectors, 3 * vectors)) == pytest.approx(dict.fromkeys(METRICS, 100.0))


def write(path: Path, rows: list[tuple[str, ...]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def test_questions_and_answers_are_the_distinct_texts(tmp_path: Path) -> None:
    rows = [("question", "answer"), ("who?", "me"), ("why?", "so"), ("who?", "you"), ("what?", "so"), ("who?", "me ")]
    task = load_retrieval(write(tmp_path / "qa.csv", [*rows, ("", "nothing"), ("", "")]))
    assert task is not None
    assert task.questions == ["who?", "why?", "what?"]
    assert task.corpus == ["me", "so", "you"]
    assert task.answers.tolist() == [[0, 0], [1, 1], [0, 2], [2, 1]]
    assert "question ← question: 'who?', answer ← answer: 'me'; 3 questions, 3 answers, 1 rows" in task.describe()


def test_other_delimiters_are_found_and_lost_rows_said(tmp_path: Path) -> None:
    (path := tmp_path / "qa.csv").write_text("Who is it?;It is me.\nwhy?;so\nwhen?;now, or later\n")
    task = load_retrieval(str(path))
    assert task is not None
    assert task.corpus == ["so", "now, or later"]
    assert "NOTE: the first row is taken for the columns' names, and looks like sentences: if it is" in task.describe()


def test_named_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [("answer", "question"), ("1", "who?"), ("2", "why?")]
    task = load_retrieval(write(tmp_path / "qa.csv", rows), columns=("question", "answer"))
    assert task is not None
    assert (task.questions, task.corpus) == (["who?", "why?"], ["1", "2"])


def test_columns_decide_the_kind_of_task(tmp_path: Path) -> None:
    graded = write(tmp_path / "graded.csv", [("sentence1", "sentence2", "score"), ("a", "b", "1"), ("c", "d", "2")])
    more = write(tmp_path / "more.csv", [("id", "q", "a"), ("1", "who?", "me"), ("2", "why?", "so")])
    assert load_retrieval(graded) is None
    assert load_retrieval("STSBenchmark") is None
    assert load_retrieval(more) is None
    assert load_retrieval(graded, columns=("q", "a")) is None
    found = load_retrieval(more, columns=("q", "a"))
    assert found is not None
    assert found.questions == ["who?", "why?"]


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        ([("id", "text"), ("1", "a"), ("2", "b")], (), "but column id holds numbers: name the columns of the question"),
        ([("text", "gold"), ("a b", "yes"), ("b c", "no")], (), "but column gold holds labels"),
        ([("", "text"), ("a b", "me"), ("b c", "you")], (), "but column '' has no name of its own"),
        ([("answer", "question"), ("me", "who?"), ("so", "why?")], (), "but column answer comes first"),
        ([("q", "q"), ("who?", "me"), ("why?", "so")], (), "has two columns 'q': give each a name of its own"),
        ([("q", "a"), ("who?", "me"), ("why?", "me")], (), "has 1 different answers: retrieval needs two or more"),
        ([("q", "a")], (), "has 0 different answers"),
        ([("q", "a"), ("who?", "me"), ("why?", "so")], ("question", "a"), "has no column question; it has q, a"),
    ],
)
def test_files_that_are_no_questions_and_answers(
    tmp_path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        load_retrieval(write(tmp_path / "qa.csv", rows), columns=columns)


def test_a_metric_that_is_100_for_every_model_is_refused() -> None:
    task = task_of([(0, 0), (1, 1)], 2, 5)
    check_metric(task, "recall@1")
    check_metric(task, "ndcg@10")
    with pytest.raises(InputError, match="5 different answers, so recall@5 is 100 for every model"):
        check_metric(task, "recall@5")


QA = [("question", "answer"), *((f"the dog number {i} eats", f"a man runs with {i}") for i in range(12))]


def test_evaluate_takes_questions_and_answers(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qa, outputs = write(tmp_path / "qa.csv", QA), [tmp_path / f"scores.{kind}" for kind in ("json", "csv", "md")]
    graded = tmp_path / "pairs.tsv"
    graded.write_text("sentence1\tsentence2\tscore\na man\ta woman\t3\nthe dog\ta dog\t5\n")
    command = ["evaluate", str(tiny_bert), "--pooler", "avg", "--tasks", qa, str(graded), "--json", str(outputs[0])]
    main([*command, "--csv", str(outputs[1]), "--markdown", str(outputs[2])])
    shown = capsys.readouterr()
    assert "qa, retrieval × 100" in shown.out
    assert "question ← question: 'the dog number 0 eats'" in shown.err
    result = json.loads(outputs[0].read_text())["models"][0]
    assert list(result["retrieval"][qa]) == list(METRICS)
    assert list(result["sts"]["reported"]) == [str(graded), "Avg."]
    lines = list(csv.DictReader(outputs[1].read_text().splitlines()))
    assert [line["metric"] for line in lines] == ["spearman", "spearman", *METRICS]
    assert "**qa, retrieval × 100**" in outputs[2].read_text()


def test_columns_that_no_task_has_are_refused(tmp_path: Path) -> None:
    graded = write(tmp_path / "graded.csv", [("sentence1", "sentence2", "score"), ("a", "b", "1"), ("c", "d", "2")])
    qa, columns = write(tmp_path / "qa.csv", QA), ("question", "answer")
    with pytest.raises(InputError, match="columns names question and answer, which none of the tasks has"):
        load_suite([graded], "", columns=columns)
    with pytest.raises(InputError, match="columns names question and answer, which none of the tasks has"):
        load_tasks(EvaluationConfig(dev=graded, columns=columns))
    assert len(load_suite([graded, qa], "", columns=columns).retrieval) == 1
    assert load_tasks(EvaluationConfig(dev=graded, test=(qa,), columns=columns)).dev


@pytest.mark.full
def test_a_run_selects_by_retrieval(
    tiny_bert: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qa, run = write(tmp_path / "qa.csv", QA), tmp_path / "run"
    options = ["--model.path", str(tiny_bert), "--data.train", str(text_file), "--data.cache", str(tmp_path / "cache")]
    options += ["--max-steps", "4", "--batch-size", "16", "--evaluation.dev", qa, "--evaluation.every", "2"]
    command = ["train", "unsup_bert_base", "--output", str(run), *options]
    main([*command, "--evaluation.metric", "mrr@10", "--evaluation.test", qa])
    shown = capsys.readouterr().out
    assert "dev       retrieval, question ← question: 'the dog number 0 eats'" in shown
    assert "selects by mrr@10" in shown
    assert "step 2: dev mrr@10 " in shown
    assert "MRR@10 × 100, test" in shown
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    dev = [line for line in lines if "dev" in line]
    assert [line["step"] for line in dev] == [0, 2, 4]
    assert {f"dev_{name}" for name in METRICS} | {"dev_alignment", "dev_uniformity"} <= set(dev[0])
    assert all(line["dev"] == line["dev_mrr@10"] for line in dev)
    results = json.loads((run / "results.json").read_text())
    assert (results["metric"], results["test_metric"]) == ("mrr@10", "mrr@10")
    assert results["dev"] == max(line["dev"] for line in dev)
    scores = tmp_path / "scores.json"
    main(["evaluate", str(run), "--tasks", qa, "--json", str(scores)])
    found = json.loads(scores.read_text())["models"][0]["retrieval"][qa]
    assert found["mrr@10"] == pytest.approx(results["after"][qa], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--evaluation.metric", "spearman"], "has no scores: leave it out, or add a column score"),
        (["--evaluation.metric", "recall@10", "--evaluation.columns", "question"], "name two, of the question"),
    ],
)
def test_a_metric_that_the_dev_file_lacks_is_refused(
    tiny_bert: Path, text_file: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "unsup_bert_base", "--model.path", str(tiny_bert), "--data.train", str(text_file)]
    command += ["--output", str(tmp_path / "run"), "--evaluation.dev", write(tmp_path / "qa.csv", QA)]
    with pytest.raises(SystemExit, match="2"):
        main([*command, *options])
    assert says in capsys.readouterr().err
