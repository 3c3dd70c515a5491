"""Files and folders that are there complete or not at all."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.errors import InputError, reason


def write_text(path: Path, text: str) -> None:
    """Writes a text file, replacing it in one step."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, indented, replacing the file in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes arrays, each contiguous, as .safetensors for PyTorch."""
    from safetensors.numpy import save

    # Not `save_file`, whose files since safetensors 0.8 only their owner can read.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` once the block has ended without an error.

    Raises:
      InputError: it cannot be written, or another has taken the name.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as private:
            partial = Path(private) / folder.name  # unlike the folder around it, with the user's usual permissions
            partial.mkdir()
            yield partial
            partial.rename(folder)
    except OSError as error:
        raise InputError(
            f"output {folder} cannot be written ({reason(error)}): free space or choose another"
        ) from error
