"""The one pure function that advances the train state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from simcse_jax.data.batch import Batch
from simcse_jax.runtime.mesh import batch_sharding, replicated, state_sharding
from simcse_jax.training.loss import Metrics, make_loss
from simcse_jax.training.spec import StepSpec
from simcse_jax.training.state import TrainState, bounded


def make_train_step(spec: StepSpec, state: Any) -> jax.stages.Wrapped:
    """The jitted step: `state, batch -> state, metrics`. The state given is donated.

    Args:
      spec: the step, with a number for `micro_batch`.
      state: the state, or its shapes, as `ShapeDtypeStruct`.

    Returns:
      A function whose metrics are replicated float scalars: those of `make_loss`, `grad_norm` (before clipping),
      `learning_rate` and `weight_norm` (after the step).
    """
    schedule, optimizer = spec.schedule, spec.optimizer
    shardings = state_sharding(spec.mesh, state)
    loss_fn = make_loss(spec, state.params)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, (metrics, buffer) = jax.grad(loss_fn, has_aux=True)(state.params, state.buffer, state.step, batch)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(schedule(state.step))}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = bounded(spec.config, optax.apply_updates(state.params, updates))
        metrics["weight_norm"] = optax.tree.norm(params)
        return TrainState(state.step + 1, params, opt_state, buffer), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(spec.mesh)),
        out_shardings=(shardings, replicated(spec.mesh)),
        donate_argnums=0,
    )
