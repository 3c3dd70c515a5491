"""From the start of a process to its first training step, and to that step's end."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks.report import Row, Table
from benchmarks.step import Step
from benchmarks.timing import alternate
from benchmarks.work import DTYPES, PROGRAMS
from benchmarks.worker import Contender, Worker


@dataclass
class Beside:
    """The measures of a contender's starts beside their time."""

    peak: int = 0
    """Most bytes that its process held in the last start."""
    steps: list[float] = field(default_factory=list)
    """Seconds of the second step in each start."""


def first_step(name: str, contender: Contender, beside: dict[str, Beside], cache: Path | None = None) -> float:
    """Seconds from the start of a contender's process to the end of its first step.

    Args:
      name, contender: see `Worker`.
      beside: takes the other measures, under the contender's name.
      cache: folder of the compilers' caches; a new and empty one where None.
    """
    with ExitStack() as stack:
        folder = str(cache or stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        caches = {
            PROGRAMS: f"{folder}/ours",
            "JAX_COMPILATION_CACHE_DIR": "",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        start = time.perf_counter()
        worker = stack.enter_context(Worker(name, replace(contender, environment=contender.environment | caches)))
        worker.call("run")
        taken = time.perf_counter() - start
        beside[name].steps.append(worker.timed("run"))
        beside[name].peak = worker.call("peak")
        return taken


@dataclass(frozen=True)
class Start:
    """Python, imports, model, compilation and a step, on text that is tokenised already."""

    step: Step = field(default_factory=Step)
    dtype: DTYPES = "float32"
    compile: bool = True
    """Measure torch.compile, too, beside eager PyTorch."""
    rounds: int = 3

    def quick(self) -> "Start":
        """The same part at the size of a rehearsal."""
        return replace(self, step=self.step.quick(), compile=False, rounds=1)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument see `Step.run`."""
        work = self.step.work(folder)
        contenders = {"ours": work.ours(self.dtype), "torch": work.peer("peers_torch:Step", self.dtype)}
        if self.compile:
            contenders["torch.compile"] = work.peer("peers_torch:Step", self.dtype, compiled=True)
        functions: dict[str, Callable[[], float]] = {}
        beside: defaultdict[str, Beside] = defaultdict(Beside)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as caches:
            for name, contender in contenders.items():
                cold = "torch, eager" if name == "torch" else f"{name}, cold"
                functions[cold] = partial(first_step, cold, contender, beside)
                if name != "torch":
                    functions[f"{name}, warm"] = partial(
                        first_step, f"{name}, warm", contender, beside, Path(caches) / name
                    )
                    functions[f"{name}, warm"]()  # fills the cache
                    del beside[f"{name}, warm"]
            measured = alternate(functions, self.rounds, warm_up=0)
        size = self.step.size
        title = f"BERT {size.layers} × {size.width}, {self.dtype}"
        note = "Cold: with an empty cache of compiled programs; warm: with that of an earlier run."
        ends = [Row(name, m.seconds, m.ratios, peak=beside[name].peak) for name, m in measured.items()]
        begins = [
            Row(name, [end - step for end, step in zip(m.seconds, beside[name].steps, strict=True)])
            for name, m in measured.items()
        ]
        return [
            Table(f"Start to the end of the first step: {title}", ends, notes=[note]),
            Table(f"Start to the first step: the same, less a second step: {title}", begins, notes=[note]),
        ]
