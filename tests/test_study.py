"""The batch-size study: end to end on a tiny model, and each measure against a direct computation."""

import csv
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.demo import first_layers
from simcse_jax.data.feed import Feed
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.table import TokenTable
from simcse_jax.errors import InputError
from simcse_jax.evaluation.geometry import alignment, geometry, positive_pairs, uniformity
from simcse_jax.evaluation.sts import Subset, Task
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.weights import load_params
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.study import Cell, Study
from simcse_jax.study.effects import effects
from simcse_jax.study.false_negatives import false_negatives, first_sentences
from simcse_jax.study.grid import Series
from simcse_jax.study.hardness import hardest_share
from simcse_jax.study.measure import from_log
from simcse_jax.study.noise_scale import batch_gradients, compared, mean_cosine, noise_scale
from simcse_jax.study.report import _budgets
from simcse_jax.study.run import run_study
from simcse_jax.study.table import rows_of, slope, values

PAIRS = ["a man runs\ta woman runs\t3", "the dog eats\ta dog eats\t5", "red house\tnever two\t0", "cat\tdog\t2"]
TIMES = ("seconds", "steps_per_second", "memory_bytes")


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """Each cell compiles its own step; for one device, one layer and no dropout that takes a second or two."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "devices", lambda *_: first)
        yield


@pytest.fixture(scope="module")
def study(tiny_bert: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    pairs = folder / "pairs.tsv"
    pairs.write_text("sentence1\tsentence2\tscore\n" + "\n".join(PAIRS) + "\n")
    return Study(
        base=Config(
            model=ModelConfig(path=str(first_layers(tiny_bert, 1, folder)), pooler="avg", dropout=0.0),
            data=DataConfig(train=str(text_file), max_length=12, cache=str(folder / "cache")),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            evaluation=EvaluationConfig(dev=str(pairs), test=(str(pairs),)),
        ),
        output=str(folder / "whole"),
        batch_sizes=(16, 32),
        rules=("constant", "linear"),
        seeds=(1, 2),
        reference_batch_size=16,
        sentences=96,
        evaluations=2,
        false_negative_threshold=0.9,
        noise_scale_batches=2,
    )


@pytest.fixture(scope="module")
def done(study: Study) -> Study:
    """The study, run without interruption."""
    assert run_study(study)["cells"] == 6
    return study


def table(study: Study) -> list[dict[str, str]]:
    with (study.folder / "study.csv").open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_a_study_end_to_end(done: Study) -> None:
    rows = table(done)
    assert len(rows) == 8  # 2 batches × 2 rules × 2 seeds; the 2 runs at the reference batch stand for both rules
    assert len({row["cell"] for row in rows}) == 6
    for row in rows:
        assert float(row["learning_rate"]) == (2e-3 if row["cell"].startswith("batch32-linear") else 1e-3)
        assert int(row["steps"]) * int(row["batch_size"]) == int(row["sentences"]) == 96
        for name in ("dev", "test", "test_pairs", "alignment", "uniformity", "loss", "false_negatives"):
            assert math.isfinite(float(row[name])), name
    assert {float(row["noise_scale_before"] or "nan") > 0 for row in rows} <= {True, False}
    best = max(rows, key=lambda row: float(row["dev"]))
    report = (done.folder / "report.md").read_text("utf-8")
    assert f"{float(best['dev']):.2f}" in report or "±" in report
    assert "6 runs" in report
    for name in ("score", "path", "hardness"):
        assert f"({name}.png)" in report
        assert (done.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (done.folder / f"{name}.svg").read_text("utf-8")
    assert not list(done.folder.glob("cells/*/checkpoints"))


def test_a_cell_is_the_run_it_says(done: Study) -> None:
    """Its figures are those of its own log, at the checkpoint that dev selected, and of its own batches."""
    cell = Cell(32, "linear", 2)
    folder = done.cell_folder(cell)
    measured = json.loads((folder / "cell.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dev = {line["step"]: line for line in lines if "dev" in line}
    assert sorted(dev) == [0, 2, 3]  # two evaluations were asked for
    best = max(dev.values(), key=lambda line: (line["dev"], line["step"]))  # of equal scores the last
    assert (measured["best_step"], measured["dev"]) == (best["step"], best["dev"])
    assert (measured["alignment"], measured["uniformity"]) == (best["dev_alignment"], best["dev_uniformity"])
    assert measured["path"] == [[s, d["dev_alignment"], d["dev_uniformity"]] for s, d in sorted(dev.items())]
    assert measured["loss"] == next(line["loss"] for line in lines if line["step"] == 3 and "loss" in line)
    # One task serves as dev and test here.
    assert measured["test"] == pytest.approx(measured["dev"], abs=1e-6)

    sentences = Path(done.base.data.train).read_text().splitlines()
    vectors = SimCSE(done.base.model.path, "avg", done.base.data.max_length).encode(sentences)
    found = 0
    for step in range(3):
        batch = vectors[EpochOrder(len(sentences), 32, 2).examples(step)]
        found += sum(batch[i] @ batch[j] > 0.9 for i in range(32) for j in range(32) if i != j)
    assert 0 < measured["false_negatives"] == pytest.approx(found / 96)


class StopAt:
    """Stands in for a signal that comes at the n-th step of the process."""

    def __init__(self, n: int) -> None:
        self.steps, self.n = 0, n

    def __call__(self, request: Any, step: int) -> bool:
        self.steps += 1
        return self.steps == self.n


@pytest.mark.full
def test_interrupted_and_continued_gives_the_same(done: Study, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    interrupted = replace(done, output=f"{done.output}-interrupted")
    with monkeypatch.context() as patched:
        stop = StopAt(8)  # cells take 6, 3, 3, ... steps
        patched.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: stop(self, step))
        assert run_study(interrupted) == {"stopped": "batch32-constant-seed1", "done": 1}
    assert not (interrupted.folder / "report.md").exists()
    finished = interrupted.cell_folder(Cell(16, "reference", 1))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    capsys.readouterr()
    run_study(interrupted)
    shown = capsys.readouterr().out
    assert "cell      2 of 6: batch32-constant-seed1" in shown
    assert "cell      1 of 6" not in shown
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert table(interrupted) == table(done)


def test_done_cells_are_neither_trained_nor_measured(done: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("simcse_jax.study.run.train", never)
    monkeypatch.setattr("simcse_jax.study.run.Meter", never)
    before = table(done)
    (done.folder / "study.csv").unlink()
    assert run_study(done)["cells"] == 6
    assert table(done) == before


def test_a_study_grows_but_does_not_change(done: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = replace(done, output=str(tmp_path / "copy"))
    shutil.copytree(done.folder, copy.folder)
    for changed, what in (
        (replace(copy, sentences=128), "sentences was 96, is 128"),
        (replace(copy, reference_batch_size=32), "reference_batch_size was 16, is 32"),
        (replace(copy, false_negative_threshold=0.5), "false_negative_threshold was 0.9, is 0.5"),
        (
            replace(copy, base=replace(copy.base, optimizer=OptimizerConfig(learning_rate=2e-3))),
            r"base\.optimizer\.learning_rate was 0\.001, is 0\.002",
        ),
    ):
        with pytest.raises(InputError, match=what):
            run_study(changed)
    trained = []

    def train(config: Config) -> dict[str, Any]:
        trained.append((config.batch_size, config.seed, config.optimizer.learning_rate))
        return {"stopped": 0}

    monkeypatch.setattr("simcse_jax.study.run.train", train)
    grown = replace(copy, seeds=(1, 2, 3), batch_sizes=(16, 32, 64), rules=("constant", "linear", "sqrt"))
    assert run_study(grown) == {"stopped": "batch32-sqrt-seed1", "done": 6}
    assert trained == [(32, 1, pytest.approx(1e-3 * math.sqrt(2)))]
    assert json.loads((copy.folder / "study.json").read_text())["study"]["seeds"] == [1, 2, 3]


def test_other_text_is_refused(done: Study, tmp_path: Path) -> None:
    copy = replace(done, output=str(tmp_path / "copy"), seeds=(1, 2, 3))
    shutil.copytree(done.folder, copy.folder)
    other = tmp_path / "other.txt"
    other.write_text(Path(done.base.data.train).read_text() + "one more\n")
    with pytest.raises(InputError, match="made from other text"):
        run_study(replace(copy, base=replace(copy.base, data=replace(copy.base.data, train=str(other)))))


def test_other_pairs_are_refused(done: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever their path; studies of earlier versions know no more than that."""
    copy = replace(done, output=str(tmp_path / "copy"), seeds=(1, 2, 3))
    shutil.copytree(done.folder, copy.folder)
    monkeypatch.setattr("simcse_jax.study.run.train", lambda config: {"stopped": 0})
    file = Path(done.base.evaluation.dev)
    before = file.read_text()
    file.write_text(before.replace("\t5", "\t1"))
    try:
        with pytest.raises(InputError, match=r"scored on other pairs than evaluation\.dev names now"):
            run_study(copy)
        about = json.loads((copy.folder / "study.json").read_text())
        del about["contents"]
        (copy.folder / "study.json").write_text(json.dumps(about))
        assert "stopped" in run_study(copy)
    finally:
        file.write_text(before)


def test_a_diverged_cell_is_reported(done: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from simcse_jax.training.trainer import TrainingDiverged

    def train(config: Config) -> dict[str, Any]:
        raise TrainingDiverged("at step 1")

    copy = replace(done, output=str(tmp_path / "copy"))
    shutil.copytree(done.folder, copy.folder)
    (copy.cell_folder(Cell(32, "linear", 2)) / "cell.json").unlink()
    monkeypatch.setattr("simcse_jax.study.run.train", train)
    run_study(copy)
    assert "1 of 6 runs diverged: batch32-linear-seed2." in (copy.folder / "report.md").read_text("utf-8")


def test_learning_rates_and_steps() -> None:
    study = Study(base=Config(optimizer=OptimizerConfig(learning_rate=3e-5)), reference_batch_size=64, sentences=8192)
    rates = {series.rule: study.learning_rate(study.cell(256, series, 0)) for series in study.series}
    assert rates == pytest.approx({"constant": 3e-5, "sqrt": 6e-5, "linear": 12e-5})
    assert study.learning_rate(study.cell(16, Series("sqrt"), 0)) == pytest.approx(1.5e-5)
    assert {study.cell(64, series, 0) for series in study.series} == {Cell(64, "reference", 0)}
    assert [study.steps_of(Cell(b, "sqrt", 0)) for b in (16, 4096, 6000, 100_000)] == [512, 2, 2, 1]
    assert replace(study, sentences=0, steps=7).steps_of(Cell(16, "sqrt", 0)) == 7
    guided = Cell(16, "sqrt", 0, (("data.max_length", 8), ("objective.negatives.guide", "a model")))
    assert study.key(guided) == guided.settings  # models and feeds of its own,
    assert study.text_key(guided) == guided.settings[:1]  # but no sentences of its own
    both = replace(study, steps=32, rules=("sqrt",))
    cells = [both.cell(b, series, 0) for b in (16, 256) for series in both.series]
    assert [cell.budget for cell in cells] == ["sentences", "steps", "", ""]  # at 256, both are 32 steps
    assert [both.steps_of(cell) for cell in cells] == [512, 32, 32, 32]
    assert [cell.name for cell in cells[:3]] == [
        "batch16-sqrt-sentences-seed0",
        "batch16-sqrt-steps-seed0",
        "batch256-sqrt-seed0",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentences": 0}, "set one of them"),
        ({"factors": {"objective.queues": (0, 1)}}, "has no setting 'queues'"),
        ({"factors": {"objective.queue.size": (8,)}}, "give two values or more"),
        ({"factors": {"batch_size": (16, 32)}}, "factors has batch_size, which the study sets"),
        ({"factors": {"evaluation.dev": ("a", "b")}}, "or compares by"),
        ({"factors": {"data.train": ("a/x y", "b/x_y")}}, "would have the same name"),
        ({"hardest": 1.0}, "a share below 1"),
        ({"seeds": ()}, "give at least one"),
        ({"batch_sizes": (16, 16)}, "each once"),
        ({"batch_sizes": (16, 512)}, "batch_sizes holds 512 but .* has 203 examples"),
        ({"noise_scale_batches": 1}, "at least 2"),
        ({"false_negative_sentences": -1}, "or 0 for all"),
        ({"base": Config(data=DataConfig(train="x.txt"))}, "name a dev task"),
    ],
)
def test_bad_settings(study: Study, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    output = tmp_path / "new"
    with pytest.raises(InputError, match=message):
        run_study(replace(study, output=str(output), **changes))
    assert not output.exists()


def test_command_line(done: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options override the study's fields and the base config's; a finished study prints where its report is."""
    file = tmp_path / "study.py"
    file.write_text(f"from simcse_jax.config import *\nfrom simcse_jax.study import Study\nstudy = {done!r}\n")
    main(["study", str(file), "--output", done.output])
    assert f"6 cells are done; the report is {done.output}/report.md" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["study", str(file), "--base.optimizer.learning-rate", "0.5", "--seeds", "1"])
    assert ended.value.code == 2
    assert "base.optimizer.learning_rate was 0.001, is 0.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", "--steps", "5", str(file)])
    assert "give the config file right after study" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(file)])
    assert "does not define `config = Config(...)`" in capsys.readouterr().err


def test_alignment_and_uniformity_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1100, 6)).astype(np.float32)  # more rows than a block
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    pairs = [np.exp(-2 * np.sum((unit[i] - unit[i + 1 :]) ** 2, axis=1)) for i in range(len(x))]
    assert uniformity(x) == pytest.approx(np.log(np.mean(np.concatenate(pairs))), rel=1e-12)
    assert alignment(x[:5], x[5:10]) == pytest.approx(np.mean(np.sum((unit[:5] - unit[5:10]) ** 2, axis=1)))
    assert alignment(x[:0], x[:0]) is None
    assert uniformity(x[:1]) is None


def test_positive_pairs_by_scale() -> None:
    assert positive_pairs(np.array([0, 4, 4.2, 5.0])).tolist() == [False, False, True, True]
    assert positive_pairs(np.array([0, 0.5, 0.81, 1.0])).tolist() == [False, False, True, True]
    assert positive_pairs(np.array([-1, 0.5, 0.61, 1.0])).tolist() == [False, False, True, True]
    assert positive_pairs(np.array([10, 80, 90.0, 100])).tolist() == [False, False, True, True]


def test_geometry_takes_positives_and_distinct_sentences() -> None:
    task = Task("t", [Subset("s", ["a", "b", "a"], ["b", "c", "a"], np.array([4.5, 1.0, 5.0]))], "all")
    vectors = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [-1.0, 0.0]}
    result = geometry(task, lambda sentences: np.array([vectors[s] for s in sentences]))
    assert result["alignment"] == pytest.approx((2 + 0) / 2)
    assert result["uniformity"] == pytest.approx(np.log((np.exp(-4) + np.exp(-8) + np.exp(-4)) / 3))


def test_false_negatives_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(n, 4)) for n in (7, 1030)]  # the second more than a block
    batches = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in batches]
    counts = [[np.count_nonzero(np.delete(x, i, axis=0) @ x[i] > 0.8) for i in range(len(x))] for x in batches]
    result = false_negatives(batches, 0.8)
    every = np.concatenate(counts)
    assert result["false_negatives"] == pytest.approx(every.mean())
    assert result["false_negative_anchors"] == pytest.approx((every > 0).mean())
    assert result["false_negative_pairs"] == pytest.approx(every.sum() / (7 * 6 + 1030 * 1029))
    assert set(false_negatives([np.ones((1, 2))], 0.5).values()) == {None}


def test_first_sentences_are_numbered_as_tokens_are(tmp_path: Path) -> None:
    """Examples with a blank sentence have no number."""
    file = tmp_path / "pairs.tsv"
    file.write_text("a\tb\nzero\tx\n \tx\none\tx\ntwo\t\ntwo\tx\n")
    corpus = open_corpus(DataConfig(train=str(file), columns=("a", "b")))
    assert first_sentences(corpus, np.array([0, 2])) == ["zero", "two"]
    assert first_sentences(corpus, np.array([], np.int64)) == []


def test_noise_scale_needs_two_batches_and_a_mean_gradient() -> None:
    one = {"a": jnp.ones(3)}
    assert noise_scale([], 8) is None
    assert noise_scale([one], 8) is None
    assert noise_scale([one, {"a": -jnp.ones(3)}], 8) is None  # they cancel


def test_the_log_of_a_run_with_figures_missing(tmp_path: Path) -> None:
    """A batch of one example has no pairs of its own; a run may end before its first line."""
    lines = [
        {"step": 7, "loss": 1.0, "negative_similarity": None},
        {"step": 8, "loss": 3.0, "negative_similarity": 0.5},
    ]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = from_log(tmp_path / "log", 8, 8)
    assert (found["loss"], found["negative_similarity"], found["effective_negatives"]) == (2.0, 0.5, None)
    (tmp_path / "log").write_text("")
    assert {name for name, value in from_log(tmp_path / "log", 8, 8).items() if value is not None} == {"path"}


def test_noise_scale_of_known_gradients() -> None:
    """Batches of B examples whose gradients have mean G and covariance Σ: noise scale tr Σ / |G|²."""
    rng = np.random.default_rng(0)
    mean, sd, size, batches = np.array([3.0, -4.0, 0.0]), np.array([1.0, 2.0, 6.0]), 10, 4000

    def gradients() -> Iterator[Any]:
        for _ in range(batches):
            g = mean + sd * rng.normal(size=3) / np.sqrt(size)
            yield {"a": jnp.asarray(g[:2]), "b": jnp.asarray(g[2:])}

    assert noise_scale(gradients(), size) == pytest.approx((1 + 4 + 36) / 25, rel=0.1)
    few = [np.array([1.0, 2.0]), np.array([3.0, 2.5]), np.array([2.0, 5.0])]
    variance = sum(np.sum((g - np.mean(few, axis=0)) ** 2) for g in few) / 2
    square = np.sum(np.mean(few, axis=0) ** 2) - variance / 3
    assert noise_scale(map(jnp.asarray, few), 8) == pytest.approx(8 * variance / square, rel=1e-5)
    assert noise_scale([jnp.array([1.0]), jnp.array([-1.0])], 8) is None


def test_noise_scale_takes_whole_independent_batches() -> None:
    """203 examples hold six batches of 32 that share none, in another order than a run with the seed has."""
    tokens = TokenTable(np.arange(203), np.arange(204), 1, 0, 1, 0, "")
    feed = Feed(tokens, EpochOrder(203, 32, 2**32 + 1), make_mesh())
    seen = list(batch_gradients(lambda params, batch, key: batch, {}, feed, 6))
    assert all(bool(jnp.all(batch.valid)) for batch in seen)
    first = np.concatenate([np.asarray(batch.input_ids).ravel() for batch in seen])
    assert len(set(first.tolist())) == 6 * 32
    assert set(first[:32].tolist()) != set(EpochOrder(203, 32, 1).examples(0).tolist())


def test_the_direction_of_known_gradients() -> None:
    whole = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([1.0])}

    def direction(gradients: list[Any], whole: Any) -> float | None:
        cosines: list[float] = []
        assert all(a is b for a, b in zip(compared(gradients, whole, cosines), gradients, strict=True))
        return mean_cosine(cosines)

    few = [{"a": jnp.array([2.0, 0.0]), "b": jnp.array([0.0])}, {"a": jnp.array([0.0, 3.0]), "b": jnp.array([0.0])}]
    assert direction(few, whole) == pytest.approx(np.sqrt(0.5) / 2)
    assert direction([], whole) is None
    assert direction([{"a": jnp.zeros(2), "b": jnp.zeros(1)}], whole) is None


def test_the_hardest_negatives_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 300, 8)).astype(np.float32)
    cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    shares = []
    for i in range(300):
        weights = np.sort(np.exp(np.delete(cosine[i], i) / 0.1))[::-1]
        shares.append(np.sum(weights[:6]) / np.sum(weights))  # 2 % of 299, rounded up
    assert float(hardest_share(a, b, 0.1, 0.02)) == pytest.approx(np.mean(shares), rel=1e-5)
    same = np.ones((50, 4), np.float32)
    assert float(hardest_share(same, same, 0.05, 0.1)) == pytest.approx(5 / 49, rel=1e-5)


def test_effects_are_paired_by_seed() -> None:
    study = Study(
        batch_sizes=(64, 256),
        rules=("constant", "sqrt"),
        seeds=(1, 2, 3),
        steps=10,
        factors={"objective.negatives.duplicates": (False, True)},
    )
    noise = {1: 0.0, 2: 5.0, 3: -2.0}

    def dev(row: dict[str, Any]) -> float:
        gain = {1: 1.0, 2: 2.0, 3: 3.0}[row["seed"]] if row["objective.negatives.duplicates"] else 0.0
        return noise[row["seed"]] + gain + (row["batch_size"] == 256) * (10 + (row["rule"] == "sqrt"))

    measures = {cell: {} for cell in study.cells()}
    rows = [{**row, "dev": dev(row)} for row in rows_of(study, measures)]
    found = {(effect.change, effect.at): effect for effect in effects(study, rows, "dev")}
    mask = found["duplicates True for False", "batch 256"]
    assert mask.differences == pytest.approx((1, 2, 3))
    # Student's t with two degrees of freedom: 4.3027, times sd 1 / √3.
    assert (mask.mean, mask.half) == pytest.approx((2, 4.302653 / np.sqrt(3)), rel=1e-5)
    assert not mask.is_larger_than_noise
    rule = found["rule sqrt for constant", "batch 256"]
    assert rule.differences == pytest.approx((1, 1, 1))
    assert rule.is_larger_than_noise
    batch = found["batch 256 for 64", "sqrt learning rate, duplicates True"]
    assert batch.differences == pytest.approx((11, 11, 11))
    # At the reference batch all rules are one run.
    assert ("rule sqrt for constant", "batch 64") not in found
    assert len(found) == 4 + 2 + 1


@pytest.fixture(scope="module")
def factorial(study: Study) -> Study:
    """A study of masks and a queue, at equal examples and at equal steps."""
    factors = {"objective.negatives.duplicates": (False, True), "objective.queue.size": (0, 20)}
    settings = {"rules": ("constant",), "seeds": (1,), "sentences": 96, "steps": 3, "factors": factors}
    counted = {"false_negative_sentences": 48}
    made = replace(study, output=f"{study.output}-factors", direction_batch=64, hardest=0.1, **settings, **counted)
    assert run_study(made)["cells"] == 12  # at batch 32, 96 examples are 3 steps
    return made


@pytest.mark.full
def test_any_setting_is_a_factor(factorial: Study) -> None:
    rows = table(factorial)
    assert len(rows) == 16
    assert {(row["objective.negatives.duplicates"], row["objective.queue.size"]) for row in rows} == {
        *(("False", "0"), ("False", "20"), ("True", "0"), ("True", "20")),
    }
    for row in rows:
        config = json.loads((factorial.folder / "cells" / row["cell"] / "run.json").read_text())["config"]
        assert str(config["objective"]["queue"]["size"]) == row["objective.queue.size"]
        assert str(config["objective"]["negatives"]["duplicates"]) == row["objective.negatives.duplicates"]
        assert -1 <= float(row["direction"]) <= 1
        assert 0 < float(row["hardest_share"]) <= 1
        assert float(row["effective_rank"]) > 1
        assert abs(float(row["average_cosine"])) <= 1
        assert (row["masked_share"] not in ("", "nan")) == (row["objective.negatives.duplicates"] == "True")
    report = (factorial.folder / "report.md").read_text("utf-8")
    assert "duplicates True, size 20, equal steps" in report
    assert "With one seed there is no noise" in report
    with np.load(factorial.folder / "reference.npz") as reference:
        assert len(reference["examples"]) == 48  # three batches of 16, of which one of 32 has the first two
    before = table(factorial)
    assert run_study(factorial)["cells"] == 12
    assert table(factorial) == before
    with pytest.raises(InputError, match=r"objective\.temperature was"):
        run_study(replace(factorial, base=replace(factorial.base, objective=ObjectiveConfig(temperature=0.1))))


def test_a_budget_that_decides_is_said(done: Study) -> None:
    runs = {
        f"{b}-{s}": {"batch_size": b, "steps": 8, "best_step": 8 if b == 32 or s == 1 else 4}
        for b in (16, 32)
        for s in (1, 2)
    }
    (warning,) = _budgets(runs, done)
    assert warning.startswith("**The budget decides at batch 32**: 2 of its 2 runs")


def test_slopes_and_spread() -> None:
    rows = [
        {"batch_size": b, "rule": "sqrt", "seed": s, "cell": f"{b}-{s}", "x": 3 * b**1.5, "y": 2 * np.log2(b) + s}
        for b in (16, 64, 256)
        for s in (0, 1)
    ]
    rows.append({**rows[0], "cell": "other", "x": math.nan, "y": math.nan})
    assert slope(rows, "x") == pytest.approx((1.5, 0), abs=1e-6)
    fitted = slope(rows, "y", lambda value: value)
    assert fitted is not None
    assert fitted[0] == pytest.approx(2)
    assert slope(rows[:2], "x") is None
    assert values(rows, "y", batch_size=16).tolist() == [8.0, 9.0]


def test_first_layers_of_a_model(tiny_bert: Path, tmp_path: Path) -> None:
    folder = first_layers(tiny_bert, 2, tmp_path / "cache")
    whole, cut = (read_checkpoint(f) for f in (tiny_bert, folder))
    assert (whole.config.num_hidden_layers, cut.config.num_hidden_layers) == (3, 2)
    expected, params = load_params(whole), load_params(cut)
    del expected["encoder"]["layer_2"]
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves_with_path(params), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))
    assert SimCSE(folder, "avg").encode(["a man runs"]).shape == (1, 32)
    before = (folder / "config.json").stat().st_mtime_ns
    assert first_layers(tiny_bert, 2, tmp_path / "cache") == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="has 3 layers"):
        first_layers(tiny_bert, 4, tmp_path / "cache")
