"""The guide: a frozen model whose vectors say which negatives are false (GISTEmbed, arXiv 2402.16829)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from simcse_jax.config import Config
from simcse_jax.data.batch import Batch
from simcse_jax.data.tokens import behaviour_of
from simcse_jax.errors import InputError
from simcse_jax.inference.loading import LoadedModel, load_model
from simcse_jax.model.params import Params, digest_params
from simcse_jax.postprocess import KEY
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runtime.mesh import batch_sharding, put, replicated
from simcse_jax.training.micro_batch import map_chunks

ROWS = 64
"""Rows that a device encodes at a time where the run encodes its own at once."""


def load_guide(config: Config, tokenizer: Any) -> LoadedModel | None:
    """The guide of a run; None for a run without.

    Raises:
      InputError: it cannot be loaded, has another vocabulary than the run's model, or too few positions.
    """
    path = config.objective.negatives.guide
    if not path:
        return None
    try:
        guide = load_model(path)
    except InputError as error:
        raise InputError(f"objective.negatives.guide: {error}") from error
    if behaviour_of(load_tokenizer(guide.checkpoint.folder)) != behaviour_of(tokenizer):
        raise InputError(
            f"objective.negatives.guide {path} has another tokenizer than {config.model.path}: it must read the same "
            "token ids, so give a model with the same vocabulary"
        )
    if guide.checkpoint.config.max_length < config.data.max_length:
        raise InputError(
            f"objective.negatives.guide {path} has positions for {guide.checkpoint.config.max_length} tokens but "
            f"data.max_length is {config.data.max_length}: use at most that"
        )
    return guide


def digest_guide(guide: LoadedModel) -> str:
    """The digest of a guide's weights and pooler."""
    return digest_params(guide.params, guide.pooler)


def make_guide(guide: LoadedModel, mesh: Mesh, micro_batch: int = 0) -> Callable[[Batch], Batch]:
    """A function that adds the guide's vectors to a batch on the devices; each device encodes its own rows.

    Args:
      guide: the model.
      mesh: the mesh of the batch.
      micro_batch: examples that a device encodes at a time; 0 for as many as `ROWS` hold.
    """
    whole, rows = replicated(mesh).spec, batch_sharding(mesh).spec
    placed = replicated(mesh)
    # Mostly they lie so already, and a second copy would take as much memory again.
    params = jax.tree.map(lambda x: x if x.sharding.is_equivalent_to(placed, x.ndim) else put(x, placed), guide.params)

    def encode(params: Params, batch: Batch) -> Float[Array, "N V G"]:
        def apply(part: tuple[Array, ...]) -> Float[Array, "r V S G"]:
            ids, lengths = (x.reshape(-1, x.shape[-1]) for x in part)
            vectors = jnp.asarray(guide.model.apply({"params": params}, ids, lengths))
            vectors = vectors.reshape(-1, vectors.shape[-1]).astype(jnp.float32)
            found: Array = params[KEY](vectors) if KEY in params else vectors
            return found.reshape(*part[1].shape, -1)

        arrays = jnp.asarray(batch.input_ids), jnp.asarray(batch.lengths)
        at_once = batch.rows_at_a_time(micro_batch) if micro_batch else ROWS
        return batch.by_example(map_chunks(apply, arrays, at_once))

    vectors_of = jax.jit(
        jax.shard_map(encode, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False),
        out_shardings=batch_sharding(mesh),
    )
    return lambda batch: batch._replace(guide=vectors_of(params, batch))
