"""Poolers: from token vectors to one sentence vector (SimCSE, section 6.3 and table 6)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simcse_jax.model.layout import lay_out
from simcse_jax.poolers import check_pooler, needs_first_only


def pool(
    hidden_states: tuple[Float[Array, "B L H"], ...], lengths: Int[Array, "B S"], name: str
) -> Float[Array, "B S H"]:
    """Pools hidden states hs[0..n] (hs[0] is the embedding output, hs[n] the last layer).

    - `cls`, `cls_before_pooler`: hs[n] at the first token; `SentenceEncoder` applies the tanh head that
      distinguishes the two.
    - `avg`: mean of hs[n] over the tokens of a sentence, specials included.
    - `avg_top2`: the same of (hs[n] + hs[n-1]) / 2.
    - `avg_first_last`: the same of (hs[n] + hs[1]) / 2, as the public code since January 2022.
    - `avg_static_last`: the same of (hs[n] + hs[0]) / 2, as the paper's "first-last avg." row.
    - `avg_static`: mean of hs[0]: word embeddings (with their positions, after LayerNorm), no context.

    Args:
      hidden_states: n + 1 arrays, as `Encoder` returns them.
      lengths: tokens of each sentence of a row; where 0, the vector of the sentence has no meaning.
      name: one of `POOLERS`.

    Returns:
      One vector per sentence, in the type of the hidden states (means are taken in at least float32).

    Raises:
      InputError: unknown pooler.
    """
    check_pooler(name)
    last = hidden_states[-1]
    layout = lay_out(lengths, last.shape[1])
    if needs_first_only(name):
        return jnp.take_along_axis(last, layout.start[:, :, None], axis=1, mode="clip")
    other = {"avg": last, "avg_top2": hidden_states[-2], "avg_first_last": hidden_states[1]}.get(name, hidden_states[0])
    upper = other if name == "avg_static" else last
    wide = jnp.promote_types(last.dtype, jnp.float32)
    tokens = (upper.astype(wide) + other.astype(wide)) / 2
    members = layout.members.astype(wide)
    sums = jnp.einsum("bsl,blh->bsh", members, tokens, precision="highest")
    return (sums / jnp.maximum(lengths, 1)[:, :, None]).astype(last.dtype)
