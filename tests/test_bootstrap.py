"""Bootstrap intervals against resamples drawn and ranked one by one."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from simcse_jax.cli import main
from simcse_jax.evaluation import bootstrap
from simcse_jax.evaluation.bootstrap import SEED, interval, spearman_resamples
from simcse_jax.evaluation.suite import evaluate_models, load_suite
from tests.conftest import TINY_BERT, write_model


def scores(seed: int, pairs: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """A system's scores and gold scores, with ties in both."""
    rng = np.random.default_rng(seed)
    gold = np.round(rng.uniform(0, 5, pairs))
    return np.round(gold + noise * rng.normal(size=pairs), 1), gold


def test_resamples_are_those_of_a_plain_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw, take, rank anew: scipy's Spearman of each resample, for both systems of the same resamples."""
    monkeypatch.setattr(bootstrap, "_CHUNK", 7 * 60)  # several chunks, the last one short
    (a, gold), (b, _) = scores(0, 60, 2.0), scores(1, 60, 1.0)
    found = spearman_resamples(np.stack([a, b]), gold, 25, "STS12")
    draws = np.random.default_rng([SEED, *b"STS12"])
    rows = np.concatenate([draws.integers(60, size=(n, 60)) for n in (7, 7, 7, 4)])
    expected = [[100 * spearmanr(system[row], gold[row]).statistic for row in rows] for system in (a, b)]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert not np.allclose(found, spearman_resamples(np.stack([a, b]), gold, 25, "STS13"))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Gaussian pairs of correlation ρ have Spearman 6/π asin(ρ/2): 95 % of 200 samples' intervals hold it, ± 3 sd."""
    rho, hits = 0.6, 0
    truth = 100 * 6 / np.pi * np.arcsin(rho / 2)
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, noise = rng.normal(size=(2, 200))
        gold = rho * x + (1 - rho**2) ** 0.5 * noise
        low, high = interval(spearman_resamples(x[None], gold, 300)[0])
        hits += low <= truth <= high
    assert 0.95 - 3 * 0.0154 <= hits / 200 <= 0.95 + 3 * 0.0154


def test_differences_are_paired() -> None:
    """Two systems that err together differ by less than their own intervals say, one from itself by nothing."""
    a, gold = scores(0, 300, 2.0)
    b = a + 0.05 * np.random.default_rng(3).normal(size=300)
    reported = [{"t": 100 * float(spearmanr(s, gold).statistic)} for s in (a, b, a)]
    reported = [{**r, "Avg.": r["t"]} for r in reported]
    first, second, third = bootstrap.bootstrap({"t": (np.stack([a, b, a]), gold)}, reported, 400)
    low, high = first["intervals"]["t"]
    assert low < reported[0]["t"] < high
    assert "differences" not in first
    difference, d_low, d_high = second["differences"]["t"]
    assert d_low <= difference <= d_high
    assert d_high - d_low < (high - low) / 3
    assert third["differences"]["Avg."] == [0, 0, 0]


def test_the_average_is_that_of_the_tasks_resamples() -> None:
    (a, gold_a), (b, gold_b) = scores(0, 50, 2.0), scores(1, 80, 2.0)
    (found,) = bootstrap.bootstrap({"x": (a[None], gold_a), "y": (b[None], gold_b)}, [{}], 100)
    both = (spearman_resamples(a[None], gold_a, 100, "x") + spearman_resamples(b[None], gold_b, 100, "y")) / 2
    assert found["intervals"]["Avg."] == pytest.approx(interval(both[0]))


def test_resamples_without_a_correlation_are_left_out() -> None:
    """Of two pairs a resample may hold one twice."""
    found = spearman_resamples(np.array([[1.0, 2.0]]), np.array([1.0, 2.0]), 50)
    assert set(found[np.isfinite(found)]) == {100.0}
    assert np.isnan(found).any()
    assert interval(found[0]) == [100, 100]
    assert interval(np.full(3, np.nan)) == [None, None]


def test_figures_that_are_absent_are_null_empty_and_a_dash(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single pair, and pairs of one gold score, have no correlation, no interval and no difference."""
    other = write_model(tmp_path / "other", TINY_BERT, seed=1)
    for name, lines in {"single": ["a man\ta dog\t1"], "alike": ["a man\ta dog\t1", "a cat\ta river\t1"]}.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n")
    files = {kind: tmp_path / f"scores.{kind}" for kind in ("json", "csv", "markdown")}
    options = [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
    tasks = [str(tmp_path / f"{name}.tsv") for name in ("single", "alike")]
    main(["evaluate", str(tiny_bert), str(other), "--pooler", "avg", "--bootstrap", "9", *options, "--tasks", *tasks])
    for text in (capsys.readouterr().out, *(file.read_text() for file in files.values())):
        assert "nan" not in text.replace(str(tmp_path), "").lower()
    for model in json.loads(files["json"].read_text())["models"]:
        assert set(model["sts"]["reported"].values()) == {None}
        assert model["sts"]["intervals"]["Avg."] == [None, None]
    with files["csv"].open() as file:
        assert {row["value"] + row["low"] + row["difference"] for row in csv.DictReader(file)} == {""}
    assert "| – | – | – |" in files["markdown"].read_text()


def test_several_models_on_the_command_line(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, Markdown, CSV and JSON hold the same figures, with intervals and differences to the first model."""
    other = write_model(tmp_path / "other", TINY_BERT, seed=1)
    rng = np.random.default_rng(0)
    words = np.array(["man", "dog", "cat", "runs", "red", "river"])
    pairs = tmp_path / "own.tsv"
    lines = ["\t".join([*(" ".join(rng.choice(words, 3)) for _ in "ab"), str(n % 5)]) for n in range(30)]
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n")
    files = {kind: tmp_path / f"scores.{kind}" for kind in ("json", "csv", "markdown")}
    options = [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
    options += ["--pooler", "avg", "--tasks", str(pairs), "--bootstrap", "50"]
    main(["evaluate", str(tiny_bert), str(other), *options])
    printed = capsys.readouterr().out
    everything = json.loads(files["json"].read_text())
    assert (everything["bootstrap"], [m["model"] for m in everything["models"]]) == (50, [str(tiny_bert), str(other)])
    first, second = (m["sts"] for m in everything["models"])
    difference, low, high = second["differences"]["Avg."]
    assert difference == pytest.approx(second["reported"]["Avg."] - first["reported"]["Avg."])
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [r["task"] for r in rows] == [str(pairs), "Avg."] * 2
    assert float(rows[0]["value"]) == first["reported"][str(pairs)]
    assert [float(rows[3][k]) for k in ("difference", "difference_low", "difference_high")] == [difference, low, high]
    assert rows[0]["difference"] == ""
    markdown = files["markdown"].read_text()
    for text in (printed, markdown):
        assert f"{other} (avg)" in text
        assert f"{difference:+.2f} ({low:+.2f} to {high:+.2f})" in text
        assert "95 % intervals over pairs, 50 resamples" in text
    assert "| model | own | Avg. |\n| --- | --- | --- |\n" in markdown

    # The same as in Python.
    suite = load_suite([str(pairs)], "")
    from simcse_jax import SimCSE

    models = [SimCSE(folder, "avg") for folder in (tiny_bert, other)]
    found = evaluate_models(suite, [lambda s, m=m: m.encode(s, normalize=False) for m in models], 50)  # type: ignore[misc]
    assert found[1]["sts"]["differences"]["Avg."] == pytest.approx([difference, low, high], abs=0.01)
