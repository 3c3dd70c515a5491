"""The train state and the one pure function that advances it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from simcse_jax import rng
from simcse_jax.config import Config
from simcse_jax.hf import Params
from simcse_jax.model import SentenceEncoder
from simcse_jax.objectives import Pairs, dense, info_nce, tiled
from simcse_jax.optimizer import make_optimizer
from simcse_jax.sharding import batch_sharding, gather, gather_rows, put, replicated, state_sharding

Metrics = dict[str, Float[Array, ""]]

DENSE_BYTES = 2**26
"""Most that the logits of one device may take for the dense form to be chosen."""

BLOCK_SIZES = {"cpu": 1024, "tpu": 4096, "gpu": 8192}
"""Side of a tile, by platform."""


class Batch(NamedTuple):
    """N examples of C sentences each (1: the sentence; 2: with its positive; 3: with its hard negative too)."""

    input_ids: Int[Array, "N C L"] | Int[np.ndarray, "N C L"]
    """Token ids, padded on the right."""
    lengths: Int[Array, "N C"] | Int[np.ndarray, "N C"]
    """Tokens of each sentence, specials included."""
    valid: Bool[Array, "N"] | Bool[np.ndarray, "N"]
    """False for rows that only fill up the last batch of an epoch."""


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def state_of(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, for parameters that are in place."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def create_state(
    mesh: Mesh, params: Params | Callable[[], Params], optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step, placed on the mesh.

    Args:
      mesh: the mesh.
      params: host arrays, the same on every process, or a function to be jitted that draws them.
      optimizer: the optimizer.
    """
    if callable(params):
        params = jax.jit(params, out_shardings=state_sharding(mesh, jax.eval_shape(params)))()
    else:
        params = put(params, state_sharding(mesh, params))
    shardings = state_sharding(mesh, jax.eval_shape(lambda p: state_of(p, optimizer), params))
    # Donated, so that the parameters are not there twice.
    return jax.jit(lambda p: state_of(p, optimizer), out_shardings=shardings, donate_argnums=0)(params)


def encode_views(
    model: SentenceEncoder,
    params: Params,
    batch: Batch,
    key: Array,
    examples: Int[Array, "N"] | None = None,
    micro_batch: int = 0,
) -> Float[Array, "N V H"]:
    """Training vectors of every view of every example, V = max(C, 2).

    An example of one sentence is encoded twice, each time under its own dropout noise (SimCSE, section 3). Sentence v
    of example n draws its noise from row n·V + v of `key`.

    With a micro-batch, that many examples are encoded at a time and only their vectors are kept; the backward pass
    encodes them again, under the same noise (GradCache, arXiv 2101.06983). Vectors and gradients do not depend on it.

    Args:
      model: the module.
      params: its parameters.
      batch: examples.
      key: key of the noise.
      examples: number of each example in the global batch; 0 to N−1 where None.
      micro_batch: examples encoded at a time; all where 0.
    """
    ids, lengths = batch.input_ids, batch.lengths
    if ids.shape[1] == 1:
        ids, lengths = jnp.repeat(ids, 2, axis=1), jnp.repeat(lengths, 2, axis=1)
    n, v, length = ids.shape
    numbers = jnp.arange(n) if examples is None else examples

    def encode(part: tuple[Array, Array, Array]) -> Float[Array, "n V H"]:
        ids, lengths, numbers = part
        vectors = model.apply(
            {"params": params},
            ids.reshape(-1, length),
            (jnp.arange(length)[None, None, :] < lengths[:, :, None]).reshape(-1, length),
            (numbers[:, None] * v + jnp.arange(v)[None, :]).reshape(-1),
            rngs={"dropout": key},
        )
        return jnp.asarray(vectors).reshape(numbers.shape[0], v, -1)

    whole = (jnp.asarray(ids), jnp.asarray(lengths), numbers)
    chunks = -(-n // micro_batch) if micro_batch else 1
    if chunks == 1:
        return encode(whole)
    size = -(-n // chunks)

    def cut(x: Array) -> Array:
        # What fills the last chunk up is a repetition, whose vectors are dropped.
        return jnp.take(x, jnp.arange(chunks * size) % n, axis=0).reshape(chunks, size, *x.shape[1:])

    z = jax.lax.map(jax.checkpoint(encode), jax.tree.map(cut, whole))
    return z.reshape(chunks * size, v, -1)[:n]


def uses_tiles(config: Config, mesh: Mesh, kinds: int) -> bool:
    """Whether the step goes through its pairs in tiles.

    Args:
      config: the run.
      mesh: the mesh.
      kinds: sentences of each example that every anchor meets: 1, or 2 with hard negatives.
    """
    if config.objective.implementation != "auto":
        return config.objective.implementation == "tiled"
    itemsize = 8 if config.model.dtype == "float64" else 4
    return kinds * config.batch_size**2 * itemsize / mesh.size > DENSE_BYTES


def choose_pairs(config: Config, mesh: Mesh, kinds: int) -> Pairs:
    """How the step goes through its pairs; for the arguments see `uses_tiles`."""
    if not uses_tiles(config, mesh, kinds):
        return partial(dense, gather=partial(gather_rows, mesh))
    settings = config.objective
    return partial(
        tiled,
        block=settings.block_size or BLOCK_SIZES[mesh.devices.flat[0].platform],
        mesh=mesh,
        axes=mesh.axis_names,
        dtype=None if settings.product_dtype == "float32" else settings.product_dtype,
    )


def make_loss(
    config: Config, model: SentenceEncoder, mesh: Mesh, params: Any
) -> Callable[[Params, Batch, Array], tuple[Float[Array, ""], Metrics]]:
    """The loss of a global batch as a function `params, batch, key -> loss, metrics`, to be differentiated and jitted.

    Rows are encoded where they lie: what devices exchange there is the sum of the weights' gradients, once a step
    however many chunks there are. The objective is written over the global batch.

    Args:
      config: the run, with a number for `micro_batch`.
      model: the module.
      mesh: the mesh.
      params: the parameters, or their `ShapeDtypeStruct`s.
    """
    shardings = state_sharding(mesh, params)
    micro_batch = config.micro_batch
    assert micro_batch != "auto"
    rows, whole = batch_sharding(mesh).spec, replicated(mesh).spec

    # Unchecked, the transpose sums the weights' gradients over devices where they leave, once; checked, at each use, in
    # the loop over chunks. And jax 0.12 cannot check erf. Differentiated from outside, both are exact.
    @partial(jax.shard_map, mesh=mesh, in_specs=(whole, rows, whole), out_specs=rows, check_vma=False)
    def encode(params: Params, batch: Batch, key: Array) -> Array:
        n = batch.valid.shape[0]
        examples = jax.lax.axis_index(mesh.axis_names) * n + jnp.arange(n)
        return encode_views(model, params, batch, key, examples, micro_batch)

    def loss_fn(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        # Left to itself, XLA multiplies with split weights as they lie and moves the activations instead.
        params = jax.tree.map(gather, params, shardings)
        z = encode(params, batch, key)
        hard = z[:, 2] if z.shape[1] == 3 else None
        return info_nce(
            z[:, 0],
            z[:, 1],
            hard,
            temperature=config.objective.temperature,
            hard_negative_log_weight=config.objective.hard_negative_log_weight,
            valid=jnp.asarray(batch.valid),
            pairs=choose_pairs(config, mesh, kinds=1 if hard is None else 2),
        )

    return loss_fn


def make_train_step(
    config: Config, model: SentenceEncoder, schedule: optax.Schedule, mesh: Mesh, state: Any
) -> jax.stages.Wrapped:
    """The jitted step: `state, batch -> state, metrics`. The state given is donated.

    Args:
      config: the run, with a number for `micro_batch`.
      model: the module whose parameters the state holds.
      schedule: learning rate by step.
      mesh: the mesh.
      state: the state, or its `ShapeDtypeStruct`s.

    Returns:
      A function whose metrics are replicated float scalars: those of `info_nce`, `grad_norm` (before clipping),
      `learning_rate` and `weight_norm` (after the step).
    """
    optimizer = make_optimizer(config.optimizer, schedule)
    shardings = state_sharding(mesh, state)
    loss_fn = make_loss(config, model, mesh, state.params)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = rng.key(config.seed, "dropout", state.step)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch, key)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(schedule(state.step))}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["weight_norm"] = optax.tree.norm(params)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
