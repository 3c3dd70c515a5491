"""The pack for a machine with a GPU: what it holds, which commands it runs, and how its runner treats them."""

import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as beside_peers
from benchmarks import large_batch
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import prepare, resume
from benchmarks.gpu.parts import Part, parts
from benchmarks.gpu.prepare import Prepare, package_files, source_files, task_files
from simcse_jax import cli
from simcse_jax.commands.train import Train
from simcse_jax.errors import InputError

ROOT = Path(__file__).parents[1]
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"

PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "simcse_jax": cli.parse,
    "benchmarks": beside_peers.parse,
    "benchmarks.large_batch": large_batch.parse,
    "benchmarks.gpu.resume": resume.parse,
    "benchmarks.gpu.machine": lambda words: None if not words else pytest.fail(f"it takes no {words}"),
}


@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize("quick", [False, True])
def test_the_commands_of_the_parts_exist(tmp_path: Path, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options that they are given, and with values that a run can use."""
    monkeypatch.setenv("SIMCSE_DATA", str(tmp_path))
    names: list[str] = []
    for part in parts(tmp_path, tmp_path / "runs", quick):
        parsed = PARSERS[part.module](list(part.arguments))
        if isinstance(parsed, Train):
            parsed.config.validate()
        if isinstance(parsed, beside_peers.Command):
            assert parsed.quick == quick
            assert parsed.output == tmp_path / part.name
        names.append(part.name)
    assert len(set(names)) == len(names)


def test_the_pack_holds_every_module() -> None:
    """Also those in folders called as what is not packed, such as `runs`; and nothing that git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("no clone: git says what is packed")
    found = source_files()
    expected = {f"site/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("simcse_jax/**/*.py")}
    expected |= {f"site/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("benchmarks/**/*.py")}
    expected |= {f"site/simcse_jax/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("configs/**/*.py")}
    assert expected <= set(found)
    assert {"site/simcse_jax/runs/folder.py", "site/simcse_jax/data/demo_sts_dev.tsv"} <= set(found)
    assert not [name for name in found if name.startswith("site/tests") or "__pycache__" in name]


def test_only_pure_packages_are_packed() -> None:
    found = package_files(("tyro",))
    assert "site/tyro/__init__.py" in found
    assert any(name.endswith("METADATA") for name in found)
    with pytest.raises(InputError, match="numpy holds compiled code"):
        package_files(("numpy",))
    with pytest.raises(InputError, match="pip install no-such-package"):
        package_files(("no-such-package",))


def test_a_pack_that_is_too_large_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIMCSE_DATA", raising=False)
    (tmp_path / "random").write_bytes(os.urandom(2**20))
    monkeypatch.setattr(prepare, "source_files", dict)
    monkeypatch.setattr(prepare, "made_files", lambda *_: {"random": tmp_path / "random"})
    (tmp_path / "pack.tar.gz").write_text("before")
    with pytest.raises(InputError, match=r"takes [1-3]\.\d MiB and may take 1: give fewer --sentences"):
        Prepare(output=tmp_path, packages=(), megabytes=1).run()
    assert (tmp_path / "pack.tar.gz").read_text() == "before"
    with pytest.raises(InputError, match=r"wiki_en_1m.* is missing"):
        task_files(tmp_path)


FAKE = [
    Part("fails", 60, "no_such_module"),
    Part("endless", 2, "http.server", ("--bind", "127.0.0.1", "0")),
    Part("real", 60, "platform", real_text=True),
    Part("works", 60, "platform"),
]


def test_a_part_that_fails_or_does_not_end_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIMCSE_DATA", raising=False)
    monkeypatch.setattr(runner, "parts", lambda *_: FAKE)
    output, results = tmp_path / "output", tmp_path / "results"
    places = ["--output", str(output), "--results", str(results)]
    assert runner.main(places) == 1
    summary = (output / "summary.txt").read_text()
    for line in ("fails: status 1,", "endless: out of time, 2 s", "real: left out,", "works: status 0,"):
        assert f"\n{line}" in summary
    assert "No module named no_such_module" in summary
    assert (results / "summary.txt").read_text() == summary
    with tarfile.open(results / "out.tgz") as archive:
        assert set(archive.getnames()) == {"summary.txt", "fails.txt", "endless.txt", "works.txt"}
    assert runner.main([*places, "--only", "works"]) == 0
    assert runner.main([*places, "--only", "works", "--minutes", "0.1"]) == 0
    assert (output / "summary.txt").read_text().startswith(summary)
    assert "works: not started, no time left" in (results / "summary.txt").read_text()


def test_a_part_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--only", "machin", "--output", str(tmp_path / "output")]) == 1
    assert "did you mean 'machine'? The parts are machine, loss," in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_a_stopped_runner_ends_its_part(tmp_path: Path) -> None:
    """Else a part would keep the memory of the GPU."""
    code = (
        "import runpy; from benchmarks.gpu import parts; "
        "parts.parts = lambda *_: [parts.Part('endless', 60, 'http.server', ('--bind', '127.0.0.1', '0'))]; "
        "runpy.run_module('benchmarks.gpu', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "--output", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        log = tmp_path / "endless.txt"
        deadline = time.monotonic() + 60
        while not (log.is_file() and "port" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        port = int(log.read_text().split(" port ")[1].split()[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 5)


def test_losses_of_a_resumed_run_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    whole = {1: 3.0, 2: 2.0, 3: 1.0}
    assert resume.compare(whole, whole | {3: 1.5}, at=2) == 0
    assert capsys.readouterr().out == "2 losses to step 2: 0 apart at most\n1 losses after it: 0.5 apart at most\n"
    assert resume.compare(whole, {1: 3.0, 3: 1.0}, at=2) == 1
    assert "differ in their steps: [2]" in capsys.readouterr().out


def test_without_a_pack_the_script_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "gpu").mkdir(parents=True)
    script = tmp_path / "benchmarks" / "gpu" / "run.sh"
    script.write_bytes(RUN.read_bytes())
    done = subprocess.run(["bash", script, "--quick"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "python -m benchmarks.gpu.prepare" in done.stderr


@pytest.mark.release
@pytest.mark.usefixtures("minilm")
def test_a_rehearsal_from_the_pack(tmp_path: Path) -> None:
    """Every part ends with status 0, of the packed code alone."""
    pytest.importorskip("sentence_transformers", reason="the peers are on PyTorch")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    made = [sys.executable, "-m", "benchmarks.gpu.prepare", "--output", str(tmp_path / "pack"), "--sentences", "2000"]
    subprocess.run(made, cwd=ROOT, check=True)
    done = subprocess.run(
        ["bash", tmp_path / "pack" / "run.sh", "--quick"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for part in parts(tmp_path, tmp_path, quick=True):
        there = not part.real_text or "SIMCSE_DATA" in os.environ
        assert f"\n{part.name}: {'status 0' if there else 'left out'}, " in summary
    with tarfile.open(tmp_path / "out" / "out.tgz") as archive:
        assert {"summary.txt", "loss.md", "encode-long.json"} <= set(archive.getnames())
