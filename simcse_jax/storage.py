"""Object stores, gs:// and s3://, through fsspec: what is read is copied here once, what is written is put there whole.

They have no rename, no append and no lock. So a file to be read is copied into the cache, under the identity that the
store gives its content. A run lives in a local folder, which a thread copies to the store; what counts there is
the manifest, an object that names all files of a consistent moment and is replaced in one step.
"""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simcse_jax.errors import InputError, reason
from simcse_jax.files import REMOTE, check_new_folder, is_remote, new_folder

CACHE = "~/.cache/simcse_jax"
MANIFEST = ".simcse_jax.json"
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_INTERVAL = 15.0  # seconds between copies of a run

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds, of a local file."""


def local_path(name: str | Path, cache: str = CACHE) -> Path:
    """The local path of a file or folder: its own, or of an object store's that of a copy.

    The copy lies in the cache under what the store says of the content (size, checksum or version), so that it is made
    once, and anew where the content changes. Of a run it is what the run's manifest names.

    Raises:
      InputError: nothing is there, it cannot be reached, or the package for the store is not installed.
    """
    if not is_remote(name):
        return Path(name).expanduser()
    store, path = _open(name)
    with _readable(name):
        found: dict[str, Any] = store.find(path, detail=True)
        if not found:
            raise FileNotFoundError(name)
        if f"{path}/{MANIFEST}" in found:
            manifest = json.loads(store.cat_file(f"{path}/{MANIFEST}"))
            found = {f"{path}/{file}": found[f"{path}/{file}"] for file in manifest["files"]}
        keys = ("size", "ETag", "etag", "md5Hash", "generation", "created")
        identity = [[file, *(str(about.get(key)) for key in keys)] for file, about in sorted(found.items())]
        digest = hashlib.sha256(json.dumps([_url(name), identity]).encode()).hexdigest()[:16]
        folder = Path(cache).expanduser() / "remote" / digest
        copy = folder / path.rsplit("/", 1)[-1]
        if not folder.is_dir():
            _copy(store, path, list(found), folder)
    return copy


def _copy(store: Any, path: str, files: list[str], folder: Path) -> None:
    """Copies objects to `folder/NAME`, complete or not at all."""
    try:
        with new_folder(folder) as partial:
            for file in files:
                target = partial / path.rsplit("/", 1)[-1] / file.removeprefix(path).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                store.get_file(file, str(target))
    except InputError:
        if not folder.is_dir():  # else another process has made the same copy meanwhile
            raise


@contextmanager
def written_folder(output: str | Path) -> Iterator[Path]:
    """A folder to fill, of `check_new_output`; of an object store, a local one that is put there at the end.

    The object config.json, without which a folder is no model, is put last.

    Raises:
      InputError: something is there, or it cannot be written.
    """
    if not is_remote(output):
        with new_folder(Path(output)) as partial:
            yield partial
        return
    store, path = _open(output)
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        files = [file for file in Path(temporary).rglob("*") if file.is_file()]
        with _readable(output):
            for file in sorted(files, key=lambda file: file == Path(temporary) / "config.json"):
                store.put_file(str(file), f"{path}/{file.relative_to(temporary).as_posix()}")


def check_new_output(output: str | Path) -> str | Path:
    """The absolute path, or the URL, of a folder to make, before the work that fills it.

    Raises:
      InputError: something is there, or it cannot be made or reached.
    """
    if not is_remote(output):
        return check_new_folder(output)
    store, path = _open(output)
    with _readable(output):
        if store.find(path):
            raise InputError(f"output {output} exists: choose another, or remove it")
    return _url(output)


def working_folder(output: str, cache: str) -> Path:
    """The local folder in which a run is worked on: the run folder itself, or for one on an object store one in the
    cache."""
    if not is_remote(output):
        return Path(output).expanduser()
    url = _url(output)
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(cache).expanduser().absolute() / "runs" / digest / url.rsplit("/", 1)[-1]


def fetch_run(url: str, folder: Path) -> None:
    """Makes the working folder of a run what the store has of it; removes it where the store has no run.

    Raises:
      InputError: something else is at the URL, or it cannot be reached.
    """
    store, path = _open(url)
    with _readable(url):
        manifest = _read_manifest(store, path)
        if manifest is None:
            if store.find(path):
                raise InputError(f"output {url} exists and is not a run of ours: choose another --output, or remove it")
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was removed from the store
            return
        wanted = {file: tuple(stamp) for file, stamp in manifest["files"].items()}
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
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                store.get_file(f"{path}/{file}", str(folder / file))
                os.utime(folder / file, ns=(stamp[1], stamp[1]))


@contextmanager
def mirrored(folder: Path, output: str, echo: Callable[[str], None]) -> Iterator["Mirror | None"]:
    """While the block runs, a `Mirror` of a run whose output is on an object store; None for a local one."""
    if not is_remote(output):
        yield None
        return
    with Mirror(folder, output, echo) as mirror:
        yield mirror


class Mirror:
    """Copies the local folder of a run to an object store, now and then in a thread, and at the end."""

    def __init__(self, folder: Path, url: str, echo: Callable[[str], None] = print) -> None:
        """Begins.

        Args:
          folder: the working folder, as `fetch_run` left it or with a run that was just made.
          url: where to.
          echo: says that the store cannot be reached, and that it can be again.
        """
        self._folder, self._url, self._echo = folder, url, echo
        self._store, self._path = _open(url)
        self._owner, self._claimed = secrets.token_hex(8), False
        manifest = _read_manifest(self._store, self._path)
        self._sent: dict[str, Stamp] = {f: (s[0], s[1]) for f, s in manifest["files"].items()} if manifest else {}
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
            raise InputError(f"another process trains in {self._url} by now: this one ends")

    def push(self) -> None:
        """Makes the store's run what the folder is now.

        Raises:
          InputError: the store cannot be written, or another process has taken the run over.
        """
        try:
            self._push()
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{self._url} cannot be written ({reason(error)}); the run is in {self._folder} and is copied when "
                "the same command is run again here"
            ) from error

    def _push(self) -> None:
        stamps = _stamps(self._folder)
        if self._claimed and stamps == self._sent:
            return
        manifest = _read_manifest(self._store, self._path)
        if self._claimed and (manifest is None or manifest["owner"] != self._owner):
            self._taken = True
            self.check()
        for file, stamp in stamps.items():
            if self._sent.get(file) == stamp:
                continue
            if file.startswith("checkpoints/"):
                self._store.put_file(str(self._folder / file), f"{self._path}/{file}")
            else:  # read whole: a log that grows meanwhile would not be as long as was announced
                self._store.pipe_file(f"{self._path}/{file}", (self._folder / file).read_bytes())
        content = json.dumps({"owner": self._owner, "files": stamps})
        self._store.pipe_file(f"{self._path}/{MANIFEST}", content.encode())
        self._claimed = True
        if gone := [f"{self._path}/{file}" for file in self._sent.keys() - stamps.keys()]:
            self._store.rm([file for file in gone if self._store.exists(file)])
        self._sent = stamps

    def _follow(self) -> None:
        failed = False
        while not self._ended.wait(_INTERVAL) and not self._taken:
            try:
                self._push()
                if failed:
                    self._echo(f"storage   {self._url} is written again")
                failed = False
            except FileNotFoundError:
                continue  # an old checkpoint was removed meanwhile
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


def _read_manifest(store: Any, path: str) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads(store.cat_file(f"{path}/{MANIFEST}"))
    except FileNotFoundError:
        return None
    return manifest


def _url(name: str | Path) -> str:
    return REMOTE.sub(r"\1://", str(name)).rstrip("/")


def _open(name: str | Path) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    url = _url(name)
    package = _PACKAGES[url[:2]]
    if find_spec(package) is None:
        raise InputError(f'{url} needs the Python package {package}: pip install "simcse-jax[storage]"')
    from fsspec.core import url_to_fs

    store, path = url_to_fs(url, use_listings_cache=False)
    return store, path


@contextmanager
def _readable(name: str | Path) -> Iterator[None]:
    """Turns what a store's package raises into `InputError`."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is nothing at {name}: check the bucket and the path") from error
    except Exception as error:  # dozens of types, from missing credentials to lost connections
        raise InputError(f"{name} cannot be had ({reason(error)}): check the name, credentials and network") from error
