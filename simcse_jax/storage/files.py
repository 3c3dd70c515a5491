"""Files and folders that are there complete or not at all."""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.errors import InputError, is_full, reason, system_error

CACHE = "~/.cache/simcse_jax"
"""Folder for files that can be made again: tokenised text, copies from object stores, compiled programs."""

REMOTE = re.compile(r"(gs|s3):/+(?=[^/])")
"""Matches the beginning of an object store's URL; pathlib turns the two slashes into one."""


def is_remote(name: str | Path) -> bool:
    """Whether a name is a URL of an object store, see `objects.py`."""
    return bool(REMOTE.match(str(name)))


def local_only(name: str | Path) -> Path:
    """A local path to write to; raises `InputError` for an object store's URL, where only runs and exports can go."""
    if is_remote(name):
        raise InputError(f"{name} is on an object store, where only runs and exports can be written: give a local path")
    return Path(name).expanduser()


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step; `~` is the user's home folder, as in `check_writable_file`."""
    path = path.expanduser()
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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


def check_new_folder(output: str | Path) -> Path:
    """The absolute path of a new folder, checked before the work that fills it.

    Raises:
      InputError: something is there already, or the folder cannot be made.
    """
    folder = local_only(output).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {folder} exists and is not an empty folder: choose another, or remove it")
    check_writable_folder(folder, next(p for p in folder.parents if p.exists()))
    return folder


def check_writable_folder(output: Path, folder: Path) -> None:
    """Raises `InputError` unless `folder`, the existing place for `output`, is a folder and can be written."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = f"no permission in {folder}" if folder.is_dir() else f"{folder} is not a folder"
        raise InputError(f"output {output} cannot be written ({problem}): choose another")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` once the block has ended without an error.

    Raises:
      InputError: the folder cannot be written, or another has taken the name. A system error about other files passes
        as it is.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as private:
            partial = Path(private) / folder.name  # unlike the folder around it, with the user's usual permissions
            partial.mkdir()
            yield partial
            partial.rename(folder)
    except OSError as error:
        if not _is_about(error, folder.parent):
            raise
        advice = "free space or choose another" if is_full(error) else "choose another"
        raise InputError(f"output {folder} cannot be written ({reason(error)}): {advice}") from error


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
        advice = "free space there" if is_full(error) else "give a file in a folder that exists and is writable"
        raise InputError(f"{file} cannot be written ({reason(error)}): {advice}") from error


def check_writable_file(path: Path) -> None:
    """Raises `InputError` if a file cannot be made at `path`, before the work that fills it."""
    path = local_only(path)
    folder = path.absolute().parent
    problems = {
        "it is a folder": path.is_dir(),
        f"there is no folder {folder}": not folder.is_dir(),
        f"no permission in {folder}": not os.access(folder, os.W_OK),
    }
    if problem := next((words for words, applies in problems.items() if applies), None):
        raise InputError(f"{path} cannot be written ({problem}): give a file in a folder that exists and is writable")
