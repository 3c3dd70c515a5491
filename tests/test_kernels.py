"""What compiled programs launch, move and multiply, against text written by hand and counts done by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from simcse_jax.xla.flops import matrix_flops
from simcse_jax.xla.hlo import parse
from simcse_jax.xla.work import Work, work

COMPUTATIONS = """
%elementwise (p0: f32[4,768]) -> f32[4,768] {
  %p0 = f32[4,768]{1,0} parameter(0)
  ROOT %n = f32[4,768]{1,0} negate(%p0)
}

%cut (p1: f32[11,4,768], p2: s32[]) -> bf16[4,768] {
  %p1 = f32[11,4,768]{2,1,0} parameter(0)
  %p2 = s32[] parameter(1)
  %s = f32[1,4,768]{2,1,0} dynamic-slice(%p1, %p2), dynamic_slice_sizes={1,4,768}
  ROOT %c = bf16[4,768]{1,0} convert(%s)
}

%put (p3: f32[11,4,768], p4: f32[1,4,768], p5: s32[]) -> f32[11,4,768] {
  %p3 = f32[11,4,768]{2,1,0} parameter(0)
  %p4 = f32[1,4,768]{2,1,0} parameter(1)
  %p5 = s32[] parameter(2)
  ROOT %u = f32[11,4,768]{2,1,0} dynamic-update-slice(%p3, %p4, %p5)
}

%body (q: f32[4,768]) -> f32[4,768] {
  %q = f32[4,768]{1,0} parameter(0)
  ROOT %f = f32[4,768]{1,0} fusion(%q), kind=kLoop, calls=%elementwise
}

%small (r: f32[4,768]) -> f32[4,768] {
  %r = f32[4,768]{1,0} parameter(0)
  ROOT %t = (f32[4,768]{1,0}) tuple(%r)
}

ENTRY %main (p: f32[4,768], stack: f32[11,4,768], w: f32[768,32]) -> f32[4,768] {
  %p = f32[4,768]{1,0} parameter(0)
  %stack = f32[11,4,768]{2,1,0} parameter(1)
  %w = f32[768,32]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %near = f32[4,768]{1,0:T(8,128)S(1)} parameter(4)
  %rows = s32[3]{0} parameter(5)
  INSTRUCTION
}
"""
ROW = 4 * 768 * 4
"""Bytes of f32[4,768]."""


def read(instruction: str) -> Work | None:
    return work(parse("HloModule step, is_scheduled=true\n" + COMPUTATIONS.replace("INSTRUCTION", instruction)))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("%x = f32[4,768]{1,0} fusion(%p), kind=kLoop, calls=%elementwise", Work(1, 2 * ROW)),
        # Fast memory beside the main one costs nothing.
        ("%x = f32[4,768]{1,0} fusion(%near), kind=kLoop, calls=%elementwise", Work(1, ROW)),
        ("%x = bf16[4,768]{1,0} fusion(%stack, %i), kind=kLoop, calls=%cut", Work(1, ROW + 4 + ROW // 2)),
        ("%x = f32[11,4,768]{2,1,0} fusion(%stack, %p, %i), kind=kLoop, calls=%put", Work(1, 2 * ROW + 4)),
        ("%x = f32[3072]{0} bitcast(%p)", Work()),
        ("%x = s32[]{:T(128)S(6)} add(%i, %i)", Work(0, 4)),
        ("%x = f32[4,32]{1,0} dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}", None),
        ("%x = f32[4,768]{1,0} copy(%p)", Work(1, 2 * ROW)),
        (
            "%x = (f32[4,768]{1,0}, f32[4,768]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%p), backend_config={}",
            Work(0, ROW),
        ),
        (
            "%x = ((f32[11,4,768]{2,1,0}), f32[1,4,768]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%stack), slice={[0:1]}",
            Work(0, ROW),
        ),
        ('%x = f32[4,768]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"', Work()),
        ("%x = f32[3,768]{1,0} gather(%p, %rows), offset_dims={1}", Work(1, 2 * 3 * 768 * 4)),
        (
            '%x = f32[4,768]{1,0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}',
            Work(5, 5 * 2 * ROW),
        ),
        ("%x = f32[4,768]{1,0} conditional(%i, %p, %p), branch_computations={%small, %body}", Work(1, 2 * ROW)),
        ("%x = f32[4,768]{1,0} call(%p), to_apply=%body", Work(1, 2 * ROW)),
    ],
)
def test_by_hand(instruction: str, expected: Work | None) -> None:
    if expected is None:
        expected = Work(1, ROW + 768 * 32 * 4 + 4 * 32 * 4, 2 * 4 * 32 * 768)
    assert read(instruction) == expected


def test_a_loop_of_unknown_length_is_not_counted() -> None:
    assert read("%x = f32[4,768]{1,0} while(%p), condition=%unknown, body=%body") is None


@pytest.mark.parametrize(
    ("instruction", "products"),
    [
        (
            '%x = (f32[4,32]{1,0}, s8[999]{0}) custom-call(%p, %w), custom_call_target="__cublas$lt$matmul", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            4 * 32 * 768,
        ),
        ("%x = f32[4,32]{1,0} convolution(%p, %w), dim_labels=bf_io->bf", 4 * 32 * 768),
        # A batch of 4 as a window that slides over rows far apart: one of its places each time lies on a row.
        (
            "%x = f32[4,1,1]{2,1,0} convolution(%stack, %stack), "
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=f0b_i0o->0bf",
            4 * 11,
        ),
    ],
)
def test_products_of_libraries_and_of_tpus(instruction: str, products: int) -> None:
    found = read(instruction)
    assert found is not None
    assert found.flops == 2 * products


def test_a_real_program() -> None:
    """A scan whose products and stacked results are counted as often as they are made."""

    def function(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ x), c), x, None, length=7)

    traced = jax.jit(function).trace(jax.ShapeDtypeStruct((64, 64), jnp.float32))
    found = work(parse(traced.lower().compile().as_text()))
    assert found is not None
    assert found.flops == matrix_flops(traced.jaxpr)["float32"] == 7 * 2 * 64**3
    # Each turn reads two matrices and writes the product, reads it again for the sine, and stacks one; besides, what
    # XLA copies.
    assert 7 * 5 * 64**2 * 4 < found.bytes < 7 * 12 * 64**2 * 4
    assert 14 <= found.kernels <= 40
