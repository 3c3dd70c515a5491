"""The train state and the one pure function that advances it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from simcse_jax import rng
from simcse_jax.batch import Batch
from simcse_jax.config import Config
from simcse_jax.hf import Params
from simcse_jax.loss import Buffer, Metrics, make_loss
from simcse_jax.model import SentenceEncoder, init_mlm_head
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.sharding import batch_sharding, put, replicated, state_sharding


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]
    params: Params
    """Of the sentence encoder, `encoder` and `head`; besides, what only training needs: `second`, another encoder,
    and `mlm`, the head of the masked language model."""
    opt_state: optax.OptState
    buffer: Buffer = None
    """Latest positives of length 1, oldest first, where the run smooths instances."""


def sentence_encoder(params: Params) -> Params:
    """The parameters without those that only training needs."""
    return {name: params[name] for name in ("encoder", "head") if name in params}


def state_of(
    config: Config, params: Params, optimizer: optax.GradientTransformation, initializer_range: float = 0.02
) -> TrainState:
    """The state before the first step, for parameters of a sentence encoder that are in place.

    Args:
      config: the run.
      params: `encoder` and `head`; also `mlm`, where the checkpoint had the head of a masked language model.
      optimizer: the optimizer.
      initializer_range: standard deviation of fresh weights, which are those of that head.
    """
    if config.model.encoders == 2:
        params = {**params, "second": jax.tree.map(jnp.copy, sentence_encoder(params))}
    if config.objective.mlm.weight and "mlm" not in params:
        table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
        params = {**params, "mlm": init_mlm_head(rng.key(config.seed, "init_mlm"), table, initializer_range)}
    buffer = None
    if config.objective.smoothing.weight:
        bias = params["head"]["dense"]["bias"]
        dtype = jnp.promote_types(bias.dtype, jnp.float32)
        buffer = jnp.zeros((config.objective.smoothing.buffer_size, len(bias)), dtype)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), buffer)


def create_state(
    config: Config,
    mesh: Mesh,
    params: Params | Callable[[], Params],
    optimizer: optax.GradientTransformation,
    initializer_range: float = 0.02,
) -> TrainState:
    """The state before the first step, placed on the mesh.

    Args:
      config: the run.
      mesh: the mesh.
      params: host arrays, the same on every process, or a function to be jitted that draws them.
      optimizer, initializer_range: see `state_of`.
    """
    if callable(params):
        params = jax.jit(params, out_shardings=state_sharding(mesh, jax.eval_shape(params)))()
    else:
        params = put(params, state_sharding(mesh, params))

    def create(params: Params) -> TrainState:
        return state_of(config, params, optimizer, initializer_range)

    shardings = state_sharding(mesh, jax.eval_shape(create, params))
    # Donated, so that the parameters are not there twice.
    state: TrainState = jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
    return state


def make_train_step(
    config: Config,
    model: SentenceEncoder,
    mesh: Mesh,
    state: Any,
    total_steps: int,
    vocabulary: Vocabulary | None = None,
) -> jax.stages.Wrapped:
    """The jitted step: `state, batch -> state, metrics`. The state given is donated.

    Args:
      config: the run, with a number for `micro_batch`.
      model: the module whose parameters the state holds.
      mesh: the mesh.
      state: the state, or its shapes, as `ShapeDtypeStruct`.
      total_steps: steps of the run, for what changes over it.
      vocabulary: see `make_loss`.

    Returns:
      A function whose metrics are replicated float scalars: those of `make_loss`, `grad_norm` (before clipping),
      `learning_rate` and `weight_norm` (after the step).
    """
    schedule = learning_rate_schedule(config.optimizer, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    shardings = state_sharding(mesh, state)
    loss_fn = make_loss(config, model, mesh, state.params, total_steps, vocabulary=vocabulary)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, (metrics, buffer) = jax.grad(loss_fn, has_aux=True)(state.params, state.buffer, state.step, batch)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(schedule(state.step))}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["weight_norm"] = optax.tree.norm(params)
        return TrainState(state.step + 1, params, opt_state, buffer), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
