"""The time that a checkpoint holds up a training loop."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks.report import Row, Table
from benchmarks.step import Step
from benchmarks.timing import alternate, spread
from benchmarks.worker import Contender, Worker


@dataclass(frozen=True)
class Checkpoint:
    """Steps with a checkpoint before them, against as many without: ours, written while the steps go on, and
    torch.save."""

    step: Step = field(default_factory=Step)
    steps: int = 3
    """Steps per call: enough for the checkpoint to be written meanwhile."""
    rounds: int = 5

    def quick(self) -> "Checkpoint":
        """The same part at the size of a rehearsal."""
        return replace(self, step=self.step.quick(), rounds=2)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument see `Step.run`."""
        work = self.step.work(folder)
        ours = work.ours(kind="Checkpointing", loop=self.steps)
        torch = work.peer("peers_torch:Checkpointing", loop=self.steps)
        return [self._table("ours, asynchronous", ours), self._table("torch.save", torch)]

    def _table(self, name: str, contender: Contender) -> Table:
        with Worker(name, contender) as worker:
            worker.call("steps")

            def save_and_steps() -> float:
                taken = worker.timed("save_and_steps")
                worker.call("written")
                return taken

            plain = f"{self.steps} steps"
            plain_steps = partial(worker.timed, "steps")
            measured = alternate({plain: plain_steps, f"{plain}, one checkpoint": save_and_steps}, self.rounds)
            peak = worker.call("peak")
        without, with_one = measured.values()
        stalls = [b - a for a, b in zip(without.seconds, with_one.seconds, strict=True)]
        rows = [Row(key, m.seconds, m.ratios, peak=peak) for key, m in measured.items()]
        rows = [replace(row, items=2 * self.step.batch_size * self.steps) for row in rows]
        size = self.step.size
        title = f"Checkpoint of BERT {size.layers} × {size.width} with its optimizer: {name}"
        note = f"The checkpoint holds the loop up by {spread(stalls)} s."
        return Table(title, rows, notes=[note], figures={"stalls, s": stalls})
