"""Transfer tasks: SentEval's layout, folds without leaks, and what classifiers make of vectors of known worth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.errors import InputError
from simcse_jax.evaluation import probe
from simcse_jax.evaluation.probe import C, held_out, k_fold, nested_k_fold
from simcse_jax.evaluation.suite import evaluate_models, expand_tasks, load_suite
from simcse_jax.evaluation.transfer import evaluate_transfer
from simcse_jax.evaluation.transfer_tasks import ALL_TRANSFER_TASKS, TRANSFER_TASKS, load_transfer_task, sentences_of

OFFICIAL = {
    "MR": {"train": 10662},
    "CR": {"train": 3775},
    "SUBJ": {"train": 10000},
    "MPQA": {"train": 10606},
    "SST2": {"train": 67349, "dev": 872, "test": 1821},
    "TREC": {"train": 5452, "test": 500},
    "MRPC": {"train": 4076, "test": 1725},
    "SICKEntailment": {"train": 4500, "dev": 500, "test": 4927},
}
TREC = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
SICK = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")


def write(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


@pytest.fixture(scope="module")
def senteval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks in SentEval's layout."""
    root = tmp_path_factory.mktemp("senteval")
    write_transfer(root)
    return root


def write_transfer(root: Path) -> None:
    """Writes all transfer tasks in SentEval's layout, the label in each sentence: `w3` is one of label 3."""
    rng = np.random.default_rng(0)

    def sentence(label: int) -> str:
        return " ".join([f"w{label}", *(f"x{n}" for n in rng.integers(50, size=rng.integers(1, 6)))])

    for folder, positive, negative in (
        ("MR", "rt-polarity.pos", "rt-polarity.neg"),
        ("CR", "custrev.pos", "custrev.neg"),
        ("SUBJ", "subj.objective", "subj.subjective"),
        ("MPQA", "mpqa.pos", "mpqa.neg"),
    ):
        for label, file in ((1, positive), (0, negative)):
            write(root / folder / file, [sentence(label) for _ in range(20)])
    for split in ("train", "dev", "test"):
        write(root / f"SST/binary/sentiment-{split}", [f"{sentence(n % 2)}\t{n % 2}" for n in range(24)])
    for file in ("train_5500", "TREC_10"):
        write(root / f"TREC/{file}.label", [f"{TREC[n % 6]}:sub {sentence(n % 6)}" for n in range(72)])
    for split in ("train", "test"):
        rows = [f"{n % 2}\t1\t2\t{sentence(9)}\t{sentence(9 - n % 2)}" for n in range(40)]
        write(root / f"MRPC/msr_paraphrase_{split}.txt", ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows])
    for file in ("SICK_train", "SICK_trial", "SICK_test_annotated"):
        rows = [f"{n}\t{sentence(5)}\t{sentence(5 + n % 3)}\t3.0\t{SICK[n % 3]}" for n in range(36)]
        write(root / f"SICK/{file}.txt", ["pair_ID\tsentence_A\tsentence_B\trelatedness_score\tjudgment", *rows])


def telling(sentences: list[str]) -> np.ndarray:
    """Vectors that hold the label, and noise."""
    rng = np.random.default_rng(len(sentences))
    labels = np.eye(10)[[int(s[1]) if s else 0 for s in sentences]]
    return np.concatenate([5 * labels, 0.1 * rng.normal(size=(len(sentences), 3))], axis=1).astype(np.float32)


def random_examples(seed: int, n: int, classes: int, signal: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    return rng.normal(size=(n, 8)) + signal * np.eye(classes, 8)[labels], labels


def test_counts_are_the_official_ones(real_data: Path) -> None:
    for name in ALL_TRANSFER_TASKS:
        task = load_transfer_task(name, real_data / "senteval")
        assert {split: len(s.labels) for split, s in task.splits.items()} == OFFICIAL[name]


def test_layout(tmp_path: Path) -> None:
    """Blank lines are sentences, Latin-1 is read, and rows stand in SentEval's order: by words, then by label."""
    write(tmp_path / "CR/custrev.pos", ["b c d", "", *["p"] * 12])
    write(tmp_path / "CR/custrev.neg", ["caf\xe9", "q  r ", *["n"] * 12], "latin-1")
    split = load_transfer_task("CR", tmp_path).splits["train"]
    assert split.second is None
    assert split.first == ["", "café", *["n"] * 12, *["p"] * 12, "q r", "b c d"]
    assert split.labels.tolist() == [1, *[0] * 13, *[1] * 12, 0, 1]
    write(tmp_path / "TREC/train_5500.label", [f"{kind}:x What  is {kind} ?" for kind in TREC for _ in range(10)])
    write(tmp_path / "TREC/TREC_10.label", ["NUM:dist How far : there ?"])
    test = load_transfer_task("TREC", tmp_path).splits["test"]
    assert (test.first, test.labels.tolist()) == (["How far : there ?"], [5])


def test_features_of_pairs(senteval: Path) -> None:
    split = load_transfer_task("MRPC", senteval).splits["test"]
    sentences = split.first + (split.second or [])
    table = dict(zip(sentences, np.random.default_rng(0).normal(size=(80, 4)), strict=True))
    features = split.features(lambda asked: np.stack([table[s] for s in asked]))
    u, v = table[split.first[3]], table[(split.second or [])[3]]
    np.testing.assert_allclose(features[3], [*np.abs(u - v), *(u * v)])


def test_separable_labels_are_found_and_each_sentence_is_encoded_once(senteval: Path) -> None:
    seen: list[list[str]] = []

    def encode(sentences: list[str]) -> np.ndarray:
        seen.append(sentences)
        return telling(sentences)

    tasks = [load_transfer_task(name, senteval, "fasttest") for name in ALL_TRANSFER_TASKS]
    scores = evaluate_transfer(tasks, encode, "fasttest")
    assert scores["reported"] == pytest.approx(dict.fromkeys([*ALL_TRANSFER_TASKS, "Avg."], 100.0))
    assert scores["tasks"]["MRPC"]["f1"] == pytest.approx(100)
    assert len(seen) == 1
    assert len(seen[0]) == len(set(seen[0]))
    assert set(seen[0]) == set(sentences_of(tasks))


def test_dev_reports_held_out_training_data(senteval: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never looks at test vectors."""
    monkeypatch.setattr(probe, "_accuracy", None)
    tasks = [load_transfer_task(name, senteval, "dev") for name in ("MR", "SST2", "TREC", "MRPC")]
    scores = evaluate_transfer(tasks, telling, "dev")
    assert all("accuracy" not in task and "f1" not in task for task in scores["tasks"].values())
    assert scores["reported"]["MR"] == scores["tasks"]["MR"]["dev_accuracy"]


Run = Callable[[tuple[np.ndarray, np.ndarray]], Any]
PROTOCOLS: dict[str, Run] = {
    "nested": lambda examples: nested_k_fold(examples, 5),
    "k-fold": lambda examples: k_fold(examples, random_examples(7, 400, 2, 0.0), 5),
    "held out": lambda examples: held_out(examples, random_examples(5, 400, 2, 0.0), random_examples(6, 400, 2, 0.0)),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_random_labels_are_at_chance(name: str) -> None:
    """Not so if a classifier had seen what it is scored on: 8 features fit 40 % of this noise too well."""
    found = PROTOCOLS[name](random_examples(1, 400, 2, 0.0))
    assert abs(found.test - 50) < 8
    again = PROTOCOLS[name](random_examples(1, 400, 2, 0.0))
    assert (again.dev, again.test, again.c) == (found.dev, found.test, found.c)


def test_folds_are_stratified_and_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outer and inner: each row is tested once, none is trained on, and labels keep their proportions."""
    calls: list[tuple[np.ndarray, np.ndarray]] = []
    x, y = np.arange(100.0)[:, None], (np.arange(100) % 4 == 0).astype(np.int64)

    def record(train: Any, held: Any, grid: Any = C) -> list[float]:
        calls.append((train[0][:, 0], held[0][:, 0]))
        assert (train[1].sum() * 4, held[1].sum() * 4) == (len(train[1]), len(held[1]))
        return [50.0] * len(grid)

    outer: list[tuple[np.ndarray, np.ndarray]] = []

    def score(train: Any, test: Any, c: float) -> tuple[float, np.ndarray]:
        outer.append((train[0][:, 0], test[0][:, 0]))
        assert c == C[0]  # of those that tie, the least
        return 60.0, test[1]

    monkeypatch.setattr(probe, "_path", record)
    monkeypatch.setattr(probe, "_accuracy", score)
    monkeypatch.setattr(probe, "_parallel", lambda function, values: [function(value) for value in values])
    found = nested_k_fold((x, y), 5)
    assert (found.dev, found.test, len(calls), len(outer)) == (50.0, 60.0, 25, 5)
    assert sorted(np.concatenate([test for _, test in outer])) == list(range(100))
    for (train, test), inner in zip(outer, np.reshape(np.array(calls, object), (5, 5, 2)), strict=True):
        assert set(train) == set(range(100)) - set(test)
        assert sorted(np.concatenate([held for _, held in inner])) == sorted(train)
        for part, held in inner:
            assert set(part) | set(held) == set(train)
            assert not set(part) & set(held)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_classifier_is_at_the_optimum(classes: int) -> None:
    """C · (sum of cross-entropies) + ½ ‖W‖² has no gradient there."""
    x, y = random_examples(2, 90, classes, 1.0)
    model = probe._classifier(0.5).fit(x, y)
    w, b = model.coef_.T, model.intercept_
    if classes == 2:
        error = 1 / (1 + np.exp(-(x @ w + b))) - y[:, None]
    else:
        logits = x @ w + b
        error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(classes)[y]
    assert np.abs(0.5 * x.T @ error + w).max() < 1e-2
    assert np.abs(w).max() > 0.1


def plain(train: Any, held: Any, c: float) -> float:
    """Accuracy of a classifier that was trained on its own."""
    from sklearn.linear_model import LogisticRegression

    return 100 * float(LogisticRegression(C=c, max_iter=1000).fit(*train).score(*held))


def plain_nested(x: np.ndarray, y: np.ndarray, folds: int) -> tuple[float, float]:
    """Dev and test accuracy of nested cross-validation, loop by loop."""
    from sklearn.model_selection import StratifiedKFold

    dev, test = [], []
    splitter = StratifiedKFold(folds, shuffle=True, random_state=1111)
    for part, out in splitter.split(x, y):
        inner = list(splitter.split(x[part], y[part]))
        scores = []
        for c in (2.0**t for t in range(-2, 4)):
            each = [plain((x[part][a], y[part][a]), (x[part][b], y[part][b]), c) for a, b in inner]
            scores.append(round(float(np.mean(each)), 2))
        best = int(np.argmax(scores))
        dev.append(scores[best])
        test.append(plain((x[part], y[part]), (x[out], y[out]), 2.0 ** (best - 2)))
    return float(np.mean(dev)), float(np.mean(test))


def test_nested_folds_are_sentevals() -> None:
    """Warm starts and threads change nothing."""
    x, y = random_examples(3, 150, 3, 0.5)
    found = nested_k_fold((x, y), 3)
    assert len(set(found.c)) > 1  # the grid matters
    assert (found.dev, found.test) == pytest.approx(plain_nested(x, y, 3))


@pytest.mark.parametrize(
    ("name", "file", "lines", "message"),
    [
        ("MR", "MR/rt-polarity.pos", ["a"] * 5, "MR has 5 training examples of the label 1; expected at least 12"),
        (
            "SST2",
            "SST/binary/sentiment-dev",
            ["a b\t2"],
            "line 1 has the label '2'; expected one of 0, 1",
        ),
        ("SST2", "SST/binary/sentiment-dev", ["a b 1"], "line 1 has 1 columns; expected 2"),
        ("TREC", "TREC/TREC_10.label", ["DESC How far ?"], "line 1 must be LABEL:sublabel and a question"),
        ("TREC", "TREC/TREC_10.label", ["DES:x How ?"], "has the label 'DES'; expected one of ABBR"),
        ("MRPC", "MRPC/msr_paraphrase_test.txt", ["h", "1\t2\t3\ta"], "line 2 has 4 columns; expected 5"),
        ("SICKEntailment", "SICK/SICK_trial.txt", ["h", "1\ta\tb\t3\tMAYBE"], "has the label 'MAYBE'"),
    ],
)
def test_malformed_files_are_refused(
    name: str, file: str, lines: list[str], message: str, senteval: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(senteval, tmp_path / "data")
    write(tmp_path / "data" / file, lines)
    with pytest.raises(InputError, match=r"\w") as caught:
        load_transfer_task(name, tmp_path / "data")
    assert message in str(caught.value)
    (tmp_path / "data" / file).unlink()
    with pytest.raises(InputError, match="no file"):
        load_transfer_task(name, tmp_path / "data")
    with pytest.raises(InputError, match="needs SentEval's data"):
        load_transfer_task(name, "")


def test_sets_of_tasks(senteval: Path) -> None:
    from simcse_jax.evaluation.sts import STS_TASKS

    assert expand_tasks(["sts"], "test") == list(STS_TASKS)
    assert expand_tasks(["STS12", "sts", "x.tsv"], "fasttest") == [*STS_TASKS, "x.tsv"]
    assert expand_tasks(["sts"], "dev") == ["STSBenchmark", "SICKRelatedness"]
    assert expand_tasks(["full"], "test") == [*STS_TASKS, *TRANSFER_TASKS]
    assert expand_tasks(["full"], "dev") == ["STSBenchmark", "SICKRelatedness", *TRANSFER_TASKS]
    with pytest.raises(InputError, match="unknown task 'SST-2': did you mean 'SST2'"):
        load_suite(["SST-2"], senteval)
    with pytest.raises(InputError, match="no task given"):
        load_suite([], senteval)


def test_both_kinds_together(senteval: Path, tmp_path: Path) -> None:
    write(tmp_path / "own.tsv", ["sentence1\tsentence2\tscore", "w1 x1\tw1 x2\t5", "w1 x1\tw2\t0", "w3\tw2\t1"])
    suite = load_suite(["TREC", str(tmp_path / "own.tsv"), "SST2"], senteval, "fasttest")
    (result,) = evaluate_models(suite, [telling])
    assert list(result["transfer"]["reported"]) == ["TREC", "SST2", "Avg."]
    assert list(result["sts"]["reported"]) == [str(tmp_path / "own.tsv"), "Avg."]
