"""Files and folders that are there complete or not at all."""

import errno
import json
import math
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.errors import InputError, reason, room, system_error

CACHE = "~/.cache/simcse_jax"
"""Folder for files that can be made again: tokenised text, copies from object stores, compiled programs."""

UNFINISHED = ".simcse_jax-"
"""Begins the names of folders that are being filled and of trials whether a folder can be written: a folder that holds
nothing else is empty."""

REMOTE = re.compile(r"(gs|s3):/+(?=[^/])")
"""Matches the beginning of an object store's URL; pathlib turns the two slashes into one."""


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether a name is a URL of an object store, see `objects.py`; raises `InputError` for one that is no path."""
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"{name!r} is a {type(name).__name__}; expected a name or a path, as a str or a pathlib.Path")
    return bool(REMOTE.match(str(name)))


def expanded(name: str | Path) -> Path:
    """A local path with `~` as the user's home folder; raises `InputError` where there is no such folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name} names no folder ({reason(error)}): write the path out, or set HOME") from error


def local_cache(cache: str | Path) -> Path:
    """The folder of a cache; of one on an object store, the folder here in which its content is used."""
    return expanded(CACHE if is_remote(cache) else cache)


def local_only(name: str | Path) -> Path:
    """A local path to write to; raises `InputError` for an object store's URL, where only runs and exports can go."""
    if is_remote(name):
        raise InputError(f"{name} is on an object store, where only runs and exports can be written: give a local path")
    return expanded(name)


def inside(folder: Path, name: str, where: str | Path) -> Path:
    """The path of a file that a file of another's making names; it must lie in `folder` or below.

    Links are followed, as the caches of hubs consist of them.

    Args:
      folder: the folder.
      name: the name.
      where: the file that names it, for the message.

    Raises:
      InputError: the name leads out of the folder, or can be that of no file.
    """
    problem = ""
    try:
        parts = Path(name).parts
        if len(os.fsencode(name)) > 1000 or max(map(len, map(os.fsencode, parts)), default=0) > 255 or "\0" in name:
            problem = "a name that no file has"  # for which the system has several errors
        elif Path(name).is_absolute() or ".." in parts:
            problem = "which leads out of its folder"
    except (TypeError, ValueError):  # not a text, or one that the system cannot spell
        problem = "a name that no file has"
    if problem:
        raise InputError(f"{where} names the file {reprlib.repr(name)}, {problem}: copy it again, from its maker")
    return folder / name


def check_readable(path: Path) -> None:
    """Raises `InputError` for a path that the system does not let this user read; not for one that is not there."""
    try:
        if path.is_dir():
            (path / ".").stat()
            os.scandir(path).close()
        elif path.is_file():
            path.open("rb").close()
    except FileNotFoundError:  # removed meanwhile
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): get permission for it, or give another") from error


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut, where the file system can tell."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder may be written to and not read
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` once the block has ended without an error.

    A link stays, and what it names is replaced. A file that cannot be replaced (a device, a file that is mounted or
    whose folder cannot be written) is written to instead. After the block, the file would survive a power cut.
    """
    path = path.expanduser()
    place = path.resolve()
    partial = place.with_name(f".{place.stem}.partial{place.suffix}")
    with ExitStack() as stack:
        beside = _is_replaceable(path)
        if not beside:
            partial = Path(stack.enter_context(tempfile.TemporaryDirectory())) / partial.name
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL, 0o666))  # our own, no link that waits under its name
        stack.callback(partial.unlink, missing_ok=True)
        yield partial
        try:
            if beside:
                to_disk(partial)
                partial.replace(place)
                to_disk(place.parent)
        except OSError as error:
            if error.errno != errno.EBUSY:  # that of a mounted file
                raise
            beside = False
        if not beside:
            # /dev/stdout may be a file, too, and what is in it stays.
            with path.open("ab" if _is_stream(path) else "wb") as file, partial.open("rb") as source:
                shutil.copyfileobj(source, file)


def make_folder(folder: Path) -> None:
    """Makes a folder and those around it; our own cache, which holds text and programs, is for this user alone.

    Raises:
      OSError: it cannot be made.
    """
    with suppress(RuntimeError):  # no home folder
        own = Path(CACHE).expanduser()
        if folder.absolute().is_relative_to(own):
            own.mkdir(0o700, parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _is_stream(path: Path) -> bool:
    """Whether a path is a name of the system's, such as /dev/stdout; what lies in /dev/shm is a file as any other."""
    return path.parent in (Path("/dev"), Path("/dev/fd"))


def _is_replaceable(path: Path) -> bool:
    if not path.exists():
        return True
    if not path.is_file() or _is_stream(path):
        return False
    try:
        _try_writing(path.resolve().parent)
    except OSError:
        return False
    return True


def _try_writing(folder: Path) -> None:
    """Raises the system's error where no file can be made in a folder, which permissions alone do not tell."""
    with tempfile.TemporaryFile(prefix=UNFINISHED, dir=folder):
        pass


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step; `~` is the user's home folder, as in `check_writable_file`."""
    with new_file(path) as partial:
        partial.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON in one step, null for each number that is not finite."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A JSON value with null for each number that is not finite, which JSON cannot write (constant scores give NaN)."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes arrays, each contiguous, as .safetensors for PyTorch."""
    from safetensors.numpy import save

    # Not `save_file`, whose files since safetensors 0.8 only their owner can read.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def check_new_folder(
    output: str | Path, expected: str = "an empty folder", advice: str = "choose another, or remove it"
) -> Path:
    """The absolute path of a new folder, checked before the work that fills it.

    Args:
      output: the folder: one that does not exist, or that exists and is empty, also as a link to one.
      expected: what the message says that was expected.
      advice: what it says to do where something is there already.

    Raises:
      InputError: something is there already, or the folder cannot be made or written.
    """
    folder = local_only(output).absolute()
    try:
        place = folder.resolve()
        taken = bool(_held(place)) if place.is_dir() else place.exists()
    except (OSError, RuntimeError) as error:  # no permission; links in a circle
        raise InputError(f"output {folder} cannot be read ({reason(error)}): choose another") from error
    if taken:
        holds = f" (it holds {_held(place)[0]})" if place.is_dir() else ""
        raise InputError(f"output {folder} exists and is not {expected}{holds}: {advice}")
    check_writable_folder(folder)
    return folder


_NOTHING = {"lost+found", ".DS_Store", ".gitkeep"}
"""What file systems, desktops and repositories keep in a folder that is empty to its user."""


def _held(folder: Path) -> list[str]:
    """The names in a folder, without those of `new_folder`, of trials and of `_NOTHING`."""
    return sorted({path.name for path in folder.iterdir() if not path.name.startswith(UNFINISHED)} - _NOTHING)


def check_writable_folder(folder: Path) -> None:
    """Raises `InputError` unless a folder can be written, or made and written: its nearest existing folder is tried."""
    place = folder.resolve()
    nearest, problem = folder, ""
    try:
        nearest = next(path for path in (place, *place.parents) if path.exists())
        if nearest.is_dir():
            _try_writing(nearest)
        else:
            problem = f"{nearest} is not a folder"
    except OSError as error:
        problem = f"{reason(error)} in {nearest}"
    if problem:
        raise InputError(f"output {folder} cannot be written ({problem}): choose another")


@contextmanager
def new_folder(folder: Path, last: str = "") -> Iterator[Path]:
    """A folder to fill, which is `folder` once the block has ended without an error.

    It takes the name `folder` in one step, and would then survive a power cut. Where an empty folder has that name
    already, which may be mounted, a link or the present folder, that folder takes the content instead, name by name.

    Args:
      folder: the folder.
      last: the name in it without which its content is nothing; it comes last.

    Raises:
      InputError: the folder cannot be written, or another has filled it. A system error about other files passes as it
        is.
    """
    place = folder.resolve()
    existing = place.is_dir()
    around = place if existing else place.parent
    try:
        make_folder(around)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=around, ignore_cleanup_errors=True) as private:
            partial = Path(private) / "new"  # unlike the folder around it, with the user's usual permissions
            partial.mkdir()
            yield partial
            for path in (partial, *partial.rglob("*")):
                to_disk(path)
            if existing:
                _fill(place, partial, last)
            else:
                partial.rename(place)
            to_disk(around)
    except OSError as error:
        if not _is_about(error, around):
            raise
        advice = f"{room(error)} or choose another".removeprefix(" or ")
        raise InputError(f"output {folder} cannot be written ({reason(error)}): {advice}") from error


def _fill(folder: Path, partial: Path, last: str) -> None:
    """Moves the content of `partial` into `folder`, an empty one; all of it or none."""
    if _held(folder):
        raise FileExistsError(errno.EEXIST, "another process has filled it", str(folder))
    with ExitStack() as moved:
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            target = path.rename(folder / path.name)
            moved.callback(shutil.rmtree if target.is_dir() else os.unlink, target)
        moved.pop_all()
    for path in folder.glob(f"{UNFINISHED}*"):  # what killed processes have left
        if path != partial.parent:
            shutil.rmtree(path, ignore_errors=True)


def _is_about(error: OSError, folder: Path) -> bool:
    """Whether the system's error is about a file in `folder`, or about an open file, which the system does not name."""
    if system_error(error) is None:  # that of a network, say
        return False
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    # Since Python 3.12 the names of temporary folders have their `..` resolved.
    return not names or any(Path(name).resolve().is_relative_to(folder.resolve()) for name in names)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turns a system error into `InputError`, in a block that does nothing but write `file`."""
    try:
        yield
    except OSError as error:
        if system_error(error) is None:
            raise
        advice = room(error) or "give a file in a folder that exists and is writable"
        raise InputError(f"{file} cannot be written ({reason(error)}): {advice}") from error


def write_or_rescue(write: Callable[[Path], Any], path: Path) -> None:
    """Writes what took long to make: where `path` cannot be written after all, to a temporary place.

    Args:
      write: writes to the path that it is given, or raises `InputError`.
      path: a file, or a folder to make.

    Raises:
      InputError: `path` cannot be written; the message names the other place.
    """
    try:
        write(path)
    except InputError as error:
        rescue = Path(tempfile.mkdtemp(prefix="simcse_jax-rescued-"))
        other = rescue / path.absolute().name
        try:
            write(other)
        except (InputError, OSError):
            shutil.rmtree(rescue, ignore_errors=True)
            raise error from None
        raise InputError(f"{error}. Nothing is lost: it is in {other}") from error


def check_writable_file(path: Path) -> None:
    """Raises `InputError` if a file cannot be made at `path`, before the work that fills it."""
    path = local_only(path)
    folder, problem = path.absolute().parent, ""
    try:
        if path.is_dir():
            problem = "it is a folder"
        elif not folder.is_dir():
            problem = f"there is no folder {folder}"
        elif not _is_replaceable(path):
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        elif not path.exists():
            _try_writing(path.resolve().parent)
    except (OSError, RuntimeError) as error:  # the latter of links in a circle
        problem = reason(error)
    if problem:
        raise InputError(f"{path} cannot be written ({problem}): give a file in a folder that exists and is writable")
