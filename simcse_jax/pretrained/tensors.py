"""The files of a model's weights: names and shapes come from their headers, values are read when they are asked for."""

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.errors import InputError, reason, warn
from simcse_jax.pretrained.folders import inside_run
from simcse_jax.pretrained.pooling import read_object
from simcse_jax.storage.files import inside

WORDS = "embeddings.word_embeddings.weight"
"""The weight that tells an encoder, behind the prefix that its checkpoint gives it."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    problem: str = ""
    """Words that say why it cannot be a weight; "" if it can."""


# The forms of a folder's weights, in the order in which transformers looks for them.
_FORMS = [f"{file}{index}" for file in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]


def find_tensors(folder: Path) -> dict[str, Stored]:
    """All weights of a folder, from safetensors, sharded or not, or from a PyTorch pickle.

    Of several forms, the one is taken that transformers takes; a line on stderr names the others.

    Raises:
      InputError: the folder has no weights, they cannot be read, or its index names a file outside of it.
    """
    there = [folder / name for name in _FORMS if (folder / name).is_file()]
    if not there:
        raise InputError(
            f"{folder} has no weights: expected model.safetensors, its sharded form, or pytorch_model.bin"
            + inside_run(folder)
        )
    chosen, *others = there
    files, shards = [chosen], {}
    if chosen.suffix == ".json":
        shards = read_object(chosen, "").get("weight_map", {})
        if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
            raise InputError(f"{chosen} has no weight_map from weights to files: copy it again")
        files = sorted({inside(folder, file, chosen) for file in shards.values()})
    tensors: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{file} is named by the weights' index but does not exist as a file: copy the model again"
            )
        found = find_safetensors(file) if file.suffix == ".safetensors" else _find_torch(file)
        # A shard may hold more than the index takes from it, such as what another shard holds as well.
        tensors |= {name: x for name, x in found.items() if folder / shards.get(name, file.name) == file}
    if others:
        warn(f"{folder}: the weights are those of {chosen.name}; not read: {', '.join(file.name for file in others)}")
    return tensors


_AT_ONCE = 2**25
"""Elements of a tensor that are read at a time."""
_FLOATING = ("F64", "F32", "F16", "BF16")


def find_safetensors(file: Path) -> dict[str, Stored]:
    """The arrays of a file; raises `InputError` where it is damaged.

    safetensors itself compares the lengths and offsets of the header with the size of the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened: Any = safe_open(file, framework="numpy")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
        kinds = {name: (tuple(slice.get_shape()), slice.get_dtype()) for name, slice in slices.items()}
    except FileNotFoundError as error:  # what safetensors says of a file that may not be read
        raise InputError(f"{file} cannot be read: give yourself permission to read it") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}): it is truncated or damaged, so copy it again") from error
    return {
        name: Stored(
            shape,
            partial(_read, opened, name, shape),
            "" if kind in _FLOATING else f"holds {kind}: quantised weights are not read",
        )
        for name, (shape, kind) in kinds.items()
    }


def _read(opened: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor; safetensors holds Python's lock while it reads, so that large ones are read in parts."""
    rows = max(1, _AT_ONCE // max(1, math.prod(shape[1:])))
    if not shape or shape[0] <= rows:
        return np.asarray(opened.get_tensor(name))
    stored = opened.get_slice(name)
    values = np.empty(shape, stored[:1].dtype)
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))
        values[part] = stored[part]
    return values


def _find_torch(file: Path) -> dict[str, Stored]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{file} is a PyTorch pickle and torch is not installed: pip install torch, "
            "or save the model as safetensors elsewhere"
        ) from error
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > file.stat().st_size:  # torch packs nothing
                raise ValueError(f"{unpacked:,} bytes are packed into {file.stat().st_size:,}")
        # weights_only refuses pickles that could run code.
        saved = torch.load(file, map_location="cpu", weights_only=True)
        # Lightning puts the weights into `state_dict`, DeepSpeed into `module`, loops of one's own where they like.
        parts = [part for part in saved.values() if isinstance(part, dict)]
        tensors = next((part for part in parts if any(f".{name}".endswith(f".{WORDS}") for name in part)), saved)
        return {name: _of_torch(x) for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    except Exception as error:  # torch raises many types for damaged or refused pickles
        raise InputError(
            f"{file} cannot be read as weights ({reason(error)}): copy it again, or save it as safetensors"
        ) from error


def _of_torch(x: Any) -> Stored:
    import torch

    problem = ""
    if not x.is_floating_point():
        problem = f"holds {x.dtype}: quantised weights are not read".replace("torch.", "")
    elif x.layout != torch.strided or x.device.type != "cpu":
        problem = f"is {x.layout} on {x.device}: only plain tensors are read"
    elif x.untyped_storage().nbytes() < x.numel() * x.element_size():
        problem = "is larger than what the file holds of it: copy it again"  # a small one, seen many times
    return Stored(tuple(x.shape), lambda: (x.float() if x.is_floating_point() else x).numpy(), problem)
