"""Devices to compile for, present or not: TPU slices, GPU nodes, and this machine's CPU."""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from simcse_jax.errors import InputError, reason
from simcse_jax.xla.chips import CHIPS, Chip

# XLA's description of a GPU (GpuTargetConfigProto).
_GPU_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock} l2_cache_size: {cache}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {of_block} shared_memory_per_core: {shared}
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: {memory} memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


@dataclass(frozen=True)
class Topology:
    """A named set of devices of one kind."""

    name: str
    kind: str
    """`cpu`, or a key of `CHIPS`."""
    slices: int
    """TPU slices, or nodes of GPUs: within one, devices reach each other over the interconnect."""
    shape: tuple[int, ...]
    """Chips along each axis of a TPU slice; GPUs of a node; or CPU devices."""

    @property
    def chip(self) -> Chip | None:
        """The chip of each device; None for CPUs, whose peaks are not known."""
        return CHIPS.get(self.kind)

    @property
    def node(self) -> int:
        """Devices of one slice or node."""
        return math.prod(self.shape) * (self.chip.cores if self.chip else 1)


def parse_topology(name: str) -> Topology:
    """Reads a name such as v5e:16x16, 2xv5e:16x16 (two slices), h200:8 (one node), h200:4x8 (four of 8) or cpu:8.

    Raises:
      InputError: any other name.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    slices, kind, shape = (int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))) if match else (0, "", ())
    chip = CHIPS.get(kind)
    if chip and chip.gpu and slices == 1 and len(shape) == 2:
        slices, shape = shape[0], shape[1:]
    if chip is None:
        known = kind == "cpu" and slices == 1 and len(shape) == 1
    elif chip.gpu:
        known = len(shape) == 1 and shape[0] <= 8 and (slices == 1 or chip.network > 0)
    else:
        known = len(shape) == chip.axes
    if not known or 0 in (slices, *shape):
        tpus, gpus = (", ".join(n for n, c in CHIPS.items() if c.gpu is gpu) for gpu in (False, True))
        raise InputError(
            f"topology '{name}' is not known: give a TPU slice (v5e:16x16, v4:4x4x4; of {tpus}) or several "
            f"(2xv5e:16x16), GPUs (h200:8 for one node of at most 8, h200:4x8 for four; of {gpus}, which has one node "
            "only) or cpu:N"
        )
    return Topology(name, kind, slices, shape)


def prepare_process(wanted: list[Topology]) -> None:
    """Sets up JAX for planning: on the CPU alone, with as many CPU devices as asked for.

    Does nothing to a process in which JAX has started already.
    """
    cpus = [math.prod(topology.shape) for topology in wanted if topology.kind == "cpu"]
    with contextlib.suppress(RuntimeError):  # JAX has started
        if cpus:
            jax.config.update("jax_num_cpu_devices", max(cpus))
        # Compiling for a TPU or GPU needs no such device, and a present one is left to those who train on it.
        jax.config.update("jax_platforms", "cpu")


def devices_of(topology: Topology) -> list[jax.Device]:
    """The devices of a topology: only to compile for, except CPUs, which are real.

    Raises:
      InputError: the compiler is not installed or does not know the topology, or there are too few CPU devices.
    """
    if topology.kind == "cpu":
        return _cpu_devices(topology)
    gpu = topology.chip is not None and topology.chip.gpu
    package, extra = ("jax_cuda13_plugin", "gpu-compiler") if gpu else ("libtpu", "tpu-compiler")
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{topology.name} needs its compiler, the Python package {package.replace('_', '-')}: "
            f'pip install "simcse-jax[{extra}]"'
        )
    try:
        return _gpus(topology) if gpu else _tpus(topology)
    except Exception as error:  # the plugins raise several types, none of them documented
        raise InputError(f"no devices to compile for as {topology.name}: {reason(error)}") from error


def _cpu_devices(topology: Topology) -> list[jax.Device]:
    (wanted,) = topology.shape
    here = jax.devices("cpu")
    if wanted > len(here):
        raise InputError(
            f"{topology.name} needs {wanted} CPU devices and this process has {len(here)}: set the "
            f"environment variable JAX_NUM_CPU_DEVICES={wanted}"
        )
    return here[:wanted]


def _tpus(topology: Topology) -> list[jax.Device]:
    # Without these libtpu looks for the machine's TPUs, asks Google's metadata server, and takes a lock that allows
    # one process per machine.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v4-8"),  # any that libtpu knows; the name of the topology decides
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, topology.shape))
    assert topology.chip
    found = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{topology.kind}:{shape}",
        **({"num_slices": topology.slices} if topology.slices > 1 else {}),
        **topology.chip.compiler,
    )
    return list(found.devices)


def _gpus(topology: Topology) -> list[jax.Device]:
    # The plugin asks for CUDA's run-time libraries, which compiling does not need.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    (gpus,) = topology.shape
    assert topology.chip
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x{topology.slices}x{gpus}",
        target_config=_GPU_TARGET.format(**topology.chip.compiler),
    )
    return list(found.devices)
