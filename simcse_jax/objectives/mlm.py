"""Masked language modelling (Devlin et al., arXiv 1810.04805, section 3.1), the auxiliary of SimCSE (section 5 and
appendix): tokens are hidden, and the mean cross-entropy of the original tokens is minimised.

Of the tokens of a sentence that are not special, each is chosen with probability p (0.15). Of the chosen, 80 % become
[MASK], 10 % a random token of the vocabulary, and 10 % stay as they are.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from simcse_jax.noise import below, random_bits, words_of

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become [MASK] and a random token; the others stay."""

BLOCK = 1024
"""Most tokens whose logits over the vocabulary are in memory at a time."""


class Vocabulary(NamedTuple):
    """The properties of a tokenizer that masking needs."""

    mask: int
    """Id of [MASK]."""
    special: tuple[int, ...]
    """Ids of tokens that are never chosen."""
    size: int
    """Upper bound of the ids of random tokens, exclusive."""


def mask_tokens(
    key: Key[Array, ""],
    sentences: Int[Array, "B _"],
    positions: Int[Array, "#B L"],
    input_ids: Int[Array, "B L"],
    inside: Bool[Array, "B L"],
    vocabulary: Vocabulary,
    probability: float,
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Hides tokens.

    The draw for a token depends on `key`, the number of its sentence and its place there, so the choice of hidden
    tokens does not depend on how the batch is padded, packed, or cut into devices or chunks.

    Args:
      key: the key of the stream.
      sentences: number of the sentence in the global batch that each token belongs to; one column where a row is one
        sentence.
      positions: place of each token in its sentence.
      input_ids: token ids.
      inside: True at tokens, False at padding.
      vocabulary: see `Vocabulary`.
      probability: p.

    Returns:
      The ids with the hidden tokens replaced, and which tokens were chosen, those that stay included.
    """
    chance, fate, token = (
        random_bits(words_of(k, sentences), positions.astype(jnp.uint32)) for k in jax.random.split(key, 3)
    )
    special = jnp.isin(input_ids, jnp.asarray(vocabulary.special, input_ids.dtype))
    chosen = (chance < below(probability)) & inside & ~special
    # Tokens past 2³² mod V are likelier by V / 2³², for the largest vocabularies 6e-5.
    other = (token % np.uint32(vocabulary.size)).astype(input_ids.dtype)
    replaced = jnp.where(fate < below(MASKED + RANDOM), other, input_ids)
    hidden = jnp.where(fate < below(MASKED), jnp.asarray(vocabulary.mask, input_ids.dtype), replaced)
    return jnp.where(chosen, hidden, input_ids), chosen


def block_size(tokens: int, probability: float) -> int:
    """Tokens per block: enough that the chosen ones of `tokens` fit one block with near certainty, at most `BLOCK`."""
    expected = probability * tokens
    return max(1, min(tokens, BLOCK, math.ceil(expected + 4 * math.sqrt(expected))))


def cross_entropy(
    logits_of: Callable[[Float[Array, "b H"]], Float[Array, "b V"]],
    hidden: Float[Array, "T H"],
    targets: Int[Array, " T"],
    chosen: Bool[Array, " T"],
    block: int,
) -> tuple[Float[Array, " T"], Bool[Array, " T"]]:
    """−log softmax(logits)[target] of every chosen token, in float32 at least.

    The chosen tokens move to the front and are processed in blocks; a block without any is skipped. So the logits of T
    tokens are never in memory at once, the products with the vocabulary are about those of the chosen tokens, and every
    chosen token counts, however many there are.

    Args:
      logits_of: the prediction head.
      hidden: last hidden states.
      targets: ids of the original tokens.
      chosen: tokens that count.
      block: tokens per block.

    Returns:
      The cross-entropy of each token, and whether its target has the largest logit; 0 and False where not chosen.
    """
    count = chosen.shape[0]
    blocks = -(-count // block)
    order = jnp.argsort(~chosen, stable=True)
    padded = jnp.pad(order, (0, blocks * block - count))
    wanted = jnp.arange(blocks * block) < jnp.sum(chosen)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def compute(hidden: Array, targets: Array, wanted: Array) -> tuple[Array, Array]:
        logits = logits_of(hidden).astype(wide)
        target = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        loss = jax.nn.logsumexp(logits, axis=1) - target
        return jnp.where(wanted, loss, 0), wanted & (jnp.argmax(logits, axis=1) == targets)

    def skip(hidden: Array, targets: Array, wanted: Array) -> tuple[Array, Array]:
        return jnp.zeros(block, wide), jnp.zeros(block, bool)

    def one(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        found: tuple[Array, Array] = jax.lax.cond(jnp.any(part[2]), compute, skip, *part)
        return found

    parts = jax.tree.map(lambda x: x.reshape(blocks, block, *x.shape[1:]), (hidden[padded], targets[padded], wanted))
    loss, correct = jax.tree.map(lambda x: x.reshape(-1)[:count], jax.lax.map(jax.checkpoint(one), parts))
    back = jnp.argsort(order)
    return loss[back], correct[back]
