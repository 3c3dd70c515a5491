"""What plans send: rings of tiles inside a slice, over slices and over nodes, on devices that are here or not."""

from dataclasses import replace
from pathlib import Path

import pytest

from simcse_jax.config import MeshConfig, NegativesConfig, ObjectiveConfig, QueueConfig
from simcse_jax.errors import InputError
from simcse_jax.plan.plan import Plan, plan
from tests.plans import NO_GPU, NO_TPU, WIDTH, encoder, run_of

__all__ = ["encoder"]


def ring(encoder: Path, topology: str, dcn: int = 1) -> Plan:
    """A step of 1,024 triplets in tiles, encoded eight at a time."""
    objective = ObjectiveConfig(implementation="tiled", block_size=16)
    run = replace(run_of(encoder, 1024), objective=objective, micro_batch=8, mesh=MeshConfig(dcn=dcn))
    return plan(run, topology)


def check_ring(p: Plan) -> None:
    """The keys go round, W − 1 times forward and backward, there their gradients W + 1 times; nothing gathers them."""
    assert p.tiled
    share = 2 * 1024 * WIDTH * 4 // p.devices
    passed = [c for c in p.collectives if c.kind == "collective-permute"]
    # Besides, which rows count. A compiler may make one instruction of two.
    assert sum(c.bytes * (c.count or 0) for c in passed) == pytest.approx((3 * p.devices - 1) * share, rel=0.02)
    assert not [c for c in p.collectives if c.kind in ("all-gather", "all-to-all") and c.bytes >= share]
    # Once a step, however many chunks.
    assert all(c.count == 1 for c in p.collectives if c.kind in ("all-reduce", "reduce-scatter"))


def check_rings(p: Plan) -> None:
    """Keys and their gradients cross to other slices once per slice that is not their own, and nothing else does."""
    assert p.tiled
    share, node = 2 * 1024 * WIDTH * 4 / p.devices, p.devices // p.dcn
    crossing = [c for c in p.collectives if c.kind == "collective-permute" and c.by_network(node)[1]]
    sent = sum(c.by_network(node)[1] * (c.count or 0) for c in crossing)
    # Where there are two slices, a compiler sends the keys once for the forward pass and the backward pass.
    assert 2 * (p.dcn - 1) * share <= sent <= 3.06 * (p.dcn - 1) * share
    assert all(c.by_network(node)[0] == 0 for c in crossing)
    assert not [c for c in p.collectives if c.kind in ("all-gather", "all-to-all") and c.by_network(node)[1] >= share]


def masked_ring(encoder: Path, topology: str) -> Plan:
    """The same with all masks, every direction, and a queue of two batches."""
    directions = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")
    negatives = NegativesConfig(duplicates=True, margin=0.1, guide=str(encoder), directions=directions)
    objective = ObjectiveConfig(
        implementation="tiled", block_size=16, negatives=negatives, queue=QueueConfig(size=2048)
    )
    return plan(replace(run_of(encoder, 1024), objective=objective, micro_batch=8), topology)


def check_masked_ring(p: Plan) -> None:
    """No vectors, ids or marks are gathered: no more than a number per row."""
    assert p.tiled
    assert [c for c in p.collectives if c.kind == "collective-permute"]
    assert not [c for c in p.collectives if c.kind in ("all-gather", "all-to-all") and c.bytes > 4 * 1024]


def test_ring_on_cpus(encoder: Path) -> None:
    check_ring(ring(encoder, "cpu:8"))


def test_rings_over_slices_on_cpus(encoder: Path) -> None:
    p = ring(encoder, "cpu:8", dcn=4)
    assert (p.dcn, p.data, p.fsdp) == (4, 2, 1)
    check_rings(p)


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
@pytest.mark.parametrize("topology", ["2xv5e:4x4", "4xv5p:2x2x1"])
def test_rings_over_slices_on_tpu(encoder: Path, topology: str) -> None:
    p = ring(encoder, topology, dcn=int(topology[0]))
    check_rings(p)
    between = [c for c in p.collectives if c.by_network(p.devices // p.slices)[1]]
    assert all(c.overlapped for c in between if c.kind == "collective-permute")
    # Gradients are summed inside a slice first: each device sends its share of the sums, with padding, to other slices.
    assert p.memory
    weights = p.memory.arguments / 3  # and two moments of each
    sums = sum(c.bytes for c in between if c.kind == "all-reduce")
    assert sums < weights / 2
    flat = ring(encoder, topology)
    assert flat.networks["DCN"].bytes > 2 * p.networks["DCN"].bytes


@pytest.mark.release
@pytest.mark.skipif(NO_GPU, reason="jax-cuda13-plugin, the compiler for GPUs, is not installed")
def test_rings_over_nodes_of_gpus(encoder: Path) -> None:
    p = ring(encoder, "h200:2x4", dcn=2)
    check_rings(p)
    assert list(p.networks) == ["NVLink", "InfiniBand"]


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
@pytest.mark.parametrize(
    ("topology", "mesh", "message"),
    [
        ("2xv5e:2x2", MeshConfig(dcn=4), r"mesh.dcn is 4 but the 8 devices lie in 2 slice\(s\) of 4"),
        ("v5e:2x2", MeshConfig(dcn=2), r"mesh.dcn is 2 but the 4 devices lie in 1 slice\(s\) of 4"),
        ("2xv5e:2x2", MeshConfig(fsdp=8), "mesh.fsdp is 8 but a slice has 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_slices(encoder: Path, topology: str, mesh: MeshConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(replace(run_of(encoder), mesh=mesh), topology)


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_an_axis_of_the_torus_may_be_split(encoder: Path) -> None:
    p = plan(replace(run_of(encoder), mesh=MeshConfig(fsdp=2)), "v6e:4x4")
    assert (p.data, p.fsdp) == (8, 2)


def test_a_ring_with_masks_and_a_queue_on_cpus(encoder: Path) -> None:
    check_masked_ring(masked_ring(encoder, "cpu:8"))


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_a_ring_with_masks_and_a_queue_on_tpu(encoder: Path) -> None:
    check_masked_ring(masked_ring(encoder, "v5e:4x4"))


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_ring_on_tpu(encoder: Path) -> None:
    p = ring(encoder, "v5e:4x4")
    check_ring(p)
    check_overlap(p)


@pytest.mark.release
@pytest.mark.skipif(NO_GPU, reason="jax-cuda13-plugin, the compiler for GPUs, is not installed")
def test_ring_on_gpus(encoder: Path) -> None:
    p = ring(encoder, "h200:8")
    check_ring(p)
    check_overlap(p)


def check_overlap(p: Plan) -> None:
    """The permutes inside the loops run while blocks are multiplied."""
    turns = [c for c in p.collectives if c.kind == "collective-permute" and (c.count or 0) > 1]
    assert turns
    assert all(c.overlapped for c in turns)
