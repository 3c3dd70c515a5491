"""Several processes, each with devices of its own, train as one."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.errors import InputError
from simcse_jax.runtime.processes import check_shared
from tests.jobs import Job

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


@pytest.fixture(scope="module")
def alone(config_file: Path) -> Path:
    """The run folder of one process with 8 devices."""
    output = config_file.parent / "alone"
    done = subprocess.run(command(config_file, output), env=environment(), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_equal_one_with_all_devices(alone: Path, config_file: Path, tmp_path: Path, processes: int) -> None:
    """Losses, gradient norms and dev scores over 20 steps with dropout; the parameters at the end."""
    output = tmp_path / "run"
    rehearsal = [*REHEARSE, "--logs", str(tmp_path), str(processes), str(8 // processes)]
    done = subprocess.run(
        [*rehearsal, *command(config_file, output)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "rehearsal-1.log").read_text()
    expected, actual = losses(alone), losses(output)
    assert len(expected) == 20
    np.testing.assert_allclose(actual, expected, rtol=5e-6)
    results = [json.loads((folder / "results.json").read_text()) for folder in (alone, output)]
    words = [{name: x for name, x in result.items() if isinstance(x, str)} for result in results]
    assert words[0] == words[1]
    numbers = [{name: x for name, x in result.items() if not isinstance(x, str)} for result in results]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    # The others speak only through their logs.
    assert done.stdout.count("run in") == 1


@pytest.mark.full
def test_preemption_of_one_process_saves_and_ends_all(config_file: Path, tmp_path: Path) -> None:
    """SIGTERM: the status asked for and a checkpoint of the step reached, from which the same command goes on."""
    output = tmp_path / "run"
    long = command(config_file, output, "--max-steps", "5000")
    stopped = [0]
    for status in (0, 75):
        stopped_status = [] if status == 0 else ["--stopped-status", str(status)]
        rehearsed = [*REHEARSE, "--logs", str(tmp_path), "2", "1", *long, *stopped_status]
        with subprocess.Popen(rehearsed, env=environment(1)) as rehearsal:
            deadline = time.monotonic() + 300
            while not any(int(p.name) > stopped[-1] + 9 for p in (output / "checkpoints").glob("[0-9]*[0-9]")):
                if time.monotonic() > deadline or rehearsal.poll() is not None:
                    rehearsal.terminate()  # leaving the block waits for it
                    pytest.fail("the run ended, or has not come to its next checkpoint in five minutes")
                time.sleep(0.2)
            rehearsal.send_signal(signal.SIGTERM)
            assert rehearsal.wait(timeout=60) == status
        stopped.append(max(int(path.name) for path in (output / "checkpoints").iterdir()))
    assert 10 <= stopped[1] < stopped[2]
    assert len(losses(output)) == stopped[2]


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of several blocks, of which each process tokenises some."""
    words = np.array(["man", "woman", "dog", "cat", "runs", "eats", "sees", "red", "house", "river", "never", "two"])
    path = tmp_path_factory.mktemp("long") / "text.txt"
    drawn = np.random.default_rng(0).choice(words, (5 * 8192, 4))
    path.write_text("".join(" ".join(row) + "\n" for row in drawn))
    return path


@pytest.mark.full
def test_shares_of_tokens_give_the_run_of_one_process(config_file: Path, long_text: Path, tmp_path: Path) -> None:
    """4 processes of 2 devices write a cache together and train as one of 8, on the same tokens."""
    options = ["--data.train", str(long_text), "--max-steps", "6", "--data.cache"]
    places = [str(tmp_path / name) for name in ("cache-1", "cache-4")]
    alone = [*command(config_file, tmp_path / "alone", *options), places[0]]
    job = [*REHEARSE, "--logs", str(tmp_path), "4", "2", *command(config_file, tmp_path / "job", *options), places[1]]
    for words in (alone, job):
        done = subprocess.run(words, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "job"), losses(tmp_path / "alone"), rtol=5e-6)
    ids = [[path.read_bytes() for path in sorted(Path(place).glob("*/ids-*.bin"))] for place in places]
    assert [len(files) for files in ids] == [1, 4]
    assert all(ids[1])
    assert sum(map(len, ids[1])) == len(ids[0][0])
    fingerprints = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("alone", "job")]
    assert fingerprints[0]["data_fingerprint"] == fingerprints[1]["data_fingerprint"]


TOKENISE = """
import sys
import numpy as np, xxhash
from simcse_jax.config import DataConfig
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.reports.progress import telling
from simcse_jax.runtime.processes import joined_processes

model, text, cache = sys.argv[1:]
with joined_processes(heartbeat=15), telling(quiet=False):
    table = tokenize_corpus(open_corpus(DataConfig(train=text)), load_tokenizer(model), 12, cache, progress=False)
    print("tokens", *(xxhash.xxh3_64_hexdigest(np.array(numbers)) for numbers in (table.ids, table.offsets)))
"""


@pytest.mark.full
def test_processes_tokenise_a_share_each_or_all_where_they_share_no_cache(
    tiny_bert: Path, long_text: Path, tmp_path: Path
) -> None:
    """The cache is the first two processes', and another folder of its name is the third's."""
    homes = {process: {"HOME": str(tmp_path / f"home-{process == 2}")} for process in range(3)}
    said = []
    for attempt in ("written", "read"):
        words = ["-c", TOKENISE, str(tiny_bert), str(long_text), "~/cache"]
        with Job(3, words, tmp_path / attempt, homes) as job:
            assert job.ends(180) == [0, 0, 0], job.said()
            said += [job.log(process) for process in range(3)]
    found = [line for log in said for line in log.splitlines() if line.startswith("tokens")]
    assert len(found) == 6
    assert len(set(found)) == 1
    shares = [len(list((tmp_path / f"home-{third}" / "cache").glob("*/ids-*.bin"))) for third in (False, True)]
    assert shares == [2, 1]
    assert ["these tokenise all of the text" in log for log in said] == [True, False, True, False, False, False]


@pytest.mark.full
def test_a_process_killed_while_it_tokenises_leaves_no_tokens(tiny_bert: Path, long_text: Path, tmp_path: Path) -> None:
    """The other ends, and the next job writes the cache."""
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text(10 * long_text.read_text())
    words = ["-c", TOKENISE, str(tiny_bert), str(text), str(cache)]

    def both_write() -> bool:
        return len([path for path in cache.glob("partial-*/*/ids-*.bin") if path.stat().st_size]) == 2

    with Job(2, words, tmp_path / "killed") as job:
        job.until(both_write)
        job.send(signal.SIGKILL, 1)
        assert job.ends(120, without=1) == [1]
        assert "process 1 of 2" in job.errors(0)[0]
    assert not list(cache.glob("tokens-*"))
    with Job(2, words, tmp_path / "again") as job:
        assert job.ends(180) == [0, 0], job.said()
    assert len(list(cache.glob("tokens-*/ids-*.bin"))) == 2


PAIR = """
import os, pathlib, signal, sys, time
from simcse_jax.errors import InputError
from simcse_jax.runtime.preemption import stop_on_signal
from simcse_jax.runtime.processes import check_shared, joined_processes

with joined_processes():
    shared, process = pathlib.Path(sys.argv[1]), os.environ["JAX_PROCESS_ID"]
    check_shared(shared / "run")
    (shared / process).mkdir()
    try:
        check_shared(shared / process / "run")
    except InputError as error:
        (shared / process / "said").write_text(str(error))

    if process == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)  # the run is still loading
    with stop_on_signal() as stop:
        for step in range(101, 120):
            if stop(step):
                break
            time.sleep(0.2)
    (shared / process / "stopped").write_text(str(step))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes wrote to a folder of its own."""
    folder = tmp_path_factory.mktemp("pair")
    rehearsal = [*REHEARSE, "--logs", str(folder), "2", "1", sys.executable, "-c", PAIR, str(folder)]
    done = subprocess.run(rehearsal, env=environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_an_output_that_hosts_do_not_share_is_refused(pair: Path) -> None:
    """By every process, so that none waits for the others; one that they share is not, and nothing is left there."""
    for process in ("0", "1"):
        assert "run is not shared: 1 of 2 processes do not see" in (pair / process / "said").read_text()
        assert sorted(path.name for path in (pair / process).iterdir()) == ["said", "stopped"]


def test_a_full_disk_of_process_0_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 comes to what all gather also where it cannot write; process 1 is made up."""
    gathered: list[Any] = []

    def touch(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def gather(mine: np.ndarray) -> np.ndarray:
        gathered.append(mine.tolist())
        return np.stack([mine, [False, True]])

    monkeypatch.setattr("simcse_jax.runtime.processes.jax.process_count", lambda: 2)
    for name, value in {
        "broadcast_one_to_all": lambda x: x,
        "sync_global_devices": lambda x: None,
        "process_allgather": gather,
    }.items():
        monkeypatch.setattr(f"simcse_jax.runtime.processes.multihost_utils.{name}", value)
    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(InputError, match=r"cannot be written by process 0 \(No space left on device\): free space"):
        check_shared(tmp_path / "run")
    assert gathered == [[False, False]]


def test_a_signal_before_the_first_step_of_a_resumed_run_counts(pair: Path) -> None:
    """All stop after the same step, and that is not past the end."""
    stopped = [int((pair / process / "stopped").read_text()) for process in ("0", "1")]
    assert stopped[0] == stopped[1] < 119


STOPPING = """
import signal, sys, time
import jax
from simcse_jax.runtime.preemption import stop_on_signal
from simcse_jax.runtime.processes import joined_processes

with joined_processes(), stop_on_signal() as stop:
    for step in range(1000):
        print(step)
        if jax.process_index() == 1 and step == 10:
            for _ in range(int(sys.argv[1])):
                signal.raise_signal(signal.SIGINT)
        if stop(step):
            time.sleep(30 * (int(sys.argv[1]) - 1))  # saving waits for a process that has ended
            break
        time.sleep(0.1)
"""


@pytest.mark.full
def test_ctrl_c_stops_all_processes_together(tmp_path: Path) -> None:
    with Job(2, ["-c", STOPPING, "1"], tmp_path) as job:
        assert job.ends(60) == [0, 0]
        first, second = (job.log(process).splitlines() for process in (0, 1))
        assert "SIGINT: saving and stopping after this step; once more to stop at once" in second
        assert [line for line in first if line.isdecimal()] == [line for line in second if line.isdecimal()]


@pytest.mark.full
def test_ctrl_c_twice_ends_all_processes(tmp_path: Path) -> None:
    with Job(2, ["-c", STOPPING, "2"], tmp_path) as job:
        assert job.ends(60)[0] == 130
        assert job.errors(0)[0].endswith("was interrupted")


FULL_DISK = """
import errno, os, sys
from simcse_jax.cli import program
from simcse_jax.runs import checkpoints

def no_space(*given, **named):
    raise OSError(errno.ENOSPC, "No space left on device")

if sys.argv[1] == "0":
    checkpoints.write_manifest = no_space
elif os.environ["JAX_PROCESS_ID"] == "1":
    from orbax.checkpoint._src.futures import future
    future.ChainedFuture.result = no_space
program(sys.argv[2:])
"""


@pytest.mark.full
@pytest.mark.parametrize("full", [0, 1])
def test_a_process_that_cannot_write_a_checkpoint_ends_all(config_file: Path, tmp_path: Path, full: int) -> None:
    """Soon, though orbax's threads wait for one another: process 0 its manifest, process 1 its arrays."""
    arguments = ["train", str(config_file), "--output", str(tmp_path / "run"), "--heartbeat", "5"]
    with Job(2, ["-c", FULL_DISK, str(full), *arguments], tmp_path / "logs") as job:
        assert job.ends(180) == [2, 2], job.said()
        assert "No space left on device): free space and run the same command again" in job.errors(full)[0]
        assert f"process {full} of 2" in job.errors(1 - full)[0]
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()]


def test_dry_run_prints_the_processes() -> None:
    done = subprocess.run([*REHEARSE, "--dry-run", "2", "4", "true", "--flag"], capture_output=True, text=True)
    assert [line.split()[-3:] for line in done.stdout.splitlines()] == [
        [f"JAX_PROCESS_ID={i}", "true", "--flag"] for i in range(2)
    ]


def test_a_command_that_does_not_exist_is_refused() -> None:
    done = subprocess.run([*REHEARSE, "2", "4", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no command 'no-such-command'" in done.stderr
