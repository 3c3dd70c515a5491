"""AdamW with linear warm-up and decay, as the published runs use it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from simcse_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear from 0 to the peak over `warmup_steps`, then linear to 0 at `total_steps`."""
    warmup = min(config.warmup_steps, total_steps)
    decay = optax.linear_schedule(config.learning_rate, 0.0, max(total_steps - warmup, 1))
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), decay], [warmup])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (‖g‖ + 1e-6)): PyTorch's rule, which optax's differs from by the 1e-6."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip, then AdamW (Loshchilov & Hutter, arXiv 1711.05101); weight decay acts on matrices only."""
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )
    return optax.chain(clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
