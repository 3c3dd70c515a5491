"""Objectives by name. There is no list of them: each is a function in the module of the same name."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simcse_jax.config import NegativesConfig, ObjectiveConfig
from simcse_jax.errors import InputError, did_you_mean, reason
from simcse_jax.objectives.contrast import Settings, contrast

Loss = Callable[..., Any]
"""`z1, z2, z3, **settings -> loss, metrics`; see `info_nce`."""

_SETTINGS = tuple(Settings.__annotations__)
_OTHER_NAMES = dict.fromkeys(("ntxent", "simcse", "contrastive", "mnrl", "multiplenegativesranking"), "info_nce")
_VECTORS = ("z1", "z2", "z3", "clean")


def find_loss(name: str) -> Loss:
    """The objective with this name.

    Args:
      name: of a function in this package's module of the same name, e.g. "info_nce", or your own "module:function".

    Raises:
      InputError: no such module or function.
    """
    module, _, function = name.partition(":")
    if not function:
        module, function = f"{__package__}.{name}", name
    try:
        loss: Loss = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module of the user's own raises
        files = {path.stem: path.read_text("utf-8") for path in Path(__file__).parent.glob("*.py")}
        guess = did_you_mean(name, [stem for stem, text in files.items() if f"def {stem}(" in text], _OTHER_NAMES)
        raise InputError(
            f"no objective '{name}' ({type(error).__name__}: {reason(error)}): {guess}name a file in "
            "simcse_jax/objectives that holds a function of the same name, e.g. info_nce, or give your own as "
            "module:function"
        ) from error
    parameters = inspect.signature(loss).parameters if callable(loss) else {}
    takes = any(p.kind == p.VAR_KEYWORD for p in parameters.values()) or set(_SETTINGS) <= set(parameters)
    if loss is contrast or "z1" not in parameters or not takes:
        raise InputError(
            f"'{name}' is not an objective: its first argument must be z1, and it must take **settings "
            f"({', '.join(_SETTINGS)})"
        )
    return loss


def wants_clean(loss: Loss) -> bool:
    """Whether an objective takes `clean`, the vectors of the first sentences without dropout."""
    return "clean" in inspect.signature(loss).parameters


def check_objective(objective: ObjectiveConfig, width: int | None = None) -> None:
    """Raises `InputError` for an objective that no training step can use.

    Args:
      objective: the settings.
      width: width of the vectors, where it is known.
    """
    check_options(objective.loss, objective.options)
    widths = objective.widths
    if any(w < 1 or w > (width or w) for w in widths) or len(set(widths)) < len(widths):
        limit = f" to the width of the vectors, {width}" if width else ""
        raise InputError(f"objective.widths is {list(widths)}; give each once, from 1{limit}")
    check_negatives(objective)
    if objective.loss == "own_negative" and objective.smoothing.weight:
        raise InputError("objective.loss own_negative has no in-batch negatives to smooth: set smoothing.weight to 0")
    if objective.loss == "own_negative" and (objective.queue.size or masks_of(objective.negatives)):
        raise InputError(
            "objective.loss own_negative has no negatives of other sentences: set objective.queue.size to 0, and leave "
            "out what masks negatives (objective.negatives.duplicates, margin and guide)"
        )


def masks_of(negatives: NegativesConfig) -> list[str]:
    """The settings by which negatives are masked."""
    masks = {"duplicates": negatives.duplicates, "margin": negatives.margin is not None, "guide": bool(negatives.guide)}
    return [name for name, on in masks.items() if on]


def check_negatives(objective: ObjectiveConfig) -> None:
    """Raises `InputError` for settings of the negatives that do not go together, or that the loss cannot use."""
    negatives, loss = objective.negatives, objective.loss
    directions, first = negatives.directions, "query_to_document"
    if directions[:1] != (first,) or len(set(directions)) < len(directions):
        raise InputError(
            f"objective.negatives.directions is {list(directions)}: give each once, {first} first; it has the positives"
        )
    if len(directions) > 1 and loss in ("symmetric", "off_dropout", "own_negative"):
        raise InputError(
            f"objective.negatives.directions is {list(directions)} but objective.loss '{loss}' says itself which pairs "
            "are contrasted: leave one out, or take info_nce"
        )
    if "bias" in objective.learned and "bias" not in inspect.signature(find_loss(loss)).parameters:
        raise InputError(f"objective.learned has 'bias', which objective.loss '{loss}' does not have: take sigmoid")
    least, most = objective.temperature_range if len(objective.temperature_range) == 2 else (1.0, 0.0)
    if not 0 < least < most or ("temperature" in objective.learned and not least <= objective.temperature <= most):
        raise InputError(
            f"objective.temperature_range is {list(objective.temperature_range)} and objective.temperature is "
            f"{objective.temperature}: give the least and the greatest value, above 0, and a temperature between them"
        )
    for name, what in (("hardness", "weigh"), ("debias", "debias")):
        if getattr(negatives, name) and loss in ("sigmoid", "focal", "off_dropout", "own_negative"):
            raise InputError(
                f"objective.negatives.{name} is {getattr(negatives, name)} but objective.loss '{loss}' does not "
                f"{what} its negatives: take info_nce, symmetric or decoupled, or set it to 0"
            )


def initial_bias(objective: ObjectiveConfig) -> float:
    """The bias b that a loss begins with: its option, else its default."""
    default = inspect.signature(find_loss(objective.loss)).parameters["bias"].default
    return float(objective.options.get("bias", default))


def check_options(name: str, options: Mapping[str, float]) -> None:
    """Raises `InputError` for an option that an objective does not have, or that is not finite."""
    parameters = inspect.signature(find_loss(name)).parameters.values()
    known = [p.name for p in parameters if p.kind != p.VAR_KEYWORD and p.name not in (*_VECTORS, *_SETTINGS)]
    for option in options:
        if option not in known:
            raise InputError(
                f"objective.options has '{option}'; '{name}' takes {', '.join(known) if known else 'no options'}"
            )
        if not math.isfinite(options[option]):
            raise InputError(f"objective.options {option} is {options[option]}; it must be a finite number")
