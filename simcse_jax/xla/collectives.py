"""The collectives of a compiled program: the data that it sends between devices."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from simcse_jax.xla.hlo import Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_NOT_WORK = ("bitcast", "constant", "copy", "get-tuple-element", "parameter", "tuple")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a program."""

    kind: str
    """One of `KINDS`."""
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    """Type and shape of each result on one device."""
    bytes: int
    """Size of the whole array that one group gathers, sums, scatters or passes on."""
    group: tuple[int, ...]
    """Partitions of the first group; of a permute, all partitions that send or receive."""
    count: int | None
    """How often it runs; None in a loop whose length the text does not state."""
    overlapped: bool
    """Whether it is asynchronous, with work between its start and its end."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends each time it runs: `ring_bytes`."""
        return ring_bytes(self.kind, self.bytes, len(self.group))


def ring_bytes(kind: str, size: int, devices: int) -> float:
    """Bytes that each of W devices sends by a ring, b = `size` the whole: b for a permute or broadcast, 2(W−1)/W · b
    for a sum, (W−1)/W · b for all else; no other way sends less."""
    if kind in ("collective-permute", "collective-broadcast"):
        return float(size) if devices > 1 else 0.0
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices * size


def collectives(program: Program) -> list[Collective]:
    """Every collective of a compiled program whose group has more than one device."""
    found = [collective for name, count in program.reached() for collective in _collectives_of(name, program, count)]
    return [c for c in found if len(c.group) > 1]


def _collectives_of(name: str, program: Program, count: int | None) -> Iterator[Collective]:
    instructions = program.computations.get(name, [])
    for position, instruction in enumerate(instructions):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        arrays = instruction.arrays
        started = instruction.opcode.endswith("-start")
        if started and kind != "all-reduce":
            # Such a start returns its operands, then its results, then data for the backend.
            n = len(instruction.operands)
            arrays = arrays[n : 2 * n]
        group = _group(instruction.rest, program.devices)
        found = Collective(
            kind=kind,
            arrays=tuple((array.kind, array.shape) for array in arrays),
            bytes=sum(array.bytes for array in arrays) * (len(group) if kind == "reduce-scatter" else 1),
            group=group,
            count=count,
            overlapped=started and _work_follows(instructions[position + 1 :], instruction.name),
        )
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            # TPU: a sum fused with the cut that makes it a scatter.
            size = len(group)
            cut = tuple((t, (shape[0] // size, *shape[1:])) for t, shape in found.arrays)
            found = replace(found, kind="reduce-scatter", arrays=cut)
        yield found


def _work_follows(rest: list[Instruction], start: str) -> bool:
    """Whether something is computed before the end of the asynchronous `start`."""
    between = itertools.takewhile(lambda i: not (i.opcode.endswith("-done") and start in i.operands), rest)
    return any(
        not i.opcode.removesuffix("-start").removesuffix("-done").startswith((*_NOT_WORK, *KINDS)) for i in between
    )


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of `replica_groups`, in any of XLA's three notations, or the partitions of a permute."""
    if match := re.search(r"source_target_pairs=\{([\d{},]*)\}", attributes):
        return tuple(sorted({int(n) for n in re.findall(r"\d+", match[1])}))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in match[1].split(","))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        sizes = [int(n) for n in match[2].split(",")]
        order = [int(n) for n in match[3].split(",")] if match[3] else list(range(len(sizes)))
        strides = [math.prod(sizes[i + 1 :]) for i in order]
        places = itertools.product(*(range(sizes[i]) for i in order))
        numbered = (sum(i * s for i, s in zip(place, strides, strict=True)) for place in places)
        return tuple(itertools.islice(numbered, int(match[1].split(",")[-1])))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        axes = [(name, int(n)) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])]
        chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[2])
        members = [0]
        for axis, before, size in chosen:
            k = [name for name, _ in axes].index(axis)
            n, stride = axes[k][1], math.prod(m for _, m in axes[k + 1 :])
            length = int(size) if size else n
            step = stride * n // (int(before or 1) * length)
            members = [m + i * step for m in members for i in range(length)]
        return tuple(members)
    return tuple(range(devices))
