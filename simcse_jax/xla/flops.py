"""Matrix-product FLOPs of a function, counted from its jaxpr."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(jaxpr: ClosedJaxpr | Jaxpr) -> Counter[str]:
    """Multiplications and additions of all matrix products, over all devices.

    A loop counts as often as it runs, the body of a `shard_map` once per device, and recomputed products count again.
    Of the branches of a condition, the one with the most FLOPs counts. All else, softmax to optimizer, is left out.

    Returns:
      FLOPs by arithmetic: the type of the operands ("bfloat16", "float32", ...), or "float32 highest"
      for float32 products at `jax.lax.Precision.HIGHEST`.

    Raises:
      ValueError: a matrix product in a loop whose length is not known before it runs.
    """
    total: Counter[str] = Counter()
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total[_arithmetic(equation)] += 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
            continue
        inner = [matrix_flops(sub) for sub in _jaxprs(params.values())]
        if name == "cond":
            inner = [max(inner, key=Counter.total)]
        elif name == "while" and any(inner):
            raise ValueError("a matrix product in a loop of unknown length: its FLOPs cannot be counted")
        for counts in inner:
            for key, count in counts.items():
                total[key] += count * _times(name, params)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _times(name: str, params: dict[str, Any]) -> int:
    """How often an equation runs the functions that it holds."""
    if name == "scan":
        return int(params["length"])
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _arithmetic(equation: Any) -> str:
    kind = str(equation.invars[0].aval.dtype)
    precision = equation.params["precision"]
    exact = isinstance(precision, tuple) and jax.lax.Precision.HIGHEST in precision
    return f"{kind} highest" if exact and kind == "float32" else kind


def _jaxprs(values: Iterable[Any]) -> list[ClosedJaxpr | Jaxpr]:
    found: list[ClosedJaxpr | Jaxpr] = []
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _jaxprs(value)
    return found
