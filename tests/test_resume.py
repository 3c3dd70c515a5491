"""A run that is killed, stopped or moved to other devices goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.commands.train import summary
from simcse_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    MLMConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QueueConfig,
    SmoothingConfig,
)
from simcse_jax.errors import InputError
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import load_model
from simcse_jax.model.build import build_model
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.runs.checkpoints import checkpoint_folders, open_checkpoints, restore
from simcse_jax.runs.folder import open_run
from simcse_jax.runs.metrics_log import TIMES
from simcse_jax.runtime.mesh import make_mesh, state_sharding
from simcse_jax.training.spec import StepSpec
from simcse_jax.training.state import TrainState, from_items, to_items
from simcse_jax.training.trainer import train
from tests.conftest import TINY_BERT, first_devices, full, release, tree_error, without_key_biases, write_model


@pytest.fixture(autouse=True)
def _few_devices(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two devices where a test asks for no other `devices`: a step for eight takes longer to compile and to load."""
    callspec = getattr(request.node, "callspec", None)
    with first_devices(callspec.params.get("devices", 2) if callspec else 2):
        yield


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the other tests, with two layers."""
    return write_model(tmp_path_factory.mktemp("tiny") / "bert", TINY_BERT | {"num_hidden_layers": 2})


@pytest.fixture(scope="module")
def dev_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dev") / "dev.tsv"
    pairs = ["a man runs\ta woman runs\t3", "the dog eats\ta dog eats\t5", "red house\tnever two\t0", "cat\tdog\t2"]
    path.write_text("sentence1\tsentence2\tscore\n" + "\n".join(pairs) + "\n")
    return path


@pytest.fixture
def config(tiny_bert: Path, text_file: Path, dev_file: Path, tmp_path: Path) -> Config:
    return Config(
        output=str(tmp_path / "run"),
        batch_size=16,
        max_steps=12,
        log_every=1,
        model=ModelConfig(path=str(tiny_bert), pooler="cls", mlp_only_train=True),
        data=DataConfig(train=str(text_file), max_length=12, cache=str(tmp_path / "cache")),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(dev=str(dev_file), every=4),
        checkpoint=CheckpointConfig(every=3, keep=2),
    )


def final_state(folder: Path, step: int | None = None) -> TrainState:
    """The train state of the latest checkpoint, or that of a step."""
    run = open_run(folder)
    model = build_model(read_checkpoint(run.model_folder).config, run.config.model)
    spec = StepSpec(run.config, model, make_mesh(devices=jax.devices()[:1]), 1, 1)
    folders = checkpoint_folders(folder)
    return from_items(restore(folders[step or max(folders)], to_items(spec.state_shapes())))


def assert_identical(a: Any, b: Any) -> None:
    """Every leaf, bit by bit."""
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def lines(folder: Path) -> list[dict[str, float]]:
    """The log without what it says of time, which differs."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in logged]


class Killed:
    """A training process that is ended with SIGKILL when a condition on its run folder holds."""

    def __init__(self, config_file: Path, output: Path, cache: Path) -> None:
        self.output = output
        self.command = [sys.executable, "-m", "simcse_jax", "train", str(config_file), "--output", str(output)]
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def run_to_end(self) -> None:
        done = subprocess.run(self.command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run_until(self, condition: Any) -> None:
        errors = self.output.with_suffix(".stderr")
        with (
            errors.open("w") as file,
            subprocess.Popen(self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=file) as process,
        ):
            start, deadline = self.logged(), time.monotonic() + 120
            while not condition(self.logged() - start):
                assert time.monotonic() < deadline
                assert process.poll() is None, f"ended before it was killed: {errors.read_text()[-3000:]}"
            process.send_signal(signal.SIGKILL)

    def logged(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def writing(self) -> bool:
        """Whether a checkpoint is being written: it has a temporary name until it is complete."""
        folder = self.output / "checkpoints"
        return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


@pytest.mark.parametrize("kills", [full(2), release(10)])
def test_kill_9_ends_bit_identical(
    tiny_bert: Path, text_file: Path, dev_file: Path, tmp_path: Path, kills: int
) -> None:
    """Killed at a random step and, every other time, during a checkpoint write."""
    config_file = tmp_path / "config.py"
    config_file.write_text(f"""
from simcse_jax.config import *
config = Config(
    batch_size=16, max_steps=600, log_every=1,
    model=ModelConfig(path={str(tiny_bert)!r}, pooler="cls", mlp_only_train=True),
    data=DataConfig(train={str(text_file)!r}, max_length=12, cache={str(tmp_path / "cache")!r}),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    evaluation=EvaluationConfig(dev={str(dev_file)!r}, every=50),
    checkpoint=CheckpointConfig(every=7, keep=2),
)
""")
    whole = Killed(config_file, tmp_path / "whole", tmp_path / "jax")
    whole.run_to_end()
    killed = Killed(config_file, tmp_path / "killed", tmp_path / "jax")
    generator = random.Random(0)
    during_writes = 0
    for kill in range(kills):
        steps = generator.randint(2, 40)
        if kill % 2:
            killed.run_until(lambda new, steps=steps: new >= steps and killed.writing())
            during_writes += killed.writing()
        else:
            killed.run_until(lambda new, steps=steps: new >= steps)
    killed.run_to_end()
    assert during_writes >= 3 * kills // 10
    assert_identical(final_state(killed.output), final_state(whole.output))
    assert lines(killed.output) == lines(whole.output)
    results = [json.loads((run.output / "results.json").read_text()) for run in (killed, whole)]
    assert results[0] == results[1]


@pytest.mark.full
def test_sigterm_saves_exits_0_and_resumes(config: Config, tmp_path: Path) -> None:
    arguments = ["--model.path", config.model.path, "--data.train", config.data.train, "--batch-size", "16"]
    arguments += ["--data.cache", config.data.cache, "--max-steps", "100000", "--log-every", "1"]
    command = [sys.executable, "-m", "simcse_jax", "train", "unsup_bert_base", "--output", config.output, *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command += ["--evaluation.dev", ""]
    log = Path(config.output) / "metrics.jsonl"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (log.is_file() and log.read_text().count("\n") > 5):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    step = max(int(path.name) for path in (Path(config.output) / "checkpoints").iterdir())
    assert f"stopped at step {step:,} and saved; the same command continues" in output


def lasting(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what is said of one call alone."""
    return {name: value for name, value in results.items() if name not in ("steps", "seconds")}


OBJECTIVES = {
    "contrast": ObjectiveConfig(),
    # The buffer is full at step 5, between the two stops.
    "smoothing": ObjectiveConfig(smoothing=SmoothingConfig(weight=0.5, buffer_size=80)),
    "mlm": ObjectiveConfig(mlm=MLMConfig(weight=0.1)),
    "queue": ObjectiveConfig(queue=QueueConfig(size=40, momentum=0.9), learned=("temperature",)),
}


@pytest.mark.parametrize(
    ("objective", "encoders", "stops", "steps"),
    [
        ("contrast", 1, (5,), 7),
        full("contrast", 1, (2, 7), 12),
        full("smoothing", 1, (2, 7), 12),
        full("mlm", 1, (2, 7), 12),
        full("smoothing", 2, (2, 7), 12),
        full("queue", 2, (2, 7), 12),
    ],
)
def test_resumed_in_parts_equals_whole(
    config: Config,
    objective: str,
    encoders: Any,
    stops: tuple[int, ...],
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped by request, once or twice; a finished run is not trained again."""
    config = replace(config, objective=OBJECTIVES[objective], model=replace(config.model, encoders=encoders))
    config = replace(config, max_steps=steps)
    whole = replace(config, output=str(tmp_path / "whole"))
    expected = lasting(train(whole))
    for stop_at in stops:
        monkeypatch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step, n=stop_at: step == n)
        assert train(config) == {"stopped": stop_at}
    monkeypatch.undo()
    assert lasting(train(config)) == expected
    assert_identical(final_state(Path(config.output)), final_state(Path(whole.output)))
    assert lines(Path(config.output)) == lines(Path(whole.output))
    before = (Path(config.output) / "metrics.jsonl").stat().st_mtime_ns
    assert lasting(train(config)) == expected
    assert (Path(config.output) / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.full
def test_measuring_geometry_changes_nothing(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only lines are added to the log: the same parameters and the same selection, also with it given on resuming."""
    plain = replace(config, output=str(tmp_path / "plain"))
    expected = lasting(train(plain))
    measured = replace(config, evaluation=replace(config.evaluation, geometry_every=3))
    monkeypatch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 5)
    train(replace(measured, evaluation=config.evaluation))
    monkeypatch.undo()
    assert lasting(train(measured)) == expected
    assert_identical(final_state(Path(config.output)), final_state(Path(plain.output)))
    found, without = lines(Path(config.output)), lines(Path(plain.output))
    assert [line["step"] for line in found if "dev_alignment" in line] == [0, 4, 6, 8, 9, 12]
    assert [line for line in found if line["step"] in (0, 4, 8, 12) or "loss" in line] == without


@pytest.mark.parametrize(("devices", "fsdp", "dcn"), [full(2, 2, 1), full(8, 4, 1), full(8, 2, 4)])
def test_resumes_on_other_devices(
    config: Config, devices: int, fsdp: int, dcn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From data 8 to data 2 × fsdp 4 or dcn 4 × fsdp 2, from data 2 to fsdp 2, with other settings that may change."""
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole)
    monkeypatch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 6)
    train(config)
    monkeypatch.undo()
    train(replace(config, mesh=MeshConfig(fsdp=fsdp, dcn=dcn), log_every=2, checkpoint=CheckpointConfig(every=100)))
    a, b = final_state(Path(config.output)).params, final_state(Path(whole.output)).params
    assert tree_error(without_key_biases(a), without_key_biases(b)) < 1e-5


def test_keeps_the_latest_and_the_best(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    # The best is 0, which is a score like any other, and equalled later: the last counts, which has learnt more.
    scores = iter([-10.0, 0.0, -20.0, 0.0])
    evaluations = {"reported": {}}

    def evaluate(tasks: Any, encode: Any) -> Any:
        return evaluations | {"reported": {tasks[0].name: next(scores)}}

    monkeypatch.setattr("simcse_jax.training.scores.evaluate", evaluate)
    results = train(replace(config, checkpoint=CheckpointConfig(every=9, keep=2)))
    assert (results["best_step"], results["dev"]) == (12, 0.0)
    assert "untrained" not in results
    kept = {int(path.name) for path in (Path(config.output) / "checkpoints").iterdir()}
    assert kept == {9, 12}
    assert load_model(config.output).step == 12


def test_the_best_is_kept_beside_the_latest(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([-10.0, 0.0, -20.0, -5.0])
    monkeypatch.setattr(
        "simcse_jax.training.scores.evaluate", lambda tasks, encode: {"reported": {tasks[0].name: next(scores)}}
    )
    results = train(replace(config, checkpoint=CheckpointConfig(every=9, keep=2)))
    assert (results["best_step"], results["dev"]) == (4, 0.0)
    kept = {int(path.name) for path in (Path(config.output) / "checkpoints").iterdir()}
    assert kept == {4, 9, 12}
    loaded = load_model(config.output)
    assert (loaded.step, loaded.origin) == (4, "parameters of step 4, the best dev score (0.00)")
    assert_identical(loaded.params, final_state(Path(config.output), 4).params)
    for step, found in (("latest", 12), (9, 9), ("best", 4)):
        assert load_model(config.output, step=step).step == found
    with pytest.raises(InputError, match="keeps no checkpoint of step 5; it keeps 4, 9, 12: choose one of these"):
        load_model(config.output, step=5)


def test_a_run_that_stops_early_at_its_worst_says_so(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its best checkpoint is that of step 0; the results, the last line and what exports it name that."""
    scores = iter([50.0, 40.0, 30.0, 20.0])
    monkeypatch.setattr(
        "simcse_jax.training.scores.evaluate", lambda tasks, encode: {"reported": {tasks[0].name: next(scores)}}
    )
    patient = replace(config, evaluation=replace(config.evaluation, patience=2))
    results = train(patient)
    assert (results["step"], results["best_step"]) == (8, 0)
    assert results["untrained"].startswith("no evaluation scored higher than the model before training (dev 50.00 at")
    assert json.loads((Path(config.output) / "results.json").read_text())["untrained"] == results["untrained"]
    last = summary(open_run(Path(config.output)), results, []).splitlines()[-1]
    assert last.startswith("WARNING   no evaluation scored higher")
    assert last.endswith(f"simcse-jax export {config.output} OUT --step latest takes the last step")
    capsys.readouterr()
    main(["export", config.output, str(tmp_path / "best")])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "took parameters of step 0, the best dev score (50.00): the model before training"
    assert shown[-1].startswith("WARNING: this is the model before training. --step latest exports")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "- parameters of step 0, the best dev score (50.00): the model before training\n" in card
    main(["export", config.output, str(tmp_path / "latest"), "--step", "latest"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "took parameters of step 8, the latest"
    assert len(shown) == 2
    assert "- parameters of step 8, the latest\n" in (tmp_path / "latest" / "README.md").read_text()
    with pytest.raises(InputError, match="keeps no checkpoint of step 5; it keeps 0, "):
        export(config.output, tmp_path / "other", step=5)
    with pytest.raises(InputError, match="for a model that is loaded already: give it to load_model"):
        export(load_model(config.output), tmp_path / "other", step=0)


def test_a_checkpoint_is_a_copy_of_its_moment(config: Config) -> None:
    """The state is donated to the next step while the checkpoint is still being written."""
    mesh = make_mesh(devices=jax.devices()[:1])
    state = TrainState(jax.numpy.int32(1), {"head": jax.numpy.ones((512, 512))}, ())
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    folder = Path(config.output)
    from simcse_jax.runs.checkpoints import Progress

    with open_checkpoints(folder, CheckpointConfig(keep=4)) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(to_items(state), step, Progress(), None)
            state = advance(state)
        checkpoints.wait()
        for step in range(1, 5):
            sharding = state_sharding(mesh, state.params)["head"]
            shape = {"head": jax.ShapeDtypeStruct((512, 512), np.float32, sharding=sharding)}
            restored = restore(checkpoint_folders(folder)[step], {"params": shape})["params"]
            np.testing.assert_array_equal(restored["head"], np.full((512, 512), step, np.float32))


def test_a_run_folder_that_vanishes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(self: Any, step: int) -> bool:
        while step == 3 and Path(config.output).exists():  # a checkpoint may be on its way there
            shutil.rmtree(config.output, ignore_errors=True)
        return False

    monkeypatch.setattr("simcse_jax.training.trainer.StopRequest.__call__", remove)
    with pytest.raises(InputError, match=f"writing to {config.output} failed .*: the folder is gone"):
        train(config)


@pytest.mark.parametrize(
    "place",
    [
        "simcse_jax.training.scores.evaluate",
        "simcse_jax.training.trainer.to_items",
        "simcse_jax.runs.checkpoints.asdict",
    ],
)
@pytest.mark.parametrize("error", [TypeError("a bug"), ConnectionError("no network")], ids=["bug", "network"])
def test_an_error_that_is_no_refusal_to_write_passes(
    config: Config, place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither reads as a full disk nor loses its traceback."""

    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(type(error)) as raised:
        train(config)
    assert raised.value is error


def test_only_one_process_trains_in_a_folder(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first runs, and continues it afterwards."""

    def meanwhile(self: Any, step: int) -> bool:
        if step == 2:
            with pytest.raises(InputError, match="another process is training in"):
                train(config)
        return step == 3

    monkeypatch.setattr("simcse_jax.training.trainer.StopRequest.__call__", meanwhile)
    assert train(config) == {"stopped": 3}
    monkeypatch.undo()
    assert train(config)["step"] == 12


@pytest.mark.full
def test_text_may_have_moved(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 3)
    train(config)
    monkeypatch.undo()
    moved = tmp_path / "moved.txt"
    moved.write_bytes(Path(config.data.train).read_bytes())
    assert train(replace(config, data=replace(config.data, train=str(moved))))["step"] == 12


@pytest.mark.full
def test_killed_with_the_checkpoint_of_step_0_only(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dev score of step 0 is neither measured nor counted twice."""
    config = replace(config, checkpoint=CheckpointConfig(every=9))
    whole = replace(config, output=str(tmp_path / "whole"))
    expected = lasting(train(whole))

    def die(self: Any, step: int) -> bool:
        raise RuntimeError("killed")

    monkeypatch.setattr("simcse_jax.training.trainer.StopRequest.__call__", die)
    with pytest.raises(RuntimeError, match="killed"):
        train(config)
    monkeypatch.undo()
    assert [path.name for path in (Path(config.output) / "checkpoints").iterdir()] == ["0"]
    assert lasting(train(config)) == expected
    assert lines(Path(config.output)) == lines(Path(whole.output))
    assert_identical(final_state(Path(config.output)), final_state(Path(whole.output)))
