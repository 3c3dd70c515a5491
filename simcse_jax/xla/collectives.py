"""The collectives of a compiled program: the data that it sends between devices."""

import itertools
import math
import re
from collections import Counter
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
    pairs: tuple[tuple[int, int], ...] = ()
    """Of a permute: which partition sends to which."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends each time it runs: `ring_bytes`."""
        return ring_bytes(self.kind, self.bytes, len(self.group))

    def by_network(self, node: int) -> tuple[float, float]:
        """Bytes that a device sends each time it runs: inside its slice or node, and to others; of a permute, the most.

        A group over several nodes works inside each, where a device sends `ring_bytes` of its part of the group, and
        between them, where each sends its share of what its node sends.

        Args:
          node: devices of a slice or node.
        """
        if self.kind == "collective-permute":
            leaves = [a // node != b // node for a, b in self.pairs if a != b]
            return float(self.bytes * (not all(leaves))), float(self.bytes * any(leaves))
        members = Counter(partition // node for partition in self.group)
        alone = 1 if self.kind == "collective-broadcast" else min(members.values())
        inside = ring_bytes(self.kind, self.bytes, max(members.values()))
        return inside, ring_bytes(self.kind, self.bytes, len(members)) / alone


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
        if kind == "recv" and "_xla_megascale_transfer_type" in instruction.rest:
            overlapped = _work_follows(instructions[position + 1 :], instruction.name)
            yield _between_slices(instruction, program.devices, count, overlapped)
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
            pairs=_pairs(instruction.rest),
        )
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            # TPU: a sum fused with the cut that makes it a scatter.
            size = len(group)
            cut = tuple((t, (shape[0] // size, *shape[1:])) for t, shape in found.arrays)
            found = replace(found, kind="reduce-scatter", arrays=cut)
        yield found


_MEGASCALE = {
    **{"ONE_TO_ONE": "collective-permute", "ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather"},
    **{"REDUCE_SCATTER": "reduce-scatter", "ALL_TO_ALL": "all-to-all"},
}


def _between_slices(received: Instruction, devices: int, count: int | None, overlapped: bool) -> Collective:
    """What the devices of a TPU slice exchange with those of other slices: a program is of one slice alone.

    The runtime of libtpu numbers slices from 1, and device d of slice s 100,000 s + d.

    Args:
      received: the receiving half of the transfer.
      devices: devices of a slice.
      count: how often it runs.
      overlapped: see `Collective`.
    """

    def partition(number: str) -> int:
        slice_, device = divmod(int(number), 100_000)
        return (slice_ - 1) * devices + device

    (transfer,) = re.findall(r'_xla_megascale_transfer_type="(\w+)"', received.rest)
    (target,) = re.findall(r'_xla_megascale_target="?([\w{},:>-]+)', received.rest)
    kind = _MEGASCALE[transfer]
    pairs = tuple((partition(a), partition(b)) for a, b in re.findall(r"(\d+)->(\d+)", target))
    group: set[int] = {member for pair in pairs for member in pair}
    if product := re.fullmatch(r"\{([\d,:]+)\}x.*", target):
        # Each device with those of the same place in the other slices.
        ranges = [[int(n) for n in part.split(":")] for part in product[1].split(",")]
        group = {(n - 1) * devices for ends in ranges for n in range(ends[0], ends[-1] + 1)}
    elif not pairs:
        group = {partition(n) // devices * devices for n in re.findall(r"\d+", target)}
    arrays = received.arrays[:1]
    return Collective(
        kind=kind,
        arrays=tuple((array.kind, array.shape) for array in arrays),
        bytes=sum(array.bytes for array in arrays) * (len(group) if kind == "reduce-scatter" else 1),
        group=tuple(sorted(group)),
        count=count,
        overlapped=overlapped,
        pairs=pairs,
    )


def _work_follows(rest: list[Instruction], start: str) -> bool:
    """Whether something is computed before the end of the asynchronous `start`."""
    between = itertools.takewhile(lambda i: not (i.opcode.endswith("-done") and start in i.operands), rest)
    return any(
        not i.opcode.removesuffix("-start").removesuffix("-done").startswith((*_NOT_WORK, *KINDS)) for i in between
    )


def _pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    match = re.search(r"source_target_pairs=\{([\d{},]*)\}", attributes)
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])) if match else ()


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of `replica_groups`, in any of XLA's three notations, or the partitions of a permute."""
    if pairs := _pairs(attributes):
        return tuple(sorted({member for pair in pairs for member in pair}))
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
