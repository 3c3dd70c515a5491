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
from simcse_jax.objectives import info_nce
from simcse_jax.optimizer import make_optimizer
from simcse_jax.sharding import batch_sharding, gather, gather_rows, put, replicated, state_sharding

Metrics = dict[str, Float[Array, ""]]


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


def encode_views(model: SentenceEncoder, params: Params, batch: Batch, key: Array) -> Float[Array, "N V H"]:
    """Training vectors of every view of every example, V = max(C, 2).

    An example of one sentence is encoded twice, each time under its own dropout noise (SimCSE, section 3). Sentence v
    of example n draws its noise from row n·V + v of `key`.
    """
    ids, lengths = batch.input_ids, batch.lengths
    if ids.shape[1] == 1:
        ids, lengths = jnp.repeat(ids, 2, axis=1), jnp.repeat(lengths, 2, axis=1)
    n, v, length = ids.shape
    mask = jnp.arange(length)[None, None, :] < lengths[:, :, None]
    vectors = model.apply(
        {"params": params},
        ids.reshape(n * v, length),
        mask.reshape(n * v, length),
        jnp.arange(n * v),
        rngs={"dropout": key},
    )
    return jnp.asarray(vectors).reshape(n, v, -1)


def make_train_step(
    config: Config, model: SentenceEncoder, schedule: optax.Schedule, mesh: Mesh, state: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: `state, batch -> state, metrics`. The state given is donated.

    The loss is written over the global batch; the one thing said about devices is that the keys of InfoNCE are whole on
    each of them, from which XLA makes one all-gather.

    Args:
      config: the run.
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

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
            # Left to itself, XLA multiplies with split weights as they lie and moves the activations instead.
            params = jax.tree.map(gather, params, shardings.params)
            z = encode_views(model, params, batch, rng.key(config.seed, "dropout", state.step))
            anchors = jax.lax.with_sharding_constraint(z[:, 0], batch_sharding(mesh))
            return info_nce(
                anchors,
                z[:, 1],
                z[:, 2] if z.shape[1] == 3 else None,
                temperature=config.objective.temperature,
                hard_negative_log_weight=config.objective.hard_negative_log_weight,
                valid=jnp.asarray(batch.valid),
                gather=partial(gather_rows, mesh),
            )

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
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
