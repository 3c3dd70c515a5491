"""Paths in what is published."""

import sysconfig
from pathlib import Path
from typing import Any


def portable(value: Any) -> Any:
    """A JSON value in which the last part of a path stands for an absolute path of this machine.

    Of a path inside an installed package, the part from the package on is kept.
    """
    if isinstance(value, dict):
        return {key: portable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [portable(entry) for entry in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    path, packages = Path(value), Path(sysconfig.get_paths()["purelib"])
    return str(path.relative_to(packages)) if path.is_relative_to(packages) else path.name
