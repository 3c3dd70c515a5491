"""The masked language model of a batch: every sentence masked, encoded once more, and what was hidden predicted."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from simcse_jax.data.batch import Batch
from simcse_jax.model import SentenceEncoder, build_mlm_head, lay_out
from simcse_jax.model.params import Params
from simcse_jax.objectives.mlm import Vocabulary, block_size, cross_entropy, mask_tokens
from simcse_jax.training.micro_batch import map_chunks


class MaskedSums(NamedTuple):
    """Sums over the chosen tokens of all sentences of each example."""

    cross_entropy: Float[Array, " N"]
    correct: Float[Array, " N"]
    """Tokens that were predicted."""
    tokens: Float[Array, " N"]


class MaskedMean(NamedTuple):
    """Means over the chosen tokens of the global batch."""

    cross_entropy: Float[Array, ""]
    accuracy: Float[Array, ""]


def masked_sums(
    model: SentenceEncoder,
    params: Params,
    batch: Batch,
    examples: Int[Array, " N"],
    masking: Key[Array, ""],
    dropout: Key[Array, ""],
    vocabulary: Vocabulary,
    probability: float,
    micro_batch: int = 0,
) -> MaskedSums:
    """Masks and encodes every sentence and compares what its tokens are with what the head predicts.

    Sentence c of example n draws its masks and its dropout noise from row n·C + c of the two keys.

    Args:
      model: the module.
      params: its parameters; `mlm` among them, the head's.
      batch: examples.
      examples: number of each example in the global batch.
      masking, dropout: keys.
      vocabulary: see `Vocabulary`.
      probability: of a token to be chosen.
      micro_batch: examples encoded at a time; all where 0.
    """
    table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    head = build_mlm_head(model.config, model.dtype, model.param_dtype)

    def logits_of(hidden: Float[Array, "b H"]) -> Float[Array, "b V"]:
        return jnp.asarray(head.apply({"params": params["mlm"]}, hidden, table))

    def sums(part: tuple[Array, ...]) -> MaskedSums:
        ids, lengths, numbers = (x.reshape(-1, x.shape[-1]) for x in part)
        layout = lay_out(lengths, ids.shape[1], numbers)
        assert layout.owners is not None
        inside = layout.sentence < lengths.shape[1]
        masked, chosen = mask_tokens(masking, layout.owners, layout.position, ids, inside, vocabulary, probability)
        encoder = {"params": {"encoder": params["encoder"]}}
        noise = {"dropout": dropout}
        states: Any = model.apply(encoder, masked, lengths, numbers, rngs=noise, method=SentenceEncoder.hidden_states)
        hidden = states[-1]
        loss, correct = cross_entropy(
            logits_of,
            hidden.reshape(-1, hidden.shape[-1]),
            ids.reshape(-1),
            chosen.reshape(-1),
            block_size(ids.size, probability),
        )
        figures = (loss, correct.astype(loss.dtype), chosen.astype(loss.dtype))
        members = layout.members.astype(loss.dtype)
        return MaskedSums(
            *(
                jnp.einsum("bsl,bl->bs", members, x.reshape(ids.shape), precision="highest").reshape(part[1].shape)
                for x in figures
            )
        )

    parts = (jnp.asarray(batch.input_ids), jnp.asarray(batch.lengths), batch.numbers(examples))
    found: MaskedSums = map_chunks(sums, parts, batch.rows_at_a_time(micro_batch))
    return MaskedSums(*(jnp.sum(batch.by_example(x), axis=1) for x in found))


def masked_mean(sums: MaskedSums, valid: Bool[Array, " N"]) -> MaskedMean:
    """Means over all chosen tokens of the examples that count; 0 where no token was chosen."""
    loss, correct, tokens = (jnp.sum(jnp.where(valid, x, 0)) for x in sums)
    count = jnp.maximum(tokens, 1)
    return MaskedMean(loss / count, correct / count)
