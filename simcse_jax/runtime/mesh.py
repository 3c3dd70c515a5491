"""The device mesh, and the place of each array of a run on it."""

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from simcse_jax.errors import InputError, reason

AXES = ("dcn", "data", "fsdp")
"""Axes of every mesh: slices (of TPUs) or nodes (of GPUs), then the devices of each."""

BATCH = PartitionSpec(AXES)
"""Leading axis of every batch array: split over all devices."""

REPLICATED = PartitionSpec()


def find_devices() -> list[jax.Device]:
    """All devices of the job.

    Raises:
      InputError: the platform that JAX_PLATFORMS asks for is not available.
    """
    try:
        return list(jax.devices())
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, where cuda is asked for and none seen
        asked = os.environ.get("JAX_PLATFORMS")
        why = reason(error) if str(error) else "no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise InputError(
            f"JAX finds no device{f' for JAX_PLATFORMS={asked}' if asked else ''} ({why}): install the extra of this "
            "package for the hardware, cuda or tpu, or set JAX_PLATFORMS=cpu"
        ) from error


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    devices: Iterable[jax.Device] | None = None,
    dcn: int = 1,
    slices: int | None = None,
) -> Mesh:
    """A mesh with the axes `AXES`, in which the devices of a slice are neighbours, also where `dcn` is 1.

    Args:
      data: devices along `data`; -1 takes all remaining devices.
      fsdp: devices along `fsdp`, of one slice where `dcn` is more than 1.
      devices: the devices to use; if None, all of the job.
      dcn: slices along `dcn`, all of them or 1.
      slices: number of slices, whose devices follow each other; if None, as the devices say. CPUs do not say: `dcn`
        then cuts them.

    Raises:
      InputError: the axes do not multiply to the number of devices or do not fit the slices; see also `find_devices`.
    """
    chosen = find_devices() if devices is None else list(devices)
    rest, left = divmod(len(chosen), max(dcn * fsdp, 1))
    if min(dcn, fsdp) < 1 or left or data not in (-1, rest):
        raise InputError(
            f"mesh {layout({'dcn': dcn, 'data': data, 'fsdp': fsdp})} does not fit {len(chosen)} devices: "
            "the axes must multiply to that number (data -1 takes all remaining devices)"
        )
    groups = _slices_of(chosen, slices or (dcn if chosen[0].platform == "cpu" else None))
    sizes = sorted({len(group) for group in groups})
    if dcn not in (1, len(groups)) or (dcn > 1 and len(sizes) > 1):
        raise InputError(
            f"mesh.dcn is {dcn} but the {len(chosen)} devices lie in {len(groups)} slice(s) of "
            f"{' or '.join(map(str, sizes))}: set it to the number of slices, which must be of one size, or to 1"
        )
    if any(size % fsdp for size in sizes):  # `dcn` is 1: each copy of the parameters spans slices, which is slow
        return Mesh(np.concatenate(groups).reshape(1, rest, fsdp), AXES, axis_types=(AxisType.Auto,) * 3)
    # Splitting a torus axis changes nothing where the mesh does not need it.
    blocks = [
        mesh_utils.create_device_mesh((len(group) // fsdp, fsdp), group, allow_split_physical_axes=True)
        for group in groups
    ]
    return Mesh(np.concatenate(blocks).reshape(dcn, rest, fsdp), AXES, axis_types=(AxisType.Auto,) * 3)


def _slices_of(devices: list[jax.Device], slices: int | None) -> list[list[jax.Device]]:
    """The devices slice by slice: in `slices` equal parts, or, where that is None, as they say themselves."""
    if slices:
        return [list(part) for part in np.array_split(np.asarray(devices), slices)]

    def index(device: jax.Device) -> int:
        return getattr(device, "slice_index", None) or 0  # of GPUs, it numbers the nodes

    return [list(group) for _, group in groupby(sorted(devices, key=index), index)]


def layout(shape: Mapping[str, int]) -> str:
    """The sizes of a mesh's axes, for people: `dcn` only where there are several slices."""
    return " × ".join(f"{axis} {size}" for axis, size in shape.items() if axis != "dcn" or size != 1)


def compiler_options(mesh: Mesh, preset: bool = False) -> dict[str, bool] | None:
    """Options for `jax.jit` of a program that goes round a ring of devices, with `PRESETS` if asked for."""
    platform = mesh.devices.flat[0].platform
    if platform == "cpu" and mesh.size > 1:
        # XLA's runtime for CPUs numbers the permutes of a ring alike, and takes one for another where two go at a time.
        return {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    return PRESETS.get(platform) if preset else None


PRESETS: dict[str, dict[str, bool]] = {
    # "GPU performance tips" of JAX, and "Tips for High-Performance LLMs with JAX and XLA" of NVIDIA's JAX-Toolbox.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_triton_gemm_any": True,
        "xla_gpu_exhaustive_tiling_search": True,
    },
    # XLA's "Flags guidance", and what MaxText, of Google, and axlearn, of Apple, train with on v5e, v5p and v6e.
    "tpu": {
        "xla_tpu_enable_latency_hiding_scheduler": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
    },
}
"""XLA's options for a faster step, by platform; docs/gpus.md has the reason for each."""


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Shardings of parameters and optimizer state, leaf by leaf.

    Matrices are split over `fsdp` along the largest axis that it divides; vectors and scalars, which are small, are
    whole on every device. Every slice has a copy of all.

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
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, REPLICATED)


def gather(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x`, which is split by `sharding`, whole on every device.

    The gradient is summed over devices and split the same way again; a plain sharding constraint is its own transpose
    and would make the gradient whole on every device, too.
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
    """`gather` of an array whose rows, its second axis, are split over all devices."""
    return gather(x, NamedSharding(mesh, PartitionSpec(None, *BATCH)))


def put(tree: Any, shardings: Any) -> Any:
    """Places host arrays that every process holds whole onto the mesh."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda index: np.asarray(x)[index]), tree, shardings
    )


def with_sharding(tree: Any, shardings: Any) -> Any:
    """Shapes and types of a tree as `ShapeDtypeStruct`s with the given shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def check_batch_size(mesh: Mesh, n: int) -> None:
    """Raises `InputError` unless the devices of the mesh divide a global batch of `n`."""
    if n % mesh.size:
        lower = n - n % mesh.size
        choices = f"{lower} or {lower + mesh.size}" if lower else f"{mesh.size}"
        raise InputError(
            f"a global batch of {n} cannot be split over {mesh.size} devices "
            f"({layout(mesh.shape)}): use a multiple of {mesh.size}, e.g. {choices}"
        )


def put_batch(mesh: Mesh, n: int, load: Callable[[slice], Any]) -> Any:
    """Places a global batch onto the mesh; each process loads only the rows of its own devices.

    Args:
      mesh: the mesh, whose size divides `n`.
      n: rows of the global batch.
      load: returns the given rows as a tree of NumPy arrays, whose leading axis is rows, or something else that every
        device has the same number of.

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
