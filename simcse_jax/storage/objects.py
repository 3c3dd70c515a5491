"""Object stores, gs:// and s3://, through fsspec: inputs are copied to the cache once, outputs are put there whole.

`mirror.py` adds what runs need.
"""

import atexit
import glob
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simcse_jax.errors import InputError, reason
from simcse_jax.storage.files import (
    CACHE,
    REMOTE,
    check_new_folder,
    check_readable,
    expanded,
    inside,
    is_remote,
    local_cache,
    new_folder,
)
from simcse_jax.storage.places import Place, reached
from simcse_jax.storage.records import parse_record

MANIFEST = ".simcse_jax.json"
"""Name of the object that lists the files of a run on a store."""
COMMITTED = "commit_success.txt"
"""Name of the object by which orbax ends a checkpoint on gs://: a folder without it is none."""
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def local_path(name: str | Path, cache: str = CACHE) -> Path:
    """The local path of a file or folder: its own, or that of a copy where it is on an object store or in a pipe.

    A pipe, such as /dev/stdin, can be read once; its copy is removed when the process ends. Of an object store, the
    name of the copy in the cache follows from the size, checksum or version of the content, so that it is made once,
    and again when the content changes. Of a run, the files that its manifest names are copied, and on gs:// its
    checkpoints.

    Raises:
      InputError: nothing is there, or a run without a checkpoint; the store cannot be reached; or its package is not
        installed. Of a local path: this user may not read it.
    """
    if not is_remote(name):
        local = expanded(name)
        check_readable(local)
        is_stream = local.exists() and not (local.is_file() or local.is_dir())
        return _copy_of_stream(local) if is_stream or _OPEN.fullmatch(str(local)) else local
    store, path = open_store(name)
    with readable(name):
        for more in (2, 1, 0):
            try:
                return _copy_of_objects(store, path, name, local_cache(cache) / "remote")
            except KeyError as error:  # a run that is trained has dropped a checkpoint meanwhile, or written another
                if not more:
                    raise FileNotFoundError(error.args[0]) from error
    raise AssertionError


def _copy_of_objects(store: Any, path: str, name: str | Path, cache: Path) -> Path:
    """The copy of what is at a path of a store; raises `KeyError` where an object is no longer there."""
    found = _find_content(store, path, name)
    keys = ("size", "ETag", "etag", "md5Hash", "generation", "created")
    identity = [[file, *(str(about.get(key)) for key in keys)] for file, about in sorted(found.items())]
    digest = hashlib.sha256(json.dumps([url_of(name), identity]).encode()).hexdigest()[:16]
    folder = cache / digest
    if not folder.is_dir():
        _copy(store, path, list(found), folder, name)
    return folder / path.rsplit("/", 1)[-1]


def _copy_of_stream(path: Path) -> Path:
    """A copy of what a pipe holds, named .txt where the pipe's name has no ending; the file behind a redirection."""
    behind = path.resolve()
    if behind.is_file() and behind.suffix:
        return behind
    if not (_OPEN.fullmatch(str(path)) and path.is_fifo()):  # a pipe with a name of its own may be filled again
        return _copied(path)
    key = (path.stat().st_dev, path.stat().st_ino)
    if key not in _COPIES:
        _COPIES[key] = _copied(path)
    return _COPIES[key]


_OPEN = re.compile(r"/dev/(stdin|fd/\d+)|/proc/\w+/fd/\d+")
"""Matches the paths of what a process has open."""
_COPIES: dict[tuple[int, int], Path] = {}
"""Copies of the pipes that the process has open, by device and number."""


def _copied(path: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="simcse_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with path.open("rb") as stream:
            packed = ".gz" * stream.peek(2).startswith(b"\x1f\x8b")
            copy = folder / f"{path.name}{'' if path.suffix else f'.txt{packed}'}"
            with copy.open("wb") as file:
                shutil.copyfileobj(stream, file)
    except OSError as error:
        raise InputError(f"{path} cannot be read or copied to {folder} ({reason(error)})") from error
    return copy


def find_objects(store: Any, path: str) -> dict[str, Any]:
    """The objects at a path and below it, without the empty ones named FOLDER/ that web consoles make for folders."""
    found: dict[str, Any] = store.find(path, detail=True)
    return {file: about for file, about in found.items() if not file.endswith("/")}


def read_manifest(store: Any, path: str) -> dict[str, Any] | None:
    """A run's manifest, see `parse_manifest`; None where no manifest exists."""
    try:
        return parse_manifest(store.cat_file(f"{path}/{MANIFEST}"), path)
    except FileNotFoundError:
        return None


def parse_manifest(content: bytes, path: str) -> dict[str, Any]:
    """The manifest of the run at a path: `owner` and `files`.

    Raises:
      InputError: the manifest is damaged, or names a file outside of the run.
    """
    try:
        manifest: dict[str, Any] = dict(parse_record(content))
        stamps = manifest["files"].values()
        if type(manifest["owner"]) is not str or not all([*map(type, stamp)] == [int, int] for stamp in stamps):
            raise ValueError("it has another form")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"the manifest of the run at {path} is damaged ({reason(error)})"
        raise InputError(f"{problem}: remove {path}/{MANIFEST}, and copy the run there again") from error
    _check_inside(manifest["files"], f"the manifest of the run at {path}")
    return manifest


def _find_content(store: Any, path: str, name: str | Path) -> dict[str, Any]:
    """The objects of a file or folder at a path; of a run, those of its manifest and of its checkpoints on gs://."""
    found = find_objects(store, path)
    if not found:
        if glob.has_magic(path):
            raise InputError(f"there is nothing at {name}, and patterns are for local folders: name a file or a folder")
        raise FileNotFoundError(name)
    if f"{path}/{MANIFEST}" not in found or not (manifest := read_manifest(store, path)):
        return found
    if not manifest["files"]:
        raise InputError(f"the run at {name} has no checkpoint yet: train it with the command that began it")
    wanted = [f"{path}/{file}" for file in manifest["files"] if is_mirrored(file, name)]
    if native_place(name):
        ended = re.compile(rf"({re.escape(path)}/checkpoints/\d+/){COMMITTED}")
        folders = tuple(match[1] for file in found if (match := ended.fullmatch(file)))
        wanted += [file for file in found if file.startswith(folders)]
    return {file: found[file] for file in wanted}


def is_mirrored(file: str, url: str | Path) -> bool:
    """Whether a file of a run is the mirror's; on gs:// orbax writes the checkpoints itself."""
    return not (file.startswith("checkpoints/") and native_place(url))


def _check_inside(files: Iterable[str], where: str) -> None:
    for file in files:
        inside(Path(), file, where)


def _copy(store: Any, path: str, files: list[str], folder: Path, name: str | Path) -> None:
    """Copies objects to `folder/NAME`, complete or not at all."""
    relative = {file: file.removeprefix(path.rpartition("/")[0]).lstrip("/") for file in files}
    _check_inside(relative.values(), str(name))
    try:
        with new_folder(folder) as partial:
            for file, place in relative.items():
                (partial / place).parent.mkdir(parents=True, exist_ok=True)
                try:
                    with readable(name):  # the store's errors are not the disk's
                        store.get_file(file, str(partial / place))
                except InputError as error:
                    if isinstance(error.__cause__, FileNotFoundError):
                        raise KeyError(file) from error
                    raise
    except InputError:
        if not folder.is_dir():  # else another process has made the same copy
            raise


@contextmanager
def written_folder(output: str | Path) -> Iterator[Path]:
    """A folder to fill, from `check_new_output`; for an object store, a local folder that is put there at the end.

    The object config.json, without which a folder is no model, is put last.

    Raises:
      InputError: something is there already, or the folder cannot be written.
    """
    if not is_remote(output):
        with new_folder(Path(output), last="config.json") as partial:
            yield partial
        return
    store, path = open_store(output)
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        files = [file for file in Path(temporary).rglob("*") if file.is_file()]
        with readable(output):
            for file in sorted(files, key=lambda file: file == Path(temporary) / "config.json"):
                store.put_file(str(file), f"{path}/{file.relative_to(temporary).as_posix()}")


def check_new_output(output: str | Path) -> str | Path:
    """The absolute path or the URL of a new folder, checked before the work that fills it.

    Raises:
      InputError: something is there already, or the folder cannot be made or reached.
    """
    if not is_remote(output):
        return check_new_folder(output)
    store, path = open_store(output)
    with readable(output):
        if find_objects(store, path):
            raise InputError(f"output {output} exists: choose another, or remove it")
    return url_of(output)


def url_of(name: str | Path) -> str:
    """The URL in its usual spelling, without a slash at its end."""
    return REMOTE.sub(r"\1://", str(name)).rstrip("/")


def native_place(name: str | Path) -> Place | None:
    """The place of a run on gs://, for orbax and for `manifest.py`; None for a local path and on s3://.

    Raises:
      InputError: the package of the store is not installed; or orbax would read the URL as that of another place.
    """
    if not REMOTE.match(str(name)) or not (url := url_of(name)).startswith("gs:"):
        return None
    if not {"", ".", ".."}.isdisjoint(url.removeprefix("gs://").split("/")) or not set("?#*[]").isdisjoint(url):
        raise InputError(
            f"{url} cannot be the place of a run or a cache: ?, #, *, [ and ] and parts that are empty or dots mean "
            "something else to orbax and gcsfs. Give another name"
        )
    open_store(name)
    from etils import epath
    from fsspec.config import conf

    # What other processes write there must be seen; epath's file system asks for no setting but these.
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(url)


def move(path: Place, target: Place) -> None:
    """Moves a file or folder to a place on the same disk or store, making the folder around it."""
    if is_remote(path):
        store, _ = open_store(path)
        store.mv(str(path), str(target), recursive=True)
        return
    target.parent.mkdir(exist_ok=True)
    path.rename(target)


def open_store(name: str | Place) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    url = url_of(str(name))
    package = _PACKAGES[url[:2]]
    if find_spec(package) is None:
        raise InputError(f'{url} needs the Python package {package}: pip install "simcse-jax[storage]"')
    from fsspec.core import url_to_fs

    store, path = url_to_fs(url, use_listings_cache=False)
    return store, path


@contextmanager
def readable(name: str | Place) -> Iterator[None]:
    """Turns the exceptions of a store's package into `InputError`; see `reached`."""
    try:
        with reached(name):
            yield
    except FileNotFoundError as error:
        raise InputError(f"there is nothing at {name}: check the bucket and the path") from error
