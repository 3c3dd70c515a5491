"""Changes of inputs that keep their form: of JSON a value or a key, of a table a cell or a line."""

import json
import random
from collections.abc import Callable
from typing import Any

from tests.fuzz.targets import PARTS

_VALUES: list[str] = [
    *("null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1e999", "NaN", "-Infinity", "1e-320"),
    *("2147483648", "9223372036854775808", "1" * 400, '""', '"\\ud800"', '"a"', '"../x"', '"/etc/hosts"', '"\\u0000"'),
    *("[]", "{}", "[[]]", "[1, 2, 3]", '{"a": 1}', "[" * 80 + "]" * 80, "[" * 2000 + "]" * 2000, '["a", "b"]'),
]
_CELLS: list[bytes] = [
    *(b"", b'"', b'""', b'"a', b"\t", b",", b";", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\r", b"\n\n"),
    *(b"nan", b"inf", b"1e999", b"-1", b"5.0", b"3,5", b"entailment", b"contradiction", b"a man runs", b"\xed\xa0\x80"),
    *(b"A" * 300, b"null", b"-", b"sentence1", b"score", b"label", b"premise", b"question", b"answer"),
]


def mutate(data: bytes, most: int, seed: int, other: Callable[[bytes, int], bytes]) -> bytes:
    """An input changed in one place, or in a few.

    Args:
      data: the input.
      most: most bytes of the result.
      seed: decides the change.
      other: changes bytes without regard to their form, and is used for a share of the changes.
    """
    chosen = random.Random(seed)
    if not data or chosen.random() < 0.4:
        return other(data, most)
    parts = data.split(PARTS)
    place = chosen.randrange(len(parts))
    for _ in range(chosen.choice((1, 1, 1, 2, 4))):
        parts[place] = _change(parts[place], chosen)
    return PARTS.join(parts)[:most]


def _change(part: bytes, chosen: random.Random) -> bytes:
    lines = part.split(b"\n")
    at = chosen.randrange(len(lines))
    for text, rebuild in (
        (part, lambda new: new),
        (lines[at], lambda new: b"\n".join([*lines[:at], new, *lines[at + 1 :]])),
    ):
        start = min((i for i in (text.find(b"{"), text.find(b"[")) if i >= 0), default=-1)
        if 0 <= start <= 1:  # a byte that chooses settings may come first
            try:
                value = json.loads(text[start:])
            except (ValueError, RecursionError):
                continue
            return rebuild(text[:start] + _change_json(value, chosen).encode("utf-8", "surrogatepass"))
    return _change_table(lines, chosen)


def _change_json(value: Any, chosen: random.Random) -> str:
    mark = f"@{chosen.random()}@"
    nodes = _nodes(value)
    if not nodes:
        return chosen.choice(_VALUES)
    holder, key = chosen.choice(nodes)
    way = chosen.random()
    replacement = chosen.choice(_VALUES)
    if way < 0.15:
        del holder[key]
    elif way < 0.25 and isinstance(holder, dict):
        holder[chosen.choice(["a", "step", "", *map(str, holder)])] = mark
    elif way < 0.35:
        other_holder, other_key = chosen.choice(nodes)
        holder[key] = json.loads(json.dumps(other_holder[other_key]))
    elif way < 0.45 and isinstance(holder[key], str):
        text = holder[key]
        holder[key] = chosen.choice([text * 20, text[: len(text) // 2], text + "\u2028", text.upper(), f"../{text}"])
    elif way < 0.6 and isinstance(holder[key], int | float):
        holder[key] = chosen.choice([-holder[key], holder[key] + 1, holder[key] * 1024, str(holder[key])])
    else:
        holder[key] = mark
    return json.dumps(value).replace(f'"{mark}"', replacement)


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and its key or index."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            found += [(inner, key) for key in inner]
            waiting += inner.values()
        elif isinstance(inner, list):
            found += [(inner, place) for place in range(len(inner))]
            waiting += inner
    return found


def _change_table(lines: list[bytes], chosen: random.Random) -> bytes:
    at = chosen.randrange(len(lines))
    delimiter = next((d for d in (b"\t", b",", b";", b"|") if d in lines[at]), b" ")
    cells = lines[at].split(delimiter)
    cell = chosen.randrange(len(cells))
    way = chosen.random()
    if way < 0.5:
        cells[cell] = chosen.choice(_CELLS)
    elif way < 0.6:
        cells.insert(cell, chosen.choice(_CELLS))
    elif way < 0.7:
        del cells[cell]
    elif way < 0.8:
        cells[cell] = b'"' + cells[cell] + b'"'
    changed = delimiter.join(cells)
    if way < 0.8:
        lines = [*lines[:at], changed, *lines[at + 1 :]]
    elif way < 0.9:
        lines = [*lines[:at], lines[at], *lines[at:]]
    else:
        lines = [*lines[:at], *lines[at + 1 :]] or [b""]
    return b"\n".join(lines)
