"""The figures of chips, against those that their makers publish."""

import pytest

from simcse_jax.xla.chips import CHIPS, MIB


@pytest.mark.parametrize(
    ("name", "teraflops", "memory", "interconnect", "network"),
    [
        ("v4", 275, 1228, 600, 50),
        ("v5e", 197, 819, 400, 25),
        ("v5p", 459, 2765, 1200, 50),
        ("v6e", 918, 1638, 800, 100),
        ("tpu7x", 2307, 7380, 1200, 100),
    ],
)
def test_tpus_by_chip(name: str, teraflops: int, memory: int, interconnect: int, network: int) -> None:
    """TFLOP/s in bfloat16, GB/s of memory, GB/s to the neighbours both ways and Gb/s of the network."""
    chip = CHIPS[name]
    found = (chip.flops["bfloat16"] / 1e12, chip.bandwidth / 1e9, 2 * chip.interconnect / 1e9, 8 * chip.network / 1e9)
    assert [chip.cores * x for x in found] == pytest.approx([teraflops, memory, interconnect, network])
    assert chip.links * chip.cores == 2 * chip.axes  # one to each side


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.gpu])
def test_gpus_multiply_what_their_units_do(name: str) -> None:
    """A multiplication and an addition per unit and cycle; tensor cores take bfloat16 at twice the rate of TF32."""
    chip = CHIPS[name]
    units = chip.compiler["cores"] * chip.compiler["units"]
    assert chip.flops["float32 highest"] == pytest.approx(2 * units * chip.compiler["clock"] * 1e9, rel=0.01)
    assert chip.flops["bfloat16"] == pytest.approx(2 * chip.flops["float32"], rel=0.01)


@pytest.mark.parametrize(
    ("name", "bits", "megahertz"),
    [("a100", 5120, 1593), ("h100", 5120, 2619), ("b200", 7680, 3996), ("l4", 192, 6251), ("rtx4090", 384, 10_501)],
)
def test_gpus_move_what_their_bus_does(name: str, bits: int, megahertz: int) -> None:
    """Twice per cycle, at the clock of the memory that CUDA reports."""
    assert CHIPS[name].bandwidth == pytest.approx(2 * bits / 8 * megahertz * 1e6, rel=0.001)
    assert CHIPS[name].compiler["bandwidth"] == CHIPS[name].bandwidth


@pytest.mark.parametrize(
    ("name", "total"),
    [("a100", 81_920), ("h100", 81_559), ("h200", 143_771), ("b200", 183_359), ("l4", 23_034), ("rtx4090", 24_564)],
)
def test_programs_get_less_memory_than_nvidia_smi_has(name: str, total: int) -> None:
    """CUDA, from which JAX takes three quarters, has 0.4 to 2.2 % less than nvidia-smi's total in MiB."""
    assert 0.975 * total < CHIPS[name].compiler["memory"] / MIB < 0.997 * total
    assert CHIPS[name].memory == CHIPS[name].compiler["memory"] * 3 // 4
