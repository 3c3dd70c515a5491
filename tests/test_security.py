"""Nothing that is read runs as code, and no file is written through a link that somebody else has put in its place."""

import ast
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simcse_jax.errors import InputError
from simcse_jax.runs.folder import check_output
from simcse_jax.runs.lock import check_free, only_writer
from simcse_jax.runs.metrics_log import MetricsLog
from simcse_jax.runtime import compilation_cache as programs
from simcse_jax.storage import files
from simcse_jax.storage.files import make_folder, write_text
from tests.test_imports import FILES, PACKAGE, imports_of
from tests.test_programs import Settings

# Modules whose readers run what they read, or can be made to.
UNSAFE = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "dbm",
    "yaml",
    "jsonpickle",
    "pty",
}
CALLS = {"eval", "exec", "compile", "__import__", "import_module", "run_path", "run_module", "exec_module"}
CALLS |= {"read_index", "deserialize_index", "system", "popen"}
# The files that run code, by its name: commands, public names and data sets of TFDS, which are installed; a config file
# or a loss of the user's own; modules of JAX.
RUNS = {
    **{
        file: {"import_module"}
        for file in ("cli.py", "__init__.py", "data/tfds.py", "objectives/find.py", "runtime/heartbeat.py")
    },
    "config/load.py": {"run_path"},
}


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def passed(call: ast.Call, name: str) -> str | None:
    """What a call gives for a keyword, as source; None where it does not give it."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_reader_runs_what_it_reads(path: Path) -> None:
    assert not UNSAFE & {name.split(".")[0] for name in imports_of(path)}
    allowed = RUNS.get(str(path.relative_to(PACKAGE)), set())
    for function, call in calls_of(path):
        name = function.rsplit(".", 1)[-1]
        if name != "compile" or isinstance(call.func, ast.Name):  # re.compile and the like have their own
            assert name not in CALLS - allowed
        assert passed(call, "allow_pickle") in (None, "False")
        assert passed(call, "trust_remote_code") in (None, "False")
        assert passed(call, "shell") in (None, "False")
        if function == "torch.load":
            assert passed(call, "weights_only") == "True"


def test_a_lock_that_is_a_link_leaves_what_it_names(tmp_path: Path) -> None:
    precious, lock = tmp_path / "precious", tmp_path / "run" / ".lock"
    precious.write_text("kept")
    lock.parent.mkdir()
    lock.symlink_to(precious)
    for use in (check_free, lambda folder: only_writer(folder).__enter__()):
        with pytest.raises(InputError, match=r"\.lock is a link; expected a file that this package made: remove it"):
            use(lock.parent)
    assert precious.read_text() == "kept"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(InputError, match=r"\.lock is not a plain file"), only_writer(lock.parent):
        pass
    lock.unlink()
    lock.write_text("of an earlier version")
    with only_writer(lock.parent):
        assert lock.read_text() == "of an earlier version"
        with pytest.raises(InputError, match="another process is training"):
            check_free(lock.parent)


def test_a_file_is_not_written_through_a_link_under_the_name_of_its_partial_one(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / ".scores.partial.json").symlink_to(precious)
    write_text(tmp_path / "scores.json", "{}")
    assert (tmp_path / "scores.json").read_text() == "{}"
    assert precious.read_text() == "kept"
    # A link that the user gives is followed: what it names is replaced.
    (tmp_path / "link.json").symlink_to(tmp_path / "scores.json")
    write_text(tmp_path / "link.json", "[]")
    assert (tmp_path / "scores.json").read_text() == "[]"


def test_no_run_writes_through_the_links_in_its_folder(tmp_path: Path) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    (run / "figures").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (tmp_path / "volume").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "volume")  # as where the checkpoints are to lie on another disk
    check_output(run)
    precious.write_text("kept")
    for name in ("results.json", "figures/loss.png", "wandb.json"):
        (run / name).symlink_to(precious)
        with pytest.raises(InputError, match=f"{name} is a link, and training would write to what it names"):
            check_output(run)
        (run / name).unlink()
    (run / ".metrics.partial.jsonl").symlink_to(precious)
    MetricsLog(run / "metrics.jsonl", -1).close()
    assert precious.read_text() == "kept"


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o000])
def test_our_cache_is_private_whatever_the_umask(
    mask: int, umask: Callable[[int], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(programs, "FOLDER", tmp_path / "cache" / "programs")
    monkeypatch.setattr(programs.jax, "config", settings := Settings(None))
    umask(mask)
    make_folder(tmp_path / "cache" / "remote" / "one")
    assert mode(tmp_path / "cache") == 0o700
    programs.keep_programs()
    folder = tmp_path / "cache" / "programs" / programs.machine()
    assert mode(folder) == mode(folder.parent) == 0o700
    assert settings.values["jax_compilation_cache_dir"] == str(folder)
    # A folder that the user names for tokens is shared as the umask says.
    make_folder(tmp_path / "shared" / "tokens")
    assert mode(tmp_path / "shared") == 0o777 & ~mask


@pytest.mark.parametrize("where", ["cache", "cache/programs", "machine"])
@pytest.mark.parametrize("fault", ["group", "all", "owner"])
def test_programs_that_others_could_have_put_there_are_not_run(
    where: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / "cache" / "programs"
    folder = ours / programs.machine()
    folder.mkdir(parents=True, mode=0o700)
    place = folder if where == "machine" else tmp_path / where
    if fault == "owner":
        about = place.stat()
        other = os.stat_result((*about[:4], 12345, *about[5:]))
        real = Path.stat
        monkeypatch.setattr(Path, "stat", lambda path, **how: other if path == place else real(path, **how))
    else:
        place.chmod(0o770 if fault == "group" else 0o707)
        monkeypatch.setattr(programs, "_is_own", lambda group: False)
    lines: list[str] = []
    monkeypatch.setattr(programs, "FOLDER", ours)
    monkeypatch.setattr(programs, "warn", lines.append)
    monkeypatch.setattr(programs.jax, "config", settings := Settings(None))
    programs.keep_programs()
    assert settings.values["jax_compilation_cache_dir"] is None
    assert len(lines) == 1
    assert f"{place} belongs to another user or can be written by others" in lines[0]


def test_the_users_own_folder_of_programs_is_left_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setattr(programs.jax, "config", settings := Settings(str(tmp_path)))
    programs.keep_programs()
    assert settings.values["jax_compilation_cache_dir"] == str(tmp_path)
