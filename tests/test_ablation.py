"""Ablations: presets that name real settings, and a table from runs that are done once."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from simcse_jax.ablation.run import _rows, format_rows, run_ablation
from simcse_jax.ablation.settings import Ablation
from simcse_jax.cli import main
from simcse_jax.config import Config
from simcse_jax.config.load import load_variable
from simcse_jax.config.values import with_settings
from simcse_jax.errors import InputError
from simcse_jax.objectives import check_options
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runs.folder import create_run
from simcse_jax.storage.manifest import write_sealed

PRESETS = [p.stem for p in sorted((Path(__file__).parents[1] / "configs" / "ablations").glob("[!_]*.py"))]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_runs(name: str) -> None:
    ablation = load_variable(name, "ablation", Ablation)
    assert set(ablation.paper) <= set(ablation.variants)
    outputs = set()
    for variant in ablation.chosen():
        config = ablation.config(variant, 42)
        config.validate()
        check_options(config.objective.loss, config.objective.options)
        outputs |= {config.output}
    assert len(outputs) == len(ablation.variants)


def test_settings_are_set_where_they_are_named() -> None:
    changed = with_settings(Config(), {"model.dropout": 0.3, "objective.smoothing.weight": 0.2, "epochs": 2})
    assert (changed.model.dropout, changed.objective.smoothing.weight, changed.epochs) == (0.3, 0.2, 2)
    assert replace(changed, epochs=1) != Config()
    for name in ("model.dropuot", "modle.dropout", "epochs.more"):
        with pytest.raises(InputError, match="has no setting"):
            with_settings(Config(), {name: 1})


def test_the_table_has_the_spread_over_seeds() -> None:
    rows = [
        {"variant": "a", "seed": 1, "best": 80.0, "loss": 0.01},
        {"variant": "a", "seed": 2, "best": 82.0, "loss": 0.03},
        {"variant": "b", "seed": 1, "diverged": "at step 3"},
    ]
    assert format_rows(rows, {"a": 82.5}).splitlines() == [
        "| variant | seeds | dev, best | loss | paper |",
        "| --- | --- | --- | --- | --- |",
        "| a | 2 | 81.00 ± 1.41 | 0.0200 ± 0.0141 | 82.5 |",
        "| b | 0 | diverged | diverged |  |",
    ]


def test_figures_that_are_null_are_left_out() -> None:
    """Dev pairs without a high score have no alignment."""
    rows = [{"variant": "a", "best": 80.0, "alignment": None}, {"variant": "b", "best": None, "alignment": None}]
    assert format_rows(rows, {}).splitlines()[0] == "| variant | seeds | dev, best |"
    assert format_rows(rows, {}).splitlines()[2:] == ["| a | 1 | 80.00 |", "| b | 1 | – |"]


def test_the_table_keeps_runs_whose_files_have_moved(small_run: Config, tiny_bert: Path, tmp_path: Path) -> None:
    """Where this call has compared their content; of others only the paths are known."""
    ablation = Ablation(base=small_run, variants={"whole": {}}, output=str(tmp_path))
    config = replace(ablation.config("whole", 42), model=replace(small_run.model, path="/gone"))
    folder = tmp_path / "whole" / "seed42"
    run = create_run(folder, config, "", read_checkpoint(tiny_bert), load_tokenizer(tiny_bert))
    write_sealed(run.results_file, {"step": 8, "best_step": None, "dev": None})
    assert [row["seed"] for row in _rows(ablation, "whole", {}, {folder})] == [42]
    assert _rows(ablation, "whole", {}, set()) == []


def test_every_variant_is_checked_before_the_first_is_trained(
    small_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simcse_jax.ablation.run.train", lambda config: 1 / 0)
    (tmp_path / "ids.csv").write_text("id,text\n1,a man\n2,a dog\n")
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "a man\ta dog\t1\n" * 3)
    for bad, problem in (("data.train", "ids.csv"), ("evaluation.dev", "pairs.tsv")):
        variants = {"whole": {}, "other": {bad: str(tmp_path / problem)}}
        with pytest.raises(InputError, match=problem):
            run_ablation(Ablation(base=small_run, variants=variants, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.usefixtures("two_devices")
def test_ablate_trains_once_and_writes_the_table(
    tiny_bert: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.tsv"
    lines = ["a man runs\ta woman runs\t3", "the dog eats\ta dog eats\t5", "red house\tnever two\t0"]
    pairs.write_text("sentence1\tsentence2\tscore\n" + "\n".join(lines) + "\n")
    command = [
        "ablate",
        "dropout",
        "--output",
        str(tmp_path / "out"),
        "--only",
        "0.0",
        "fixed 0.1",
        "--seeds",
        "1",
        "2",
    ]
    command += ["--base.model.path", str(tiny_bert), "--base.data.train", str(text_file), "--base.max-steps", "2"]
    command += ["--base.data.cache", str(tmp_path / "cache"), "--base.evaluation.dev", str(pairs)]
    command += ["--base.batch-size", "16", "--base.evaluation.test", str(pairs), "--base.data.max-length", "12"]
    main(command)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| fixed 0.1 | 2 |" in table
    rows = list(csv.DictReader((tmp_path / "out" / "ablation.csv").read_text().splitlines()))
    assert [(r["variant"], r["seed"]) for r in rows] == [(v, s) for v in ("0.0", "fixed 0.1") for s in ("1", "2")]
    run = json.loads((tmp_path / "out" / "fixed 0.1" / "seed2" / "run.json").read_text())["config"]
    assert (run["seed"], run["model"]["dropout"], run["objective"]["noise"]) == (2, 0.1, "shared")
    metrics = tmp_path / "out" / "0.0" / "seed1" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    main(command)
    assert "resumed   at step 2 of 2" in capsys.readouterr().out
    assert metrics.stat().st_mtime_ns == before
    main([*command, "--only", "0.0", "--seeds", "2"])  # the table keeps what was done before
    assert (tmp_path / "out" / "table.md").read_text() == table
    main([*command, "--only", "0.01", "--seeds", "3", "--base.max-steps", "1"])
    assert capsys.readouterr().out.count("a run with other max_steps") == 4
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 3

    for more, message in (
        (["--only", "0.15", "nothing"], "no variant nothing"),
        (["--seeds", "1", "1"], "each once"),
        (["--base.max-steps", "3"], "is a run with other settings (max_steps was 2, is 3)"),
        (["--base.objective.widths", "16", "16"], "give each once"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *more])
        assert message in capsys.readouterr().err
