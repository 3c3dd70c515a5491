"""The device mesh, and where each array of a run lives on it."""

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from simcse_jax.errors import InputError, is_full, reason
from simcse_jax.programs import drop_programs

BATCH = PartitionSpec(("data", "fsdp"))
"""Leading axis of every batch array: split over all devices."""

REPLICATED = PartitionSpec()


def join_processes(multi_host: bool = False) -> None:
    """Connects this process to the others of a multi-host run; does nothing on a single host.

    With JAX_COORDINATOR_ADDRESS set, JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too. Otherwise, with
    `multi_host`, JAX finds the job on its own (Cloud TPU, SLURM, Open MPI).

    Raises:
      InputError: JAX_COORDINATOR_ADDRESS without the other two, or no job was found.
    """
    if jax.distributed.is_initialized():
        return
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
                f"multi_host is set but no Cloud TPU, SLURM or MPI job was found ({error}): start one process a host "
                "inside such a job, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from error


def check_shared(folder: Path) -> None:
    """Raises `InputError` on every process of a multi-host run unless all of them see what is written to `folder`.

    Process 0 leaves a file of a random name in the folder, or in the nearest one above it that exists, and takes it
    away again.
    """
    if jax.process_count() == 1:
        return
    name = f".shared-{int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))):08x}"
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    first, problem, advice = jax.process_index() == 0, "", "choose another"
    if first:
        try:
            (nearest / name).touch()
        except OSError as error:  # raised by all below: the others wait for this process
            problem = reason(error)
            advice = "free space or choose another" if is_full(error) else advice
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


def make_mesh(data: int = -1, fsdp: int = 1, devices: Iterable[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data` and `fsdp`.

    Args:
      data: devices along `data`; -1 takes all that remain.
      fsdp: devices along `fsdp`.
      devices: the devices to use, all of the job where not given.

    Raises:
      InputError: the axes do not multiply to the number of devices, or the platform that JAX_PLATFORMS asks for is
        not to be had.
    """
    try:
        chosen = list(jax.devices() if devices is None else devices)
    except RuntimeError as error:
        raise InputError(
            f"JAX finds no device ({reason(error)}): install the extra of this package for the hardware, cuda or tpu, "
            "or unset JAX_PLATFORMS"
        ) from error
    if fsdp < 1 or len(chosen) % fsdp or (data != -1 and data * fsdp != len(chosen)):
        raise InputError(
            f"mesh data {data} × fsdp {fsdp} does not fit {len(chosen)} devices: "
            "the two must multiply to that number (data -1 takes what remains)"
        )
    shape = (len(chosen) // fsdp, fsdp)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=chosen)


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Shardings of parameters and optimizer state, leaf by leaf.

    Matrices are split over `fsdp` along the largest axis it divides; vectors and scalars, which are small, are whole
    everywhere.

    Args:
      mesh: the mesh.
      tree: arrays or `ShapeDtypeStruct`s.
    """

    def leaf(x: Any) -> NamedSharding:
        divisible = [i for i in range(x.ndim) if x.shape[i] % mesh.shape["fsdp"] == 0]
        if x.ndim < 2 or not divisible:
            return NamedSharding(mesh, REPLICATED)
        axis = max(divisible, key=lambda i: x.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(leaf, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every batch array: rows split over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, REPLICATED)


def gather(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x`, split as `sharding` says, whole on every device.

    The gradient is summed over devices and split the same way again; a plain sharding constraint has itself as its
    transpose and would make the gradient whole on every device, too.
    """

    @jax.custom_vjp
    def whole(x: jax.Array) -> jax.Array:
        everywhere: jax.Array = jax.lax.with_sharding_constraint(x, replicated(sharding.mesh))
        return everywhere

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.with_sharding_constraint(gradient, sharding),)

    whole.defvjp(lambda x: (whole(x), None), backward)
    return whole(x)


def gather_rows(mesh: Mesh, x: jax.Array) -> jax.Array:
    """`gather` of an array whose rows, the last axis but one or the only one, are split over all devices."""
    return gather(x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 2), *BATCH)))


def put(tree: Any, shardings: Any) -> Any:
    """Places host arrays that every process holds whole onto the mesh."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda index: np.asarray(x)[index]), tree, shardings
    )


def check_batch_size(mesh: Mesh, n: int) -> None:
    """Raises `InputError` unless the devices of the mesh divide a global batch of `n`."""
    if n % mesh.size:
        lower = n - n % mesh.size
        choices = f"{lower} or {lower + mesh.size}" if lower else f"{mesh.size}"
        raise InputError(
            f"a global batch of {n} cannot be split over {mesh.size} devices "
            f"(data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}): use a multiple of {mesh.size}, e.g. {choices}"
        )


def put_batch(mesh: Mesh, n: int, load: Callable[[slice], Any]) -> Any:
    """Places a global batch onto the mesh; each process loads only the rows of its own devices.

    Args:
      mesh: the mesh, whose size divides `n`.
      n: rows of the global batch.
      load: returns the given rows as a tree of NumPy arrays, whose leading axis is rows, or something else of which
        every device has as many.

    Returns:
      The tree as global arrays, sharded by `batch_sharding`.
    """
    sharding = batch_sharding(mesh)
    shards = [
        jax.device_put(load(index[0]), device)
        for device, index in sharding.addressable_devices_indices_map((n,)).items()
        if index is not None
    ]

    def assemble(*parts: jax.Array) -> jax.Array:
        shape = (parts[0].shape[0] * mesh.size, *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    return jax.tree.map(assemble, *shards)
