"""The files in a folder of tokens: written in shares, completed, and read.

Each process writes the tokens of some blocks of the text, in their order, into files of its own, numbered by the share:

ids-0.bin       token ids, one sentence after the other
offsets-0.bin   where each sentence starts in that file, and the end of the last
missing-0.bin   numbers of its sentences in that file that are not there, where there are such
blocks.bin      for each block of the text, in order: its share, its examples, its tokens
manifest.json   digests of these, and what they hold

Until the folder is complete, two files of each share lie beside it:

share-0.json    digests of its files, and what they hold
blocks-0.bin    for each of its blocks: its place in the text, its examples, its tokens
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from simcse_jax.data.columns import MOST
from simcse_jax.data.pieces import Pieces
from simcse_jax.data.table import TokenTable
from simcse_jax.pretrained.tokenizers import largest_id
from simcse_jax.storage.files import to_disk
from simcse_jax.storage.manifest import MANIFEST, Damage, read_manifest, read_sealed, stamp, write_sealed

BLOCKS = "blocks.bin"
_PART = 2**20  # tokens, or sentences, that are checked at a time


def dtype_of(largest: int) -> str:
    """The type of token ids up to the largest."""
    return "uint16" if largest < 2**16 else "uint32"


def report_share(folder: Path, share: int, blocks: Int[np.ndarray, "B 3"], about: dict[str, Any]) -> None:
    """Tells `reports` what is in the files of a share, once these are on the disk.

    Args:
      folder: the folder that is being filled.
      share: the number of the share.
      blocks: place in the text, examples and tokens of each of its blocks.
      about: facts, as JSON.
    """
    report, beside = reports_of(folder, share)
    blocks.astype(np.int64).tofile(beside)
    files = {file.name: file for file in (*sorted(folder.glob(f"*-{share}.bin")), beside)}
    for file in files.values():
        to_disk(file)
    content = {name: stamp(file) for name, file in files.items()}
    write_sealed(report, {"about": about, "blocks": content.pop(beside.name), "files": content})


def reports(folder: Path, shares: int) -> list[tuple[Int[np.ndarray, "B 3"], dict[str, Any]]]:
    """What `report_share` was given for each share.

    Raises:
      Damage: the disk gives something else.
    """
    found = []
    for share in range(shares):
        report, blocks = reports_of(folder, share)
        content = read_sealed(report)
        if content["blocks"] != stamp(blocks):
            raise Damage(f"{blocks.name} was changed")
        found.append((np.fromfile(blocks, np.int64).reshape(-1, 3), content["about"]))
    return found


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
        files |= read_sealed(reports_of(folder, share)[0])["files"]
    path = folder / BLOCKS
    blocks.astype(np.int64).tofile(path)
    files[path.name] = stamp(path)
    to_disk(path)
    to_disk(folder)
    write_sealed(folder / MANIFEST, {"about": about, "files": files})


def reports_of(folder: Path, share: int) -> tuple[Path, Path]:
    """The two files of a share that lie beside the folder until it is complete."""
    return folder.with_name(f"share-{share}.json"), folder.with_name(f"blocks-{share}.bin")


def read_table(folder: Path, tokenizer: Any, max_length: int, fingerprint: str, own: set[str]) -> TokenTable | None:
    """The tokens in a folder; None where its files, of which those named `own` are read, do not fit together."""
    about = read_manifest(folder)["about"]
    largest = largest_id(tokenizer)
    dtype, columns = dtype_of(largest), about["columns"]
    asked = about["dtype"] == dtype and about["max_length"] == max_length
    if not (asked and type(columns) is int and 0 < columns <= MOST and type(about["skipped"]) is int):
        return None
    blocks = np.fromfile(folder / BLOCKS, np.int64).reshape(-1, 3)
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
        if names[1] in own and not _are_offsets(folder / names[1], ends, max_length):
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
        pad_id=tokenizer.pad_token_id,
        max_length=max_length,
        skipped=about["skipped"],
        # Earlier versions left examples out that lack a hard negative.
        fingerprint=fingerprint if gone is None else f"{fingerprint}-missing",
        origin=_lines(about["origin"]),
        missing=gone,
    )


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
