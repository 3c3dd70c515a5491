"""Config files: Python files that define a dataclass, given by path or, if the package ships them, by name."""

import runpy
import traceback
from importlib import resources
from pathlib import Path
from typing import TypeVar

from simcse_jax.config.settings import Config
from simcse_jax.config.values import check_types
from simcse_jax.errors import InputError, reason

T = TypeVar("T")


def load_config_file(name: str) -> Config:
    """Reads the variable `config` of a Python config file, see `load_variable`."""
    return load_variable(name, "config", Config)


def load_variable(name: str, variable: str, kind: type[T]) -> T:
    """Reads a variable of a Python config file.

    Args:
      name: path of the file, or the name of one that comes with the package, e.g. "quickstart".
      variable: name of the variable.
      kind: its type, a dataclass.

    Raises:
      InputError: no such file or name, a file that cannot be run, or a file that does not define the variable as a
        `kind`.
    """
    path = Path(name)
    if not path.is_file():
        shipped = _shipped_configs(variable)
        if path.stem not in shipped or len(path.parts) > 2:
            raise InputError(f"no config file '{name}'; configs that come with the package: {', '.join(shipped)}")
        path = shipped[path.stem]
    try:
        value = runpy.run_path(str(path)).get(variable)
    except InputError:
        raise
    except Exception as error:  # whatever the file's own code raises
        if isinstance(error, SyntaxError) and path.suffix != ".py":
            raise InputError(
                f"{path} is not a Python file; give one that defines `{variable}`, or a config of the package "
                f"({', '.join(_shipped_configs(variable))}): text goes to --data.train"
            ) from None
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise InputError(f"config file {path}{where}: {type(error).__name__}: {reason(error)}") from error
    if not isinstance(value, kind):
        found = "there is no such variable" if value is None else f"it is a {type(value).__name__}"
        raise InputError(f"{path} does not define `{variable} = {kind.__name__}(...)`: {found}")
    check_types(value)
    return value


def _shipped_configs(variable: str) -> dict[str, Path]:
    """The package's files that define the variable: studies begin with study_, ablations have a folder of their own."""
    folder = Path(str(resources.files("simcse_jax.configs")))
    if variable == "ablation":
        folder /= "ablations"
    files = [p for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    return {p.stem: p for p in files if p.stem.startswith("study_") == (variable == "study")}
