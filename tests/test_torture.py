"""A short form of the campaign of faults, and what its long form has found; docs/reliability.md has its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simcse_jax.storage.files import new_file, new_folder
from tests.torture.kinds import FAULT

ROOT = Path(__file__).parents[1]


@pytest.mark.full
def test_a_short_campaign_finds_no_fault(tmp_path: Path) -> None:
    """A case of every third kind."""
    records = tmp_path / "records.jsonl"
    command = [sys.executable, "-m", "tests.torture", "--seed", "1", "--records", str(records)]
    kinds = subprocess.run([*command, "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    chosen = kinds.splitlines()[::3]  # all take two minutes
    done = subprocess.run(
        [*command, "--runs", str(len(chosen)), "--kinds", *chosen], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert {record["kind"] for record in found} == {*chosen}
    assert FAULT not in {record["outcome"] for record in found}


@pytest.fixture
def reached_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files and folders that were waited for, and of the renamings, in their order."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note_fsync(number: int) -> None:
        events.append(Path(f"/proc/self/fd/{number}").resolve().name)
        fsync(number)

    def note_rename(self: Path, target: Path) -> Path:
        events.append(f"→ {Path(target).name}")
        return (replace if self.is_file() else rename)(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(Path, "replace", note_rename)
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the names of open files are read from /proc")
@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_takes_its_name_after_its_files_reached_the_disk(
    existing: bool, tmp_path: Path, reached_disk: list[str]
) -> None:
    """Else a power cut leaves the name with empty files, or takes a folder that was reported as written."""
    folder = tmp_path / "there"
    if existing:
        folder.mkdir()
    with new_folder(folder, last="b") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("a")
        (partial / "b").write_text("b")
    first = next(number for number, event in enumerate(reached_disk) if event.startswith("→"))
    assert {*reached_disk[:first]} >= {"inner", "a", "b", "new"}
    assert reached_disk[-1] == ("there" if existing else tmp_path.name)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the names of open files are read from /proc")
def test_a_file_takes_its_name_after_it_reached_the_disk(tmp_path: Path, reached_disk: list[str]) -> None:
    with new_file(tmp_path / "results.json") as partial:
        partial.write_text("{}")
    assert reached_disk == [".results.partial.json", "→ results.json", tmp_path.name]


def test_a_late_answer_of_tensorstore_shows_no_traceback() -> None:
    """A disk that failed during a checkpoint gave one for each file, beside the one error."""
    code = """
import asyncio
import logging
import tensorstore
from simcse_jax.runs.quiet import quiet_orbax
quiet_orbax()
logging.getLogger("asyncio").disabled = True  # it names the task that still waits
promise, future = tensorstore.Promise.new()
async def wait():
    await future
loop = asyncio.new_event_loop()
task = loop.create_task(wait())
loop.run_until_complete(asyncio.sleep(0.01))
loop.close()
promise.set_result(0)
class Other:
    def __del__(self):
        raise ValueError("seen")
Other()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ValueError: seen" in done.stderr
    assert "Event loop is closed" not in done.stderr
