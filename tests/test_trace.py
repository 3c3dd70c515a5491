"""`--profile`: the trace of some steps of a run, and the memory profile of a step that did not fit."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from simcse_jax.config import Config
from simcse_jax.errors import InputError
from simcse_jax.training.trace import Trace, save_memory
from simcse_jax.training.trainer import Trainer, train


def steps_of(folder: Path) -> list[int]:
    """The numbers of the steps in a trace, and a check that it holds the work of the program."""
    (file,) = (folder / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    planes = {plane.name: plane for plane in data.planes}
    assert "/host:CPU" in planes
    events = [event for line in planes["/host:CPU"].lines for event in line.events]
    assert any("dot" in event.name for event in events)
    return [int(dict(event.stats)["step_num"]) for event in events if event.name == "train"]


def test_the_trace_holds_the_steps_asked_for(small_run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(small_run, profile="3:4"))
    assert steps_of(Path(small_run.output)) == [3, 4]
    assert f"profile   {small_run.output}/profile" in capsys.readouterr().out


@pytest.mark.full
def test_a_run_that_ends_in_the_middle_has_a_trace(small_run: Config) -> None:
    """The trace of what was done is kept, and the run goes on with another choice of steps."""
    total = small_run.max_steps
    train(replace(small_run, profile=f"{total}:{total + 5}"))
    assert steps_of(Path(small_run.output)) == [total]
    assert train(replace(small_run, profile=""))["step"] == total  # no other run


@pytest.mark.parametrize("steps", ["3", "0:2", "4:3", "a:b", "3:", "-1:2", "3-4"])
def test_other_words_are_refused(small_run: Config, steps: str) -> None:
    with pytest.raises(InputError, match="give the first and the last step to trace"):
        train(replace(small_run, profile=steps))
    assert not Path(small_run.output).exists()


def test_steps_after_the_end_are_refused(small_run: Config) -> None:
    with pytest.raises(InputError, match=r"profile is '900:901' but the run has 8 steps"):
        train(replace(small_run, profile="900:901"))
    assert not Path(small_run.output).exists()


def test_without_a_choice_nothing_is_traced(tmp_path: Path) -> None:
    trace = Trace(None, tmp_path, print)
    with trace.step(1, None):
        pass
    trace.after(1, None)
    trace.close()
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_traces_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", begun.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: begun.append("end"))
    trace = Trace((10, 13), tmp_path, lambda line: None)
    for step in range(12, 16):
        with trace.step(step, None):
            pass
        trace.after(step, None)
    assert begun == [str(tmp_path / "profile"), "end"]


def test_the_profiler_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("only one profile may be run at a time")

    told: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    trace = Trace((1, 2), tmp_path, told.append)
    for step in (1, 2):
        with trace.step(step, None):
            pass
        trace.after(step, None)
    trace.close()
    assert told == ["profile   there is no trace: only one profile may be run at a time"]


def test_a_step_that_does_not_fit_leaves_a_memory_profile(small_run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: Trainer, batch: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")

    monkeypatch.setattr(Trainer, "take", take)
    file = Path(small_run.output) / "profile" / "memory.prof"
    with pytest.raises(InputError, match=rf"after step 0 the devices had no memory left.*--micro-batch auto.*{file}"):
        train(small_run)
    assert gzip.decompress(file.read_bytes())


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    assert save_memory(tmp_path, None, RuntimeError("INTERNAL: something")) is None
    assert not list(tmp_path.iterdir())
