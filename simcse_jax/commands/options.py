"""The options and checks that several commands share."""

import os
import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from simcse_jax.errors import InputError

if TYPE_CHECKING:
    from simcse_jax.config import Backend
    from simcse_jax.inference.simcse import SimCSE


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command of the package. Importing its module imports no JAX; `run` imports it where needed."""

    debug: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the traceback of an error."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print results and errors alone, without progress and notes."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also print what JAX compiles and what libraries log."""
    no_verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read checkpoints, exports, indexes and caches without comparing them with the digests in their manifests."""

    keeps_programs: ClassVar[bool] = True
    """Whether the command keeps its compiled programs for the next run."""

    @abstractmethod
    def run(self) -> None:
        """Carries out the command."""


@dataclass(frozen=True, kw_only=True)
class Configured(Command):
    """A command whose first argument is a config file; its options override the settings of that file."""

    config_file: str

    @classmethod
    @abstractmethod
    def from_file(cls, file: str) -> "Configured":
        """The command with the settings of a config file."""


def senteval_folder() -> str:
    """The folder in SentEval's layout that `SIMCSE_DATA` names; empty where that is unset."""
    root = os.environ.get("SIMCSE_DATA")
    return str(Path(root) / "senteval") if root else ""


def check_searchable(sentences: Path) -> None:
    """Raises `InputError` for what is neither a text file nor a saved index, before the model is loaded."""
    from simcse_jax.data.corpus import find_text
    from simcse_jax.inference.index import is_index

    path = sentences.expanduser()
    if not path.is_dir():
        find_text(path)
    elif not is_index(path):
        raise InputError(f"{path} is neither a text file nor a saved index (a folder with index.json)")


def make_searchable(model: "SimCSE", sentences: Path, backend: "Backend" = "jax") -> None:
    """Loads the saved index that a path names, or encodes the sentences of a text file."""
    if sentences.expanduser().is_dir():
        model.load_index(sentences)
    else:
        model.build_index(sentences, backend, progress=True)


def pairs_of_values() -> ConstructorRegistry:
    """Makes tyro read a dict as `--data.where NAME VALUE NAME VALUE`, whatever the config file sets.

    By itself, tyro would turn each key of a dict that is not empty into an option, and refuse other keys.
    """
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if typing.get_origin(info.type) is not dict:
            return None
        _, kind = typing.get_args(info.type)

        def read(words: list[str]) -> dict[str, Any]:
            if len(words) % 2:
                raise ValueError("expected pairs of a name and a value")
            return {name: kind(value) for name, value in zip(words[::2], words[1::2], strict=True)}

        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[NAME VALUE [NAME VALUE ...]]",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
        )

    return registry
