"""The names of the poolers, for settings: `model/pooling.py` computes them, and imports JAX."""

from typing import Any, Literal, get_args

from simcse_jax.errors import InputError, did_you_mean

PoolerName = Literal["cls", "cls_before_pooler", "avg", "avg_top2", "avg_first_last", "avg_static_last", "avg_static"]
POOLERS: tuple[str, ...] = get_args(PoolerName)

OTHER_POOLERS = {
    **dict.fromkeys(("mean", "average", "meanpooling", "avgpooling", "meantokens", "poolingmodemeantokens"), "avg"),
    **dict.fromkeys(("first", "poolerclassifier"), "cls"),
    **dict.fromkeys(("clsbeforehead", "clstoken", "poolingmodeclstoken"), "cls_before_pooler"),
    **dict.fromkeys(("avgfirstlastlayers", "firstlast", "firstlastavg"), "avg_first_last"),
}
"""What other programs call some of these, as `did_you_mean` compares names."""


def check_pooler(name: Any) -> None:
    """Raises `InputError` unless `name` is one of `POOLERS`."""
    if name not in POOLERS:
        guess = did_you_mean(str(name), POOLERS, OTHER_POOLERS)
        raise InputError(f"unknown pooler '{name}': {guess}choose one of {', '.join(POOLERS)}")


def needs_first_only(name: str) -> bool:
    """Whether the pooler reads only the first token of each sentence from the last layer."""
    return name in ("cls", "cls_before_pooler")
