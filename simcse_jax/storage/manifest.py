"""Manifests: the sizes and digests of a folder's files, by which damage on disk is found before the files are used.

A manifest is the last file written to a folder. Its digests, xxh3-128, find the errors of storage, but
are no protection against a forger.
"""

import json
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"


class Damage(Exception):
    """What is wrong with a folder."""


def digest(path: Path) -> str:
    """The xxh3-128 digest of a file, as 32 hexadecimal digits."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return xxhash.xxh3_128_hexdigest(content)


def _seal(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _to_disk(path: Path) -> None:
    """Waits until a file or the names in a folder would survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_manifest(folder: Path, about: dict[str, Any], without: Iterable[str] = ()) -> None:
    """Writes the manifest of a folder, after all its files have reached the disk.

    Args:
      folder: the folder, complete.
      about: facts to keep with the digests, as JSON.
      without: names of files that still change.
    """
    paths = sorted(path for path in folder.rglob("*") if path.name not in (MANIFEST, *without))
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(digest, files))
        list(pool.map(_to_disk, [*paths, folder]))
    names = (path.relative_to(folder).as_posix() for path in files)
    content = {
        "about": about,
        "files": {n: [p.stat().st_size, d] for n, p, d in zip(names, files, digests, strict=True)},
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(content | {"seal": _seal(content)}, indent=1), "utf-8")
    _to_disk(path)
    _to_disk(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts that a manifest keeps, `about`, and `files`: the size and digest of each.

    Raises:
      Damage: the manifest is missing or was changed.
      PermissionError: this user may not read it.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
        seal = content.pop("seal")
    except PermissionError:
        raise
    except FileNotFoundError:
        raise Damage(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(f"{MANIFEST} cannot be read") from error
    if seal != _seal(content):
        raise Damage(f"{MANIFEST} was changed")
    found: dict[str, Any] = content
    return found


def verify(folder: Path, parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """Compares the files of a folder with its manifest. Files that it does not name do not matter.

    Args:
      folder: the folder.
      parts: names of folders inside it, to compare only what they hold; everything where empty.

    Returns:
      The facts that the manifest keeps.

    Raises:
      Damage: the first fault found.
      PermissionError: this user may not read a file.
    """
    content = read_manifest(folder)

    def check(name: str) -> None:
        size, expected = content["files"][name]
        try:
            actual = (folder / name).stat().st_size
            if actual != size:
                raise Damage(f"{name} has {actual:,} bytes, not {size:,}")
            if digest(folder / name) != expected:
                raise Damage(f"the content of {name} was changed")
        except PermissionError:
            raise
        except OSError as error:
            raise Damage(f"{name} cannot be read ({error.strerror})") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, (name for name in content["files"] if not parts or name.split("/")[0] in parts)))
    about: dict[str, Any] = content["about"]
    return about
