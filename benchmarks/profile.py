"""Profile of a train step: the time of each part, and its distance from the machine's limits."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Row, Table
from benchmarks.step import Step
from benchmarks.worker import Worker


@dataclass(frozen=True)
class Profile:
    """A trace of our train step, by part, beside its FLOPs and the matrix product's rate in the same run."""

    step: Step = field(default_factory=Step)
    packed: bool = False
    """Pack several sentences per row."""
    steps: int = 2
    """Steps per trace."""
    rounds: int = 3

    def quick(self) -> "Profile":
        """The same part at the size of a rehearsal."""
        return replace(self, step=self.step.quick(), rounds=1)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument see `Step.run`."""
        work = self.step.work(folder)
        return [self._table(work, dtype) for dtype in self.step.dtypes]

    def _table(self, work: Any, dtype: str) -> Table:
        # Without the flag, a CPU's trace has no operations in it.
        environment = {"XLA_FLAGS": "--xla_cpu_enable_xprof_traceme=true"}
        contender = work.ours(dtype, environment=environment, packed_length=128 if self.packed else 0)
        contender = replace(contender, make="ours_profile:Profile")
        with Worker("ours", contender) as worker:
            worker.call("run")
            ceiling = worker.call("ceiling", self.step.product, dtype)
            whole = [worker.timed() for _ in range(self.rounds)]
            traces = [worker.call("trace", self.steps) for _ in range(self.rounds)]
            account = worker.call("account")
            ceiling = max(ceiling, worker.call("ceiling", self.step.product, dtype))
            peak = worker.call("peak")
        parts = {part: [trace[part][0] for trace in traces if part in trace] for part in traces[0]}
        total = sum(median(times) for times in parts.values())
        rows = [Row("a step, not traced", whole, items=work.sentences, flops=work.flops, ceiling=ceiling, peak=peak)]
        for part, times in sorted(parts.items(), key=lambda item: -median(item[1])):
            rows.append(Row(f"{part}, {traces[0][part][1]} calls, {median(times) / total:.0%}", times))
        floor = account["flops"] / ceiling
        notes = [
            f"Launched: {account['kernels']:,} kernels, moving {account['bytes'] / 1e9:.1f} GB and multiplying "
            f"{account['flops'] / 1e12:.3f} TFLOP, which takes {floor:.2f} s at the ceiling; the model asks for "
            f"{work.flops / 1e12:.3f} TFLOP. Parts run side by side where they can, so that they may add up to more "
            "than a step; a fusion counts as what it ends with.",
        ]
        figures = {"account": account, "parts": {part: [trace.get(part) for trace in traces] for part in parts}}
        layers = {None: "", True: ", layers scanned", False: ", layers unscanned"}[self.step.scan]
        kind = f"{dtype}{', packed' if self.packed else ''}{layers}"
        return Table(
            f"Profile. {self.step.title(work)}, {kind}", rows, notes=notes, figures=figures, ceilings={"ours": ceiling}
        )
