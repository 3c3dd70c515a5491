"""Profile of this project's train step: a trace of the program as it runs."""

import re
import tempfile
from collections import defaultdict
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


class Profile(Step):
    """The train step, traced."""

    def trace(self, steps: int) -> dict[str, tuple[float, int]]:
        """Seconds and calls of each part, per step.

        Args:
          steps: number of steps to trace.
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
            for event in (event for plane in data.planes for line in plane.lines for event in line.events):
                operation = str(dict(event.stats).get("hlo_op", ""))
                # A loop's time is that of the operations in it.
                if operation in parts and not re.match(r"(while|call|conditional)\b", operation):
                    seconds[parts[operation]] += event.duration_ns / 1e9 / steps
                    calls[parts[operation]] += 1
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
