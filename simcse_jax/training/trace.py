"""The profile of a few steps of a run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"
"""Folder of the traces in a run folder."""
MEMORY = "memory.prof"
"""File for the device memory at the moment when a step did not fit, for pprof."""


class Trace:
    """A trace of the steps that `Config.profile` names, written by JAX's profiler for xprof and TensorBoard."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, echo: Callable[[str], None]) -> None:
        """Args:
        steps: the first step to trace and the last; None traces none.
        folder: the run folder.
        echo: prints a line.
        """
        self._steps, self._folder, self._echo = steps, folder / FOLDER, echo
        self._running = False

    def step(self, step: int) -> AbstractContextManager[Any]:
        """A block that is the work of a step; begins the trace with its first one."""
        if self._steps is None:
            return nullcontext()
        if step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._running else nullcontext()

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after its last step, once the devices have done it; `state` is what the step returned."""
        if self._running and self._steps and step == self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace if it is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._echo(f"profile   {self._folder}: read it with xprof --logdir {self._folder}")


def save_memory(folder: Path, error: Exception) -> str:
    """Writes the devices' memory profile if a step ended for want of memory.

    Returns:
      A sentence that says where it is; "" for another error, or where it cannot be written.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    file = folder / FOLDER / MEMORY
    try:
        file.parent.mkdir(exist_ok=True)
        jax.profiler.save_device_memory_profile(str(file))
    except (OSError, RuntimeError):  # what led here matters more
        return ""
    return f"what held the memory is in {file}: pprof --text {file}"
