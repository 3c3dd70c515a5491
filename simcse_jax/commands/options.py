"""What several commands take."""

import os
import typing
from pathlib import Path
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def senteval_folder() -> str:
    """The folder in SentEval's layout that `SIMCSE_DATA` names; empty where that is unset."""
    root = os.environ.get("SIMCSE_DATA")
    return str(Path(root) / "senteval") if root else ""


def pairs_of_values() -> ConstructorRegistry:
    """How tyro reads an option that is a dict: `--data.where NAME VALUE NAME VALUE`, whatever the config file sets.

    By itself it would, of a dict that is not empty, make an option of each key and refuse others.
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
