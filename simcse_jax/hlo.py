"""What a compiled program sends between devices, read from its HLO text.

The text is the one source that all of XLA's backends share; XLA's own cost analysis counts the body of a loop once,
however often it runs.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%([\w.\-]+))"
)
_NOT_WORK = ("bitcast", "constant", "copy", "get-tuple-element", "parameter", "tuple")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a program."""

    kind: str
    """One of `KINDS`."""
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    """Type and shape of each result on one device."""
    bytes: int
    """Size of the whole: what is gathered, summed, scattered or passed on, of one group."""
    group: tuple[int, ...]
    """Partitions of the first group that take part together; of a permute, all that send or receive."""
    count: int | None
    """How often it runs; None in a loop whose length the text does not tell."""
    overlapped: bool
    """Asynchronous, with work between its start and its end."""

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


@dataclass(frozen=True)
class _Instruction:
    root: bool
    name: str
    result: str
    opcode: str
    rest: str
    """Operands and attributes."""


def collectives(program: str) -> list[Collective]:
    """Every collective of a compiled program that has more than one device to its group.

    Args:
      program: `compiled.as_text()`.
    """
    computations, entry = _parse(program)
    header = program.split("\n", 1)[0]
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header))
    found = [
        collective
        for name, count in _reached(computations, entry, 1)
        for collective in _collectives_of(name, computations, devices, count)
    ]
    return [c for c in found if len(c.group) > 1]


def _parse(program: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", ""
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(_Instruction(bool(match[1]), *match.groups()[1:]))
    return computations, entry


def _reached(
    computations: dict[str, list[_Instruction]], name: str, count: int | None
) -> Iterator[tuple[str, int | None]]:
    """Every computation as often as it is called from, with the number of times it runs each time."""
    yield name, count
    for instruction in computations.get(name, []):
        if instruction.opcode in ("async-done", "async-update"):
            continue  # names the computation that its start has called
        times: int | None = 1
        if instruction.opcode == "while":
            times = _trips(instruction, computations)
        for match in _CALLED.finditer(instruction.rest):
            for called in re.findall(r"[\w.\-]+", match[1] or match[2]):
                yield from _reached(computations, called, count and times and count * times)


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """How often the body of a loop runs: XLA's own note, or the bound of a count from 0 in steps of 1, as JAX's are."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
    inside = {i.name: i for i in computations.get(condition[1], [])} if condition else {}
    root = next((i for i in inside.values() if i.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    bounds = [inside[name] for name in _operands(root) if name in inside and inside[name].opcode == "constant"]
    return int(bounds[0].rest.split(")")[0]) if len(bounds) == 1 else None


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])


def _collectives_of(
    name: str, computations: dict[str, list[_Instruction]], devices: int, count: int | None
) -> Iterator[Collective]:
    instructions = computations.get(name, [])
    for position, instruction in enumerate(instructions):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        arrays = [(t, tuple(map(int, filter(None, dims.split(","))))) for t, dims in _ARRAY.findall(instruction.result)]
        started = instruction.opcode.endswith("-start")
        if started and kind != "all-reduce":
            # Such a start returns its operands, then its results, then what the backend needs.
            n = len(_operands(instruction))
            arrays = arrays[n : 2 * n]
        group = _group(instruction.rest, devices)
        found = Collective(
            kind=kind,
            arrays=tuple(arrays),
            bytes=sum(_bytes(*array) for array in arrays) * (len(group) if kind == "reduce-scatter" else 1),
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


def _work_follows(rest: list[_Instruction], start: str) -> bool:
    """Whether something is computed before the end of the asynchronous `start`."""
    between = itertools.takewhile(lambda i: not (i.opcode.endswith("-done") and start in _operands(i)), rest)
    return any(
        not i.opcode.removesuffix("-start").removesuffix("-done").startswith((*_NOT_WORK, *KINDS)) for i in between
    )


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    bits = 8 if kind == "pred" else int(re.sub(r"^[a-z]*", "", kind).split("e")[0].split("b")[0] or 0)
    return math.prod(shape) * bits // 8


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
