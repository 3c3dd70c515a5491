"""The profile of a few steps of a run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax

from simcse_jax.errors import InputError, is_out_of_memory, reason
from simcse_jax.storage.places import Place, reached

FOLDER = "profile"
"""Folder of the traces in a run folder."""
MEMORY = "memory.prof"
"""File of process 0 for the device memory at the moment when a step did not fit, for pprof; memory-1.prof of process 1,
and so on."""


class Trace:
    """A trace of the steps that `Config.profile` names, written by JAX's profiler for xprof and TensorBoard.

    Process 0 writes it, of its own devices. What the profiler cannot do does not end the run.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, echo: Callable[[str], None]) -> None:
        """Args:
        steps: the first step to trace and the last; None traces none.
        folder: the run folder.
        echo: prints a line.
        """
        self._steps = steps if jax.process_index() == 0 else None
        self._folder, self._echo, self._running = folder / FOLDER, echo, False

    def step(self, step: int, state: Any) -> AbstractContextManager[Any]:
        """A block that is the work of a step; begins the trace with the first one that is asked for.

        Args:
          step: its number.
          state: what the devices compute before it.
        """
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(state)
            self._running = self._told(lambda: jax.profiler.start_trace(str(self._folder)))
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
            if self._told(jax.profiler.stop_trace):
                self._echo(f"profile   {self._folder}: read it with xprof --logdir {self._folder}")

    def _told(self, act: Callable[[], None]) -> bool:
        """Whether the profiler did as it was told; if not, says why, and no other step is traced."""
        try:
            act()
        except (OSError, RuntimeError) as error:
            self._steps = None
            self._echo(f"profile   there is no trace: {reason(error)}")
            return False
        return True


def save_memory(folder: Path, store: Place | None, error: Exception) -> str | None:
    """Writes the devices' memory profile if an error was for want of memory.

    Args:
      folder: the folder that this process works on the run in.
      store: the run's place on a store, to which `folder` is copied of process 0 alone.
      error: what ended the run.

    Returns:
      A sentence that says where it is, "" where it cannot be written; None for another error.
    """
    if not is_out_of_memory(error):
        return None
    process = jax.process_index()
    name = MEMORY.replace(".", f"-{process}.") if process else MEMORY
    file = folder / FOLDER / name
    try:
        file.parent.mkdir(exist_ok=True)
        jax.profiler.save_device_memory_profile(str(file))
    except (OSError, RuntimeError):  # what led here matters more
        return ""
    place: Place = file
    if store and process:
        with suppress(InputError, OSError), reached(store):
            (store / FOLDER / name).write_bytes(file.read_bytes())
            place = store / FOLDER / name
    return f"; what held the memory is in {place}: pprof --text {file}"
