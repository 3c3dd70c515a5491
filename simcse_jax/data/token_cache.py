"""The folders of tokenised text: made by all processes that share the file system, each its share, and read by all."""

import fcntl
import os
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
from simcse_jax.data.token_files import read_table
from simcse_jax.errors import InputError, reason, room, some
from simcse_jax.reports.progress import note
from simcse_jax.runtime.processes import gather_texts, sharing
from simcse_jax.storage.files import make_folder
from simcse_jax.storage.manifest import Damage, read_manifest, verify

FORMAT = 4  # in the name of a cache folder: raise it when the files change
PARTIAL = f"partial-{socket.gethostname()}@"  # begins the names of folders that are being filled
_YOUNG = 10  # seconds in which a process has surely locked such a folder
_OLD = 24 * 3600  # seconds after which one of another host, whose locks may not be seen here, is left over
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

    def open(self, fill: Callable[[Path, int, int], None], finish: Callable[[Path, int], None]) -> TokenTable:
        """The tokens in the folder, which is filled first where there are none, or damaged ones, which a line names.

        Args:
          fill: writes a share of the tokens into a folder, given that, its number and the number of shares.
          finish: completes the folder, given the number of shares.

        Raises:
          InputError: the folder cannot be read or written.
        """
        process = jax.process_index()
        copies = gather_texts(self._copy())
        self._check_same(copies)
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
        if copies[process] in damaged:
            note(f"the token cache {self.folder} is damaged ({damaged[copies[process]]}): the text is tokenised again")
        if lacking:
            made = self._make(lacking, fill, finish)
            table = made if process in lacking else table
        assert table is not None
        return table

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
            "owner make it readable (chmod -R a+rX), or set data.cache to another folder"
        )

    def _make(
        self, lacking: list[int], fill: Callable[[Path, int, int], None], finish: Callable[[Path, int], None]
    ) -> TokenTable | None:
        """Fills the folder, together with those of the processes that lack it which share it; None if this has it."""
        cache, process = self.folder.parent, jax.process_index()
        lacks, private = process in lacking, None
        try:
            if lacks:
                make_folder(cache)
            members = sharing(cache if lacks else None)
            if lacks and process == members[0]:
                if len(members) < len(lacking):
                    note(
                        f"{len(lacking)} processes need the tokens and {len(members)} of them share the cache {cache}: "
                        "these tokenise all of the text"
                    )
                _remove_leftovers(cache)
                private = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=cache))
        except OSError as error:
            raise InputError(
                f"cannot write to the cache {cache} ({reason(error)}): set data.cache to another folder"
            ) from error
        try:
            with _locked(private, fcntl.LOCK_SH) if private else nullcontext():
                if private:
                    # Unlike the folder around it, others may read it as the user's umask says.
                    (private / self.folder.name).mkdir()
                places = gather_texts(private.name if private else "")
                if lacks:
                    partial = cache / places[members[0]] / self.folder.name
                    fill(partial, members.index(process), len(members))
                gather_texts("")  # all have written
                if private:
                    finish(private / self.folder.name, len(members))
                    self._publish(private / self.folder.name)
                gather_texts("")  # all folders are there
        except OSError as error:
            advice = f"{room(error)} or set data.cache to another folder".removeprefix(" or ")
            raise InputError(f"cannot write tokens to {cache} ({reason(error)}): {advice}") from error
        finally:
            if private:
                shutil.rmtree(private, ignore_errors=True)
        if not lacks:
            return None
        until = time.monotonic() + _SEEN
        while not self.folder.is_dir() and time.monotonic() < until:
            time.sleep(0.1)
        try:
            return self._read(members.index(process), len(members))
        except Damage as damage:
            raise InputError(
                f"the tokens just written to {self.folder} are damaged ({damage}): set data.cache to another disk"
            ) from damage

    def _publish(self, partial: Path) -> None:
        """Renames a finished folder into place, where another job may have been first with the same content."""
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
            table = read_table(folder, self.tokenizer, self.max_length, self.fingerprint, own)
        except PermissionError as error:
            raise self._unreadable(error) from error
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise Damage(f"it cannot be read: {reason(error)}") from error
        if table is None:
            raise Damage("its files do not fit one another")
        return table


def _remove_leftovers(cache: Path) -> None:
    """Removes from a cache what killed processes have left: what no process of this host fills, or an old one."""
    for left in cache.glob("partial-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > (_YOUNG if left.name.startswith(PARTIAL) else _OLD):
                with _locked(left, fcntl.LOCK_EX):
                    shutil.rmtree(left)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Holds a lock on a folder; where the file system has no locks, a shared one is done without."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError) if kind == fcntl.LOCK_SH else nullcontext():
            fcntl.flock(number, kind | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)
