"""The one pure function that advances the train state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from simcse_jax.data.batch import Batch
from simcse_jax.runtime.mesh import batch_sharding, compiler_options, replicated
from simcse_jax.training.loss import Metrics, make_loss
from simcse_jax.training.queue import advanced, make_key_encoder
from simcse_jax.training.spec import StepSpec
from simcse_jax.training.state import TrainState, bounded, document_encoder, shardings_of


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
    shardings = shardings_of(spec.mesh, state)
    loss_fn = make_loss(spec, state.params)
    settings = spec.config.objective.queue
    encode_keys = make_key_encoder(spec.compiled_model, spec.mesh, spec.micro_batch)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        queue, keys = state.queue, None if state.queue is None else encode_keys(state.queue.encoder, batch)
        of_step = state.buffer, state.step, batch, queue, keys
        grads, (metrics, buffer) = jax.grad(loss_fn, has_aux=True)(state.params, *of_step)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(schedule(state.step))}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = bounded(spec.config, optax.apply_updates(state.params, updates))
        metrics["weight_norm"] = optax.tree.norm(params)
        if queue is not None and keys is not None:
            queue = advanced(settings, queue, keys, batch, document_encoder(params))
        return TrainState(state.step + 1, params, opt_state, buffer, queue), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(spec.mesh)),
        out_shardings=(shardings, replicated(spec.mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(spec.mesh, spec.config.xla_preset),
    )
