"""The folders of tokenised text: made by all processes that share the file system, each its share, and read by all.

Each process writes the tokens of some blocks of the text, in their order, into files of its own, numbered by the share:

ids-0.bin       token ids, one sentence after the other
offsets-0.bin   where each sentence starts in that file, and the end of the last
missing-0.bin   numbers of its sentences in that file that are not there, where there are such
blocks.bin      for each block of the text, in order: its share, its examples, its tokens
manifest.json   digests of these, and what they hold
"""

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
import numpy as np
from jaxtyping import Int

from simcse_jax.data.columns import MOST
from simcse_jax.data.pieces import Pieces
from simcse_jax.data.table import TokenTable
from simcse_jax.errors import InputError, reason, room, some
from simcse_jax.pretrained.tokenizers import largest_id
from simcse_jax.reports.progress import note
from simcse_jax.runtime.processes import gather_texts, sharing
from simcse_jax.storage.files import make_folder, to_disk
from simcse_jax.storage.manifest import MANIFEST, Damage, digest, read_manifest, read_sealed, verify, write_sealed

FORMAT = 4  # in the name of a cache folder: raise it when the files change
PARTIAL = f"partial-{socket.gethostname()}@"  # begins the names of folders that are being filled
_YOUNG = 10  # seconds in which a process has surely locked such a folder
_OLD = 24 * 3600  # seconds after which one of another host, whose locks may not be seen here, is left over
_PART = 2**20  # tokens, or sentences, that are checked at a time
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
            table = self._table(own)
        except PermissionError as error:
            raise self._unreadable(error) from error
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise Damage(f"it cannot be read: {reason(error)}") from error
        if table is None:
            raise Damage("its files do not fit one another")
        return table

    def _table(self, own: set[str]) -> TokenTable | None:
        """The tokens in the folder; None where its files, of which those named `own` are read, do not fit together."""
        folder, about = self.folder, read_manifest(self.folder)["about"]
        largest = largest_id(self.tokenizer)
        dtype, columns = dtype_of(largest), about["columns"]
        asked = about["dtype"] == dtype and about["max_length"] == self.max_length
        if not (asked and type(columns) is int and 0 < columns <= MOST and type(about["skipped"]) is int):
            return None
        blocks = np.fromfile(folder / "blocks.bin", np.int64).reshape(-1, 3)
        if not len(blocks) or blocks.min() < 0 or blocks.max() > 2**40 or blocks[:, 1:].min() < 1:
            return None
        shares, file = np.unique(blocks[:, 0], return_inverse=True)
        sizes = blocks[:, 1:] * [columns, 1]  # sentences and tokens
        begins = np.zeros_like(sizes)  # of the blocks, in their files
        missing = []
        for number, share in enumerate(shares):
            here = file == number
            ends = np.cumsum(sizes[here], axis=0)
            begins[here] = ends - sizes[here]
            names = [f"{kind}-{share}.bin" for kind in ("ids", "offsets", "missing")]
            bytes_of = [(folder / name).stat().st_size for name in names[:2]]
            if bytes_of != [int(ends[-1, 1]) * np.dtype(dtype).itemsize, 8 * int(ends[-1, 0] + 1)]:
                return None
            if names[0] in own and not all(part.max() <= largest for part in _parts(folder / names[0], dtype)):
                return None
            if names[1] in own and not _are_offsets(folder / names[1], ends, self.max_length):
                return None
            if (folder / names[2]).exists():
                lost = np.fromfile(folder / names[2], np.int64)
                if not (len(lost) and lost[0] >= 0 and lost[-1] < ends[-1, 0] and np.all(np.diff(lost) > 0)):
                    return None
                places = np.flatnonzero(here)[np.searchsorted(ends[:, 0], lost, side="right")]
                missing.append(lost - begins[places, 0] + (np.cumsum(sizes[:, 0]) - sizes[:, 0])[places])
        gone = np.sort(np.concatenate(missing)) if missing else None
        if about["missing"] != (0 if gone is None else len(gone)):
            return None
        ids, offsets = ([folder / f"{kind}-{share}.bin" for share in shares] for kind in ("ids", "offsets"))
        # Blocks that follow one another in a file are one piece.
        first = np.flatnonzero(np.diff(file, prepend=-1))
        (sentences, tokens), file = np.add.reduceat(sizes, first).T, file[first]
        (at_sentence, at_token), added = begins[first].T, None
        if len(first) > 1:
            added = np.cumsum(tokens) - tokens - at_token
        sentences[-1] += 1  # the end of the last
        return TokenTable(
            Pieces(ids, dtype, file, at_token, tokens),
            Pieces(offsets, "int64", file, at_sentence, sentences, added),
            columns=columns,
            pad_id=self.tokenizer.pad_token_id,
            max_length=self.max_length,
            skipped=about["skipped"],
            # Earlier versions left examples out that lack a hard negative.
            fingerprint=self.fingerprint if gone is None else f"{self.fingerprint}-missing",
            origin=_lines(about["origin"]),
            missing=gone,
        )


def dtype_of(largest: int) -> str:
    """The type of token ids up to the largest."""
    return "uint16" if largest < 2**16 else "uint32"


def report_share(folder: Path, share: int, about: dict[str, Any]) -> None:
    """Tells `reports` what is in the files of a share, once these are on the disk.

    Args:
      folder: the folder that is being filled.
      share: the number of the share.
      about: facts, as JSON.
    """
    files = sorted(folder.glob(f"*-{share}.bin"))
    for file in files:
        to_disk(file)
    content = {file.name: [file.stat().st_size, digest(file)] for file in files}
    write_sealed(_report(folder, share), {"about": about, "files": content})


def reports(folder: Path, shares: int) -> list[dict[str, Any]]:
    """What `report_share` was given for each share."""
    return [read_sealed(_report(folder, share))["about"] for share in range(shares)]


def complete(folder: Path, shares: int, blocks: Int[np.ndarray, "B 3"], about: dict[str, Any]) -> None:
    """Writes what a folder lacks once all shares are there.

    Args:
      folder: the folder that is being filled.
      shares: the number of shares.
      blocks: share, examples and tokens of each block, in the order of the text.
      about: facts to keep in the manifest, as JSON.
    """
    files: dict[str, list[Any]] = {}
    for share in range(shares):
        files |= read_sealed(_report(folder, share))["files"]
    path = folder / "blocks.bin"
    blocks.astype(np.int64).tofile(path)
    files[path.name] = [path.stat().st_size, digest(path)]
    to_disk(path)
    to_disk(folder)
    write_sealed(folder / MANIFEST, {"about": about, "files": files})


def _report(folder: Path, share: int) -> Path:
    return folder.with_name(f"share-{share}.json")


def _lines(origin: Any) -> tuple[str, ...]:
    """Lines of text; raises `TypeError` for another value."""
    if not all(isinstance(line, str) for line in origin):
        raise TypeError("its origin is no text")
    return tuple(origin)


def _parts(path: Path, dtype: str) -> Iterator[np.ndarray]:
    """The numbers in a file, some at a time; read, not mapped, so that they do not stay in memory."""
    with path.open("rb") as file:
        while len(part := np.fromfile(file, dtype, _PART)):
            yield part


def _are_offsets(path: Path, ends: Int[np.ndarray, "B 2"], max_length: int) -> bool:
    """Whether sentences lie one after the other in a file, none too long, and blocks end at `ends`, in sentences and
    tokens."""
    last, count = 0, -1
    for part in _parts(path, "int64"):
        lengths = np.diff(part, prepend=last)
        if count < 0:
            first, lengths = lengths[0], lengths[1:]
            if first:
                return False
        if not 0 < lengths.min(initial=1) <= lengths.max(initial=1) <= max_length:
            return False
        here = (ends[:, 0] > count) & (ends[:, 0] <= count + len(part))
        if np.any(part[ends[here, 0] - count - 1] != ends[here, 1]):
            return False
        last, count = int(part[-1]), count + len(part)
    return True


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
