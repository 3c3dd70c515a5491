"""The work of a compiled program: its kernels, the bytes that it moves through memory, its matrix products."""

import math
import re
from dataclasses import dataclass

import numpy as np

from simcse_jax.xla.hlo import Instruction, Program

_FREE_OPCODES = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "optimization-barrier"),
    *("partition-id", "replica-id", "while", "conditional", "call", "async-start", "async-update"),
)
_NO_KERNELS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked")
"""Custom calls that compute nothing."""


@dataclass(frozen=True)
class Work:
    """The work of one run of a program, or of a part of it, on one device."""

    kernels: int = 0
    """Launches: fusions, calls of libraries, copies and all else that runs by itself. Copies that a TPU makes beside
    its work, and instructions that give single numbers, do not count."""
    bytes: int = 0
    """Bytes that all kernels read and write in the device's main memory, as if no cache held anything between two of
    them. Of an array that is cut or updated in place, only the part counts."""
    flops: int = 0
    """Multiplications and additions of matrix products, as compiled."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.kernels + other.kernels, self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> "Work":
        return Work(self.kernels * times, self.bytes * times, self.flops * times)


def work(program: Program) -> Work | None:
    """The work of one run of a compiled program; of a condition, that of the branch that moves most bytes.

    Returns:
      The work, or None where the text does not state how often a loop runs.
    """
    try:
        return _work(program, program.entry)
    except _UnknownLength:
        return None


class _UnknownLength(Exception):
    pass


def _work(program: Program, name: str) -> Work:
    total = Work()
    instructions = program.computations[name]
    given = {i.name: i for i in instructions}
    for i in instructions:
        if i.opcode == "while":
            if (trips := program.trips(i)) is None:
                raise _UnknownLength
            (body,) = re.findall(r"body=%([\w.\-]+)", i.rest)
            total += _work(program, body) * trips
        elif i.opcode == "conditional":
            total += max((_work(program, branch) for branch in i.called), key=lambda w: w.bytes)
        elif i.opcode in ("call", "async-start"):
            for called in i.called:
                total += _work(program, called)
        elif not _is_free(i):
            total += Work(_launches(i), _moved(program, i, given), _flops(program, i, given))
    return total


def _is_free(i: Instruction) -> bool:
    return (
        i.opcode in _FREE_OPCODES
        or i.opcode.endswith("-done")
        or any(f'custom_call_target="{name}"' in i.rest for name in _NO_KERNELS)
    )


def _launches(i: Instruction) -> int:
    beside = i.opcode in ("copy-start", "slice-start", "send", "recv")
    number = i.opcode != "fusion" and all(math.prod(array.shape) == 1 for array in i.arrays)
    return int(not beside and not number)


def _moved(program: Program, i: Instruction, given: dict[str, Instruction]) -> int:
    """Bytes read and written in main memory."""
    arrays = i.arrays
    if i.opcode == "copy-start":
        arrays = arrays[:2]  # what is written, and what is read
        return sum(array.bytes for array in arrays if not array.space)
    if i.opcode in ("send", "recv"):
        return arrays[0].bytes  # the rest is data for the backend
    if i.opcode == "slice-start":
        # A tuple of the operands, the result, and data for the backend.
        result = arrays[len(i.operands)]
        return result.bytes * sum(not array.space for array in (arrays[0], result))
    if "cublas" in i.rest:
        arrays = arrays[:1]  # and a workspace
    operands = [given[name] for name in dict.fromkeys(i.operands) if name in given]
    if i.opcode == "fusion":
        (called,) = i.called
        reads = [
            _touched(program, called, position, operand)
            for position, operand in enumerate(given[name] for name in i.operands)
        ]
        return sum(reads) + _written(program, called, i)
    if i.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * _in_memory(i)
    if i.opcode == "dynamic-update-slice":
        return 2 * _in_memory(operands[1])
    if i.opcode == "scatter":
        return 3 * _in_memory(given[i.operands[2]])
    return sum(map(_in_memory, operands)) + sum(array.bytes for array in arrays if not array.space)


def _in_memory(i: Instruction) -> int:
    return sum(array.bytes for array in i.arrays if not array.space)


def _touched(program: Program, name: str, position: int, operand: Instruction) -> int:
    """Bytes that a fusion reads of an operand: the whole, or the parts that all its uses cut out."""
    whole = _in_memory(operand)
    if not whole:
        return 0
    cut = _cut_of(program, name, position)
    return whole if cut is None else min(whole, cut)


def _cut_of(program: Program, name: str, position: int) -> int | None:
    """Bytes of a parameter that a fused computation uses; None where it uses the whole."""
    instructions = program.computations[name]
    (parameter,) = (i for i in instructions if i.opcode == "parameter" and i.rest.startswith(f"{position})"))
    names, total = {parameter.name}, 0
    for i in instructions:
        used = [k for k, operand in enumerate(i.operands) if operand in names]
        if not used or i.opcode == "parameter":
            continue
        size = sum(array.bytes for array in i.arrays)
        if i.opcode == "bitcast":
            names.add(i.name)
            if i.root:
                return None
        elif i.opcode in ("dynamic-slice", "slice", "gather") and used == [0]:
            total += size
        elif i.opcode == "dynamic-update-slice" and used == [0]:
            continue  # in place: only what is written counts, as written
        elif i.opcode == "scatter" and used == [0]:
            updates = next(j for j in instructions if j.name == i.operands[2])
            total += sum(array.bytes for array in updates.arrays)
        elif i.opcode == "fusion":
            parts = [_cut_of(program, i.called[0], k) for k in used]
            if None in parts:
                return None
            total += sum(part or 0 for part in parts)
        else:
            return None
    return total


def _written(program: Program, name: str, fusion: Instruction) -> int:
    """Bytes that a fusion writes: its results, or where one is updated in place, the update."""
    inside = {i.name: i for i in program.computations[name]}
    root = next(i for i in inside.values() if i.root)
    results = [inside[operand] for operand in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for result, array in zip(results, fusion.arrays, strict=False):
        while result.opcode in ("bitcast", "convert", "copy") and result.operands[0] in inside:
            result = inside[result.operands[0]]
        size = array.bytes
        if result.opcode in ("dynamic-update-slice", "scatter"):
            update = inside[result.operands[1 if result.opcode == "dynamic-update-slice" else 2]]
            size = min(size, sum(part.bytes for part in update.arrays))
        elif result.opcode == "fusion" and len(results) == 1:
            return _written(program, result.called[0], fusion)
        total += 0 if array.space else size
    return total


def _flops(program: Program, i: Instruction, given: dict[str, Instruction]) -> int:
    if i.opcode == "fusion":
        inside = {j.name: j for j in program.computations[i.called[0]]}
        return sum(_flops(program, j, inside) for j in inside.values())
    if i.opcode == "convolution":
        return _convolution_flops(i, given)
    if i.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    elif "cublas" in i.rest and "gemm_backend_config" in i.rest:
        summed = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', i.rest)
    else:
        return 0
    assert summed
    left = given[i.operands[0]].arrays[0].shape
    return 2 * math.prod(i.arrays[0].shape) * math.prod(left[int(d)] for d in re.findall(r"\d+", summed[1]))


def _convolution_flops(i: Instruction, given: dict[str, Instruction]) -> int:
    """FLOPs of a matrix product written as a convolution, as on TPUs; places outside of the input do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels
    left, right = (given[name].arrays[0].shape for name in i.operands[:2])
    out = i.arrays[0].shape
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    settings = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    count = out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for axis in range(len(out) - 2):

        def of(name: str, default: str, axis: int = axis) -> str:
            return settings[name].split("x")[axis] if name in settings else default

        size, stride, spread, step = (int(of(name, "1")) for name in ("size", "stride", "lhs_dilate", "rhs_dilate"))
        before = int(of("pad", "0_0").split("_")[0])
        length = (left[labels[1].index(str(axis))] - 1) * spread + 1
        places = np.arange(out[labels[3].index(str(axis))])[:, None] * stride + np.arange(size) * step - before
        count *= int(np.sum((places >= 0) & (places < length) & (places % spread == 0)))
    return 2 * count
