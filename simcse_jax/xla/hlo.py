"""The text of a compiled program: its computations, how often each runs, the size of its instructions' results.

The text is the one source that all of XLA's backends share. XLA's own cost analysis counts the body of a loop once,
however often it runs, and does not exist for GPUs that this machine lacks.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%([\w.\-]+))"
)


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    kind: str
    """Type of its elements, e.g. "bf16"."""
    shape: tuple[int, ...]
    space: int
    """Memory space of the array: 0 is the device's main memory."""

    @property
    def bytes(self) -> int:
        """Size, without the padding of a tiled layout."""
        bits = 8 if self.kind == "pred" else int(re.sub(r"^[a-z]*", "", self.kind).split("e")[0].split("b")[0] or 0)
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    root: bool
    name: str
    result: str
    opcode: str
    rest: str
    """Operands and attributes."""

    @property
    def arrays(self) -> list[Array]:
        """The arrays of its result; those of a tuple one by one."""
        found = []
        for kind, shape, layout in _ARRAY.findall(self.result):
            space = re.search(r"S\((\d+)\)", layout)
            found.append(Array(kind, tuple(map(int, filter(None, shape.split(",")))), int(space[1]) if space else 0))
        return found

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        matches = _CALLED.finditer(self.rest)
        return [name for match in matches for name in re.findall(r"[\w.\-]+", match[1] or match[2])]


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, list[Instruction]]
    entry: str
    """Name of the computation that it begins with."""
    devices: int

    def reached(self, name: str | None = None, count: int | None = 1) -> Iterator[tuple[str, int | None]]:
        """Every computation, once per call site, with the number of times it runs from there.

        Args:
          name: of the computation to begin with; the entry where None.
          count: how often that computation runs; None where this is not known.
        """
        name = self.entry if name is None else name
        yield name, count
        for instruction in self.computations.get(name, []):
            if instruction.opcode in ("async-done", "async-update"):
                continue  # names the computation that its start has called
            times = self.trips(instruction) if instruction.opcode == "while" else 1
            for called in instruction.called:
                yield from self.reached(called, count and times and count * times)

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a loop runs, by XLA's own note or by the bound of a count from 0 in steps of 1, as JAX
        writes loops; None where the text has neither."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
        inside = {i.name: i for i in self.computations.get(condition[1], [])} if condition else {}
        root = next((i for i in inside.values() if i.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        bounds = [inside[name] for name in root.operands if name in inside and inside[name].opcode == "constant"]
        return int(bounds[0].rest.split(")")[0]) if len(bounds) == 1 else None


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(Instruction(bool(match[1]), *match.groups()[1:]))
    head = text.split("\n", 1)[0]
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head))
    return Program(computations, entry, devices)
