"""Config files: Python files that define a dataclass, given by path or, if the package ships them, by name."""

import ast
import re
import runpy
import traceback
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from simcse_jax.config import settings
from simcse_jax.config.settings import Config
from simcse_jax.config.values import check_types
from simcse_jax.errors import InputError, did_you_mean, reason
from simcse_jax.storage.files import check_readable

T = TypeVar("T")

VARIABLES = {"train": "config", "study": "study", "ablate": "ablation"}
"""For each command that trains, the variable that its config files define."""


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
    path = find_config(name, variable)
    value = run_config(path, variable).get(variable)
    if not isinstance(value, kind):
        found = "there is no such variable" if value is None else f"it is a {type(value).__name__}"
        raise InputError(f"{path} does not define `{variable} = {kind.__name__}(...)`: {found}")
    check_types(value)
    return value


def find_config(name: str, *variables: str) -> Path:
    """The config file with this path or, among those of the package that define one of the variables, this name.

    Raises:
      InputError: no such file or name.
    """
    path = Path(name)
    check_readable(path)
    if path.is_file():
        return path
    shipped = {stem: file for variable in variables for stem, file in shipped_configs(variable).items()}
    if path.stem in shipped and len(path.parts) <= 2 and not path.exists():
        return shipped[path.stem]
    hint = did_you_mean(path.stem, shipped)
    if path.is_dir():
        hint = "it is a folder. "
        if (path / "run.json").is_file():
            hint = f"it is a run: give the config that it was begun with, and --output {name}. "
    elif other := next((use for use, v in VARIABLES.items() if path.stem in shipped_configs(v)), None):
        hint = f"it is one for simcse-jax {other}. "
    known = f"Configs that come with the package: {', '.join(shipped)}"
    raise InputError(f"no config file '{name}'{': ' if hint else '. '}{hint}{known}")


def run_config(path: Path, variable: str) -> dict[str, Any]:
    """The variables of a config file.

    Args:
      path: the file.
      variable: the one that is wanted, for messages.

    Raises:
      InputError: the file cannot be run.
    """
    try:
        return runpy.run_path(str(path))
    except InputError:
        raise
    except Exception as error:  # whatever the file's own code raises
        if isinstance(error, SyntaxError) and path.suffix != ".py":
            raise InputError(
                f"{path} is not a Python file; give one that defines `{variable}`, or a config of the package "
                f"({', '.join(shipped_configs(variable))}): text goes to --data.train"
            ) from None
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        guess = guess_field(str(error))
        raise InputError(
            f"config file {path}{where}: {type(error).__name__}: {reason(error)}{guess and f': {guess}'}"
        ) from error


def guess_field(message: str) -> str:
    """The field that an unknown argument of one of our settings may mean, as a question; Python 3.13 asks itself."""
    found = re.fullmatch(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    kind = getattr(settings, found[1], None) if found else None
    return did_you_mean(found[2], (f.name for f in fields(kind))).strip() if found and is_dataclass(kind) else ""


def shipped_configs(variable: str) -> dict[str, Path]:
    """The package's files that define the variable: studies begin with study_, ablations have a folder of their own."""
    folder = Path(str(resources.files("simcse_jax.configs")))
    if variable == "ablation":
        folder /= "ablations"
    files = [p for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    return {p.stem: p for p in files if p.stem.startswith("study_") == (variable == "study")}


def summary(path: Path) -> str:
    """The first paragraph of a config file's docstring."""
    about = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(about.partition("\n\n")[0].split())
