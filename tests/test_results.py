"""`make results`: cells, records, statistics, and a report from runs of a few steps."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.results import statistics
from benchmarks.results.__main__ import Settings, main
from benchmarks.results.cells import Cell, Records, Sources
from benchmarks.results.claims import CLAIMS, claims
from benchmarks.results.equivalence import torch_arguments
from benchmarks.results.experiments import (
    EXPERIMENTS,
    PATHS,
    SEEDS,
    Scale,
    ablation_cell,
    ablations,
    cells_of,
    equivalence_cell,
)
from benchmarks.results.measure import config_of
from benchmarks.results.tables import Found, ablated
from benchmarks.wordnet import synonyms
from simcse_jax.errors import InputError
from simcse_jax.runs.metrics_log import read_log
from simcse_jax.training.trainer import train
from tests.test_sts import write_similarity
from tests.test_transfer import write_transfer

SCALE = Scale()


def test_differences_are_welch_s() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 5).tolist(), rng.normal(0, 3, 4).tolist()
    found = statistics.difference(a, b)
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert found.mean / found.error == pytest.approx(expected.statistic)
    assert found.freedom == pytest.approx(expected.df)
    assert found.interval(0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)))


def test_a_side_without_seeds_has_no_spread() -> None:
    found = statistics.difference([3.0, 4.0, 5.0], [1.0])
    expected = stats.ttest_1samp([3.0, 4.0, 5.0], 1.0)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(0.95) - np.array(1.0)))
    alone = statistics.difference([3.0], [1.0])
    assert alone.mean == 2
    assert np.isnan(alone.interval()).all()


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([5.0, 5.1, 5.2], [1.0, 1.1, 1.2], "holds"),
        ([1.0, 1.1, 1.2], [5.0, 5.1, 5.2], "does not hold"),
        ([1.0, 5.0, 9.0], [0.0, 4.0, 8.0], "not decided at this scale"),
    ],
)
def test_verdicts(a: list[float], b: list[float], word: str) -> None:
    assert statistics.verdict(statistics.difference(a, b)) == word


def test_equivalence_is_two_one_sided_tests() -> None:
    rng = np.random.default_rng(1)
    for scale in (0.1, 1.0, 3.0):
        a, b = rng.normal(0.3, scale, 5), rng.normal(0.0, scale, 5)
        above = stats.ttest_ind(a + 1, b, equal_var=False, alternative="greater").pvalue
        below = stats.ttest_ind(a - 1, b, equal_var=False, alternative="less").pvalue
        found = statistics.difference(a.tolist(), b.tolist())
        assert statistics.is_equivalent(found, 1.0) == (max(above, below) < 0.05)


def test_cells_have_names_of_their_own() -> None:
    cells = [cell for experiment in EXPERIMENTS for cell in cells_of(experiment, SCALE, 3e-5)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({json.dumps(cell.settings) for cell in cells}) == len(cells)
    for experiment in EXPERIMENTS:
        assert all(cell.experiment == experiment for cell in cells_of(experiment, SCALE, 3e-5))


def test_every_seed_comes_before_the_next() -> None:
    seeds = [seed_of(cell) for cell in cells_of("ablations", SCALE, 3e-5)]
    assert seeds == sorted(seeds)


def seed_of(cell: Cell) -> int:
    return int(cell.name.rpartition("seed")[2])


def test_ablations_share_the_run_without_changes() -> None:
    cells = cells_of("ablations", SCALE, 3e-5)
    published = [cell.name for cell in cells if "as_published" in cell.name and seed_of(cell) == 42]
    assert len(published) == 4  # unsupervised, of sentences and of running text; supervised; IS-CSE
    variants = [changes for ablation in ablations() for changes in ablation.variants.values()]
    assert len([cell for cell in cells if seed_of(cell) == 43]) < len(variants)
    assert [cell.needs for cell in cells].count("synonyms") == 2
    plain = ablation_cell("unsup_bert_base", {}, 43, SCALE, 3e-5)
    assert ablation_cell("unsup_bert_base", {"model.dropout": 0.1}, 43, SCALE, 3e-5) == plain
    assert ablation_cell("sup_bert_base", {"objective.temperature": 0.05}, 43, SCALE, 3e-5).name.count("published")
    shared = ablation_cell("unsup_bert_base", {"model.dropout": 0.1, "objective.noise": "shared"}, 43, SCALE, 3e-5)
    assert shared.settings["config"] == plain.settings["config"] | {"objective.noise": "shared"}
    # The variants of figure 2 are those whose collapse is a claim: three seeds, and the path of the first.
    last = [cell for cell in cells if seed_of(cell) == 44]
    assert len(last) == len(PATHS)
    followed = [cell for cell in cells if "evaluation.geometry_every" in cell.settings["config"]]
    assert {cell.name.replace("42", "44") for cell in followed} == {cell.name for cell in last}


def test_a_seed_given_alone_measures_the_same(tmp_path: Path) -> None:
    """The record of a seed is good for a call with all seeds, and the other way round."""
    for experiment in EXPERIMENTS:
        alone = {cell.name: cell.settings for cell in cells_of(experiment, Scale((43,)), 3e-5)}
        together = {cell.name: cell.settings for cell in cells_of(experiment, SCALE, 3e-5)}
        assert alone.items() <= together.items()


def test_cells_train_what_they_say(root: Path, tiny_bert: Path, tmp_path: Path) -> None:
    sources = Sources(tiny_bert, tiny_bert, root, tmp_path)
    for experiment in ("learning_rate", "ladder", "ablations"):
        for cell in cells_of(experiment, SCALE, 3e-5):
            if "config" in cell.settings:
                config = config_of(cell.settings, sources)
                config.validate()
                assert cell.name.endswith(f"seed{config.seed}")
                for name, value in cell.settings["config"].items():
                    part: Any = config
                    for word in name.split("."):
                        part = getattr(part, word)
                    expected = str(sources.synonyms) if name == "data.synonyms" else value
                    assert part == (tuple(expected) if isinstance(expected, list) else expected)


def test_synonyms_of_wordnet(tmp_path: Path) -> None:
    """Single words of the most frequent sense, of every part of speech; senses by offset in another file."""
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 licence\n")
        (tmp_path / f"index.{part}").write_text("  1 licence\n")
    with (tmp_path / "data.noun").open("a") as file:
        file.write("00000010 06 n 03 film 0 movie 0 moving_picture 1 001 @ 00000099 n 0000 | a form of\n")
        file.write("00000020 06 n 02 film 1 photographic_film 0 000 | a strip\n")
    with (tmp_path / "data.verb").open("a") as file:
        file.write("00000010 36 v 03 film 0 shoot 5 Take 9 000 01 + 08 00 | make a film\n")
    with (tmp_path / "data.adj").open("a") as file:
        file.write("00000030 00 s 02 abundant(ip) 0 galore(ip) 0 000 | existing in\n")
    with (tmp_path / "index.noun").open("a") as file:
        file.write("film n 2 2 @ ~ 2 1 00000010 00000020  \nmoving_picture n 1 0 1 0 00000010  \n")
    with (tmp_path / "index.verb").open("a") as file:
        file.write("film v 1 1 + 1 0 00000010  \n")
    with (tmp_path / "index.adj").open("a") as file:
        file.write("galore a 1 0 1 0 00000030  \n")
    assert synonyms(tmp_path) == {"film": ["movie", "shoot", "take"], "galore": ["abundant"]}


def test_cells_are_chosen_by_the_beginnings_of_their_names() -> None:
    chosen = Settings(only=("ladder/unsupervised_simcse-seed", "equivalence/minilm"))._chosen(SCALE, 3e-5)
    seeds = [f"ladder/unsupervised_simcse-seed{seed}" for seed in (42, 43, 44)]
    assert [cell.name for cell in chosen if cell.experiment == "ladder"] == seeds
    sides = {"equivalence/minilm-torch", "equivalence/minilm-jax"}
    assert {cell.name.rpartition("-")[0] for cell in chosen[3:]} == sides
    assert len(Settings()._chosen(SCALE, 3e-5)) == sum(len(cells_of(name, SCALE, 3e-5)) for name in EXPERIMENTS)
    with pytest.raises(InputError, match="--only ladders: no cell has a name that begins so"):
        Settings(only=("ladder", "ladders"))._chosen(SCALE, 3e-5)


def test_records_of_other_settings_are_refused(tmp_path: Path) -> None:
    records = Records(tmp_path)
    cell = Cell("ladder/x", {"steps": 5}, lambda settings, sources, folder: {}, 1.0)
    assert records.read(cell) is None
    records.write(cell, {"best": 1.5, "loss": float("nan")}, 2.0)
    assert records.read(cell) == {"best": 1.5, "loss": None}
    with pytest.raises(InputError, match="steps was 5, is 6"):
        records.read(Cell("ladder/x", {"steps": 6}, cell.measure, 1.0))
    (tmp_path / "ladder/x.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        records.read(cell)


def test_other_content_is_refused(root: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """The same settings on another model or text would give records that do not go together."""
    records = Records(tmp_path / "results")
    records.check_sources(Sources(tiny_bert, tiny_bert, root, tmp_path))
    records.check_sources(Sources(tmp_path / "gone", tiny_bert, root, tmp_path))
    other = tmp_path / "bert"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="measured on other content of model than there is now"):
        records.check_sources(Sources(other, tiny_bert, root, tmp_path))


def test_every_claim_names_runs_that_there_are(tmp_path: Path) -> None:
    """A claim whose variant no experiment runs would never be decided."""
    records = Records(tmp_path)
    for experiment in EXPERIMENTS:
        for cell in cells_of(experiment, SCALE, 3e-5):
            figures = {"best": 1.0, "dev": 1.0, "path": [[0, 1.0, None, None], [1, 2.0, None, None]]}
            scores = {"sts": {"Avg.": 1.0}} if experiment == "ladder" else {}
            if "transfer" in cell.settings.get("measures", []):
                scores["transfer"] = {"Avg.": 1.0}
            records.write(cell, figures | scores, 1.0)
    found = Found(records, SCALE, 3e-5)
    for claim in CLAIMS:
        least = 1 if claim.below is claim.above or "above" in claim.words else 2
        assert len(claim.score(claim.above(found))) >= max(2, least), claim.words
        assert len((claim.other or claim.score)(claim.below(found))) >= 1, claim.words
        assert claim.paper is None or claim.paper[0] > claim.paper[1]
    assert claims(found).count("not measured yet") == 0


def test_a_diverged_run_decides_no_claim(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for changes in ({}, {"model.dropout": 0.5}):
        for seed in (42, 43):
            cell = ablation_cell("unsup_bert_base", changes, seed, SCALE, 3e-5)
            bad = changes and seed == 43
            records.write(cell, {"diverged": "NaN"} if bad else {"best": 1.0, "path": [[0, 1.0, None, None]]}, 1.0)
    found = Found(records, SCALE, 3e-5)
    (line,) = [line for line in claims(found).splitlines() if "0.1 is above 0.5" in line]
    assert "1 runs diverged" in line
    assert "| 0.5 | 1, 1 diverged | 1.00 |" in ablated(found)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The data of `make results`, in small."""
    root = tmp_path_factory.mktemp("data")
    write_transfer(root / "senteval")
    write_similarity(root / "senteval")
    lines = text_file.read_text("utf-8").splitlines()
    (root / "wiki").mkdir()
    for name in ("wiki_en_1m", "wiki_docs"):
        with gzip.open(root / "wiki" / f"{name}.txt.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    (root / "nli").mkdir()
    triplets = [",".join(lines[i : i + 3]) for i in range(0, 198, 3)]
    (root / "nli" / "nli_triplets_small.csv").write_text("\n".join(["sent0,sent1,hard_neg", *triplets]) + "\n")
    return root


@pytest.mark.full
def test_results_end_to_end(
    root: Path, tiny_bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("benchmarks.results.measure.RESAMPLES", 20)
    monkeypatch.setattr("benchmarks.results.experiments.POSTPROCESSED", ("whitening",))
    monkeypatch.setattr("benchmarks.results.experiments.TRANSFER", ())
    monkeypatch.setattr("benchmarks.results.experiments.SEEDS", {**SEEDS, "equivalence": 2})
    output, runs = tmp_path / "results", tmp_path / "runs"
    command = ["--steps", "2", "--seeds", "42", "--only", "ladder", "equivalence", "--output", str(output)]
    command += ["--runs", str(runs), "--model", str(tiny_bert), "--minilm", str(tiny_bert), "--data", str(root)]
    assert main([*command, "--minutes", "0"]) == 0
    assert "no report yet: nothing is measured" in capfd.readouterr().out
    assert main(command) == 0
    out = capfd.readouterr().out
    assert "cell      1 of 3: learning_rate/1e-05-seed42" in out
    assert "0 of 18 cells are measured; the others take about" in out
    assert "3 of 18 cells" not in out
    assert "0 of 15 cells are measured; the others take about" in out
    report = output.with_suffix(".md")
    text = report.read_text("utf-8")
    everything = [cell for name in EXPERIMENTS for cell in cells_of(name, Scale(steps=2), 1e-4)]
    assert f"18 of {len(everything)} cells are measured" in text
    assert "| unsupervised SimCSE | 1 |" in text
    assert "| all-MiniLM-L6-v2, PyTorch | 1 |" in text
    assert (output / "spectrum.png").is_file()
    assert not [file for file in runs.rglob("*") if file.is_file()]
    files = {file: file.stat().st_mtime_ns for file in [report, *output.rglob("*")] if file.is_file()}
    assert main([*command, "--data", "nowhere", "--model", "nowhere"]) == 0  # nothing left to measure
    assert {file: file.stat().st_mtime_ns for file in [report, *output.rglob("*")] if file.is_file()} == files
    assert main(["--output", str(output), "--data", str(root), "--minutes", "0"]) == 1
    assert "was measured with other settings" in capfd.readouterr().err


@pytest.mark.full
def test_both_trainers_begin_alike(root: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """Without dropout, PyTorch's loop and ours are one trajectory: weights, examples, order, schedule and clipping."""
    pytest.importorskip("torch")
    from benchmarks.results.torch_trainer import Trainer

    settings = equivalence_cell("model", "torch", 42, Scale(steps=6)).settings
    settings["config"] |= {"model.dropout": 0.0, "evaluation.every": 3}
    sources = Sources(tiny_bert, tiny_bert, root, tmp_path)
    config = replace(config_of(settings, sources), output=str(tmp_path / "ours"))
    trainer = Trainer(**torch_arguments(config, sources, tmp_path / "theirs"))
    for module in trainer._encoder.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    theirs = trainer.run()
    train(config)
    ours = read_log(tmp_path / "ours" / "metrics.jsonl")
    losses = [line["loss"] for line in ours if "loss" in line]
    assert theirs["loss"] == pytest.approx(losses[-1], rel=1e-4)
    path = [line["dev"] for line in ours if "dev" in line]
    assert [score for _, score in theirs["path"]] == pytest.approx(path, abs=1e-3)
