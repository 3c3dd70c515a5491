"""The compiled step, what it takes of a device's memory, and the largest micro-batch that fits."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from simcse_jax.errors import InputError, is_out_of_memory
from simcse_jax.reports.progress import note
from simcse_jax.training.spec import StepSpec
from simcse_jax.training.step import make_train_step
from simcse_jax.xla.flops import matrix_flops


@dataclass(frozen=True)
class Memory:
    """Bytes of a compiled step on one device, as its compiler laid them out."""

    arguments: int
    """State and batch."""
    outputs: int
    aliased: int
    """Outputs that lie where arguments were: the donated state."""
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The most that is there at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class CompiledStep:
    """The step of a run, compiled for the devices of a mesh."""

    flops: Counter[str] | None
    """Of matrix products over all devices, by the arithmetic they ask for (see `matrix_flops`), those of padding and of
    what is computed twice among them; None where they cannot be counted."""
    micro_batch: int
    """Examples that each device encodes at a time."""
    executable: jax.stages.Compiled | None
    """`state, batch -> state, metrics`; None where the compiler gave up because the step does not fit."""
    memory: Memory | None
    needed: int | None
    """Bytes that a device needs; None where the compiler gave up without saying."""
    available: int | None
    """Bytes that a device has; None where that is not known."""

    @property
    def fits(self) -> bool:
        """Whether the step fits; where it is not known what a device has, whether the compiler made it."""
        return self.memory is not None and (self.available is None or self.memory.total <= self.available)

    @property
    def function(self) -> Callable[..., Any]:
        """The executable of a step that compiled."""
        assert self.executable is not None
        return self.executable


def available_memory(mesh: Mesh) -> int | None:
    """Bytes that a device of the mesh has for us, the least of all processes; None where the device does not say."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        # The devices of a process share the memory of its host.
        free = psutil.virtual_memory().available // len(mesh.local_devices)
    else:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    if jax.process_count() > 1:
        free = int(np.min(multihost_utils.process_allgather(np.asarray(free, np.float32))))
    return free or None


def fit_step(
    spec: StepSpec,
    available: int | None,
    compiler_options: dict[str, Any] | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> CompiledStep:
    """Compiles the step of a run, from shapes alone, for devices that need not be here.

    Where the micro-batch is `auto`, it is the largest that fits.

    Args:
      spec: the step.
      available: bytes of a device; None where they are not known.
      compiler_options: for XLA.
      context: entered around the compilation.

    Returns:
      The step, which need not fit: with `auto` it is then the one of micro-batch 1.
    """
    config = spec.config
    rows = config.batch_size // spec.mesh.size
    size = rows if config.micro_batch in (0, "auto") else min(int(config.micro_batch), rows)
    state, batch = spec.state_shapes(), spec.batch_shapes()
    while True:
        size = -(-rows // -(-rows // size))  # chunks are of equal size
        traced = make_train_step(spec.with_micro_batch(size), state).trace(state, batch)
        with context():
            step = _compile(traced, size, available, compiler_options)
        if config.micro_batch != "auto" or size == 1 or step.fits:
            return step
        # The state does not shrink, so at most in proportion. Powers of two divide most batches.
        share = available / step.needed if available and step.needed else 0.5
        size = 2 ** int(np.log2(max(1.0, size * min(share, 0.99))))


def _compile(
    traced: Any, micro_batch: int, available: int | None, compiler_options: dict[str, Any] | None
) -> CompiledStep:
    flops: Counter[str] | None
    try:
        flops = matrix_flops(traced.jaxpr)
    except ValueError:
        flops = None
    try:
        executable: jax.stages.Compiled = traced.lower().compile(compiler_options=compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # What the compiler says a step would have needed, e.g. "Used 20.1G of 15.75G hbm".
        match = re.search(r"(?:Used |\()([\d.]+)([KMG])\b", str(error))
        needed = int(float(match[1]) * 1024 ** (1 + "KMG".index(match[2]))) if match else None
        return CompiledStep(flops, micro_batch, None, None, needed, available)
    figures: Any = executable.memory_analysis()
    memory = Memory(
        arguments=figures.argument_size_in_bytes,
        outputs=figures.output_size_in_bytes,
        aliased=figures.alias_size_in_bytes,
        temporaries=figures.temp_size_in_bytes,
        code=figures.generated_code_size_in_bytes,
    )
    return CompiledStep(flops, micro_batch, executable, memory, memory.total, available)


def compile_step(spec: StepSpec) -> CompiledStep:
    """Compiles the step of a run for the devices that are here.

    Raises:
      InputError: the step does not fit the memory of a device.
    """
    note("compiling the train step")
    config, step = spec.config, fit_step(spec, available_memory(spec.mesh))
    if step.fits:
        return step
    advice = "set --micro-batch auto" if config.micro_batch != "auto" and step.micro_batch > 1 else "use more devices"
    needs, has = ("?" if size is None else f"{size / 1e9:.2f}" for size in (step.needed, step.available))
    raise InputError(
        f"a step of {config.batch_size:,} examples, {step.micro_batch:,} encoded at a time, takes {needs} GB of each "
        f"device and {has} GB are available: {advice}, or a smaller --batch-size"
    )
