"""Reading compiled programs, against text written by hand and counts done by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from simcse_jax.xla.collectives import collectives
from simcse_jax.xla.flops import matrix_flops
from simcse_jax.xla.hlo import parse

HEAD = "HloModule step, is_scheduled=true, num_partitions=8\n"
# As XLA prints them for CPU, GPU and TPU: tilings with brackets, tuples, three notations of groups.
ENTRY = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (p: f32[4,768]) -> f32[4,768] {
  %p = f32[4,768]{1,0:T(8,128)} parameter(0), metadata={op_name="all-reduce(not this)"}
  INSTRUCTIONS
}
"""


def read(*instructions: str) -> list[Any]:
    return collectives(parse(HEAD + ENTRY.replace("INSTRUCTIONS", "\n  ".join(instructions))))


def test_gather() -> None:
    (c,) = read("%g = f32[32,768]{1,0:T(8,128)S(1)} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}")
    assert (c.kind, c.arrays, c.bytes) == ("all-gather", (("f32", (32, 768)),), 32 * 768 * 4)
    assert (c.group, c.count, c.overlapped) == (tuple(range(8)), 1, False)
    assert c.sent == 7 / 8 * c.bytes


def test_sum_of_several_arrays() -> None:
    (c,) = read("%r = (bf16[768]{0}, /*index=1*/bf16[3,5]{1,0}) all-reduce(%p, %p), replica_groups={}, to_apply=%add")
    assert c.arrays == (("bf16", (768,)), ("bf16", (3, 5)))
    assert c.bytes == (768 + 15) * 2
    assert c.sent == 2 * 7 / 8 * c.bytes


def test_scatter_counts_the_whole() -> None:
    (c,) = read("%s = f32[4,768]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add")
    assert (c.group, c.bytes, c.sent) == ((0, 1, 2, 3), 4 * 4 * 768 * 4, 3 * 4 * 768 * 4)


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("[4,2]<=[8]", (0, 1)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", tuple(range(8))),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", (0, 1)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", (0, 1)),
        ("{}", tuple(range(8))),
    ],
)
def test_groups(groups: str, group: tuple[int, ...]) -> None:
    (c,) = read(f"%r = f32[] all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert c.group == group


@pytest.mark.parametrize(
    ("transfer", "target", "kind", "size", "group", "networks"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:7}"', "all-reduce", 4, (0, 8), (0, 4)),
        ("ALL_REDUCE", '"{1:4}x{0:7}"', "all-reduce", 4, (0, 8, 16, 24), (0, 6)),
        ("ALL_GATHER", '"{1,2}x{0:7}"', "all-gather", 4, (0, 8), (0, 2)),
        ("REDUCE_SCATTER", '"{1,2}x{0:7}"', "reduce-scatter", 8, (0, 8), (0, 4)),
        ("ALL_TO_ALL", "{{100000,100001,200000,200001}}", "all-to-all", 4, (0, 8), (0, 2)),
        ("ONE_TO_ONE", "{{100000->200000},{200003->100003}}", "collective-permute", 4, (0, 3 + 8, 8, 3), (0, 4)),
    ],
)
def test_what_slices_exchange(
    transfer: str, target: str, kind: str, size: int, group: tuple[int, ...], networks: tuple[float, float]
) -> None:
    """A TPU sends to other slices through its host; `size` and `networks` in units of 3 kB, the array on a device."""
    attributes = f'frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{transfer}"}}'
    (c,) = read(
        "%token = token[] after-all()",
        f"%send = (f32[4,768]{{1,0}}, u32[], token[]) send(%p, %token), channel_id=2, {attributes}",
        f"%recv = (f32[4,768]{{1,0}}, u32[], token[]) recv(%token), channel_id=1, {attributes}",
        "%work = f32[4,768]{1,0} tanh(%p)",
        "%done = (f32[4,768]{1,0}, token[]) recv-done(%recv), channel_id=1",
    )
    assert (c.kind, c.group, c.count, c.overlapped) == (kind, tuple(sorted(group)), 1, True)
    assert c.bytes == size * 768 * 4
    assert c.by_network(8) == tuple(n * 768 * 4 for n in networks)


def test_a_permute_may_use_both_networks() -> None:
    """The last of each four sends to the next four, the others to their neighbours."""
    pairs = ",".join(f"{{{i},{(i + 1) % 8}}}" for i in range(8))
    (c,) = read(f"%q = f32[4,768]{{1,0}} collective-permute(%p), source_target_pairs={{{pairs}}}")
    assert c.by_network(8) == (c.bytes, 0)
    assert c.by_network(4) == (c.bytes, c.bytes)
    assert c.by_network(1) == (0, c.bytes)


def test_one_device_sends_nothing() -> None:
    assert read("%r = f32[] all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add") == []


START = (
    "%c = (f32[4,768]{1,0}, f32[4,768]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), "
    "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
)
DONE = "%d = f32[4,768]{1,0} collective-permute-done(%c)"


def test_permute_beside_work() -> None:
    (c,) = read(START, "%f = f32[4,768]{1,0} fusion(%p), kind=kLoop, calls=%add", DONE)
    assert (c.kind, c.bytes, c.sent, c.overlapped) == ("collective-permute", 4 * 768 * 4, 4 * 768 * 4, True)
    assert c.group == (0, 1, 2, 3)


def test_permute_with_nothing_beside_it() -> None:
    (c,) = read(START, "%t = (f32[4,768]{1,0}) tuple(%p)", DONE, "%f = f32[] fusion(%p), kind=kLoop, calls=%add")
    assert not c.overlapped


def test_asynchronous_gather_of_two() -> None:
    (c,) = read(
        "%g = ((pred[8]{0}, f32[8,3]{1,0}), (pred[64]{0}, f32[64,3]{1,0})) all-gather-start(%p, %p), "
        "replica_groups={{0,1,2,3,4,5,6,7}}",
        "%h = (pred[64]{0}, f32[64,3]{1,0}) all-gather-done(%g)",
    )
    assert c.arrays == (("pred", (64,)), ("f32", (64, 3)))
    assert c.bytes == 64 + 64 * 3 * 4


LOOP = """
%body (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  ROOT %r = f32[2]{0} all-reduce(%q), replica_groups={{0,1}}, to_apply=%add
}

%condition (q.1: (s32[], f32[2])) -> pred[] {
  %q.1 = (s32[]{:T(128)}, f32[2]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q.1), index=0
  %bound = s32[]{:T(128)} constant(12), metadata={op_name="n"}
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%outer (q.2: f32[2]) -> f32[2] {
  %q.2 = f32[2]{0} parameter(0)
  ROOT %w = f32[2]{0} while(%q.2), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("loop", "count"),
    [
        ("condition=%condition, body=%body", 12),
        ('condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}', 5),
        ('condition=%unknown, body=%outer, backend_config={"known_trip_count":{"n":"5"}}', 60),
        ("condition=%unknown, body=%body", None),
    ],
)
def test_loops_multiply(loop: str, count: int | None) -> None:
    entry = ENTRY.replace("INSTRUCTIONS", f"%loop = f32[2]{{0}} while(%p), {loop}")
    (c,) = collectives(parse(HEAD + LOOP + entry))
    assert c.count == count


def test_both_branches_of_a_condition_and_calls() -> None:
    entry = ENTRY.replace("INSTRUCTIONS", "%c = f32[2]{0} conditional(%p, %p, %p), branch_computations={%body, %outer}")
    assert [c.count for c in collectives(parse(HEAD + LOOP + entry))] == [1, 12]


def test_sum_fused_with_a_cut_is_a_scatter() -> None:
    fused = """
%all-reduce-scatter.1 (input: f32[64,768]) -> f32[16,768] {
  %input = f32[64,768]{1,0} parameter(0)
  %r = f32[64,768]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = f32[16,768]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={16,768}
}
"""
    call = "%f = f32[16,768]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    (c,) = collectives(parse(HEAD + fused + ENTRY.replace("INSTRUCTIONS", call)))
    assert (c.kind, c.arrays, c.bytes) == ("reduce-scatter", (("f32", (16, 768)),), 64 * 768 * 4)


def ring(mesh: jax.sharding.Mesh, x: Any, y: Any) -> Any:
    n = mesh.size

    def local(x: Any, y: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            y, largest = carry
            largest = jnp.maximum(largest, (x @ y.T).max(1))
            return (jax.lax.ppermute(y, "d", [(i, (i + 1) % n) for i in range(n)]), largest), None

        return jax.lax.scan(step, (y, jnp.zeros(x.shape[0])), None, length=n)[0][1]

    return jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"), check_vma=False)(x, y)


def test_a_real_ring() -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, P("d")))
    traced = jax.jit(lambda x, y: ring(mesh, x, y)).trace(x, x)
    (c,) = collectives(parse(traced.lower().compile().as_text()))
    assert (c.kind, c.arrays, c.count) == ("collective-permute", (("f32", (8, 16)),), 8)
    assert matrix_flops(traced.jaxpr) == {"float32": 2 * 64 * 64 * 16}


def scan(x: Any) -> Any:
    return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=7)[0]


def choice(x: Any) -> Any:
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x: x @ x, 1),
        (jax.jit(lambda x: x @ x), 1),
        (scan, 7),
        (choice, 2),
        (lambda x: jax.vmap(lambda row: x @ row)(x), 1),
        (jax.grad(lambda x: (x @ x).sum()), 3),
        (jax.grad(lambda x: jnp.sin(x @ x).sum()), 3),
        # Recomputed before its gradient is taken, once more.
        (jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x) @ x))(x).sum()), 8),
        (lambda x: jnp.einsum("ij,kj->ik", x, x, precision="highest"), 0),
        (lambda x: x * x, 0),
    ],
)
def test_matrix_flops(function: Callable[[Any], Any], products: int) -> None:
    x = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    assert matrix_flops(jax.make_jaxpr(function)(x))["float32"] == products * 2 * 6**3


def test_matrix_flops_by_arithmetic() -> None:
    def products(x: Any) -> Any:
        y = jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST)
        return y, jnp.matmul(x.astype(jnp.bfloat16), x.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    flops = matrix_flops(jax.make_jaxpr(products)(jax.ShapeDtypeStruct((4, 4), jnp.float32)))
    assert flops == {"float32 highest": 128, "bfloat16": 128}


def test_a_loop_of_unknown_length_is_an_error() -> None:
    def loop(x: Any) -> Any:
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="a loop of unknown length"):
        matrix_flops(jax.make_jaxpr(loop)(jax.ShapeDtypeStruct((4, 4), jnp.float32)))
