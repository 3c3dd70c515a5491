"""Compiled programs kept between runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simcse_jax.runs.metrics_log import TIMES, read_log
from simcse_jax.runtime import compilation_cache as programs


@pytest.mark.full
def test_a_second_run_compiles_nothing(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    pairs = tmp_path / "pairs.tsv"
    rows = ["sentence1\tsentence2\tscore", "a man runs\ta woman runs\t3", "red house\tnever two\t0", "a cat\ta dog\t2"]
    pairs.write_text("\n".join(rows) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment |= {"HOME": str(home), "JAX_LOG_COMPILES": "1", "JAX_EXPLAIN_CACHE_MISSES": "1"}
    command = [sys.executable, "-m", "simcse_jax", "train", "unsup_bert_base", "--max-steps", "2", "--batch-size", "8"]
    command += [
        "--model.path",
        str(tiny_bert),
        "--evaluation.dev",
        str(pairs),
        "--data.train",
        str(text_file),
        "--data.cache",
        str(tmp_path / "tokens"),
    ]

    def train(output: str) -> tuple[set[str], list[dict[str, float]], str]:
        """The programs that are kept afterwards, the log of the run, and JAX's of its compiler."""
        done = subprocess.run(
            [*command, "--output", str(tmp_path / output)],
            env=environment,
            check=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        kept = {path.name for path in (home / programs.FOLDER.relative_to("~")).glob("*/*")}
        log = [{n: x for n, x in e.items() if n not in TIMES} for e in read_log(tmp_path / output / "metrics.jsonl")]
        return kept, log, done.stderr

    first, log, compiler = train("first")
    assert any(name.startswith("jit_train_step-") for name in first)
    assert "PERSISTENT COMPILATION CACHE MISS for 'jit_train_step'" in compiler
    assert "PERSISTENT COMPILATION CACHE MISS for 'jit_state_of'" in compiler
    second, log_again, compiler = train("second")
    assert second == first
    assert log_again == log
    assert "PERSISTENT COMPILATION CACHE MISS" not in compiler
    for program in ("jit_state_of", "jit_train_step"):
        assert f"Persistent compilation cache hit for '{program}'" in compiler


class Settings:
    """In place of JAX's, which are those of all tests."""

    def __init__(self, folder: str | None) -> None:
        self.values: dict[str, object] = {"jax_compilation_cache_dir": folder, "jax_enable_compilation_cache": True}
        self.update = self.values.__setitem__


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_the_folder_is_the_users_or_ours(given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.jax, "config", settings := Settings(given))
    monkeypatch.setattr(programs, "FOLDER", tmp_path / "programs")
    programs.keep_programs()
    ours = tmp_path / "programs" / programs.machine()
    assert settings.values["jax_compilation_cache_dir"] == (given or str(ours))
    assert ours.exists() == (given is None)


@pytest.mark.parametrize("home", ["a file", "none"])
def test_without_a_folder_nothing_is_kept(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(programs.jax, "config", settings := Settings(None))
    folder = tmp_path / "file" / "programs" if home == "a file" else Path("~nobody-of-this-name/programs")
    monkeypatch.setattr(programs, "FOLDER", folder)
    programs.keep_programs()
    assert settings.values == Settings(None).values


@pytest.mark.parametrize(("limit", "most"), [("MAX_BYTES", 25), ("MAX_FILES", 2)])
def test_the_oldest_go(limit: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.jax, "config", Settings(None))
    monkeypatch.setattr(programs, "FOLDER", tmp_path)
    monkeypatch.setattr(programs, limit, most)
    folder = tmp_path / programs.machine()
    folder.mkdir()
    for age, name in enumerate(["newest", "middle", "oldest"]):
        (folder / name).write_bytes(bytes(10))
        os.utime(folder / name, (0, 1000 - age))
    programs.keep_programs()
    assert {path.name for path in folder.iterdir()} == {"newest", "middle"}


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_several_processes_keep_none(given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.jax, "config", settings := Settings(given))
    monkeypatch.setattr(programs, "FOLDER", tmp_path)
    programs.keep_programs()
    programs.drop_programs()
    assert settings.values["jax_compilation_cache_dir"] == given


def test_a_named_folder_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.jax, "config", settings := Settings("elsewhere"))
    monkeypatch.setattr(programs, "FOLDER", Path("~nobody-of-this-name/programs"))
    programs.keep_programs()
    programs.drop_programs()
    assert settings.values == Settings("elsewhere").values
