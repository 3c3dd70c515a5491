"""Outputs: tried before the work, filled where they are empty, complete or not there at all."""

import errno
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.ablation import Ablation
from simcse_jax.ablation.run import run_ablation
from simcse_jax.cli import main
from simcse_jax.config import Config
from simcse_jax.data.demo import demo_text
from simcse_jax.errors import InputError
from simcse_jax.inference.index import Index
from simcse_jax.inference.loading import kept_steps, load_model
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runs.folder import check_output, create_run, is_run, open_run
from simcse_jax.storage.files import (
    CACHE,
    UNFINISHED,
    check_new_folder,
    check_writable_file,
    new_folder,
    write_json,
    write_text,
)
from simcse_jax.storage.manifest import write_sealed
from simcse_jax.study import Study
from simcse_jax.study.run import run_study


@contextmanager
def without_rights() -> Iterator[None]:
    """A block with no more rights than any user has, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


_NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def fill(folder: Path) -> None:
    with new_folder(folder, last="b.json") as partial:
        for name in ("c", "b.json", "a"):
            (partial / name).write_text(name)
        (partial / "inside").mkdir()
        (partial / "inside" / "d").write_text("d")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


FILLED = ["a", "b.json", "c", "inside", "inside/d"]


@pytest.mark.parametrize("kind", ["absent", "empty", "link", "link to nothing", "present"])
def test_every_empty_folder_can_be_filled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = tmp_path / "out", tmp_path / "real"
    if kind == "empty":
        folder.mkdir()
    if kind.startswith("link"):
        folder.symlink_to(real)
    if kind == "link":
        real.mkdir()
    if kind == "present":
        folder.mkdir()
        monkeypatch.chdir(folder)
    given = Path() if kind == "present" else folder
    assert check_new_folder(given) == folder
    before = names(tmp_path)
    fill(check_new_folder(given))
    assert names(folder) == FILLED
    assert folder.is_symlink() == kind.startswith("link")
    added = {name.split("/", 1)[0] for name in names(tmp_path)} - {name.split("/", 1)[0] for name in before}
    assert added <= {"out", "real"}
    with pytest.raises(InputError, match=r"out exists and is not an empty folder \(it holds a\): choose another"):
        check_new_folder(given)


def test_a_folder_is_empty_beside_what_others_keep_in_it(tmp_path: Path) -> None:
    """As in the root of a volume that was just formatted."""
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".DS_Store").write_text("of a desktop")
    fill(check_new_folder(tmp_path))
    assert names(tmp_path) == sorted([*FILLED, "lost+found", ".DS_Store"])


def test_an_own_folder_in_a_foreign_one_is_filled(open_folder: Path) -> None:
    folder = open_folder / "mine"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
    open_folder.chmod(0o555)
    with without_rights():
        fill(check_new_folder(folder))
    assert names(folder) == FILLED


def test_a_folder_that_cannot_be_renamed_over_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mounted volume."""
    folder, rename = tmp_path / "volume", Path.rename
    folder.mkdir()

    def busy(path: Path, target: Path) -> Path:
        if Path(target) == folder:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    fill(folder)
    assert names(folder) == FILLED


def test_the_name_that_counts_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where a move fails, those before it are taken back."""
    moved: list[str] = []
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        moved.append(path.name)
        if path.name == "b.json":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match=r"Disk quota exceeded\): free space or choose another"):
        fill(tmp_path)
    assert len(moved) == 4
    assert moved[-1] == "b.json"
    assert names(tmp_path) == []


def test_the_remains_of_a_killed_process_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f"{UNFINISHED}abc" / "new").mkdir(parents=True)
    fill(check_new_folder(tmp_path))
    assert names(tmp_path) == FILLED


def test_what_another_has_written_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def both() -> None:
        with new_folder(tmp_path / "out") as partial:
            (partial / "a").write_text("mine")
            (tmp_path / "out" / "a").write_text("theirs")

    with pytest.raises(InputError, match="another process has filled it"):
        both()
    assert names(tmp_path) == ["out", "out/a"]
    assert (tmp_path / "out" / "a").read_text() == "theirs"


def test_a_folder_that_cannot_be_written_is_found_before_the_work(open_folder: Path, tmp_path: Path) -> None:
    open_folder.chmod(0o555)
    for output, problem in ((open_folder / "out", "Permission denied in"), (Path("/proc/out"), "in /proc")):
        with (
            without_rights(),
            pytest.raises(InputError, match=rf"output {output} cannot be written \(.*{problem}.*: choose another"),
        ):
            check_new_folder(output)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match=r"circle cannot be (read|written)"):
        check_new_folder(tmp_path / "circle")
    with pytest.raises(InputError, match="~nobody-here/out names no folder"):
        check_new_folder("~nobody-here/out")


def test_folders_without_permission_are_named(open_folder: Path, tiny_bert: Path) -> None:
    closed, run = open_folder / "closed", open_folder / "run"
    shutil.copytree(tiny_bert, closed / "model")
    run.mkdir()
    (run / "run.json").write_text("{}")
    for path in (closed, run / "run.json"):
        path.chmod(0)
    with without_rights():
        for path in (closed, closed / "model"):
            with pytest.raises(InputError, match=rf"{path} cannot be read \(Permission denied\): get permission"):
                load_model(path, "avg")
            with pytest.raises(InputError, match=rf"{path} cannot be read \(Permission denied\)"):
                check_output(path)
        with pytest.raises(InputError, match=r"run cannot be read \(Permission denied\)"):
            load_model(run)


def test_files_go_where_links_point(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    link = tmp_path / "scores.json"
    link.symlink_to(tmp_path / "data" / "scores.json")
    for content in ("first", "second"):
        check_writable_file(link)
        write_text(link, content)
        assert link.is_symlink()
        assert (tmp_path / "data" / "scores.json").read_text() == content
    assert names(tmp_path) == ["data", "data/scores.json", "scores.json"]


def test_what_cannot_be_replaced_is_written_to(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, a file in a foreign folder, and one that is mounted."""
    pipe, file = open_folder / "pipe", open_folder / "file"
    os.mkfifo(pipe)
    file.write_text("a longer earlier content")
    for path in (pipe, file):
        path.chmod(0o666)
    open_folder.chmod(0o555)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    with without_rights():
        check_writable_file(pipe)
        check_writable_file(file)
        reader.start()
        write_text(pipe, "to the pipe")
        reader.join(10)
        write_text(file, "new")
        with pytest.raises(InputError, match=r"other cannot be written \(Permission denied\): give a file"):
            check_writable_file(open_folder / "other")
    assert read == ["to the pipe"]
    assert file.read_text() == "new"
    open_folder.chmod(0o755)

    def busy(path: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))

    monkeypatch.setattr(Path, "replace", busy)
    write_text(file, "newer")
    assert file.read_text() == "newer"
    assert names(open_folder) == ["file", "pipe"]


def test_json_has_no_numbers_that_it_cannot_write(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"dev": math.nan, "many": [1.0, math.inf], "fine": 2})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "dev": None,
        "many": [1.0, None],
        "fine": 2,
    }


def test_a_score_that_is_absent_is_read_back(small_run: Config, tmp_path: Path, tiny_bert: Path) -> None:
    checkpoint = read_checkpoint(tiny_bert)
    run = create_run(tmp_path / "run", small_run, "", checkpoint, load_tokenizer(tiny_bert))
    write_sealed(
        run.results_file, {"step": 1, "best_step": None, "dev": None, "before": {"a.tsv": math.nan, "Avg.": 3.5}}
    )
    results = open_run(run.folder).results()
    assert results["dev"] is None
    assert results["before"] == {"a.tsv": None, "Avg.": 3.5}


def test_runs_begin_in_empty_folders_and_outside_of_other_runs(
    small_run: Config, tmp_path: Path, tiny_bert: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    check_output(folder)
    create_run(folder, small_run, "", read_checkpoint(tiny_bert), load_tokenizer(tiny_bert))
    assert is_run(folder)
    check_output(folder)
    for inside in (folder / "another", folder / "checkpoints" / "a" / "b"):
        with pytest.raises(InputError, match=f"lies in the folder of another run, {folder}: choose another --output"):
            check_output(inside)


def test_studies_and_ablations_check_their_output_first(
    small_run: Config, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simcse_jax.ablation.run.train", lambda config: 1 / 0)
    monkeypatch.setattr("simcse_jax.study.run.Meter", lambda study: 1 / 0)
    run, full = tmp_path / "run", tmp_path / "full"
    create_run(run, small_run, "", read_checkpoint(tiny_bert), load_tokenizer(tiny_bert))
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    tasks = replace(small_run.evaluation, test=(small_run.evaluation.dev,))
    study = Study(base=replace(small_run, evaluation=tasks), steps=2, batch_sizes=(64,))
    ablation = Ablation(base=small_run, variants={"whole": {}})
    for output, problem in (
        (run / "inside", "lies in the folder of another run"),
        (Path("/proc/out"), "cannot be written"),
        (full / "thesis.tex" / "a", "is not a folder"),
    ):
        with pytest.raises(InputError, match=problem):
            run_study(replace(study, output=str(output)))
        with pytest.raises(InputError, match=problem):
            run_ablation(replace(ablation, output=str(output)))
    with pytest.raises(InputError, match="full exists and is not a study"):
        run_study(replace(study, output=str(full)))


def test_the_demonstration_says_where_it_cannot_write(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder.chmod(0o555)
    monkeypatch.setenv("HOME", str(open_folder))
    with (
        without_rights(),
        pytest.raises(InputError, match=rf"to {open_folder}/\.cache/simcse_jax \(Permission denied\): set HOME to a"),
    ):
        demo_text(Path(CACHE))


def test_commands_fill_empty_folders(
    tiny_bert: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The present folder, and a link to one elsewhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main(["export", str(tiny_bert), ".", "--pooler", "avg"])
    assert load_model(tmp_path / "here").pooler == "avg"
    (tmp_path / "index").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "index")
    main(["search", str(tmp_path / "here"), str(text_file), "--save-index", str(tmp_path / "link")])
    assert len(Index.load(tmp_path / "index")) == 203
    (tmp_path / "bert").mkdir()
    main(["vocabulary", str(text_file), str(tmp_path / "bert"), "--size", "60"])
    assert (tmp_path / "bert" / "config.json").is_file()


def test_vectors_are_never_lost(
    tiny_bert: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The outputs were free before the work and are taken by others during it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    encode = SimCSE.encode

    def taken(self: SimCSE, *given: Any, **settings: Any) -> Any:
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
        return encode(self, *given, **settings)

    monkeypatch.setattr(SimCSE, "encode", taken)
    for output, command in (
        (tmp_path / "out.npy", ["encode", str(tiny_bert), str(text_file), str(tmp_path / "out.npy")]),
        (tmp_path / "index", ["search", str(tiny_bert), str(text_file), "--save-index", str(tmp_path / "index")]),
    ):
        with pytest.raises(SystemExit):
            main([*command, "--pooler", "avg"])
        assert "Nothing is lost: it is in " in capsys.readouterr().err
        assert names(output) == ["thesis.tex"]
    (vectors,) = (tmp_path / "temporary").glob("*/out.npy")
    assert np.load(vectors).shape == (203, 32)
    (saved,) = (tmp_path / "temporary").glob("*/index")
    assert len(Index.load(saved)) == 203


def test_a_reader_outlives_what_a_writer_removes(
    small_run: Config, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(tmp_path / "run", small_run, "", read_checkpoint(tiny_bert), load_tokenizer(tiny_bert))
    for step in ("1", "2"):
        (run.folder / "checkpoints" / step / "params").mkdir(parents=True)

    def check(path: Path) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)

    monkeypatch.setattr("simcse_jax.inference.loading.check_readable", check)
    with pytest.raises(InputError, match="run has no checkpoint yet"):
        kept_steps(run.folder)
