"""The devices whose peaks are known: TPUs and NVIDIA GPUs, by their makers' figures."""

from dataclasses import dataclass, field
from typing import Any

TERA, GIGA, GIB, MIB = 1e12, 1e9, 2**30, 2**20


@dataclass(frozen=True)
class Chip:
    """The capacities of one device of JAX, by its maker. Rates are peaks, per second."""

    flops: dict[str, float]
    """FLOPs by the arithmetic of a matrix product, as `flops.matrix_flops` names it."""
    memory: int
    """Bytes that a program can use."""
    bandwidth: float
    """Bytes to and from that memory."""
    interconnect: float
    """Bytes that the device sends over all its links to its neighbours in the slice or node."""
    network: float
    """Bytes that the device sends to other slices or nodes; 0 where there is no such network."""
    networks: tuple[str, str]
    """Names of these two."""
    links: int = 1
    """Number of links to neighbours; one permute uses one."""
    cores: int = 1
    """Devices on one chip."""
    axes: int = 2
    """Axes of a slice of TPUs."""
    gpu: bool = False
    sparse_cores: bool = False
    """Whether a TPU has cores besides for gathers and sums."""
    compiler: dict[str, Any] = field(default_factory=dict)
    """Description of the device for the compiler."""
    options: dict[str, Any] = field(default_factory=dict)
    """XLA's options to compile for it where it is not there."""


def _tpu(bfloat16: float, network_gigabits: float, **figures: Any) -> Chip:
    # A float32 product takes one pass in bfloat16 by default, six at Precision.HIGHEST.
    flops = {"bfloat16": bfloat16, "float32": bfloat16, "float32 highest": bfloat16 / 6}
    return Chip(flops, network=network_gigabits / 8 * GIGA, networks=("ICI", "DCN"), **figures)


# What compute capability fixes: threads and bytes of shared memory of a multiprocessor, bytes that one block may have
# of them, and float32 units (CUDA C++ programming guide, "Compute capabilities").
_CAPABILITIES = {
    (8, 0): (2048, 167_936, 166_912, 64),
    (8, 9): (1536, 102_400, 101_376, 128),
    (9, 0): (2048, 233_472, 232_448, 128),
    (10, 0): (2048, 233_472, 232_448, 128),
}


def _gpu(
    name: str,
    capability: tuple[int, int],
    teraflops: tuple[float, float, float],
    memory: int,
    bandwidth: float,
    interconnect: tuple[str, float],
    network: tuple[str, float],
    cores: int,
    clock: float,
    cache: float,
) -> Chip:
    # Products without sparsity in bfloat16, TF32 (the default for float32) and float32. JAX takes three quarters of the
    # memory by default.
    threads, shared, of_block, units = _CAPABILITIES[capability]
    return Chip(
        dict(zip(("bfloat16", "float32", "float32 highest"), (x * TERA for x in teraflops), strict=True)),
        memory=memory * 3 // 4,
        bandwidth=bandwidth * GIGA,
        interconnect=interconnect[1] * GIGA,
        network=network[1] * GIGA,
        networks=(interconnect[0], network[0]),
        gpu=True,
        compiler={
            "name": name,
            "major": capability[0],
            "minor": capability[1],
            # sm_90a and sm_100a, which have more instructions than 9.0 and 10.0.
            "extension": "ACCELERATED_FEATURES" if capability[0] >= 9 else "NONE",
            "threads": threads,
            "shared": shared,
            "of_block": of_block,
            "units": units,
            "memory": memory,
            "bandwidth": int(bandwidth * GIGA),
            "cores": cores,
            "clock": clock,
            "cache": int(cache * MIB),
        },
        # Autotuning runs candidates on the device; untuned, XLA's own matrix products refuse some small shapes, cuBLAS
        # takes them all.
        options={"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    )


_NVLINK_4, _PCIE_4, _NDR = ("NVLink", 450.0), ("PCIe", 32.0), ("InfiniBand", 50.0)

# TPU: docs.cloud.google.com/tpu/docs, one page per chip (v4, v5e, v5p, v6e, tpu7x), and for memory and interconnect of
# v4 Google's announcement of v5p, which compares the two (1228 GB/s; the page has 1200). The interconnect is half of
# what counts both ways. Memory is the limit that XLA's errors name when a program does not fit. DCN: the network per
# chip, or per pod of v5e (6.4 Tb/s) over its 256 chips; of v4, for which no page has it, 50 Gb/s by
# jax-ml.github.io/scaling-book. A TPU7x is two devices, each with half of the chip.
#
# GPU: the rates are those of NVIDIA's datasheets of the A100 (SXM4, 80 GB), H200 (SXM), L4 and HGX B200 (an eighth of
# its totals), and of its whitepapers of Hopper (H100 SXM) and Ada (RTX 4090); NVLink and PCIe are half of what counts
# both ways, which an RTX 4090 does not reach: its copies go through the host. 7672 GB/s of the B200 are 7680 bits at
# 3996 MHz, 7.7 TB/s in the datasheet.
# Memory, multiprocessors, clock and cache are what CUDA reports: in XLA's own descriptions of A100, H100 and B200
# (xla/backends/gpu/target_config/specs), else in outputs that users have published, of PyTorch (H200), TensorRT
# (RTX 4090) and deviceQuery (L4). Drivers differ by some hundred MB; the totals of nvidia-smi, and the H200 of XLA's
# descriptions, which is a nominal one, are larger than what a program can have.
# Network: one adapter per GPU, of 200 Gb/s as in a DGX A100, of 400 Gb/s as in a DGX H100 and B200; of the L4, an
# eighth of the 100 Gb/s of Google's g2-standard-96.
#
# Checked on 2026-11-28 against copies of Google's pages and of XLA's descriptions, and for NVIDIA's datasheets and
# whitepapers, the networks and v4's announcement against what others quote of them. For bfloat16 on the L4 no quotation
# was found: it is about twice TF32 there, as on all others.
CHIPS = {
    "v4": _tpu(
        *(275 * TERA, 50.0),
        memory=int(30.75 * GIB),
        bandwidth=1228 * GIGA,
        interconnect=300 * GIGA,
        links=6,
        axes=3,
        sparse_cores=True,
        compiler={"chip_config_name": "megacore"},  # the two cores of a chip are one device, as on a v4 machine
    ),
    "v5e": _tpu(197 * TERA, 25.0, memory=int(15.75 * GIB), bandwidth=819 * GIGA, interconnect=200 * GIGA, links=4),
    "v5p": _tpu(
        *(459 * TERA, 50.0),
        memory=int(95.73 * GIB),
        bandwidth=2765 * GIGA,
        interconnect=600 * GIGA,
        links=6,
        axes=3,
        sparse_cores=True,
    ),
    "v6e": _tpu(
        918 * TERA,
        100.0,
        memory=int(31.24 * GIB),
        bandwidth=1638 * GIGA,
        interconnect=400 * GIGA,
        links=4,
        sparse_cores=True,
    ),
    "tpu7x": _tpu(
        *(2307 / 2 * TERA, 50.0),
        memory=int(94.74 * GIB),
        bandwidth=7380 / 2 * GIGA,
        interconnect=300 * GIGA,
        links=3,
        cores=2,
        axes=3,
        sparse_cores=True,
    ),
    "a100": _gpu(
        *("NVIDIA A100-SXM4-80GB", (8, 0), (312.0, 156.0, 19.5), 85_100_068_864, 2039.0),
        *(("NVLink", 300.0), ("InfiniBand", 25.0)),
        cores=108,
        clock=1.41,
        cache=40.0,
    ),
    "h100": _gpu(
        *("NVIDIA H100 80GB HBM3", (9, 0), (989.4, 494.7, 66.9), 84_942_979_072, 3350.0),
        *(_NVLINK_4, _NDR),
        cores=132,
        clock=1.98,
        cache=50.0,
    ),
    "h200": _gpu(
        *("NVIDIA H200", (9, 0), (989.4, 494.7, 66.9), 143_156 * MIB, 4800.0),
        *(_NVLINK_4, _NDR),
        cores=132,
        clock=1.98,
        cache=60.0,
    ),
    "b200": _gpu(
        *("NVIDIA B200", (10, 0), (2250.0, 1125.0, 75.0), 191_514_411_008, 7672.0),
        *(("NVLink", 900.0), _NDR),
        cores=148,
        clock=1.965,
        cache=126.5,
    ),
    "l4": _gpu(
        *("NVIDIA L4", (8, 9), (121.0, 60.0, 30.3), 23_612_293_120, 300.0),
        *(_PCIE_4, ("Ethernet", 12.5 / 8)),
        cores=58,
        clock=2.04,
        cache=48.0,
    ),
    "rtx4090": _gpu(
        *("NVIDIA GeForce RTX 4090", (8, 9), (165.2, 82.6, 82.6), 24_207 * MIB, 1008.0),
        *(_PCIE_4, ("", 0.0)),
        cores=128,
        clock=2.52,
        cache=72.0,
    ),
}

# What JAX calls the devices of a chip. Other cards of the names A100 and H100, such as PCIe's, are slower and not known
# here.
_KINDS = {
    **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"},
    **{"TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"},
    **{chip.compiler["name"]: name for name, chip in CHIPS.items() if chip.gpu},
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by its name in JAX; None where its peaks are not known, as for a CPU."""
    return CHIPS.get(_KINDS.get(device_kind, ""))
