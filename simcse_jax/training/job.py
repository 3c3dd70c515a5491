"""How a run starts on its devices: what has to be settled before JAX looks for them, and the other processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from simcse_jax.config import Config
from simcse_jax.config.values import SHARE
from simcse_jax.errors import InputError
from simcse_jax.runtime.compilation_cache import shared_programs
from simcse_jax.runtime.heartbeat import private
from simcse_jax.runtime.processes import joined_processes

_SHARE, _OLD_SHARE, _ALL = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """`joined_processes` with the settings of a run, and its settings for GPUs and, in the block, compiled programs.

    Raises:
      InputError: JAX has started its devices already, so that the settings for GPUs would come too late; or see
        `shared_programs` and `joined_processes`.
    """
    _set_memory(config)
    job = joined_processes(config.multi_host, config.heartbeat, config.join_timeout)
    with shared_programs(config.compilation_cache), job:
        yield


def _set_memory(config: Config) -> None:
    wanted = {}
    if config.gpu_memory is not None and SHARE.holds(config.gpu_memory):  # the config's own check comes later
        wanted[_SHARE] = str(config.gpu_memory)
    if config.gpu_preallocate is not None:
        wanted[_ALL] = str(config.gpu_preallocate).lower()
    if late := [name for name, value in wanted.items() if os.environ.get(name) != value]:
        if private("xla_bridge", "backends_are_initialized")():
            raise InputError(
                "gpu_memory and gpu_preallocate come too late: JAX has started its devices in this process. Set the "
                f"environment variable{'s' * (len(late) > 1)} "
                f"{' and '.join(f'{name}={wanted[name]}' for name in late)} before it starts, or train before anything "
                "else"
            )
        os.environ.update(wanted)
    if _SHARE in wanted:
        os.environ.pop(_OLD_SHARE, None)  # with which JAX refuses the new name, and finds no GPU
