"""Several processes, each with devices of its own, train as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REHEARSE = [sys.executable, str(ROOT / "launch" / "rehearse.py")]

CONFIG = """
from simcse_jax.config import *
config = Config(
    batch_size=16, max_steps=20, log_every=1, seed=3,
    model=ModelConfig(path={model!r}, pooler="cls", mlp_only_train=True),
    data=DataConfig(train={text!r}, max_length=16, cache={cache!r}),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    evaluation=EvaluationConfig(dev={dev!r}, every=10),
    checkpoint=CheckpointConfig(every=10),
)
"""


@pytest.fixture(scope="module")
def config_file(tiny_bert: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multihost")
    dev = folder / "dev.tsv"
    pairs = ["a man runs\ta woman runs\t3", "the dog eats\ta dog eats\t5", "red house\tnever two\t0", "cat\tdog\t2"]
    dev.write_text("sentence1\tsentence2\tscore\n" + "\n".join(pairs) + "\n")
    path = folder / "config.py"
    values = {"model": str(tiny_bert), "text": str(text_file), "cache": str(folder / "cache"), "dev": str(dev)}
    path.write_text(CONFIG.format(**values))
    return path


def command(config_file: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "simcse_jax", "train", str(config_file), "--output", str(output), *options]


def environment(devices: int = 8) -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def losses(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_process_of_eight(config_file: Path, tmp_path: Path) -> None:
    """Losses, gradient norms and dev scores over 20 steps with dropout; the parameters at the end."""
    alone = subprocess.run(command(config_file, tmp_path / "one"), env=environment(), stderr=subprocess.PIPE, text=True)
    assert alone.returncode == 0, alone.stderr
    rehearsal = [*REHEARSE, "--logs", str(tmp_path), "2", "4", *command(config_file, tmp_path / "two")]
    done = subprocess.run(rehearsal, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + (tmp_path / "rehearsal-1.log").read_text()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    for expected, actual in zip(one, two, strict=True):
        assert actual == pytest.approx(expected, rel=5e-6)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    # Process 1 speaks only through its log.
    assert done.stdout.count("run in") == 1


@pytest.mark.slow
def test_preemption_of_one_process_saves_and_ends_all(config_file: Path, tmp_path: Path) -> None:
    """SIGTERM: exit status 0 and a checkpoint of the step reached, from which the same command goes on."""
    output = tmp_path / "run"
    long = command(config_file, output, "--max-steps", "5000")
    stopped = [0]
    for _ in range(2):
        with subprocess.Popen([*REHEARSE, "--logs", str(tmp_path), "2", "1", *long], env=environment(1)) as rehearsal:
            deadline = time.monotonic() + 120
            while not any(int(p.name) > stopped[-1] + 9 for p in (output / "checkpoints").glob("[0-9]*[0-9]")):
                assert time.monotonic() < deadline
                assert rehearsal.poll() is None
                time.sleep(0.2)
            rehearsal.send_signal(signal.SIGTERM)
            assert rehearsal.wait(timeout=60) == 0
        stopped.append(max(int(path.name) for path in (output / "checkpoints").iterdir()))
    assert 10 <= stopped[1] < stopped[2]
    assert len(losses(output)) == stopped[2]


def test_dry_run_prints_the_processes() -> None:
    done = subprocess.run([*REHEARSE, "--dry-run", "2", "4", "true", "--flag"], capture_output=True, text=True)
    assert [line.split()[-3:] for line in done.stdout.splitlines()] == [
        [f"JAX_PROCESS_ID={i}", "true", "--flag"] for i in range(2)
    ]


def test_a_command_that_does_not_exist_is_refused() -> None:
    done = subprocess.run([*REHEARSE, "2", "4", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no command 'no-such-command'" in done.stderr
