"""The tokens of a text on gs://, for all jobs that know the place.

URL/JOB/ids-0.bin, …   the files of a folder of tokens, as one job put them there
URL/manifest.json      the manifest of the folder, which names the files of one job: written last, and in one step

What the manifest does not name is being put there, or was left by a job that failed.
"""

import re
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from simcse_jax.errors import InputError
from simcse_jax.reports.progress import note
from simcse_jax.storage.files import is_remote, to_disk
from simcse_jax.storage.guarded import Guarded
from simcse_jax.storage.manifest import MANIFEST, Damage, parse_manifest, sealed, stamp, write_sealed
from simcse_jax.storage.objects import native_place, open_store, readable, url_of
from simcse_jax.storage.places import StoreError, reached

OLD = 24 * 3600
"""Seconds after which no job still fills a folder: the files of all shares are put there when all are written."""
_AT_ONCE = 4  # files that are copied at a time: each takes some memory
_NAME = re.compile(r"([0-9a-f]{16})/([a-z]+(?:-\d+)?\.bin)")
_OBJECT = re.compile(r"(tokens-\d+-[0-9a-f]{16})/([0-9a-f]{16})/[^/]+")


def check_cache(cache: str | Path) -> None:
    """Raises `InputError` for a cache on a store where several processes cannot write, or without its package."""
    if is_remote(cache) and native_place(cache) is None:
        raise InputError(
            f"data.cache is {cache}: a cache on an object store is written by several processes, which only gs:// "
            "allows. Give a folder, or a place on gs://"
        )


class TokenStore:
    """The place of a text's tokens on gs://.

    Its methods raise `StoreError` where the store cannot be reached, which says nothing of the tokens.
    """

    def __init__(self, url: str) -> None:
        """Reads nothing yet.

        Args:
          url: the place, named as the local folder of the same tokens.
        """
        self.url = url_of(url)
        self._store, self._path = open_store(self.url)
        self._manifest = Guarded(f"{self.url}/{MANIFEST}")

    def _read(self) -> tuple[str, dict[str, Any]]:
        """The job whose files the store has, with their manifest as a folder of them has it; "" where there is none.

        Raises:
          Damage: the manifest was changed.
        """
        with reached(self.url):
            content = self._manifest.read()
        if content is None:
            return "", {}
        manifest = parse_manifest(content)
        named = {name: _NAME.fullmatch(name) for name in manifest["files"]}
        jobs = {match and match[1] for match in named.values()}
        if len(jobs) != 1 or None in jobs:
            raise Damage(f"{MANIFEST} names other files")
        files = {match[2]: manifest["files"][name] for name, match in named.items() if match}
        return str(jobs.pop()), manifest | {"files": files}

    def job(self) -> str:
        """The job whose files the store has; "" where it has none, or a damaged manifest, which a line says."""
        try:
            return self._read()[0]
        except Damage as damage:
            note(f"the token cache {self.url} is damaged ({damage}): it is made again")
            return ""

    def try_writing(self) -> None:
        """Raises `InputError` where this process cannot write to the store, before it works for hours."""
        trial = f"{self._path}/{secrets.token_hex(8)}/trial"  # which `sweep` knows
        with readable(self.url):
            self._store.pipe_file(trial, b"")
            self._remove([trial])

    def put(self, job: str, files: Iterable[Path]) -> None:
        """Copies files of a job to the store."""
        with readable(self.url), ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda file: self._store.put_file(str(file), f"{self._path}/{job}/{file.name}"), files))

    def publish(self, job: str, manifest: dict[str, Any], damaged: str) -> None:
        """Makes the files of a job the tokens, unless another job was first, whose files then are.

        Args:
          job: the job, all of whose files are there.
          manifest: of these files.
          damaged: the job whose files they may replace.
        """
        content = manifest | {"files": {f"{job}/{name}": stamp for name, stamp in manifest["files"].items()}}
        unneeded: set[str] = set()
        while True:
            try:
                now = self._read()[0]
            except Damage:
                now = ""
            if now not in ("", damaged):
                break
            with reached(self.url):
                if self._manifest.write(sealed(content).encode()):
                    unneeded = set(content["files"])
                    break
        with suppress(StoreError, FileNotFoundError):
            self._remove(f"{self._path}/{name}" for name in self._names(job) if name not in unneeded)

    def _names(self, job: str) -> list[str]:
        with reached(self.url):
            return [found.removeprefix(f"{self._path}/") for found in self._store.find(f"{self._path}/{job}")]

    def get(self, job: str, paths: Iterable[Path]) -> None:
        """Copies files that `put` has put there.

        Raises:
          Damage: one is missing.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda path: self._get(job, path), paths))

    def _get(self, job: str, path: Path) -> None:
        try:
            with reached(self.url):
                self._store.get_file(f"{self._path}/{job}/{path.name}", str(path))
        except FileNotFoundError:
            raise Damage(f"{job}/{path.name} is missing") from None

    def fetch(self, folder: Path) -> None:
        """Makes a local folder that of the store; the files that it has already are not copied.

        Raises:
          Damage: the store has other files than its manifest names, or none.
        """
        job, manifest = self._read()
        files = manifest.get("files", {})
        if not files:
            raise Damage(f"{MANIFEST} is missing")
        for path in folder.iterdir():
            if path.name not in files:
                path.unlink()
        lacking = [name for name, known in files.items() if stamp(folder / name) != known]

        def copy(name: str) -> None:
            for _ in range(2):  # the way here may damage it, too
                self._get(job, folder / name)
                if stamp(folder / name) == files[name]:
                    to_disk(folder / name)
                    return
            raise Damage(f"the content of {job}/{name} was changed")

        if lacking:
            size = megabytes(files[name][0] for name in lacking)
            note(f"{len(lacking)} of {len(files)} files of tokens, {size}, are copied from {self.url}")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(copy, lacking))
        to_disk(folder)
        write_sealed(folder / MANIFEST, manifest)

    def sweep(self) -> None:
        """Removes what jobs that failed more than a day ago have left in the cache, of this text and of others."""
        cache, _, _ = self._path.rpartition("/")
        with suppress(StoreError, FileNotFoundError):  # a user who may not list or remove them does not need to
            with reached(self.url):
                found = self._store.find(cache, prefix="tokens-", detail=True)
            left: dict[tuple[str, str], list[str]] = {}
            young = set()
            for path, about in found.items():
                if match := _OBJECT.fullmatch(path.removeprefix(f"{cache}/")):
                    left.setdefault((match[1], match[2]), []).append(path)
                    if time.time() - about["mtime"].timestamp() < OLD:
                        young.add((match[1], match[2]))
            for name, job in left.keys() - young:
                other = TokenStore(f"{self.url.rpartition('/')[0]}/{name}")
                with suppress(Damage):  # it may have named them
                    if other._read()[0] != job:
                        self._remove(left[name, job])

    def _remove(self, paths: Iterable[str]) -> None:
        with reached(self.url):
            for path in paths:
                with suppress(FileNotFoundError):  # another job has removed it
                    self._store.rm_file(path)


def megabytes(sizes: Iterable[int]) -> str:
    """The sum of sizes in bytes, for a line of progress."""
    return f"{sum(sizes) / 1e6:,.1f} MB"
