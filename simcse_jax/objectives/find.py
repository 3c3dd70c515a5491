"""Objectives by name. There is no list of them: a name is a function in the module of that name."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from simcse_jax.errors import InputError
from simcse_jax.objectives.contrast import Settings

Loss = Callable[..., Any]
"""`z1, z2, z3, **settings -> loss, metrics`; see `info_nce`."""

_SETTINGS = tuple(Settings.__annotations__)
_VECTORS = ("z1", "z2", "z3", "clean")


def find_loss(name: str) -> Loss:
    """The objective of a name.

    Args:
      name: that of a function in the module of the same name here, e.g. "info_nce", or "module:function" of your own.

    Raises:
      InputError: no such module or function.
    """
    module, _, function = name.partition(":")
    if not function:
        module, function = f"{__package__}.{name}", name
    try:
        loss = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"no objective '{name}' ({error}): name a file of simcse_jax/objectives that holds a function of the same "
            "name, e.g. info_nce, or your own as module:function"
        ) from error
    if not callable(loss) or "z1" not in inspect.signature(loss).parameters:
        raise InputError(f"'{name}' is not an objective: its first argument must be z1")
    return loss


def wants_clean(loss: Loss) -> bool:
    """Whether an objective takes `clean`, the vectors of the first sentences without dropout."""
    return "clean" in inspect.signature(loss).parameters


def check_options(name: str, options: Mapping[str, float]) -> None:
    """Raises `InputError` for an option that an objective does not have."""
    parameters = inspect.signature(find_loss(name)).parameters.values()
    known = [p.name for p in parameters if p.kind != p.VAR_KEYWORD and p.name not in (*_VECTORS, *_SETTINGS)]
    for option in options:
        if option not in known:
            raise InputError(
                f"objective.options has '{option}'; '{name}' takes {', '.join(known) if known else 'no options'}"
            )
