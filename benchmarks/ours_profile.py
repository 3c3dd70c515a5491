"""Profile of this project's train step: a trace of the program as it runs."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from benchmarks.ours_training import Step
from simcse_jax.xla.hlo import Program, parse
from simcse_jax.xla.work import work

PARTS = {
    "products with weights": r"/product/",
    "gradients of their inputs": r"/product_gradient/",
    "gradients of the weights": r"/weights_gradient/",
    "attention": r"/attention/",
    "LayerNorm": r"/norm/",
    "GELU": r"/gelu/",
    "dropout": r"/Dropout_\d",
    "embeddings": r"/embeddings/",
    "the rest of the encoder": r"/SentenceEncoder/",
    "loss": r"jvp\(",
    "clipping and AdamW": r"train_step",
}
"""Patterns of scope names in the program; the first that matches an operation's name counts. XLA's own operations have
none."""
OTHER = "copies and loops"
LIBRARIES = "products and attention by the maker's libraries"
_LIBRARY = re.compile(r"gemm|nvjet|cutlass|cublas|cudnn|fmha|splitk", re.IGNORECASE)


def part_of(name: str) -> str:
    """The part of a step that an operation belongs to, by its name in the source."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), OTHER)


def parts_of(program: Program) -> dict[str, str]:
    """The part of each instruction; a fusion has the part of its last operation."""
    found: dict[str, str] = {}
    for instructions in program.computations.values():
        for i in instructions:
            lines = [i, *(j for name in i.called if i.opcode == "fusion" for j in reversed(program.computations[name]))]
            names = (re.search(r'op_name="([^"]*)"', line.rest) for line in lines)
            found[i.name] = part_of(next((name[1] for name in names if name), ""))
    return found


def parts_of_events(data: Any, parts: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """The part and the nanoseconds of each event of a trace that is work of the program.

    A GPU's kernels lie in its streams; those that a graph launched do not say which instruction they are, but most bear
    its name, with underscores.

    Args:
      data: a `jax.profiler.ProfileData`.
      parts: the part of each instruction.
    """
    on_gpu = any(plane.name.startswith("/device:GPU") for plane in data.planes)
    kernels = {re.sub(r"\W", "_", name): part for name, part in parts.items()}
    for plane, line in ((p, line) for p in data.planes for line in p.lines):
        if on_gpu and not (plane.name.startswith("/device:GPU") and line.name.startswith("Stream")):
            continue
        for event in line.events:
            operation = str(dict(event.stats).get("hlo_op", ""))
            # A loop's time is that of the operations in it.
            if operation in parts and not re.match(r"(while|call|conditional)\b", operation):
                yield parts[operation], event.duration_ns
            elif on_gpu and operation not in parts:
                yield kernels.get(event.name, LIBRARIES if _LIBRARY.search(event.name) else OTHER), event.duration_ns


class Profile(Step):
    """The train step, traced."""

    def trace(self, steps: int) -> dict[str, tuple[float, int]]:
        """Seconds and calls of each part, per step.

        Args:
          steps: number of steps to trace.

        Raises:
          RuntimeError: nothing in the trace belongs to the step.
        """
        parts = parts_of(self._program())
        seconds: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            with jax.profiler.trace(folder):
                for _ in range(steps):
                    self.run()
            (file,) = Path(folder).rglob("*.xplane.pb")
            data = jax.profiler.ProfileData.from_file(str(file))
            for part, taken in parts_of_events(data, parts):
                seconds[part] += taken / 1e9 / steps
                calls[part] += 1
            if not seconds:
                lines = {f"{plane.name}: {line.name}" for plane in data.planes for line in plane.lines}
                raise RuntimeError(f"the trace has no operation of the step; its lines are {sorted(lines)}")
        return {part: (taken, calls[part] // steps) for part, taken in seconds.items()}

    def account(self) -> dict[str, int]:
        """The launches, bytes and FLOPs of the compiled step: `simcse_jax.xla.work.Work`."""
        found = work(self._program())
        assert found is not None
        return asdict(found)

    def _program(self) -> Program:
        self.run()
        assert self._running is not None
        compiled: Any = self._running[0].step
        return parse(compiled.executable.as_text())
