"""The one pure function that advances the train state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from simcse_jax.config import Config
from simcse_jax.data.batch import Batch
from simcse_jax.model import SentenceEncoder
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.runtime.mesh import batch_sharding, replicated, state_sharding
from simcse_jax.training.loss import Metrics, make_loss
from simcse_jax.training.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.training.state import TrainState


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
