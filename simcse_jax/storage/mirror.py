"""A run on an object store: a local folder, which a thread of process 0 copies there.

A store has no rename, no append and no lock. The manifest decides what the copy holds: it is an object that names all
files of one consistent moment and is replaced in one step. It is made first, and then names no file.

On gs:// the checkpoints are no part of the copy: all processes write them to the store, through orbax, and the copy is
brought up to date before each is completed. So the store alone decides where the run stands; the folder is scratch.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from simcse_jax.errors import InputError, reason
from simcse_jax.storage.files import is_remote, local_cache, make_folder, write_text
from simcse_jax.storage.guarded import Guarded
from simcse_jax.storage.objects import (
    MANIFEST,
    find_objects,
    is_mirrored,
    native_place,
    open_store,
    parse_manifest,
    read_manifest,
    readable,
    url_of,
)

_INTERVAL = 15.0  # seconds between copies
_OWNER = ".owner"  # in the working folder: the owner that the manifest had when it was last copied from there

Manifest = dict[str, Any]
"""`owner`, a random word of the process that last claimed the run, and `files`, a `Stamp` for each name."""

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds, of a local file."""


def working_folder(output: str, cache: str, process: int = 0) -> Path:
    """The local folder in which a run works: the run folder itself, or for an object store a folder in the cache.

    Processes may share the cache, and each has a folder of its own there.
    """
    if not is_remote(output):
        return Path(output).expanduser()
    url = url_of(output)
    digest = hashlib.sha256(url.encode()).hexdigest()[:16] + (f"-{process}" if process else "")
    return local_cache(cache).absolute() / "runs" / digest / url.rsplit("/", 1)[-1]


def fetch_run(url: str, folder: Path, beginnings: tuple[str, ...] = ("",)) -> Manifest | None:
    """Brings the working folder of a run to the state of the store.

    On s3://, a folder that the store was last copied from stays as it is: it is as new as the copy or newer.

    Args:
      url: the URL of the run.
      folder: its working folder.
      beginnings: of the names of the files that are wanted; by default all.

    Returns:
      The store's manifest, for `mirrored`; None where the store has no run.

    Raises:
      InputError: something other than a run is at the URL; the URL cannot be reached; or the run that was copied there
        from the folder has been removed.
    """
    store, path = open_store(url)
    with readable(url):
        manifest = read_manifest(store, path)
        owner = None if native_place(url) else _last_owner(folder)
        if manifest is None and find_objects(store, path):
            raise InputError(f"output {url} exists and is not a run of ours: choose another --output, or remove it")
        if manifest is None and (outer := _run_around(store, path)):
            raise InputError(f"output {url} lies in the folder of another run, {outer}: choose another --output")
        if manifest and manifest["owner"] == owner:
            return manifest
        if not manifest or not manifest["files"]:
            if owner:
                raise InputError(
                    f"the run that was copied to {url} is no longer there, but {folder} still has it: remove that "
                    f"folder to start again, or remove {folder / _OWNER} to continue the run"
                )
            if native_place(url) and folder.is_dir():
                shutil.rmtree(folder)
            return manifest
        files = {file: tuple(stamp) for file, stamp in manifest["files"].items() if is_mirrored(file, url)}
        wanted = {file: stamp for file, stamp in files.items() if file.startswith(beginnings)}
        here = _stamps(folder)
        for file in here.keys() - wanted.keys():
            (folder / file).unlink()
        # A folder named by a step is a checkpoint to orbax, even an empty one.
        steps = {file.split("/")[1] for file in wanted if file.startswith("checkpoints/")}
        for checkpoint in folder.glob("checkpoints/*"):
            if checkpoint.name not in steps:
                shutil.rmtree(checkpoint)
        for file, stamp in wanted.items():
            if here.get(file) != stamp:
                make_folder((folder / file).parent)
                store.get_file(f"{path}/{file}", str(folder / file))
                os.utime(folder / file, ns=(stamp[1], stamp[1]))
    return manifest


@contextmanager
def mirrored(
    folder: Path, output: str, fetched: Manifest | None, echo: Callable[[str], None]
) -> Iterator["Mirror | None"]:
    """A `Mirror` of a run whose output is on an object store, while the block runs; None for a local output."""
    if not is_remote(output):
        yield None
        return
    with Mirror(folder, output, fetched, echo) as mirror:
        yield mirror


def copy_again(folder: Path, output: str) -> None:
    """Copies the files that were added to a run after its `Mirror` ended; does nothing for a local output.

    Raises:
      InputError: the store cannot be read or written, or another process has taken the run over.
    """
    if is_remote(output):
        store, path = open_store(output)
        with readable(output):
            manifest = read_manifest(store, path)
        if manifest is None or manifest["owner"] != _last_owner(folder):
            raise InputError(f"another process now trains in {output}: the new files in {folder} stay there")
        Mirror(folder, output, manifest).push()


class Mirror:
    """Copies the local folder of a run to an object store, now and then in a thread, and at the end."""

    def __init__(self, folder: Path, url: str, fetched: Manifest | None, echo: Callable[[str], None] = print) -> None:
        """Begins.

        Args:
          folder: the working folder, as `fetch_run` left it or with a run that was just made.
          url: the URL of the copy.
          fetched: the manifest that `fetch_run` found there. Only objects that it names are ever removed there.
          echo: reports that the store cannot be reached, and later that it can be reached again.
        """
        self._folder, self._url, self._echo = folder, url, echo
        self._store, self._path = open_store(url)
        self._manifest, self._lock = Guarded(f"{url_of(url)}/{MANIFEST}"), threading.Lock()
        self._owner, self._claimed = secrets.token_hex(8), False
        self._fetched = fetched
        stamps = fetched["files"].items() if fetched else ()
        self._sent: dict[str, Stamp] = {f: (s[0], s[1]) for f, s in stamps if is_mirrored(f, url)}
        self._taken = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self.push()
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self.push()
        elif not self._taken:
            with suppress(InputError):  # the error on its way says more
                self.push()

    def check(self) -> None:
        """Raises `InputError` once another process has taken the run over."""
        if self._taken:
            raise InputError(f"another process now trains in {self._url}: this one ends")

    def push(self) -> None:
        """Brings the store's copy to the present state of the folder.

        Raises:
          InputError: the store cannot be written, or another process has taken the run over, or has written there
            between `fetch_run` and the first push.
        """
        try:
            for more in (True, True, False):
                with suppress(*[FileNotFoundError] * more), self._lock:  # a file was removed during the copy
                    self._push()
                    return
        except InputError:
            raise
        except Exception as error:  # dozens of types of the store's package, as in `objects.readable`
            kept = f"the run is in {self._folder} and is copied when you run the same command again on this machine"
            if native_place(self._url):
                kept = "run the same command again, which continues from the last complete checkpoint"
            raise InputError(f"{self._url} cannot be written ({reason(error)}); {kept}") from error

    def _push(self) -> None:
        stamps, content = _stamps(self._folder), self._manifest.read()
        manifest = None if content is None else parse_manifest(content, self._path)
        if not self._claimed and manifest != self._fetched:
            self._taken = True
            raise InputError(f"{self._url} has changed in the meantime: run the same command again")
        if self._claimed and (manifest is None or manifest["owner"] != self._owner):
            self._taken = True
            self.check()
        if self._claimed and stamps == self._sent:
            return
        if not self._claimed and (manifest is None or native_place(self._url)):  # before any object is replaced
            self._fetched = self._put_manifest(manifest["files"] if manifest else {})
        for file, stamp in stamps.items():
            if self._sent.get(file) == stamp:
                continue
            if file.startswith("checkpoints/"):
                self._store.put_file(str(self._folder / file), f"{self._path}/{file}")
            else:  # read whole: a log that grows during the copy would be longer than announced
                self._store.pipe_file(f"{self._path}/{file}", (self._folder / file).read_bytes())
        self._put_manifest(stamps)
        self._claimed = True
        if gone := [f"{self._path}/{file}" for file in self._sent.keys() - stamps.keys()]:
            self._store.rm([file for file in gone if self._store.exists(file)])
        self._sent = stamps

    def _put_manifest(self, files: dict[str, Any]) -> Manifest:
        manifest = {"owner": self._owner, "files": files}
        if not self._manifest.write(json.dumps(manifest).encode()):
            self._taken = True
            self.check()
        if not self._claimed:
            write_text(self._folder / _OWNER, self._owner)
        return manifest

    def _follow(self) -> None:
        failed = False
        while not self._ended.wait(_INTERVAL) and not self._taken:
            try:
                with self._lock:
                    self._push()
                if failed:
                    self._echo(f"storage   {self._url} can be written again")
                failed = False
            except FileNotFoundError:
                continue  # an old checkpoint was removed during the copy
            except InputError:  # taken over, which `check` says
                return
            except Exception as error:  # whatever the store's package raises
                if not failed:
                    self._echo(f"storage   {self._url} cannot be written for now ({reason(error)})")
                failed = True


def _stamps(folder: Path) -> dict[str, Stamp]:
    """The files of a run that are complete: no checkpoint that is being written, nothing temporary."""
    stamps = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        unfinished = parts[0] == "checkpoints" and len(parts) > 1 and not parts[1].isdigit()
        hidden = parts[0].startswith(".") or parts[0] == "wandb" or parts[0].endswith(".partial")
        if not unfinished and not hidden and file.is_file():
            about = file.stat()
            stamps["/".join(parts)] = (about.st_size, about.st_mtime_ns)
    return stamps


def _run_around(store: Any, path: str) -> str:
    """The path of a run that a path lies in; "" where none can be seen."""
    parts = path.split("/")
    for length in range(1, len(parts)):
        outer = "/".join(parts[:length])
        with suppress(Exception):  # whoever may not read there has no run there
            if store.exists(f"{outer}/{MANIFEST}"):
                return outer
    return ""


def _last_owner(folder: Path) -> str | None:
    """The owner that the manifest had when it was last copied from the folder; None where it never was."""
    return (folder / _OWNER).read_text("utf-8") if (folder / _OWNER).is_file() else None
