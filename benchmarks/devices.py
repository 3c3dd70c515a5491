"""Several devices on one CPU against one, at the same work: the cost of dividing it."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.compare import compare
from benchmarks.report import Table
from benchmarks.step import TOLERANCE, Step


@dataclass(frozen=True)
class Devices:
    """The step on several fake CPU devices, with a copy of the parameters on each and with one copy among them, against
    the step on one device: the same global batch, the same cores."""

    step: Step = field(default_factory=Step)
    devices: int = 8
    rounds: int = 5

    def quick(self) -> "Devices":
        """The same part at the size of a rehearsal."""
        return replace(self, step=self.step.quick(), rounds=2)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument and errors see `Step.run`."""
        work = self.step.work(folder)
        kinds = {
            "1 device": (1, 1),
            f"{self.devices} devices, a copy of the parameters each": (self.devices, 1),
            f"{self.devices} devices, one copy (mesh.fsdp {self.devices})": (self.devices, self.devices),
        }
        contenders = {
            name: work.ours(
                fsdp=fsdp, environment={"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(n), "XLA_FLAGS": ""}
            )
            for name, (n, fsdp) in kinds.items()
        }
        rows, _, _ = compare(contenders, self.rounds, tolerance=TOLERANCE["float32"])
        rows = [replace(row, items=work.sentences) for row in rows]
        note = "float32. The devices share the cores of one CPU: no figure of what several accelerators would gain."
        return [Table(f"{self.devices} devices against one. {self.step.title(work)}", rows, notes=[note])]
