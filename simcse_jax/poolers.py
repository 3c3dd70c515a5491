"""The names of the poolers, for settings: `model/pooling.py` computes them, and imports JAX."""

from typing import Literal, get_args

from simcse_jax.errors import InputError, did_you_mean

PoolerName = Literal["cls", "cls_before_pooler", "avg", "avg_top2", "avg_first_last", "avg_static_last", "avg_static"]
POOLERS: tuple[str, ...] = get_args(PoolerName)

OTHER_POOLERS = {
    **dict.fromkeys(("mean", "average", "meanpooling", "avgpooling"), "avg"),
    **dict.fromkeys(("clstoken", "first", "poolerclassifier"), "cls"),
    **{"avgfirstlastlayers": "avg_first_last", "clsbeforehead": "cls_before_pooler"},
}
"""What other programs call some of these, as `did_you_mean` compares names."""


def check_pooler(name: str) -> None:
    """Raises `InputError` unless `name` is one of `POOLERS`."""
    if name not in POOLERS:
        raise InputError(
            f"unknown pooler '{name}': {did_you_mean(name, POOLERS, OTHER_POOLERS)}choose one of {', '.join(POOLERS)}"
        )


def needs_first_only(name: str) -> bool:
    """Whether the pooler reads only the first token of each sentence from the last layer."""
    return name in ("cls", "cls_before_pooler")
