"""The names of the poolers, for settings: `model/pooling.py` computes them, and imports JAX."""

from typing import Literal, get_args

from simcse_jax.errors import InputError

PoolerName = Literal["cls", "cls_before_pooler", "avg", "avg_top2", "avg_first_last", "avg_static_last", "avg_static"]
POOLERS: tuple[str, ...] = get_args(PoolerName)


def check_pooler(name: str) -> None:
    """Raises `InputError` unless `name` is one of `POOLERS`."""
    if name not in POOLERS:
        raise InputError(f"unknown pooler '{name}'; choose one of {', '.join(POOLERS)}")


def needs_first_only(name: str) -> bool:
    """Whether the pooler reads only the first token of each sentence from the last layer."""
    return name in ("cls", "cls_before_pooler")
