"""The folders of tokenised text: made by all processes that share the file system, or a store, each its share."""

import fcntl
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from simcse_jax.data.table import TokenTable
from simcse_jax.data.token_files import BLOCKS, read_table, reports_of
from simcse_jax.data.token_store import OLD, TokenStore, megabytes
from simcse_jax.errors import InputError, reason, room, some
from simcse_jax.reports.progress import note
from simcse_jax.runtime.processes import gather_texts, sharing
from simcse_jax.storage.files import make_folder
from simcse_jax.storage.manifest import Damage, read_manifest, verify
from simcse_jax.storage.places import StoreError, reached

FORMAT = 4  # in the name of a cache folder: raise it when the files change
PARTIAL = f"partial-{socket.gethostname()}@"  # begins the names of folders that are being filled
LOCK = "lock"  # in such a folder, locked by the process that made it
_YOUNG = 10  # seconds in which a process has surely locked such a folder
_SEEN = 90  # seconds for which network file systems remember that a name was not there


@dataclass(frozen=True)
class TokenCache:
    """The folder of one text's tokens.

    Its methods are called by all processes of a job together. Those that see the same files act as one: each reads or
    writes its share.
    """

    folder: Path
    fingerprint: str
    tokenizer: Any
    max_length: int
    store: TokenStore | None = None
    """Where the tokens are for all jobs; the folder then holds a copy."""

    def open(self, fill: Callable[[Path, int, int], None], finish: Callable[[Path, int], None]) -> TokenTable:
        """The tokens in the folder, which is filled first where there are none, or damaged ones, which a line names.

        Args:
          fill: writes a share of the tokens into a folder, given that, its number and the number of shares.
          finish: completes the folder, given the number of shares.

        Raises:
          InputError: the folder cannot be read or written.
        """
        process = jax.process_index()
        copies = self._copies()
        members = [p for p, copy in enumerate(copies) if copy == copies[process]]
        table, problem = None, ""
        if copies[process] != self.folder.name:
            try:
                table = self._read(members.index(process), len(members))
            except Damage as damage:
                problem = str(damage)
        problems = gather_texts(problem)
        damaged = {copy: problem for copy, problem in zip(copies, problems, strict=True) if problem}
        lacking = [p for p, copy in enumerate(copies) if copy == self.folder.name or copy in damaged]
        stored = self._stored()
        if copies[process] in damaged:
            self._say_damaged(self.folder, damaged[copies[process]], stored)
        refused, whole = "", [p for p in range(len(copies)) if p not in lacking]
        while self.store or lacking:
            if self.store and not stored and whole:
                stored = self._offer(whole.pop(), refused)
            if not lacking:
                break
            made, problem = self._make(lacking, fill, finish, stored, refused)
            problem = next(filter(None, gather_texts(problem)), "")
            if not problem:
                table = made or table
                break
            if not stored:
                raise InputError(f"the tokens just written to {self.folder} are damaged ({problem}): {self._advice}")
            refused, stored = stored, self._stored()
            stored = "" if stored == refused else stored  # another job may have mended them
            if self.store:
                self._say_damaged(self.store.url, problem, stored)
        assert table is not None
        return table

    @property
    def _advice(self) -> str:
        return f"set {'HOME' if self.store else 'data.cache'} to another folder"

    def _say_damaged(self, place: Path | str, problem: str, stored: str) -> None:
        remedy = f"it is copied from {self.store.url} again" if self.store and stored else "the text is tokenised again"
        note(f"the token cache {place} is damaged ({problem}): {remedy}")

    def _stored(self) -> str:
        """The job whose tokens the store has; "" where there is no store, or none in it that can be used."""
        if not self.store:
            return ""
        return gather_texts(self.store.job() if jax.process_index() == 0 else "")[0]

    def _offer(self, process: int, refused: str) -> str:
        """Has a process whose folder is whole put that on the store; see `_stored`."""
        if self.store and jax.process_index() == process:
            job, manifest = secrets.token_hex(8), read_manifest(self.folder)
            self._put(job, [self.folder / name for name in manifest["files"]])
            self.store.publish(job, manifest, refused)
        gather_texts("")  # it is there
        return self._stored()

    def _copies(self) -> list[str]:
        """The copy that each process has: of those that see the same files, all have it or none."""
        copies, cache = gather_texts(self._copy()), self.folder.parent
        self._check_same(copies)
        if len(set(gather_texts(self.store.url if self.store else ""))) > 1:
            raise InputError("processes have other places on gs:// in data.cache, or none: give all of them the same")
        if len({copy == self.folder.name for copy in copies}) == 1:
            return copies
        try:
            others = sharing(cache if os.access(cache, os.W_OK) else None)
        except OSError as error:
            raise self._unwritable(error) from error
        if any(copies[other] != self.folder.name for other in others):
            self._await()
        return gather_texts(self._copy())

    def _await(self) -> None:
        """Waits for a folder that is there, which a network file system may not show for a while."""
        until = time.monotonic() + _SEEN
        while self._copy() == self.folder.name and time.monotonic() < until:
            time.sleep(0.1)

    def _copy(self) -> str:
        """The folder's name, and what tells it from those of other file systems; the name alone where there is none."""
        try:
            if not self.folder.is_dir():
                return self.folder.name
            found = self.folder.stat()
        except PermissionError as error:
            raise self._unreadable(error) from error
        return f"{self.folder.name} {found.st_ino} {found.st_mtime_ns}"

    def _check_same(self, copies: list[str]) -> None:
        """Raises `InputError` where processes would train on different tokens."""
        names = [copy.split()[0] for copy in copies]
        if others := [process for process, name in enumerate(names) if name != names[0]]:
            raise InputError(
                f"process {some(map(str, others))} of {len(names)} has other text, or another tokenizer, than process "
                "0: give all processes the same data.train and model.path, with the same content"
            )

    def _unreadable(self, error: PermissionError) -> InputError:
        return InputError(
            f"the token cache {self.folder} belongs to another user and cannot be read ({reason(error)}): have its "
            f"owner make it readable (chmod -R a+rX), or {self._advice}"
        )

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"cannot write to the cache {self.folder.parent} ({reason(error)}): {self._advice}")

    def _make(
        self,
        lacking: list[int],
        fill: Callable[[Path, int, int], None],
        finish: Callable[[Path, int], None],
        stored: str,
        refused: str,
    ) -> tuple[TokenTable | None, str]:
        """Fills the folder, together with those of the processes that lack it which share it.

        With a store, all that lack it fill one together, unless it has one already, and each gets a copy.

        Args:
          lacking: the processes.
          fill: see `open`.
          finish: see `open`.
          stored: see `_stored`.
          refused: the job on the store whose tokens are damaged.

        Returns:
          The tokens, None if this process has them; and what is wrong with those that it got.
        """
        cache, process = self.folder.parent, jax.process_index()
        lacks, private = process in lacking, None
        try:
            if lacks:
                make_folder(cache)
            members = sharing(cache if lacks else None)
            if lacks and process == members[0]:
                if len(members) < len(lacking) and not self.store:
                    note(
                        f"{len(lacking)} processes need the tokens and {len(members)} of them share the cache {cache}: "
                        "these tokenise all of the text"
                    )
                _remove_leftovers(cache)
                private = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=cache))
        except OSError as error:
            raise self._unwritable(error) from error
        problem = ""
        try:
            with _locked(_lock_of(private), fcntl.LOCK_SH | fcntl.LOCK_NB) if private else nullcontext():
                if private:
                    # Unlike the folder around it, others may read it as the user's umask says.
                    (private / self.folder.name).mkdir()
                places = gather_texts(private.name if private else "")
                partial = cache / places[members[0]] / self.folder.name if lacks else cache
                if not stored:
                    self._write(partial, lacking if self.store else members, fill, finish, refused)
                if private:
                    try:
                        if self.store:
                            self.store.fetch(partial)
                        self._publish(partial)
                    except Damage as damage:
                        problem = str(damage)
                problems = gather_texts(problem)  # all folders are there
        except OSError as error:
            advice = f"{room(error)} or {self._advice}".removeprefix(" or ")
            raise InputError(f"cannot write tokens to {cache} ({reason(error)}): {advice}") from error
        except Damage as damage:
            raise InputError(f"the tokens just written to {cache} are damaged ({damage}): {self._advice}") from damage
        finally:
            if private:
                shutil.rmtree(private, ignore_errors=True)
        if not lacks or problems[members[0]]:
            return None, problem
        self._await()
        try:
            return self._read(members.index(process), len(members)), ""
        except Damage as damage:
            return None, str(damage)

    def _write(
        self,
        partial: Path,
        group: list[int],
        fill: Callable[[Path, int, int], None],
        finish: Callable[[Path, int], None],
        refused: str,
    ) -> None:
        """Fills a folder, or with a store the folders of a group, which share their files there; see `_make`."""
        process, store = jax.process_index(), self.store
        share = group.index(process) if process in group else None
        if store and share == 0:
            store.sweep()
        if share is not None:
            if store:
                store.try_writing()
            fill(partial, share, len(group))
        jobs = gather_texts(secrets.token_hex(8))  # all have written: what is put on the store waits for no one
        job = jobs[group[0]] if group else ""
        if store:
            if share is not None:
                self._put(job, [*partial.glob(f"*-{share}.bin"), *reports_of(partial, share)])
            gather_texts("")  # all is there
        if share == 0:
            if store:
                store.get(job, [file for other in range(1, len(group)) for file in reports_of(partial, other)])
            finish(partial, len(group))
            if store:
                store.put(job, [partial / BLOCKS])
                store.publish(job, read_manifest(partial), refused)
        if store:
            gather_texts("")  # it can be had

    def _put(self, job: str, files: list[Path]) -> None:
        if self.store:
            note(f"{megabytes(file.stat().st_size for file in files)} of tokens are copied to {self.store.url}")
            self.store.put(job, files)

    def _publish(self, partial: Path) -> None:
        """Renames a finished folder into place, where another job may have been first with the same content."""
        # One job at a time: of two that replace a damaged folder, either could move the other's away.
        with _locked(os.open(self.folder.parent, os.O_RDONLY), fcntl.LOCK_EX):
            try:
                partial.rename(self.folder)
            except OSError:
                if not self.folder.is_dir():
                    raise
                try:
                    self._read(0, 1)
                except Damage:
                    self.folder.rename(partial.with_name("damaged"))  # goes with the folder around it
                    partial.rename(self.folder)

    def _read(self, share: int, shares: int) -> TokenTable:
        """The tokens in the folder, of which one of `shares` equal shares is compared with the manifest.

        Raises:
          Damage: they are not what was asked for, or that share was changed.
        """
        folder = self.folder
        try:
            files = sorted(read_manifest(folder)["files"])
            own = set(files[share::shares])
            verify(folder, own.__contains__)
            with reached(folder):
                table = read_table(folder, self.tokenizer, self.max_length, self.fingerprint, own)
        except PermissionError as error:
            raise self._unreadable(error) from error
        except StoreError:
            raise
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise Damage(f"it cannot be read: {reason(error)}") from error
        if table is None:
            raise Damage("its files do not fit one another")
        return table


def _remove_leftovers(cache: Path) -> None:
    """Removes from a cache what killed processes have left: what no process of this host fills, or an old one."""
    for left in cache.glob("partial-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > (_YOUNG if left.name.startswith(PARTIAL) else OLD):
                with _locked(_lock_of(left), fcntl.LOCK_EX | fcntl.LOCK_NB, required=True):
                    pass
                shutil.rmtree(left)  # NFS removes no folder with an open file


def _lock_of(folder: Path) -> int:
    """The opened file that is locked for a folder: NFS locks only files, and alone only those that may be written."""
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)


@contextmanager
def _locked(file: int, kind: int, required: bool = False) -> Iterator[None]:
    """Holds a lock on an opened file or folder, and closes it.

    Args:
      file: the file.
      kind: the operation of `flock`.
      required: whether a lock that cannot be had is an `OSError`; else it is done without, as where there are none.
    """
    try:
        with nullcontext() if required else suppress(OSError):
            fcntl.flock(file, kind)
        yield
    finally:
        os.close(file)
