"""The processes of a job: how they connect, check that they share a folder, and act in order."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from simcse_jax.errors import InputError, reason, room
from simcse_jax.runtime.compilation_cache import drop_programs
from simcse_jax.runtime.mesh import find_devices
from simcse_jax.storage.files import UNFINISHED


def join_processes(multi_host: bool = False) -> None:
    """Connects this process to the others of a multi-host run, and finds the devices of the job.

    With JAX_COORDINATOR_ADDRESS set, JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too. Otherwise, with
    `multi_host`, JAX finds the job on its own (Cloud TPU, SLURM, Open MPI).

    Raises:
      InputError: JAX_COORDINATOR_ADDRESS without the other two, or no job found, or no device.
    """
    if not jax.distributed.is_initialized():
        _join(multi_host)
    find_devices()  # before anything else asks JAX, which has words of its own for a platform that is not there


def _join(multi_host: bool) -> None:
    if multi_host or "JAX_COORDINATOR_ADDRESS" in os.environ:
        drop_programs()
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        missing = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name not in os.environ]
        if missing:
            raise InputError(f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} is not: set all three")
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
    elif multi_host:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise InputError(
                f"multi_host is set but no Cloud TPU, SLURM or MPI job was found ({error}): start one process per host "
                "inside such a job, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from error


def check_shared(folder: Path) -> None:
    """Raises `InputError` on every process of a multi-host run unless all of them see the files in `folder`.

    Process 0 writes a file with a random name to the folder, or to the nearest existing folder above it, and removes
    it again.
    """
    if jax.process_count() == 1:
        return
    name = f"{UNFINISHED}{int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))):08x}"
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    first, problem, advice = jax.process_index() == 0, "", "choose another"
    if first:
        try:
            (nearest / name).touch()
        except OSError as error:  # raised by all below: the others wait for this process
            problem = reason(error)
            advice = f"{room(error)} or choose another".removeprefix(" or ")
    multihost_utils.sync_global_devices("written")
    outcome = multihost_utils.process_allgather(np.array([(nearest / name).exists(), not problem]))
    seen, written = outcome[:, 0], outcome[:, 1].all()
    if first:
        (nearest / name).unlink(missing_ok=True)
    if not written:
        raise InputError(f"output {folder} cannot be written by process 0 ({problem or 'its log says why'}): {advice}")
    if not seen.all():
        raise InputError(
            f"output {folder} is not shared: {int((~seen).sum())} of {seen.size} processes do not see what process 0 "
            "writes there. Give an --output on a file system that all hosts mount at the same path"
        )


T = TypeVar("T")


def first_on_process_0(action: Callable[[], T]) -> T:
    """Runs `action` on process 0, then on the others."""
    result = action() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_on_process_0")
        result = action() if result is None else result
    assert result is not None
    return result
