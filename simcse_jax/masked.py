"""The masked language model of a batch: every sentence masked, encoded once more, and what was hidden predicted."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from simcse_jax.chunks import map_chunks
from simcse_jax.hf import Params
from simcse_jax.model import SentenceEncoder, build_mlm_head
from simcse_jax.objectives.mlm import Vocabulary, block_size, cross_entropy, mask_tokens


class MaskedSums(NamedTuple):
    """Sums over the chosen tokens of all sentences of each example."""

    cross_entropy: Float[Array, "N"]
    correct: Float[Array, "N"]
    """Tokens that were predicted."""
    tokens: Float[Array, "N"]


class MaskedMean(NamedTuple):
    """Means over the chosen tokens of the global batch."""

    cross_entropy: Float[Array, ""]
    accuracy: Float[Array, ""]


def masked_sums(
    model: SentenceEncoder,
    params: Params,
    input_ids: Int[Array, "N V L"],
    lengths: Int[Array, "N V"],
    examples: Int[Array, "N"],
    masking: Key[Array, ""],
    dropout: Key[Array, ""],
    vocabulary: Vocabulary,
    probability: float,
    micro_batch: int = 0,
) -> MaskedSums:
    """Masks and encodes every sentence and compares what its tokens are with what the head predicts.

    Sentence v of example n draws its masks and its dropout noise from row n·V + v of the two keys.

    Args:
      model: the module.
      params: its parameters; `mlm` among them, the head's.
      input_ids: token ids, padded on the right.
      lengths: tokens of each sentence, specials included.
      examples: number of each example in the global batch.
      masking, dropout: keys.
      vocabulary: see `Vocabulary`.
      probability: of a token to be chosen.
      micro_batch: examples encoded at a time; all where 0.
    """
    v, length = input_ids.shape[1:]
    rows = examples[:, None] * v + jnp.arange(v)[None, :]
    table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    head = build_mlm_head(model.config, model.dtype, model.param_dtype)

    def logits_of(hidden: Float[Array, "b H"]) -> Float[Array, "b V"]:
        return jnp.asarray(head.apply({"params": params["mlm"]}, hidden, table))

    def sums(part: tuple[Array, ...]) -> MaskedSums:
        ids, lengths, rows = (x.reshape(-1, *x.shape[2:]) for x in part)
        inside = jnp.arange(length)[None, :] < lengths[:, None]
        masked, chosen = mask_tokens(masking, rows, ids, inside, vocabulary, probability)
        encoder = {"params": {"encoder": params["encoder"]}}
        noise = {"dropout": dropout}
        states: Any = model.apply(encoder, masked, inside, rows, rngs=noise, method=SentenceEncoder.hidden_states)
        hidden = states[-1]
        loss, correct = cross_entropy(
            logits_of,
            hidden.reshape(-1, hidden.shape[-1]),
            ids.reshape(-1),
            chosen.reshape(-1),
            block_size(ids.size, probability),
        )
        figures = (loss, correct.astype(loss.dtype), chosen.astype(loss.dtype))
        return MaskedSums(*(jnp.sum(x.reshape(-1, v * length), axis=1) for x in figures))

    result: MaskedSums = map_chunks(sums, (input_ids, lengths, rows), micro_batch)
    return result


def masked_mean(sums: MaskedSums, valid: Bool[Array, "N"]) -> MaskedMean:
    """Means over all chosen tokens of the examples that count; 0 where no token was chosen."""
    loss, correct, tokens = (jnp.sum(jnp.where(valid, x, 0)) for x in sums)
    count = jnp.maximum(tokens, 1)
    return MaskedMean(loss / count, correct / count)
