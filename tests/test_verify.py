"""What a folder of ours holds is compared with its manifest, and `simcse-jax verify` says what is whole and where it
comes from."""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.config import Config, DataConfig
from simcse_jax.config.postprocess import FitSettings
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.inference.export import export, model_card
from simcse_jax.inference.index import Index
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.verification import Report, inspect
from simcse_jax.postprocess.fit import fit
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params
from simcse_jax.reports.progress import telling
from simcse_jax.runs.checkpoints import check_whole, open_checkpoints, set_damaged_aside
from simcse_jax.runs.folder import Run, create_run, open_run
from simcse_jax.runs.metrics_log import MetricsLog, problem_of
from simcse_jax.runtime.provenance import provenance
from simcse_jax.storage.manifest import (
    MANIFEST,
    VERIFY,
    Damage,
    digest,
    read_sealed,
    write_sealed,
)
from simcse_jax.training.trainer import train
from tests.conftest import first_devices
from tests.test_damage import DAMAGES, Progress, cut, flip_a_bit, kept
from tests.test_resume import assert_identical, config, dev_file, final_state, lines, tiny_bert

__all__ = ["config", "dev_file", "tiny_bert"]

damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
changes = pytest.mark.parametrize("damage", DAMAGES[:-1], ids=lambda damage: damage.__name__)


@pytest.fixture(scope="module")
def exported(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a post-processor, which has weights in three files."""
    loaded = load_model(tiny_bert, "cls")
    vectors = np.random.default_rng(0).normal(size=(90, 32))
    post = fit(vectors, FitSettings())
    return Path(export(loaded.with_postprocessor(*post), tmp_path_factory.mktemp("exports") / "model"))


@damages
def test_damage_of_any_file_of_an_export_is_found(exported: Path, damage: Callable[[Path], None]) -> None:
    """Before it is used, and the message names it."""
    files = [path for path in exported.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    for path in files:
        with kept(path):
            damage(path)
            name = path.relative_to(exported).as_posix()
            assert name in str(inspect(exported)).partition("DAMAGED")[2]
            if path.name == "README.md":  # which no model needs
                load_params(read_checkpoint(exported))
                continue
            with pytest.raises(InputError, match=rf"damaged \(.*{name}.*\): copy the model or"):
                load_params(read_checkpoint(exported))
    assert inspect(exported).whole


def test_a_run_does_not_begin_from_a_damaged_export(exported: Path, small_run: Config) -> None:
    weights = exported / "model.safetensors"
    with kept(weights), first_devices(1):
        flip_a_bit(weights)
        with pytest.raises(InputError, match=f"the content of {weights.name} was changed"):
            train(replace(small_run, model=replace(small_run.model, path=str(exported))))
    assert not Path(small_run.output).exists()


@changes
def test_a_damaged_manifest_of_an_export_is_found(exported: Path, damage: Callable[[Path], None]) -> None:
    with kept(exported / MANIFEST):
        damage(exported / MANIFEST)
        assert not inspect(exported).whole
        with pytest.raises(InputError, match=f"{MANIFEST} (was changed|cannot be read)"):
            read_checkpoint(exported)


def test_an_export_that_its_owner_changes_stays_of_use(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "edited"))
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    load_model(folder)
    settings = folder / "sentence_bert_config.json"
    settings.write_text(settings.read_text().replace("40", "20"))
    with pytest.raises(InputError, match=rf"the content of {settings.name} was changed.*removed$"):
        load_model(folder)
    monkeypatch.setenv(VERIFY, "0")
    assert load_model(folder).checkpoint.max_length == 20
    monkeypatch.delenv(VERIFY)
    (folder / MANIFEST).unlink()
    assert load_model(folder).checkpoint.max_length == 20
    with pytest.raises(InputError, match=f"has no {MANIFEST} to compare it with"):
        inspect(folder)
    (folder / MANIFEST).write_text('{"name": "of a web page", "icons": []}')
    assert load_model(folder).checkpoint.max_length == 20


def test_what_a_manifest_names_is_downloaded_from_the_hub(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler over several layers has weights in a module that no other has."""
    folder = Path(export(load_model(tiny_bert, "avg_first_last"), tmp_path / "exported"))

    def download(name: str, allow_patterns: list[str], **_: Any) -> str:
        for file in (path for path in folder.rglob("*") if path.is_file()):
            relative = file.relative_to(folder)
            if any(fnmatch(relative.as_posix(), pattern) for pattern in allow_patterns):
                (tmp_path / "hub" / relative.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "hub" / relative)
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model("someone/exported").pooler == "avg_first_last"
    assert not (tmp_path / "hub" / "README.md").exists()


def write_run(folder: Path, model: Path, steps: tuple[int, ...] = (1, 2)) -> Run:
    """A run folder with small checkpoints, a log and results."""
    settings = Config(output=str(folder), data=DataConfig(train=str(model)))
    run = create_run(folder, settings, "text", read_checkpoint(model), load_tokenizer(model))
    record: dict[str, Any] = {"run": digest(folder / "run.json"), "parts": [{"from": 0, "made": provenance()}]}
    log = MetricsLog(run.metrics_file, -1)
    with open_checkpoints(folder, settings.checkpoint) as checkpoints:
        for step in steps:
            log.write(step, {"loss": 1 / step})
            record["log"] = log.record() | {"gaps": []}
            progress = Progress(steps[0], 50.0, step - steps[0])
            checkpoints.save({"params": {"x": np.full(9, step, np.float32)}}, step, progress, 50.0 / step, record)
    log.close()
    write_sealed(run.results_file, {"step": steps[-1], "best_step": steps[0], "dev": 50.0})
    return run


@pytest.fixture(scope="module")
def made_run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", tiny_bert).folder


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_run, tmp_path / "run"))


@damages
def test_damage_of_any_small_file_of_a_run_is_found(made_run: Path, damage: Callable[[Path], None]) -> None:
    files = [made_run / "run.json", *(made_run / "model").iterdir()]
    assert len(files) > 4
    for path in files:
        with kept(path):
            damage(path)
            assert not inspect(made_run).whole
            if path.exists() or path.name != "run.json":
                with pytest.raises(InputError, match=rf"damaged \(.*{path.name}.*\): copy the run's files back"):
                    open_run(made_run)
    assert inspect(made_run).whole


def state(report: Report, name: str) -> str:
    return next(f"{item.state}: {item.detail}" for item in report.items if item.name == name)


@changes
def test_damaged_results_are_set_aside(run: Path, damage: Callable[[Path], None]) -> None:
    """They are written again from the newest checkpoint; without one, nothing is touched."""
    file = run / "results.json"
    assert open_run(run).has_ended()
    damage(file)
    content = file.read_bytes()
    assert state(inspect(run), "results.json").startswith("damaged")
    assert not open_run(run).has_ended()
    with pytest.raises(InputError, match=r"results.json is damaged .*give the command that trained the run again"):
        open_run(run).results()
    (line,) = set_damaged_aside(run)
    assert "the run ends again" in line
    assert not file.exists()
    assert (run / "damaged" / "results.json").read_bytes() == content
    assert "results.json" in state(inspect(run), "damaged/")
    shutil.rmtree(run / "checkpoints")
    (run / "damaged" / "results.json").rename(file)
    with pytest.raises(InputError, match="no checkpoint is left to write it from"):
        set_damaged_aside(run)
    assert file.read_bytes() == content


def test_a_run_is_exported_without_its_damaged_results(
    run: Path, tiny_bert: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = replace(load_model(tiny_bert, "cls"), run=open_run(run), step=2)
    assert "Dev, Spearman" in model_card(loaded)
    assert not capsys.readouterr().err
    (run / "results.json").rename(run / "results.aside")
    with telling(quiet=False):
        assert "Dev, Spearman" not in model_card(loaded)
    assert "results.json has none yet, since the run has not ended" in capsys.readouterr().err
    (run / "results.aside").rename(run / "results.json")
    cut(run / "results.json")
    assert "## Training" in model_card(loaded)
    assert "Dev, Spearman" not in model_card(loaded)
    assert "the model card has no scores: " in caplog.text


def test_every_flipped_bit_of_results_is_found(tmp_path: Path) -> None:
    """A letter of a number's exponent apart, where its case does not matter."""
    file = tmp_path / "results.json"
    write_sealed(file, {"step": 8, "dev": float("nan"), "before": {"a.tsv": 3.5}, "learning": 3e-05})
    content = read_sealed(file)
    assert content == {"step": 8, "dev": None, "before": {"a.tsv": 3.5}, "learning": 3e-05}
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            assert read_sealed(file) == content
            assert changed.lower() == whole.lower()
        except Damage:
            pass


def test_what_a_log_has_lost_is_said(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file, -1)
    for step in range(1, 6):
        log.write(step, {"loss": 1 / step})
        if step == 4:
            written = log.record()
    log.close()
    assert problem_of(file, 4, written) == ""
    assert problem_of(file, 4, {}) == ""
    whole = file.read_text()
    file.write_text(whole.replace("0.5", "0.6"))
    assert problem_of(file, 4, written) == "its lines up to step 4 were changed, so that a figure there may be wrong"
    file.write_text(whole.replace('{"step": 2', '{"step"; 2'))
    assert problem_of(file, 4, written) == "1 of its 4 lines up to step 4 are lost"
    file.write_text(whole.replace('"step": 5, "loss": 0.2}\n', '"step": 5, "lo'))
    assert problem_of(file, 4, written) == ""
    file.unlink()
    assert problem_of(file, 4, written) == "4 of its 4 lines up to step 4 are lost"


def test_the_checkpoint_of_another_run_is_not_read(run: Path, tiny_bert: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", tiny_bert, (3,)).folder
    shutil.copytree(other / "checkpoints" / "3", run / "checkpoints" / "3")
    with pytest.raises(Damage, match=r"of a run with another run\.json"):
        check_whole(run / "checkpoints" / "3")
    (line,) = set_damaged_aside(run)
    assert "the newest whole one is that of step 2" in line


def test_verify_says_what_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(run)])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{run}: a run, whole\n")
    for part in ("settings", "checkpoint 1", "checkpoint 2", "best", "metrics.jsonl", "results.json"):
        assert f"  {part} " in shown
    assert "repeated here: bit for bit" in shown
    cut(next(path for path in (run / "checkpoints" / "1" / "params").rglob("*") if path.is_file()))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(run), "--json"])
    (report,) = json.loads(capsys.readouterr().out)
    assert report["repeatable"].startswith("repeated here: ")
    assert not report["whole"]
    states = {item["name"]: item["state"] for item in report["items"]}
    assert [name for name, found in states.items() if found == "damaged"] == ["checkpoint 1", "best", "metrics.jsonl"]
    shutil.rmtree(run / "checkpoints" / "1")
    assert state(inspect(run), "best") == "damaged: that of step 1, dev 50.0, is gone"
    assert inspect(run / "checkpoints" / "2").whole


def test_verify_compares_what_made_a_run_with_what_is_here(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = provenance() | {"jax": "99.0", "revision": "abc"}
    monkeypatch.setattr("simcse_jax.inference.verification._here", lambda: here)
    report = inspect(run)
    assert report.differs == {"from step 0": {"jax": (provenance()["jax"], "99.0")}}
    main(["verify", str(run)])
    shown = capsys.readouterr().out
    assert ["jax", provenance()["jax"], "99.0"] in [line.split() for line in shown.splitlines()]
    assert "repeated here: not bit for bit, as there are differences (jax)" in shown


def test_provenance_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/ada/out --xla_tuned=/home/ada/tuned.txt --xla_fast=true")
    assert provenance()["settings"].endswith("matmul_precision=None --xla_tuned=tuned.txt --xla_fast=true")


def test_verify_of_an_index_and_of_token_caches(
    tiny_bert: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index(["a", "b"], np.eye(2, dtype=np.float32)).save(tmp_path / "index")
    cache = tmp_path / "cache"
    corpus = open_corpus(DataConfig(train=str(text_file)))
    tokenize_corpus(corpus, load_tokenizer(tiny_bert), 12, cache, progress=False)
    (tokens,) = cache.iterdir()
    main(["verify", str(index), str(cache), str(tokens)])
    shown = capsys.readouterr().out
    assert f"{index}: a saved index, whole" in shown
    assert f"{cache}: token caches, whole" in shown
    assert f"{tokens}: a token cache, whole" in shown
    assert "DAMAGED" not in shown
    flip_a_bit(tokens / "ids-0.bin")
    (index / MANIFEST).unlink()
    assert not inspect(cache).whole
    assert not inspect(index).whole
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(tiny_bert)])
    assert f"{tiny_bert} has no {MANIFEST}" in capsys.readouterr().err


def test_no_verify_trusts_the_disk(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VERIFY, "")
    file = max((run / "checkpoints" / "2" / "params").rglob("*"), key=lambda path: path.is_file())
    flip_a_bit(file)
    with pytest.raises(Damage):
        check_whole(run / "checkpoints" / "2")
    with pytest.raises(SystemExit, match="1"):  # which verifies all the same
        main(["verify", "--no-verify", str(run)])
    assert os.environ[VERIFY] == "0"
    check_whole(run / "checkpoints" / "2")


def test_what_killed_processes_left_in_a_cache_goes(
    tiny_bert: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what a process still fills or has just made, nor a fresh folder of another host."""
    from simcse_jax.data.token_cache import LOCK, PARTIAL

    names = (f"{PARTIAL}1", f"{PARTIAL}2", f"{PARTIAL}3", "partial-x", "partial-y")
    left, filled, made, other, old = (tmp_path / name for name in names)
    for folder in (left, filled, made, other, old):
        folder.mkdir()
        (folder / "ids.bin").write_bytes(b"1")
    for folder in (left, filled):
        os.utime(folder, (time.time() - 60,) * 2)
    os.utime(old, (0, 0))
    number = os.open(filled / LOCK, os.O_RDWR | os.O_CREAT)
    os.utime(filled, (time.time() - 60,) * 2)
    flock = fcntl.flock

    def flock_of_nfs(number: int, kind: int) -> None:
        if kind & fcntl.LOCK_EX and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(number, kind)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    try:
        flock(number, fcntl.LOCK_SH)
        corpus = open_corpus(DataConfig(train=str(text_file)))
        tokenize_corpus(corpus, load_tokenizer(tiny_bert), 12, tmp_path, progress=False)
    finally:
        os.close(number)
    assert {path for path in tmp_path.iterdir() if path.name.startswith("partial")} == {filled, made, other}


@pytest.mark.full
def test_a_run_goes_on_with_what_is_left(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After damage to its log and its results: it says so, and ends with the bits of a run without."""
    whole, folder = replace(config, output=f"{config.output}-whole"), Path(config.output)
    with first_devices(1):
        train(whole)
        with monkeypatch.context() as patch:
            patch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 5)
            train(config)
        log = folder / "metrics.jsonl"
        log.write_text(log.read_text().replace('{"step": 2', '{"step"; 2') + '{"step": 6, "lo')
        monkeypatch.setattr("simcse_jax.training.trainer.provenance", lambda: {"jax": "99.0"})
        capsys.readouterr()
        train(config)
        said = capsys.readouterr().out
        assert f"{log}: lines that cannot be read are dropped: 2" in said
        assert "is damaged: 1 of its " in said
        assert_identical(final_state(folder), final_state(Path(whole.output)))
        report = inspect(folder)
        assert report.whole
        assert "lines before step 5 were lost or changed earlier" in state(report, "metrics.jsonl")
        assert list(report.made) == ["from step 0", "from step 5"]
        assert len(lines(folder)) == len(lines(Path(whole.output))) - 1
        results = read_sealed(folder / "results.json")
        cut(folder / "results.json")
        train(config)
        assert "the run ends again" in capsys.readouterr().out
        assert read_sealed(folder / "results.json") == results
        assert inspect(folder).whole
