"""Values of dataclasses: checked against their annotations, turned into JSON and back, compared field by field."""

import dataclasses
import json
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from simcse_jax.errors import InputError, did_you_mean
from simcse_jax.poolers import OTHER_POOLERS


@dataclass(frozen=True)
class Bound:
    """What a number must be, as a part of its field's annotation: `Annotated[int, POSITIVE]`."""

    holds: Callable[[float], bool]
    words: str
    """Ends the sentence "it must be …"."""


POSITIVE = Bound(lambda x: x > 0, "greater than 0")
NOT_NEGATIVE = Bound(lambda x: x >= 0, "0 or more")
FROM_ONE = Bound(lambda x: x >= 1, "1 or more")
BELOW_ONE = Bound(lambda x: 0 <= x < 1, "at least 0 and below 1")
SHARE = Bound(lambda x: 0 < x <= 1, "above 0 and at most 1")
SIZE = Bound(lambda x: 1 <= x < 2**31, "1 or more, and below 2 to the 31st")
FINITE = Bound(lambda x: abs(x) <= sys.float_info.max, "a finite number")

OTHER_VALUES = OTHER_POOLERS | {
    **dict.fromkeys(("bf16", "fp16", "float16", "half"), "bfloat16"),
    **{"fp32": "float32", "fp64": "float64", "validation": "dev", "valid": "dev", "faiss": "faiss-flat"},
}
"""What other programs call choices of settings and options, as `did_you_mean` compares names."""


_Hints = Callable[[type], dict[str, Any]]
_hints: _Hints = cache(partial(typing.get_type_hints, include_extras=True))
_plain_hints: _Hints = cache(typing.get_type_hints)


def out_of_bounds(config: Any, prefix: str = "") -> Iterator[str]:
    """A message for each number outside the bounds in its field's annotation."""
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        name, value = prefix + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from out_of_bounds(value, f"{name}.")
        yield from _out_of_bounds(name, value, hints[f.name])


def _out_of_bounds(name: str, value: Any, hint: Any) -> Iterator[str]:
    bounds = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Bound)]
    if isinstance(value, float):
        bounds.append(FINITE)  # JSON cannot write others
    if isinstance(value, int | float) and (broken := next((x for x in bounds if not x.holds(value)), None)):
        yield f"{name} is {shown(value)}; it must be {broken.words}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


def shown(value: Any) -> str:
    """A value as Python writes it, shortened where it is long: one that was read from a file may have any size."""
    return _SHORT.repr(value)


def check_types(config: Any) -> None:
    """Raises `InputError` for values that their fields' annotations do not allow; Python itself does not check."""
    if problems := list(_of_other_types(config, "")):
        raise InputError(*problems)


def _of_other_types(config: Any, prefix: str) -> Iterator[str]:
    hints = _plain_hints(type(config))
    for f in dataclasses.fields(config):
        name, value = prefix + f.name, getattr(config, f.name)
        yield from (problems := list(_of_other_type(name, value, hints[f.name])))
        if dataclasses.is_dataclass(value) and not problems:
            yield from _of_other_types(value, f"{name}.")


def _of_other_type(name: str, value: Any, hint: Any) -> Iterator[str]:
    if not fits(value, hint):
        advice = f": give {os.fspath(value)!r}" if isinstance(value, os.PathLike) else ""
        yield f"{name} is {shown(value)}; {_guess(value, hint)}expected {_described(hint)}{advice}"


def _guess(value: Any, hint: Any) -> str:
    """Which of the choices of a setting was meant; empty where it has none, or none is close."""
    kinds = (hint, *typing.get_args(hint))
    choices = [c for kind in kinds if typing.get_origin(kind) is Literal for c in typing.get_args(kind)]
    return did_you_mean(value, map(str, choices), OTHER_VALUES) if isinstance(value, str) else ""


def _described(hint: Any) -> str:
    """A type in words."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is one that an annotation allows."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in arguments
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(v, arguments[0]) for v in value)
    if hint is Any:
        return True
    if typing.get_origin(hint) is dict:
        names, values = arguments
        return isinstance(value, dict) and all(fits(k, names) and fits(v, values) for k, v in value.items())
    if arguments:
        return any(fits(value, a) for a in arguments)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def listed(config: Any, prefix: str = "") -> list[str]:
    """A line for each field of a dataclass: its dotted name and its value."""
    lines: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        nested = dataclasses.is_dataclass(value)
        lines += listed(value, f"{prefix}{f.name}.") if nested else [f"{prefix}{f.name} = {value!r}"]
    return lines


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Inverts `to_dict`; fields that `values` lacks take their defaults.

    Raises:
      InputError: `values` has a field that `cls` does not have.
    """
    hints = _plain_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise InputError(f"{cls.__name__} has no field {sorted(unknown)}: written by another version of simcse_jax?")

    def convert(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(typing.cast(type, hint), value)
        if isinstance(value, dict):
            return {key: convert(Any, x) for key, x in value.items()}
        return tuple(convert(Any, x) for x in value) if isinstance(value, list) else value

    return cls(**{name: convert(hints[name], value) for name, value in values.items()})


def from_json(cls: type, values: dict[str, Any], where: str) -> Any:
    """A dataclass of the fields that it declares, from a JSON object of another program, whose other keys do not count.

    Args:
      cls: the dataclass, with the types and bounds of its fields as annotations.
      values: the object; null is taken for a key that is not there.
      where: the file, which begins the messages.

    Raises:
      InputError: a field without default is missing, or has a value of another type or outside its bounds.
    """
    fields, hints, plain_hints = dataclasses.fields(cls), _hints(cls), _plain_hints(cls)
    found = {f.name: values[f.name] for f in fields if values.get(f.name) is not None}
    if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in found]:
        raise InputError(f"{where} lacks {', '.join(missing)}: copy it again")
    problems: list[str] = []
    for name, value in found.items():
        plain = plain_hints[name]
        wrong = list(_of_other_type(name, value, plain)) or list(_out_of_bounds(name, value, hints[name]))
        problems += wrong
        if not wrong and isinstance(value, int) and float in (plain, *typing.get_args(plain)):
            found[name] = float(value)
    if problems:
        raise InputError(*(f"{where}: {problem}" for problem in problems))
    return cls(**found)


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two dataclasses of one type differ."""
    names: list[str] = []
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(x):
            names += differences(x, y, f"{prefix}{f.name}.")
        elif x != y:
            names.append(prefix + f.name)
    return names


def field_value(config: Any, name: str) -> Any:
    """The value of a dotted field name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with dotted fields set.

    Raises:
      InputError: a field that the dataclass does not have.
    """
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if (
            not dataclasses.is_dataclass(config)
            or isinstance(config, type)
            or head not in {f.name for f in dataclasses.fields(config)}
        ):
            raise InputError(f"{type(config).__name__} has no setting '{head}' (in '{name}')")
        value = with_settings(getattr(config, head), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: value})
    return config
