"""A run goes on wherever its files lie now, as long as they hold what they held; anything else is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simcse_jax.config import Config, EvaluationConfig
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.inference.loading import load_model
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runs.folder import create_run, is_run, open_run
from simcse_jax.runs.lock import only_writer
from simcse_jax.storage.manifest import MANIFEST
from simcse_jax.training.compiled_step import CompiledStep
from simcse_jax.training.prepare import check_request, load_parts, make_feed
from simcse_jax.training.trainer import train
from tests.conftest import first_devices

TEST = "sentence1\tsentence2\tscore\na man eats\ta woman eats\t3\na river\ta dog\t0\nnever\tnever two\t4\n"


@pytest.fixture(autouse=True)
def _few_devices() -> Iterator[None]:
    with first_devices(1):
        yield


@pytest.fixture
def config(small_run: Config, tmp_path: Path) -> Config:
    """The small run with files of its own, in a folder that can be moved."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copytree(small_run.model.path, old / "model")
    shutil.copy(small_run.evaluation.dev, old / "dev.tsv")
    (old / "test.tsv").write_text(TEST)
    return in_folder(small_run, old)


def in_folder(config: Config, folder: Path) -> Config:
    evaluation = replace(config.evaluation, dev=str(folder / "dev.tsv"), test=(str(folder / "test.tsv"),))
    return replace(config, model=replace(config.model, path=str(folder / "model")), evaluation=evaluation)


def stop_at(step: int, config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, at: at == step)
        assert train(config) == {"stopped": step}


def change_a_score(file: Path) -> Callable[[], None]:
    """Changes one gold score, and returns a function that takes it back."""
    before = file.read_bytes()
    assert before.count(b"\t0\n") == 1
    file.write_bytes(before.replace(b"\t0\n", b"\t1\n"))
    return lambda: [file.write_bytes(before), None][1]


@pytest.mark.full
def test_a_run_goes_on_with_moved_files_and_refuses_changed_ones(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(3, config)
    run = Path(config.output)
    before = (run / "metrics.jsonl").read_bytes()
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    moved = in_folder(config, tmp_path / "new")

    for name, what in (("dev", "pairs"), ("test", "pairs"), ("model", "weights")):
        if name == "model":
            tensors = load_file("model/model.safetensors")
            changed = {n: x + np.float32(n == "encoder.layer.0.output.dense.bias") for n, x in tensors.items()}
            save_file(changed, "model/model.safetensors")
            restore: Callable[[], object] = lambda: save_file(tensors, "model/model.safetensors")  # noqa: B023, E731
        else:
            restore = change_a_score(Path(f"{name}.tsv"))
        setting = "model.path" if name == "model" else f"evaluation.{name}"
        with pytest.raises(InputError, match=f"run is a run with other {what} than {setting} names now") as raised:
            train(moved)
        assert "another --output" in str(raised.value)
        if what == "pairs":
            assert f"simcse-jax evaluate {run} --tasks FILE" in str(raised.value)
        restore()
    other = replace(moved, evaluation=replace(moved.evaluation, test=()))
    with pytest.raises(InputError, match=r"with other pairs than evaluation\.test names now"):
        train(other)
    assert (run / "metrics.jsonl").read_bytes() == before

    shutil.copy("dev.tsv", "pairs.tsv")
    monkeypatch.setattr("simcse_jax.evaluation.suite.STS_TASKS", ("test.tsv",))
    here = replace(moved.evaluation, dev="./pairs.tsv", test=("sts",))
    results = train(replace(moved, evaluation=here))
    assert results["step"] == 8
    assert list(results["before"]) == list(results["after"]) == ["test.tsv", "Avg."]

    # Ended, the run needs no checkpoints to say what came of it.
    shutil.rmtree(run / "checkpoints")
    assert train(moved) == results | {"steps": 0, "seconds": 0.0}
    assert not (run / "checkpoints").exists()
    with pytest.raises(InputError, match="run has ended and its checkpoints are gone: copy them back"):
        load_model(run)


@pytest.mark.full
def test_a_run_of_an_earlier_version_goes_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no digests: its paths are compared, however they are written."""
    stop_at(3, config)
    file = Path(config.output) / "run.json"
    about = json.loads(file.read_text())
    assert set(about.pop("contents")) == {"model.path", "evaluation.dev", "evaluation.test"}
    file.write_text(json.dumps(about))
    (file.parent / MANIFEST).unlink()
    assert open_run(file.parent).contents == {}
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    with pytest.raises(InputError, match=r"with other settings \(model.path was .*evaluation.dev was .*evaluate .*run"):
        train(in_folder(config, tmp_path / "copy"))
    monkeypatch.chdir(tmp_path / "old")
    assert train(in_folder(config, Path("../old")))["step"] == 8


def begin(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the run folder, and fails before the first step is compiled; so does every later `train`."""
    monkeypatch.setattr("simcse_jax.training.prepare.compile_step", lambda spec: object.__new__(CompiledStep))
    monkeypatch.setattr("simcse_jax.training.trainer.describe", lambda prepared: "")
    monkeypatch.setattr("simcse_jax.training.trainer.create_state", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config)


def test_a_run_without_a_checkpoint_begins_with_the_same_weights(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(config, monkeypatch)
    assert is_run(Path(config.output))
    with pytest.raises(ZeroDivisionError):  # goes on, also with a copy of the model
        train(config)
    shutil.copytree(config.model.path, config.model.path + "-copy")
    with pytest.raises(ZeroDivisionError):
        train(replace(config, model=replace(config.model, path=config.model.path + "-copy")))
    tensors = load_file(Path(config.model.path) / "model.safetensors")
    save_file({n: x * np.float32(2) for n, x in tensors.items()}, Path(config.model.path) / "model.safetensors")
    with pytest.raises(InputError, match=r"with other weights than model\.path names now"):
        train(config)


def test_what_a_run_of_an_earlier_version_began_with_is_not_doubted(config: Config, tmp_path: Path) -> None:
    """Columns that a new run would have to name, and a batch of one."""
    text = tmp_path / "text.csv"
    text.write_text("id,text\n1,a man\n2,a dog\n3,a cat\n")
    data, evaluation = replace(config.data, train=str(text)), EvaluationConfig(dev="")
    config = replace(config, data=data, evaluation=evaluation, batch_size=1)
    with pytest.raises(InputError, match="column id holds numbers"):
        check_request(config)
    checkpoint, tokenizer = read_checkpoint(config.model.path), load_tokenizer(config.model.path)
    table = tokenize_corpus(replace(open_corpus(data), doubt=False), tokenizer, 12, data.cache, progress=False)
    create_run(Path(config.output), config, table.fingerprint, checkpoint, tokenizer)
    request = check_request(config)
    feed = make_feed(request, load_parts(request))
    assert feed.table.origin == ("sentence ← id: 1", "positive ← text: a man")


def test_a_run_that_is_trained_is_found_before_anything_is_read(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(config, monkeypatch)
    monkeypatch.setattr("simcse_jax.training.prepare.load_parts", lambda *given: 1 / 0)
    with only_writer(Path(config.output)), pytest.raises(InputError, match="another process is training in"):
        train(config)
    with pytest.raises(ZeroDivisionError):
        train(config)
