"""Manifests: the sizes and digests of a folder's files, by which damage on disk is found before the files are used.

A manifest is the last file written to a folder. Its digests, xxh3-128, find the errors of storage, but
are no protection against a forger.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from simcse_jax.errors import InputError, reason
from simcse_jax.storage.files import finite, inside, is_remote, new_file, to_disk
from simcse_jax.storage.objects import find_objects, open_store
from simcse_jax.storage.places import Place, StoreError, reached
from simcse_jax.storage.records import parse_json, parse_record, read_bounded, read_record

MANIFEST = "manifest.json"
VERIFY = "SIMCSE_VERIFY"
"""Name of the environment variable that is 0 where files are to be used without comparing them with their manifests, as
with --no-verify."""


class Damage(Exception):
    """What is wrong with a folder or a file."""


def is_on() -> bool:
    """Whether files are compared with their manifests before they are used."""
    return os.environ.get(VERIFY) != "0"


def digest(path: Place) -> str:
    """The xxh3-128 digest of a file, as 32 hexadecimal digits."""
    with reached(path), _opened(path) as file:  # read, not mapped: what the disk cannot give would end the process
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _opened(path: Place) -> Any:
    """A file to be read from its beginning to its end; of an object, 16 MB with each request."""
    if not is_remote(path):
        return path.open("rb")
    store, name = open_store(path)
    return store.open(name, "rb", block_size=2**24)


def _seal(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def sealed(content: dict[str, Any]) -> str:
    """A JSON object with a digest of itself, `seal`."""
    content = finite(content)
    return json.dumps(content | {"seal": _seal(content)}, indent=2, allow_nan=False)


def write_sealed(file: Place, content: dict[str, Any]) -> None:
    """Writes what `sealed` gives, in one step that a power cut cannot undo by half."""
    text = sealed(content)
    if is_remote(file):
        file.write_text(text)
        return
    with new_file(file) as partial:
        partial.write_text(text, "utf-8")  # without a newline, so that none can be cut off


def read_sealed(file: Place, required: bool = True, compared: bool = True) -> dict[str, Any]:
    """The object that `write_sealed` wrote, without its seal.

    Args:
      file: the file.
      required: whether the file is damaged if it has no seal; files of earlier versions have none.
      compared: whether it is damaged if it has another.

    Raises:
      Damage: the file is missing or was changed.
      PermissionError: this user may not read it.
    """
    return _unsealed(file.name, lambda: read_record(file), required, compared)


def _unsealed(name: str, read: Callable[[], Any], required: bool = True, compared: bool = True) -> dict[str, Any]:
    """`read_sealed` of what `read` gives, which is called `name`."""
    try:
        content = read()
        seal = content.pop("seal") if required else content.pop("seal", None)
    except (PermissionError, StoreError):
        raise
    except FileNotFoundError:
        raise Damage(f"{name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(f"{name} cannot be read") from error
    if seal is not None and compared and seal != _seal(content):
        raise Damage(f"{name} was changed")
    found: dict[str, Any] = content
    return found


def stamp(path: Path) -> list[Any]:
    """The size and digest of a file, as a manifest keeps them; an empty list where there is none."""
    return [path.stat().st_size, digest(path)] if path.is_file() else []


def _is_same_text(path: Place, expected: str) -> bool:
    """Whether a file of JSON is as it was but for the line ends of Windows, which git gives the text that it copies."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes().replace(b"\r\n", b"\n")) == expected


def write_manifest(folder: Place, about: dict[str, Any], without: Iterable[str] = ()) -> None:
    """Writes the manifest of a folder, after all its files have reached the disk.

    Args:
      folder: the folder, complete.
      about: facts to keep with the digests, as JSON.
      without: names of files that still change.
    """
    sizes = _sizes(folder, {MANIFEST, *without})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda name: digest(folder / name), sizes))
    content = {name: [size, found] for (name, size), found in zip(sizes.items(), digests, strict=True)}
    write_sealed(folder / MANIFEST, {"about": about, "files": content})


def _sizes(folder: Place, without: set[str]) -> dict[str, int]:
    """The sizes of a folder's files by name, sorted, once a local folder has reached the disk."""
    if is_remote(folder):
        store, path = open_store(folder)
        found = {name.removeprefix(f"{path}/"): about["size"] for name, about in find_objects(store, path).items()}
        return {name: int(found[name]) for name in sorted(found) if name.split("/")[-1] not in without}
    paths = sorted(path for path in folder.rglob("*") if path.name not in without)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(to_disk, [*paths, folder]))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}


_MADE = {"*": str}
_PARTS = [{"from": int, "made": _MADE}]
_LOG = {"lines": int, "digest": str, "gaps?": [int]}
_FACTS = {
    **{"made?": _MADE, "parts?": _PARTS, "run?": str, "text?": str, "source?": str, "step?": int},
    "record?": {"run?": str, "parts?": _PARTS, "log?": _LOG},
}
"""The forms of what a manifest's readers take from `about`. A `?` ends names that may be absent; `*` is any name."""


def _fits(value: Any, form: Any) -> bool:
    """Whether a JSON value has a form like `_FACTS`."""
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(entry, form[0]) for entry in value)
    if isinstance(form, type):
        return type(value) is form
    if not isinstance(value, dict) or "*" in form:
        return isinstance(value, dict) and all(_fits(entry, form["*"]) for entry in value.values())
    named = ((name.removesuffix("?"), name, kind) for name, kind in form.items())
    return all(_fits(value[key], kind) if key in value else name.endswith("?") for key, name, kind in named)


def _check(content: dict[str, Any]) -> None:
    """Raises `ValueError` for a manifest of another form, or one that names files outside of its folder."""
    formed = content.keys() == {"about", "files"} and all(isinstance(part, dict) for part in content.values())
    for name, entry in content["files"].items() if formed else ():
        size, digits = entry
        formed = formed and type(size) is int and isinstance(digits, str)
        inside(Path(), name, MANIFEST)
    if not formed or not _fits(content["about"], _FACTS):
        raise ValueError


def read_manifest(folder: Place) -> dict[str, Any]:
    """The facts that a manifest keeps, `about`, and `files`: the size and digest of each.

    Raises:
      Damage: the manifest is missing or was changed.
      PermissionError: this user may not read it.
    """
    return _checked(read_sealed(folder / MANIFEST))


def parse_manifest(text: bytes) -> dict[str, Any]:
    """`read_manifest` of what stands in one."""
    return _checked(_unsealed(MANIFEST, lambda: parse_record(text)))


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    try:
        _check(content)
    except (ValueError, TypeError) as error:
        raise Damage(f"{MANIFEST} cannot be read") from error
    return content


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest of ours, be it damaged: not the manifest.json of another program."""
    try:
        content = parse_json(read_bounded(folder / MANIFEST))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    # Damage may have spoilt one of the names; others have files of their own in theirs.
    return isinstance(content, dict) and len({"about", "files", "seal"} & content.keys()) > 1


def faults(folder: Place, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The differences between the files of a folder and its manifest. Files that it does not name do not matter.

    Args:
      folder: the folder.
      wanted: whether to compare the file of a name; by default all.

    Raises:
      Damage: the manifest is missing or was changed.
      PermissionError: this user may not read a file.
    """
    files = read_manifest(folder)["files"]

    def fault(name: str) -> str:
        size, expected = files[name]
        try:
            if not is_remote(folder) and not (folder / name).is_file():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            with reached(folder):
                about: Any = (folder / name).stat()
            actual = about.length if is_remote(folder) else about.st_size
            if actual != size and not (name.endswith(".json") and _is_same_text(folder / name, expected)):
                return f"{name} has {actual:,} bytes, not {size:,}"
            same = actual != size or digest(folder / name) == expected
            return "" if same else f"the content of {name} was changed"
        except (PermissionError, StoreError):
            raise
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or 'there is no such object'})"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(filter(None, pool.map(fault, filter(wanted, files))))


def verify(folder: Place, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Raises `Damage` with the first of `faults`; does nothing where verification is off."""
    if is_on() and (found := faults(folder, wanted)):
        raise Damage(found[0])


def check_unchanged(folder: Path, advice: str, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Raises `InputError` for a folder whose files differ from its manifest; one without a manifest passes.

    Args:
      folder: the folder.
      advice: what the message says to do.
      wanted: see `faults`.
    """
    if not (is_on() and has_manifest(folder)):
        return
    try:
        verify(folder, wanted)
    except PermissionError as error:
        raise InputError(
            f"{error.filename} cannot be read ({reason(error)}): get permission for it, or copy it"
        ) from error
    except Damage as damage:
        raise InputError(
            f"{folder} is damaged ({damage}): {advice}; a change of your own is accepted with --no-verify, or for good "
            f"once {folder / MANIFEST} is removed"
        ) from damage
