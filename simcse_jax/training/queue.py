"""The queue: sentences of earlier batches as negatives, and the copy of the encoder for them (`QueueConfig`)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt32

from simcse_jax.config import QueueConfig
from simcse_jax.data.batch import Batch
from simcse_jax.model import SentenceEncoder
from simcse_jax.model.params import Params
from simcse_jax.objectives import Earlier, unit
from simcse_jax.runtime.mesh import BATCH, batch_sharding, replicated
from simcse_jax.training.micro_batch import map_chunks


class Queue(NamedTuple):
    """Sentences of the latest batches, the oldest batch first, and what encodes them."""

    encoder: Params
    """The copy, `encoder` and `head`; of two encoders, of the second."""
    vectors: Float[Array, "K N H"]
    """Of length 1, and as long as the batch; 0 where there has been no batch yet."""
    valid: Bool[Array, "K N"]
    texts: UInt32[Array, "K N T 2"] | None = None
    guide: Float[Array, "K N G"] | None = None


def empty_queue(config: QueueConfig, encoder: Params, batch: Batch) -> Queue:
    """The queue before the first step.

    Args:
      config: its settings.
      encoder: the parameters to copy.
      batch: a global batch, or its shapes.
    """
    k, n = -(-config.size // len(batch.valid)), len(batch.valid)
    bias = encoder["head"]["dense"]["bias"]
    texts, guide = batch.texts, batch.guide
    return Queue(
        jax.tree.map(jnp.copy, encoder),
        jnp.zeros((k, n, len(bias)), jnp.promote_types(bias.dtype, jnp.float32)),
        jnp.zeros((k, n), bool),
        None if texts is None else jnp.zeros((k, n, min(2, texts.shape[1]), 2), jnp.uint32),
        None if guide is None else jnp.zeros((k, n, guide.shape[2]), guide.dtype),
    )


def queue_sharding(mesh: Mesh, queue: Any) -> Any:
    """Shardings of a queue, where `queue` has some that hold for its copy: its rows lie as those of a batch."""
    rows = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    return queue._replace(**{name: rows for name in queue._fields[1:] if getattr(queue, name) is not None})


def earlier(config: QueueConfig, queue: Queue) -> Earlier:
    """What the contrast takes: no more than the latest `size` sentences count."""
    k, n = queue.valid.shape
    latest = jnp.arange(k * n).reshape(k, n) >= k * n - config.size
    return Earlier(queue.vectors, queue.valid & latest, queue.texts, queue.guide)


def _positive(batch: Batch) -> int:
    """The column of the positives: that of the sentences, where they are alone."""
    return min(1, batch.input_ids.shape[1] - 1)


def make_key_encoder(model: SentenceEncoder, mesh: Mesh, micro_batch: int) -> Callable[[Params, Batch], Array]:
    """A function that encodes the positives of a batch, each on the device where it lies, without noise.

    Args:
      model: the module.
      mesh: the mesh of the batch.
      micro_batch: examples that a device encodes at a time; all where 0.
    """
    whole, rows = replicated(mesh).spec, batch_sharding(mesh).spec

    @partial(jax.shard_map, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False)
    def encode(params: Params, batch: Batch) -> Float[Array, "N H"]:
        column = _positive(batch)
        ids, lengths = (jnp.asarray(x)[:, [column]] for x in (batch.input_ids, batch.lengths))
        places = None if batch.places is None else jnp.asarray(batch.places)[:, [column]]

        def apply(part: tuple[Array, ...]) -> Float[Array, "r 1 S H"]:
            tokens, sizes = (x.reshape(-1, x.shape[-1]) for x in part)
            # Numbers below 0: no noise, and the head of training.
            numbers = jnp.full(sizes.shape, -1, jnp.int32)
            vectors = model.apply({"params": params}, tokens, sizes, numbers, rngs={"dropout": jax.random.key(0)})
            return jnp.asarray(vectors).reshape(*part[1].shape, -1)

        only = batch._replace(input_ids=ids, lengths=lengths, places=places)
        vectors = map_chunks(apply, (ids, lengths), only.rows_at_a_time(micro_batch))
        return unit(only.by_example(vectors)[:, 0])

    encoder: Callable[[Params, Batch], Array] = encode
    return encoder


def advanced(config: QueueConfig, queue: Queue, keys: Float[Array, "N H"], batch: Batch, encoder: Params) -> Queue:
    """The queue after a step: the oldest batch replaced by this one, and the copy moved towards the encoder.

    Args:
      config: its settings.
      queue: before the step.
      keys: what `make_key_encoder` made of the batch.
      batch: the batch.
      encoder: the parameters after the step.
    """

    def pushed(old: Array | None, new: Array | None) -> Array | None:
        return None if old is None or new is None else jnp.concatenate([old[1:], new[None].astype(old.dtype)])

    texts, guide = batch.texts, batch.guide
    moved = jax.tree.map(lambda a, b: config.momentum * a + (1 - config.momentum) * b, queue.encoder, encoder)
    vectors, valid = pushed(queue.vectors, keys), pushed(queue.valid, jnp.asarray(batch.valid))
    assert vectors is not None
    assert valid is not None
    return Queue(
        moved,
        vectors,
        valid,
        pushed(queue.texts, None if texts is None else jnp.asarray(texts)[:, :2]),
        pushed(queue.guide, None if guide is None else jnp.asarray(guide)[:, _positive(batch)]),
    )
