"""Plans for accelerators, by their compilers where these are installed."""

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from simcse_jax.config import ObjectiveConfig
from simcse_jax.errors import InputError
from simcse_jax.plan.plan import Plan, plan
from simcse_jax.plan.table import format_plans
from tests.plans import NO_GPU, NO_TPU, WIDTH, encoder, encoder_flops, run_of

__all__ = ["encoder"]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x4", "v4:2x2x1", "tpu7x:2x2x1"])
@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_tpu(encoder: Path, topology: str) -> None:
    p = plan(run_of(encoder, dtype="bfloat16"), topology)
    check_accelerator(p, 8 if topology in ("v6e:2x4", "tpu7x:2x2x1") else 4)


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_what_does_not_fit_is_said(encoder: Path) -> None:
    dense = ObjectiveConfig(implementation="dense")
    p = plan(replace(run_of(encoder, 2**17), objective=dense, micro_batch=1024), "v5e:1x1")
    assert p.fits is False
    assert p.memory_needed is not None
    assert p.memory_limit is not None
    # The logits are 2 × 2**34 numbers.
    assert p.memory_needed > p.memory_limit
    assert p.step_seconds is None
    assert "NO" in format_plans([p])


@pytest.mark.parametrize("topology", ["h200:8", "h100:2x4", "a100:8", "b200:2x4", "l4:8", "rtx4090:8"])
@pytest.mark.release
@pytest.mark.skipif(NO_GPU, reason="jax-cuda13-plugin, the compiler for GPUs, is not installed")
def test_gpu(encoder: Path, topology: str) -> None:
    p = plan(run_of(encoder, dtype="bfloat16"), topology)
    check_accelerator(p, 8)


def check_accelerator(p: Plan, devices: int) -> None:
    """What holds of the tiny step on any accelerator."""
    assert p.devices == devices
    assert p.fits is True
    assert p.flops["bfloat16"] == encoder_flops(3 * 32) / devices
    # The keys of InfoNCE are gathered once; a compiler may gather which of them count with them.
    gathered = [c.bytes for c in p.collectives if c.kind == "all-gather" and c.bytes > 1000]
    assert [n - n % 256 for n in gathered] == [2 * 32 * WIDTH * 4]
    # Each device's gradient is widened to float32 before it is summed over devices.
    sums = [c for c in p.collectives if c.kind in ("all-reduce", "reduce-scatter") and c.bytes > 1000]
    assert sums
    assert {kind for c in sums for kind, _ in c.arrays} == {"f32"}
    assert p.step_seconds == max(p.seconds.values()) > 0
    assert set(p.seconds) == {"compute", "memory", "communication"}


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_a_slice_that_does_not_exist(encoder: Path) -> None:
    with pytest.raises(InputError, match="no devices to compile for as v5e:3x5"):
        plan(run_of(encoder), "v5e:3x5")


@pytest.mark.parametrize(
    ("topology", "package", "extra"),
    [("v5e:2x2", "libtpu", "tpu-compiler"), ("h200:8", "jax-cuda13-plugin", "gpu-compiler")],
)
def test_missing_compiler(
    encoder: Path, topology: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf'{package}: pip install "simcse-jax\[{extra}\]"'):
        plan(run_of(encoder), topology)
