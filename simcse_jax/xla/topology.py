"""Devices to compile for, present or not: TPU slices, GPU nodes, and this machine's CPU."""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from simcse_jax.errors import InputError, reason

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Chip:
    """The capacities of one device, by its maker. Rates are peaks, per second."""

    flops: dict[str, float]
    """FLOPs by the arithmetic of a matrix product, as `flops.matrix_flops` names it."""
    memory: int
    """Bytes that a program can use."""
    bandwidth: float
    """Bytes to and from that memory."""
    interconnect: float
    """Bytes that the device sends over all its links to its neighbours."""
    links: int = 1
    """Number of these links; one permute uses one."""
    network: float = 0.0
    """Bytes that the device sends to other nodes, where there are several."""
    compiler: dict[str, Any] = field(default_factory=dict)
    """Description of the device for the compiler."""


def _tpu(bfloat16: float, **figures: Any) -> Chip:
    # A float32 product takes one pass in bfloat16 by default, six at Precision.HIGHEST.
    return Chip({"bfloat16": bfloat16, "float32": bfloat16, "float32 highest": bfloat16 / 6}, **figures)


def _hopper(memory: int, bandwidth: float, name: str) -> Chip:
    # NVIDIA's H100 and H200 datasheets, SXM: dense bfloat16, TF32 (the default for float32) and float32; NVLink
    # 900 GB/s both ways. Other nodes: one 400 Gb/s adapter per GPU, as in a DGX. JAX takes three quarters of the memory
    # by default.
    compiler = {"name": name, "device_memory_size": memory, "memory_bandwidth": int(bandwidth)}
    return Chip(
        {"bfloat16": 989.4 * TERA, "float32": 494.7 * TERA, "float32 highest": 66.9 * TERA},
        memory=memory * 3 // 4,
        bandwidth=bandwidth,
        interconnect=450 * GIGA,
        network=50 * GIGA,
        compiler=compiler,
    )


# TPU: cloud.google.com/tpu/docs, one page per chip (v4, v5e, v5p, v6e); half of the bidirectional interconnect
# bandwidth per chip. Memory is XLA's own limit for a program, of the 32, 16, 95 and 32 GB.
CHIPS = {
    "v4": _tpu(
        275 * TERA,
        memory=int(30.75 * GIB),
        bandwidth=1228 * GIGA,
        interconnect=300 * GIGA,
        links=6,
        compiler={"chip_config_name": "megacore"},  # the two cores of a chip are one device, as on a v4 machine
    ),
    "v5e": _tpu(197 * TERA, memory=int(15.75 * GIB), bandwidth=819 * GIGA, interconnect=200 * GIGA, links=4),
    "v5p": _tpu(459 * TERA, memory=int(95.73 * GIB), bandwidth=2765 * GIGA, interconnect=600 * GIGA, links=6),
    "v6e": _tpu(918 * TERA, memory=int(31.24 * GIB), bandwidth=1640 * GIGA, interconnect=400 * GIGA, links=4),
    "h100": _hopper(85_520_809_984, 3350 * GIGA, "NVIDIA H100 80GB HBM3"),
    "h200": _hopper(151_397_597_184, 4800 * GIGA, "NVIDIA H200"),
}

# What JAX calls the devices of a chip. Other cards of the name H100, such as PCIe's, are slower and not known here.
_KINDS = {
    **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"},
    **{"TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"},
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by its name in JAX; None where its peaks are not known, as for a CPU."""
    return CHIPS.get(_KINDS.get(device_kind, ""))


# XLA's description of a Hopper GPU (GpuTargetConfigProto): NVIDIA's figures of compute capability 9.0 and of the
# SXM cards.
_HOPPER_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: {device_memory_size} memory_bandwidth: {memory_bandwidth}
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
    shape: tuple[int, ...]
    """Chips along each axis of a TPU slice; nodes and GPUs per node; or CPU devices."""

    @property
    def chip(self) -> Chip | None:
        """The chip of each device; None for CPUs, whose peaks are not known."""
        return CHIPS.get(self.kind)

    @property
    def node(self) -> int:
        """Number of devices that reach each other over the interconnect: one GPU node's, or a whole TPU slice's."""
        return math.prod(self.shape[1:] if self.kind.startswith("h") else self.shape)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA's options to compile for devices that this machine lacks."""
        # Autotuning runs candidates on the device; untuned, XLA's own matrix products refuse some small shapes, cuBLAS
        # takes them all.
        return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False} if self.kind.startswith("h") else {}


def parse_topology(name: str) -> Topology:
    """Reads a name such as v5e:16x16, v4:4x4x4, h200:8 (one node), h200:4x8 (four nodes of 8) or cpu:8.

    Raises:
      InputError: any other name.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    kind, shape = (match[1], tuple(int(n) for n in match[2].split("x"))) if match else ("", ())
    axes = {"cpu": (1,), "h100": (1, 2), "h200": (1, 2), "v4": (3,), "v5p": (3,), "v5e": (2,), "v6e": (2,)}
    gpus = kind.startswith("h")
    if kind not in axes or len(shape) not in axes[kind] or 0 in shape or (gpus and shape[-1] > 8):
        raise InputError(
            f"topology '{name}' is not known: give a TPU slice (v5e:16x16, v6e:8x8, v4:4x4x4, v5p:4x4x8), GPUs (h100:8 "
            "or h200:8 for one node of at most 8, h200:4x8 for four nodes) or cpu:N"
        )
    return Topology(name, kind, (1, *shape) if gpus and len(shape) == 1 else shape)


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
    gpu = topology.kind.startswith("h")
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
        platform="tpu", topology_name=f"{topology.kind}:{shape}", **topology.chip.compiler
    )
    return list(found.devices)


def _gpus(topology: Topology) -> list[jax.Device]:
    # The plugin asks for CUDA's run-time libraries, which compiling does not need.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    nodes, gpus = topology.shape
    assert topology.chip
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x{nodes}x{gpus}",
        target_config=_HOPPER_TARGET.format(**topology.chip.compiler),
    )
    return list(found.devices)
