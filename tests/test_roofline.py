"""The figures of a plan, from known programs: bytes by network, the roofline, the table; the names of topologies."""

import os
from dataclasses import astuple, replace
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from simcse_jax.errors import InputError
from simcse_jax.plan.plan import Plan, Traffic, roofline, text_of, traffic
from simcse_jax.plan.table import format_plans
from simcse_jax.training.compiled_step import Memory
from simcse_jax.xla.chips import CHIPS
from simcse_jax.xla.collectives import Collective
from simcse_jax.xla.topology import parse_topology
from simcse_jax.xla.work import Work


def collective(kind: str, size: int, group: range, count: int | None = 1) -> Collective:
    pairs = tuple(zip(group, [*group[1:], group[0]], strict=True)) if kind == "collective-permute" else ()
    return Collective(kind, (("f32", (size // 4,)),), size, tuple(group), count, False, pairs)


# 20 GB, of which a v5e has 15.75 GiB.
LARGE = Memory(arguments=10 * 10**9, outputs=10 * 10**9, aliased=10 * 10**9, temporaries=10 * 10**9, code=0)
MEMORY = Memory(arguments=300, outputs=200, aliased=190, temporaries=70, code=5)


KNOWN = Plan(
    topology="v5e:4x4",
    devices=16,
    data=16,
    fsdp=1,
    batch_size=1024,
    columns=1,
    micro_batch=64,
    tiled=True,
    compile_seconds=1.0,
    memory=LARGE,
    memory_needed=LARGE.total,
    memory_limit=CHIPS["v5e"].memory,
    flops={"bfloat16": 3e12},
    work=Work(kernels=1234, bytes=56_700_000_000, flops=3 * 10**12),
    collectives=(collective("all-reduce", 4_000_000, range(16), 2), collective("all-gather", 8, range(4), None)),
    seconds={"compute": 0.5, "memory": 0.25, "communication": 0.125},
)


def test_roofline_by_hand() -> None:
    assert MEMORY.total == 385
    v5e = parse_topology("v5e:4x4")
    found = (collective("all-reduce", 1600, range(16), 3), collective("collective-permute", 1000, range(16)))
    times = roofline(v5e, MEMORY, {"bfloat16": 197e12, "float32 highest": 197e12}, traffic(v5e, found))
    assert times["compute"] == pytest.approx(1 + 6)
    assert times["memory"] == pytest.approx(500 / 819e9)
    # Sums use all four links at once, a permute one.
    assert times["communication"] == pytest.approx(3 * 2 * 15 / 16 * 1600 / 200e9 + 1000 / 50e9)


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        ("all-gather", range(8), 7 / 8 * 8000 / 450e9),
        ("all-gather", range(16), 7 / 8 * 8000 / 450e9),
        # Half of the whole enters each node, a quarter of it through each adapter.
        ("all-gather", range(4, 12), 8000 / 2 / 4 / 50e9),
        ("all-reduce", range(4, 12), 2 * 8000 / 2 / 4 / 50e9),
        ("all-gather", range(0, 16, 8), 8000 / 2 / 50e9),
        ("collective-permute", range(16), 8000 / 50e9),
        ("collective-permute", range(4), 8000 / 450e9),
    ],
)
def test_communication_between_nodes(kind: str, group: range, seconds: float) -> None:
    nodes = parse_topology("h200:2x8")
    used = traffic(nodes, (collective(kind, 8000, group),))
    assert roofline(nodes, MEMORY, {}, used)["communication"] == pytest.approx(seconds)
    assert list(used) == ["NVLink", "InfiniBand"]


def test_communication_between_slices() -> None:
    """The slower network counts, not the sum: what goes by one can go beside what goes by the other."""
    slices = parse_topology("2xv5e:4x4")
    found = (
        collective("all-reduce", 1600, range(16), 3),  # inside each slice
        collective("all-reduce", 100, range(0, 32, 16), 3),  # of a share, between the two
        replace(collective("collective-permute", 640, range(32)), pairs=tuple((i, (i + 16) % 32) for i in range(32))),
    )
    used = traffic(slices, found)
    inside, between = 3 * 2 * 15 / 16 * 1600, 3 * 100 + 640
    assert astuple(used["ICI"]) == pytest.approx((inside, inside / 200e9))
    assert astuple(used["DCN"]) == pytest.approx((between, between / 3.125e9))
    assert roofline(slices, MEMORY, {}, used)["communication"] == used["DCN"].seconds
    assert traffic(parse_topology("cpu:8"), found) == {}


def test_table_of_known_figures() -> None:
    assert KNOWN.pairs_per_second == 2048
    assert KNOWN.sent == 2 * 2 * 15 / 16 * 4_000_000 + 6
    table = format_plans([KNOWN])
    row = "v5e:4x4 16 1,024 64 tiled 20.00 16.91 NO 1,234 56.7 3,000.0 15.0 500.00 250.00 125.00 500.00 2,048"
    assert table.splitlines()[1].split() == row.split()
    assert "all-reduce         over   16:     2 × 4.000 MB on average, a device sends 15.000 MB" in table
    assert "all-gather         over    4: ? times" in table
    assert "v5e:4x4, batch 1,024, mesh data 16 × fsdp 1: collectives per step" in table


def test_table_of_several_slices() -> None:
    known = replace(
        KNOWN,
        topology="2xv5e:4x4",
        devices=32,
        dcn=2,
        slices=2,
        networks={"ICI": Traffic(7.5e6, 0.0375), "DCN": Traffic(1e6, 0.00032)},
        collectives=(collective("all-reduce", 4_000_000, range(16)), collective("all-gather", 8, range(0, 32, 16))),
    )
    lines = format_plans([known]).splitlines()
    assert "2xv5e:4x4, batch 1,024, mesh dcn 2 × data 16 × fsdp 1: collectives per step" in lines
    assert "  a device sends by ICI 7.500 MB in 37.50 ms, by DCN 1.000 MB in 0.32 ms or more" in lines
    assert [line.rsplit(" by ", 1)[1] for line in lines[-2:]] == ["ICI", "DCN"]
    written = known.to_dict()
    assert written["networks"]["DCN"] == {"bytes": 1e6, "seconds": 0.00032}
    assert written["collectives"][1]["networks"] == {"ICI": 0, "DCN": 4}


def test_a_program_that_jax_cannot_read_is_read_from_the_dump(tmp_path: Path) -> None:
    refused = jax.errors.JaxRuntimeError("INTERNAL: async-update")
    program = Mock(spec=jax.stages.Compiled, as_text=Mock(side_effect=refused))
    with pytest.raises(jax.errors.JaxRuntimeError):
        text_of(program, tmp_path)
    for time, name in ((20, "module_0001.step"), (10, "module_0000.step")):
        path = tmp_path / f"{name}.after_optimizations.txt"
        path.write_text(f"HloModule {name}")
        os.utime(path, (time, time))
    assert text_of(program, tmp_path) == "HloModule module_0001.step"


@pytest.mark.parametrize(
    "name",
    [
        "v5e",
        "v5e:16",
        "v5e:4x4x4",
        "v4:4x4",
        "h200:0",
        "h200:16",
        "h200:1x2x8",
        "tpu:8",
        "cpu:2x2",
        "2xcpu:4",
        "v5e:axb",
        "0xv5e:4x4",
        "2xv5e",
        "2xh200:2x8",
        "rtx4090:2x8",  # no published network between nodes
        "",
        "a10:8",
    ],
)
def test_unknown_topology(name: str) -> None:
    with pytest.raises(InputError, match="is not known: give a TPU slice"):
        parse_topology(name)
