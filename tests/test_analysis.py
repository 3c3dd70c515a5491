"""The geometry of sentence vectors, and the analysis of models that writes it down."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from simcse_jax.analysis.measure import measure as measure_vectors
from simcse_jax.analysis.measure import pairs_of
from simcse_jax.analysis.report import _path
from simcse_jax.cli import main
from simcse_jax.config import CheckpointConfig, Config, DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig
from simcse_jax.data.demo import demo_similarity
from simcse_jax.errors import InputError
from simcse_jax.evaluation.geometry import (
    alignment,
    average_cosine,
    effective_rank,
    gold_groups,
    indexed_pairs,
    iso_score,
    isotropy,
    positive_pairs,
    singular_values,
    uniformity,
)
from simcse_jax.evaluation.sts import Subset, Task, distinct_sentences, load_task
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import kept_steps, load_model
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.training.trainer import train

FILES = [
    *("cosines.csv", "cosines.png", "cosines.svg", "measures.csv", "plane.csv", "plane.png", "plane.svg"),
    *("report.md", "spectrum.csv", "spectrum.png", "spectrum.svg"),
]


def gaussian(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, width))


def test_average_cosine_is_that_of_all_pairs() -> None:
    x = gaussian(30, 5) * np.linspace(0.1, 9, 30)[:, None] + 1
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[np.triu_indices(30, 1)]
    assert average_cosine(x) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert average_cosine(np.ones((4, 3))) == pytest.approx(1)
    assert average_cosine(np.array([[1.0, 0], [-2, 0]])) == pytest.approx(-1)
    assert average_cosine(np.ones((1, 3))) is None


def test_isotropy_from_one_direction_to_none() -> None:
    assert isotropy(np.ones((50, 4))) == pytest.approx(math.exp(-2))
    # The 2H ends of the axes, in which no axis is preferred.
    assert isotropy(np.concatenate([np.eye(6), -3 * np.eye(6)])) == pytest.approx(1)
    cloud = gaussian(4000, 8)
    assert 0.95 < isotropy(cloud) < 1
    assert isotropy(cloud + 2) < 0.6
    assert isotropy(cloud) == pytest.approx(isotropy(7 * cloud))


def test_isotropy_is_the_ratio_of_partition_functions() -> None:
    x = gaussian(40, 3) + 0.5
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    directions = np.linalg.svd(unit)[2]
    z = [np.sum(np.exp(unit @ (sign * c))) for c in directions for sign in (1, -1)]
    assert isotropy(x) == pytest.approx(min(z) / max(z))


def test_iso_score_counts_the_share_of_dimensions_in_use() -> None:
    """(k − 1) / (H − 1) where k of H dimensions hold the same variance and the others none (Rudman et al.)."""
    axes = np.concatenate([np.eye(10), -np.eye(10)])
    for k in (1, 2, 5, 10):
        x = 3 * axes[[i for i in range(20) if i % 10 < k]] + 5
        assert iso_score(x) == pytest.approx((k - 1) / 9, abs=1e-9)
    rotation = np.linalg.qr(gaussian(6, 6))[0]
    x = gaussian(300, 6) * np.arange(1, 7)
    assert iso_score(x) == pytest.approx(iso_score(4 * x @ rotation - 7))
    assert iso_score(np.ones((5, 3))) is None


def test_measures_of_too_few_vectors_are_absent() -> None:
    one = gaussian(1, 3)
    assert [f(one) for f in (uniformity, average_cosine, iso_score)] == [None] * 3
    assert [f(one[:0]) for f in (uniformity, average_cosine, isotropy, iso_score)] == [None] * 4
    assert alignment(one[:0], one[:0]) is None
    assert effective_rank(np.zeros(3)) is None
    task = Task("t", [Subset("s", ["a"], ["a"], np.array([1.0]))], "all")
    figures, scores, _, _ = measure_vectors(pairs_of(task), [task], {"a": one[0]})
    assert figures.keys() == {"isotropy", "effective_rank"}  # of its one sentence
    assert scores == {}


def test_spectrum_and_effective_rank() -> None:
    x = np.diag([4.0, 2.0, 1.0, 0.0])[[0, 1, 2, 3, 3]]
    np.testing.assert_allclose(singular_values(x), [1, 0.5, 0.25, 0], atol=1e-12)
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([1.0, 0, 0])) == pytest.approx(1)
    p = np.array([4, 2, 1]) / 7
    assert effective_rank(singular_values(x)) == pytest.approx(math.exp(-np.sum(p * np.log(p))))


@pytest.mark.parametrize(
    ("gold", "groups"),
    [
        ([0, 0.5, 1, 1.01, 2, 3.9, 4, 4.01, 5], [0, 0, 0, 1, 1, 3, 3, 4, 4]),
        ([0, 0.2, 0.21, 0.8, 0.81, 1], [0, 0, 1, 3, 4, 4]),
        ([-1, 1], [0, 4]),
    ],
    ids=["0 to 5", "0 to 1", "-1 to 1"],
)
def test_groups_of_gold_scores(gold: list[float], groups: list[int]) -> None:
    scores = np.array(gold, np.float64)
    np.testing.assert_array_equal(gold_groups(scores), groups)
    np.testing.assert_array_equal(positive_pairs(scores), np.array(groups) == 4)


@pytest.fixture(scope="module")
def dev_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs of the demonstration."""
    path = tmp_path_factory.mktemp("dev") / "dev.tsv"
    path.write_text("\n".join(demo_similarity("dev").read_text("utf-8").splitlines()[:41]) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, text_file: Path, dev_file: Path) -> Path:
    """A run of eight steps that has kept several checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    config = Config(
        output=str(folder / "run"),
        batch_size=16,
        max_steps=8,
        model=ModelConfig(path=str(tiny_bert), pooler="avg"),
        data=DataConfig(train=str(text_file), max_length=12, cache=str(folder / "cache")),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(dev=str(dev_file), every=4, geometry_every=2),
        checkpoint=CheckpointConfig(every=3, keep=3),
    )
    train(config)
    return folder / "run"


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_models_and_runs(
    tmp_path: Path, run: Path, tiny_bert: Path, dev_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every figure of the tables is that of the model; the path is the run's log."""
    other = export(load_model(tiny_bert, "avg"), tmp_path / "other")
    out = tmp_path / "analysis"
    options = ["--task", str(dev_file), "--tasks", str(dev_file), "--names", "trained", "before"]
    main(["analyze", str(run), str(other), "--output", str(out), *options])
    assert f"the report is {out / 'report.md'}" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == FILES

    task = load_task(str(dev_file), "")
    first, second, gold = indexed_pairs(task)
    measured = {row["model"]: row for row in rows(out / "measures.csv")}
    assert list(measured) == ["trained", "before"]
    for name, model in (("trained", run), ("before", other)):
        x = SimCSE(model).encode(distinct_sentences([task]), normalize=False)
        positive = positive_pairs(gold)
        expected = {
            "alignment": alignment(x[first[positive]], x[second[positive]]),
            "uniformity": uniformity(x),
            "average_cosine": average_cosine(x),
            "isotropy": isotropy(x),
            "iso_score": iso_score(x),
            "effective_rank": effective_rank(singular_values(x)),
        }
        for measure, value in expected.items():
            assert float(measured[name][measure]) == pytest.approx(value, abs=1e-5), measure
        assert float(measured[name]["score"]) == pytest.approx(float(measured[name]["sts"]))
        spectrum = [float(r["singular_value"]) for r in rows(out / "spectrum.csv") if r["model"] == name]
        np.testing.assert_allclose(spectrum, singular_values(x), atol=1e-6)
    assert measured["before"]["step"] == ""
    assert int(measured["trained"]["step"]) == load_model(run).step

    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    path = [r for r in rows(out / "plane.csv") if r["kind"] == "logged in training"]
    assert [int(r["step"]) for r in path] == [0, 2, 4, 6, 8]
    assert {r["model"] for r in path} == {"trained"}
    for row, line in zip(path, [line for line in logged if "dev_alignment" in line], strict=True):
        found = tuple(float(row[n]) for n in ("alignment", "uniformity", "score"))
        assert found == (line["dev_alignment"], line["dev_uniformity"], line["dev"])

    cosines = [r for r in rows(out / "cosines.csv") if r["model"] == "trained"]
    assert len(cosines) == 40
    np.testing.assert_array_equal([int(r["group"]) - 1 for r in cosines], gold_groups(gold))

    report = (out / "report.md").read_text("utf-8")
    assert "40 pairs" in report
    assert "trained, in training, steps 0 to 8 (5 evaluations)" in report
    figures = "| before | " + f"{float(measured['before']['score']):.2f} | "
    assert figures in report


def test_all_kept_checkpoints(tmp_path: Path, run: Path, dev_file: Path) -> None:
    steps = kept_steps(run)
    assert len(steps) >= 3
    out = tmp_path / "analysis"
    main(["analyze", str(run), "--output", str(out), "--task", str(dev_file), "--checkpoints"])
    measured = rows(out / "measures.csv")
    assert [int(row["step"]) for row in measured] == steps
    assert len({row["uniformity"] for row in measured}) == len(steps)
    logged = {row["step"]: row for row in rows(out / "plane.csv") if row["kind"] == "logged in training"}
    for row in measured:
        if row["step"] in logged:
            for name in ("alignment", "uniformity", "score"):
                assert float(row[name]) == pytest.approx(float(logged[row["step"]][name]), abs=1e-4)
    assert load_model(run, step=steps[0]).step == steps[0]
    with pytest.raises(InputError, match="keeps no checkpoint of step 77"):
        load_model(run, step=77)


def test_a_path_on_other_pairs_is_not_drawn(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "analysis"
    main(["analyze", str(run), "--output", str(out), "--task", str(demo_similarity("test"))])
    assert all(row["kind"] == "measured" for row in rows(out / "plane.csv"))
    assert "no path is drawn" in (out / "report.md").read_text("utf-8")


def test_a_model_whose_vectors_are_all_one(
    tmp_path: Path, tiny_bert: Path, dev_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be computed is left empty; figures and report are there all the same."""
    monkeypatch.setattr(
        "simcse_jax.inference.encoder.BatchEncoder.__call__",
        lambda self, params, sentences, progress=False: np.ones((len(sentences), 32), np.float32),
    )
    out = tmp_path / "analysis"
    main(["analyze", str(tiny_bert), "--output", str(out), "--task", str(dev_file), "--pooler", "avg"])
    (row,) = rows(out / "measures.csv")
    assert (row["score"], row["iso_score"]) == ("", "")
    assert float(row["average_cosine"]) == pytest.approx(1)
    assert sorted(p.name for p in out.iterdir()) == FILES


def test_bad_input(
    tmp_path: Path, run: Path, tiny_bert: Path, dev_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    before = sorted(tmp_path.rglob("*"))
    out, task = ["--output", str(tmp_path / "out")], ["--task", str(dev_file)]
    tiny = str(tiny_bert)
    cases = {
        "no model given": [*out, *task],
        "is not a folder": [str(run), str(tmp_path / "absent"), *out, *task],
        "is given twice": [tiny, tiny, *out, *task],
        "2 models are given and 1 names": [tiny, str(run), *out, *task, "--names", "a"],
        "are not distinct": [tiny, str(run), *out, *task, "--names", "a", "a"],
        "none of": [tiny, *out, *task, "--checkpoints"],
        "unknown task 'STSB'": [str(run), *out, "--task", "STSB"],
        "exists and is not an empty folder": [str(run), "--output", str(tmp_path / "full"), *task],
        "give the pooler": [tiny, *out, *task],
        "batch_size is 0": [str(run), *out, *task, "--batch-size", "0"],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as ended:
            main(["analyze", *arguments])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err, message
        assert sorted(tmp_path.rglob("*")) == before


def test_a_path_without_an_alignment_names_none() -> None:
    """Pairs without a high score have none."""
    rows = [{"step": step, "alignment": math.nan, "uniformity": -1.0 - step, "score": 20.0 + step} for step in (0, 3)]
    nothing = [{"step": step, "alignment": math.nan, "uniformity": math.nan, "score": math.nan} for step in (0, 3)]
    assert _path("run", nothing) == "run, in training, steps 0 to 3 (2 evaluations): no figures."
    assert _path("run", rows) == (
        "run, in training, steps 0 to 3 (2 evaluations): uniformity falls from -1.000 to -4.000, score rises from "
        "20.00 to 23.00; highest score 23.00 at step 3, with uniformity -4.000."
    )


def test_geometry_needs_pairs_to_be_measured_on() -> None:
    data = DataConfig(train="text.txt")
    with pytest.raises(InputError, match=r"geometry_every is 5 but evaluation.dev is empty"):
        Config(data=data, evaluation=EvaluationConfig(geometry_every=5)).validate()
    with pytest.raises(InputError, match=r"geometry_every is -1; it must be 0 or more"):
        Config(data=data, evaluation=EvaluationConfig(dev="STSBenchmark", geometry_every=-1)).validate()
