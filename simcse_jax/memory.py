"""The compiled step, what it takes of a device's memory, and the largest micro-batch that fits."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from simcse_jax.config import Config
from simcse_jax.embedder import init_params
from simcse_jax.errors import InputError
from simcse_jax.model import SentenceEncoder
from simcse_jax.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.sharding import batch_sharding, state_sharding
from simcse_jax.step import Batch, make_train_step, state_of


class CompiledStep(NamedTuple):
    """The step of a run, ready to be called."""

    function: jax.stages.Compiled
    """`state, batch -> state, metrics`."""
    micro_batch: int
    """Examples that each device encodes at a time."""

    @property
    def memory(self) -> int:
        """Bytes a device holds at the peak: state, batch, and all that is in between, by the compiler's account."""
        used = self.function.memory_analysis()
        assert used is not None
        live = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
        return int(live + used.temp_size_in_bytes + used.generated_code_size_in_bytes)


def lower_step(
    config: Config, model: SentenceEncoder, mesh: Mesh, columns: int, total_steps: int
) -> jax.stages.Lowered:
    """The step of a run for the devices of a mesh, which need not exist; needs no weights and no text.

    Args:
      config: the run, with a number for `micro_batch`.
      model: the module.
      mesh: the mesh.
      columns: sentences of each example.
      total_steps: steps of the run, for the learning rate.
    """
    schedule = learning_rate_schedule(config.optimizer, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = jax.eval_shape(lambda: state_of(init_params(model, 0), optimizer))

    n = config.batch_size
    batch = jax.eval_shape(
        lambda: Batch(
            jnp.zeros((n, columns, config.data.max_length), jnp.int32),
            jnp.zeros((n, columns), jnp.int32),
            jnp.zeros(n, bool),
        )
    )

    def placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree.map(placed, state, state_sharding(mesh, state))
    batch = jax.tree.map(lambda x: placed(x, batch_sharding(mesh)), batch)
    return make_train_step(config, model, schedule, mesh, state).lower(state, batch)


def available_memory(mesh: Mesh) -> int | None:
    """Bytes that a device of the mesh has for us, the least of all processes; None where the device does not say."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        # The devices of a process share the memory of its host.
        free = psutil.virtual_memory().available // len(mesh.local_devices)
    else:
        free = (device.memory_stats() or {}).get("bytes_limit", 0)
    if jax.process_count() > 1:
        free = int(np.min(multihost_utils.process_allgather(np.asarray(free, np.float64))))
    return free or None


def compile_step(config: Config, model: SentenceEncoder, mesh: Mesh, columns: int, total_steps: int) -> CompiledStep:
    """Compiles the step of a run, choosing the micro-batch where that is left to us.

    Raises:
      InputError: the step does not fit the memory of a device.
    """
    rows = config.batch_size // mesh.size
    available = available_memory(mesh)
    size = rows if config.micro_batch in (0, "auto") else min(int(config.micro_batch), rows)
    while True:
        lowered = lower_step(replace(config, micro_batch=size), model, mesh, columns, total_steps)
        step = CompiledStep(lowered.compile(), size)
        if available is None or step.memory <= available:
            return step
        if config.micro_batch != "auto" or size == 1:
            raise InputError(_does_not_fit(config, step, available))
        # At most in proportion: the state does not shrink. Whole powers of two, which divide most batches.
        size = 2 ** int(np.log2(max(1, size * available / step.memory)))


def _does_not_fit(config: Config, step: CompiledStep, available: int) -> str:
    advice = "set --micro-batch auto" if config.micro_batch != "auto" and step.micro_batch > 1 else "use more devices"
    return (
        f"a step of {config.batch_size:,} examples, {step.micro_batch:,} encoded at a time, takes "
        f"{step.memory / 1e9:.2f} GB of each device and {available / 1e9:.2f} GB are available: {advice}, "
        "or a smaller --batch-size"
    )
