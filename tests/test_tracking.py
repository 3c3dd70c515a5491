"""What a run shows: its progress, its log, TensorBoard, Weights & Biases, its figures, and where it says all is."""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simcse_jax.cli import main
from simcse_jax.config import Config
from simcse_jax.errors import InputError
from simcse_jax.runs import tracking
from simcse_jax.runs.figures import draw_run
from simcse_jax.runs.folder import open_run
from simcse_jax.runs.metrics_log import TIMES, MetricsLog, read_log
from simcse_jax.runs.speed import StepClock, StepWork
from simcse_jax.runs.tracking import Follower, TensorBoard, WandB, check_tracking
from simcse_jax.training.trainer import train
from simcse_jax.xla.chips import CHIPS, chip_of

LINES = [{"step": step, "loss": 1 / (step + 1), "grad_norm": None} for step in range(1, 6)] + [{"step": 5, "dev": 80.5}]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag, step and value of all events in a folder; a step that is there twice is an error."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    steps = found.setdefault(value.tag, {})
                    assert event.step not in steps, f"{value.tag} has step {event.step} twice"
                    steps[event.step] = value.simple_value
    return found


def test_tensorboard_is_written_anew_from_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    first = TensorBoard(tmp_path, {"seed": 1}, [])
    for line in LINES:
        first.log(line)
    first.close()
    again = TensorBoard(tmp_path, {"seed": 1}, LINES[:3])  # a run that goes on after step 3
    for line in LINES[3:]:
        again.log(line)
    again.close()
    assert len(list(tmp_path.glob("events*"))) == 1
    found = scalars(tmp_path)
    assert found["train/loss"] == pytest.approx({step: 1 / (step + 1) for step in range(1, 6)})
    assert found["dev/dev"] == {5: 80.5}
    assert "train/grad_norm" not in found
    assert b'"seed": 1' in next(tmp_path.glob("events*")).read_bytes()


@pytest.mark.parametrize("spoilt", [b"5", b"[]", b"{}", b'{"step": null}', b"\0\0\0", b"\xff\xfe", b'{"step": 2, "lo'])
def test_spoilt_lines_of_a_log_do_not_stop_a_run(tmp_path: Path, spoilt: bytes) -> None:
    """As a power cut leaves them."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + spoilt + b'\n{"step": 2, "loss": 1.0}\n')
    assert [line["step"] for line in read_log(path)] == [1, 2]
    MetricsLog(path, 1).close()
    assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n'


@pytest.mark.usefixtures("two_devices")
def test_a_run_is_tracked_and_goes_on(small_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First without a tracker, then with one, which gets all; being tracked makes it no other run."""
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 5)
    assert train(small_run) == {"stopped": 5}
    monkeypatch.undo()
    train(replace(small_run, tracking=("tensorboard",)))
    run = open_run(tmp_path / "run")
    log = read_log(run.metrics_file)
    found = scalars(run.folder / "tensorboard")
    assert list(found["train/loss"]) == [2, 4, 6, 8]
    assert found["dev/dev"] == pytest.approx({line["step"]: line["dev"] for line in log if "dev" in line})
    for line in log:
        if "loss" in line:
            assert found["train/loss"][line["step"]] == pytest.approx(line["loss"])
            assert line["sentences_per_second"] > 0
            assert "utilisation" not in line  # a CPU, whose peak is not known
    assert set(TIMES) & set(log[0]) == set()  # step 0 has a score and no speed

    figures = draw_run(run)
    assert [path.name for path in figures] == ["loss.png", "dev.png", "path.png"]
    for path in figures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in path.with_suffix(".svg").read_text("utf-8")
    assert "step" in (run.folder / "figures" / "loss.svg").read_text("utf-8")


class WandBRecorder:
    """In place of the package: what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}
        self.ended = 0

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **settings: Any) -> "WandBRecorder":
        self.settings = settings
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended += 1


def test_wandb_goes_on_without_a_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 5 was given and begun again after step 3."""
    recorder = WandBRecorder()
    monkeypatch.setitem(__import__("sys").modules, "wandb", recorder)
    first = WandB(tmp_path, {"seed": 1}, LINES[:1])
    for line in LINES[1:]:
        first.log(line)
    kept = json.loads((tmp_path / "wandb.json").read_text())
    assert kept == {"id": recorder.settings["id"], "step": 4}
    again = WandB(tmp_path, {"seed": 1}, LINES[:3])
    for line in [*LINES[3:], {"step": 6, "loss": 0.1}]:
        again.log(line)
    again.close()
    assert (recorder.settings["id"], recorder.settings["resume"], recorder.settings["config"]) == (
        kept["id"],
        "allow",
        {"seed": 1},
    )
    assert [step for step, _ in recorder.logged] == [1, 2, 3, 4, 5, 5, 5, 5, 6]  # 5 may have been cut short: merged
    assert json.loads((tmp_path / "wandb.json").read_text())["step"] == 6
    assert recorder.ended == 1


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself writes its file, without a network and without a word on the terminal."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracking(["wandb"])
    tracker = WandB(tmp_path, {"seed": 1}, LINES)
    tracker.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"seed" in file.read_bytes()


def test_what_is_missing_is_said_before_the_run(
    small_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'tensorboardX: pip install "simcse-jax\[tracking\]"'):
        train(replace(small_run, tracking=("tensorboard",)))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    monkeypatch.setattr(tracking, "_logged_in", lambda: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(InputError, match="wandb login"):
        check_tracking(["wandb"])


class Failing:
    """A tracker that fails when it begins, at a line or at the end, or never returns."""

    def __init__(self, at: str, hold: threading.Event) -> None:
        self.at, self.hold, self.lines = at, hold, 0
        self._maybe("start")

    def _maybe(self, moment: str) -> None:
        if self.at == moment:
            raise ConnectionError("no network\nand more")
        if self.at == f"slow {moment}":
            self.hold.wait(60)

    def log(self, line: dict[str, Any]) -> None:
        self.lines += 1
        self._maybe("log")

    def close(self) -> None:
        self._maybe("close")


@pytest.mark.parametrize("at", ["start", "log", "close", "slow start", "slow log", "slow close"])
def test_a_tracker_that_fails_or_hangs_neither_ends_nor_slows_anything(at: str) -> None:
    said: list[str] = []
    hold = threading.Event()
    begun = time.monotonic()
    follower = Follower("wandb", lambda: Failing(at, hold), said.append)
    for line in LINES * 100:
        follower.log(line)
    follower.close(patience=0.3)
    assert time.monotonic() - begun < 5
    hold.set()
    assert len(said) == 1
    assert said[0].startswith("tracking  wandb")
    assert ("failed (no network)" in said[0]) == (not at.startswith("slow"))


def test_speed_counts_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StepClock(StepWork(flops=3e9, least_seconds=0.5), window=2)
    assert clock.describe() == ""
    for seconds in (50.0, 2.0, 2.0):
        now[0] += seconds
        clock.step(64)
        now[0] += 1000  # an evaluation
        clock.restart()
    assert clock.speeds() == {"sentences_per_second": 32.0, "utilisation": 0.25}
    assert clock.describe() == "32 sentences/s, 25% of peak"
    assert clock.seconds == 54
    clock = StepClock(StepWork(flops=3e9, least_seconds=None), window=2)
    now[0] += 1
    clock.step(64)
    assert clock.describe() == "64 sentences/s, 3 GFLOP/s"


def test_peaks_of_known_devices() -> None:
    for kind, name in (("TPU v5 lite", "v5e"), ("NVIDIA H200", "h200"), ("TPU v4", "v4")):
        assert chip_of(kind) is CHIPS[name]
    for kind in ("cpu", "NVIDIA H100 PCIe"):
        assert chip_of(kind) is None


def test_the_command_says_where_everything_is(
    small_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the figures cannot be drawn: the run is done and said to be."""
    run = str(tmp_path / "run")
    command = ["train", "unsup_bert_base", "--output", run, "--model.path", small_run.model.path, "--max-steps", "4"]
    command += ["--data.train", small_run.data.train, "--data.cache", small_run.data.cache, "--batch-size", "16"]
    pairs = small_run.evaluation.dev
    command += ["--evaluation.dev", pairs, "--evaluation.every", "2", "--evaluation.test", pairs, "--log-every", "1"]
    main(command)
    shown = capsys.readouterr()
    assert re.search(rf"run in    {run}, 4 steps\nbest      dev spearman -?\d+\.\d\d at step [024]\n", shown.out)
    for line in (f"metrics   {run}/metrics.jsonl", f"figures   {run}/figures: loss, dev, path (.png, .svg)"):
        assert line in shown.out
    assert f"export    simcse-jax export {run} OUT" in shown.out
    assert re.search(r"step 4 of 4, 00:00 left, loss \d\.\d{4}, [\d,]+ sentences/s, [\d,]+ GFLOP/s, dev ", shown.err)

    def fail(run: Any) -> Callable[[], None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simcse_jax.runs.figures.draw_run", fail)
    main(command)
    shown = capsys.readouterr()
    assert "figures could not be drawn (No space left on device)" in shown.err
    assert "figures   " not in shown.out
    assert f"evaluate  simcse-jax evaluate {run} --tasks {pairs}\n" in shown.out
