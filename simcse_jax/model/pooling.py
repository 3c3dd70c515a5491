"""From token vectors to one sentence vector (SimCSE, section 6.3 and table 6)."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from simcse_jax.errors import InputError

PoolerName = Literal["cls", "cls_before_pooler", "avg", "avg_top2", "avg_first_last", "avg_static_last", "avg_static"]
POOLERS: tuple[str, ...] = get_args(PoolerName)


def check_pooler(name: str) -> None:
    """Raises `InputError` unless `name` is one of `POOLERS`."""
    if name not in POOLERS:
        raise InputError(f"unknown pooler '{name}'; choose one of {', '.join(POOLERS)}")


def pool(hidden_states: tuple[Float[Array, "B L H"], ...], mask: Bool[Array, "B L"], name: str) -> Float[Array, "B H"]:
    """Pools hidden states hs[0..n] (hs[0] is the embedding output, hs[n] the last layer).

    - `cls`, `cls_before_pooler`: hs[n][:, 0]; the tanh head that makes the difference is applied by `SentenceEncoder`.
    - `avg`: mean of hs[n] over the tokens of a sentence, specials included.
    - `avg_top2`: the same of (hs[n] + hs[n-1]) / 2.
    - `avg_first_last`: the same of (hs[n] + hs[1]) / 2, as the public code since January 2022.
    - `avg_static_last`: the same of (hs[n] + hs[0]) / 2, as the paper's "first-last avg." row.
    - `avg_static`: mean of hs[0]: word embeddings (with their positions, after LayerNorm), no context.

    Args:
      hidden_states: n + 1 arrays, as `Encoder` returns them.
      mask: True at tokens, False at padding.
      name: one of `POOLERS`.

    Returns:
      One vector a sentence, in the type of the hidden states (means are taken in at least float32).

    Raises:
      InputError: unknown pooler.
    """
    check_pooler(name)
    last = hidden_states[-1]
    if name in ("cls", "cls_before_pooler"):
        return last[:, 0]
    other = {"avg": last, "avg_top2": hidden_states[-2], "avg_first_last": hidden_states[1]}.get(name, hidden_states[0])
    upper = other if name == "avg_static" else last
    wide = jnp.promote_types(last.dtype, jnp.float32)
    tokens = (upper.astype(wide) + other.astype(wide)) / 2
    weights = mask[:, :, None].astype(wide)
    return (jnp.sum(tokens * weights, axis=1) / jnp.sum(weights, axis=1)).astype(last.dtype)
