"""Compiled programs kept between runs, so that the next run neither traces nor lowers its own.

JAX's cache finds a program by its text, for which it must be traced: seconds for the step of 12 layers. Here it is
found by all that the text follows from: settings, the source of this package, versions, devices.
"""

import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from simcse_jax.programs import own_folder

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables of the environment that hold flags, or the name of a file of them."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax")


def _text_or_file(value: str) -> str:
    named = value != "" and not value.lstrip().startswith("-")
    return Path(value).read_text() if named and Path(value).is_file() else value


def _source() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCE = _source()
"""A digest of this package as it was imported: it may be changed while a run prepares."""


def place(settings: Any, devices: Sequence[jax.Device]) -> Path | None:
    """Where a program is kept; None where nothing is kept, or in a folder that the user named.

    Args:
      settings: what this package makes it from: its `repr` must tell it from every other.
      devices: what it runs on.
    """
    if (folder := own_folder()) is None:
        return None
    identity = [
        settings,
        _SOURCE,
        [version(package) for package in _PACKAGES],
        sys.version,
        sorted(jax.config.values.items()),
        [_text_or_file(os.environ.get(name, "")) for name in _FLAGS],
        devices[0].client.platform_version,
        [(device.id, device.device_kind) for device in devices],
    ]
    return folder / f"step-{hashlib.sha256(repr(identity).encode()).hexdigest()}"


def keep(file: Path, executable: jax.stages.Compiled, beside: Any) -> None:
    """Writes a program, and what is to be known of it; not where it cannot be, for want of space or by its devices.

    Args:
      file: see `place`.
      executable: compiled here. One that JAX's cache gave lacks its functions when it is written again, on CPUs.
      beside: to be pickled.
    """
    try:
        content = pickle.dumps((serialize_executable.serialize(executable), beside))
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix="partial-", delete=False) as partial:
            try:
                partial.write(content)
                partial.flush()
                Path(partial.name).replace(file)
            finally:
                Path(partial.name).unlink(missing_ok=True)
    except Exception:  # a full disk, or whatever the device's library raises: the run goes on without
        return


def find(file: Path, devices: Sequence[jax.Device]) -> tuple[jax.stages.Compiled, Any] | None:
    """What `keep` was given; None where it was not, or cannot be read."""
    try:
        (program, inputs, outputs), beside = pickle.loads(file.read_bytes())
        return serialize_executable.deserialize_and_load(program, inputs, outputs, execution_devices=devices), beside
    except Exception:  # absent, or whatever a damaged one raises: it is compiled instead
        return None
