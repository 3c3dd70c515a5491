"""The speed of a run: sentences per second, and the share of the devices' peak that its arithmetic uses."""

import time
from collections import Counter, deque
from dataclasses import dataclass

from jax.sharding import Mesh

from simcse_jax.xla.chips import chip_of


@dataclass(frozen=True)
class StepWork:
    """The arithmetic of one step of a run."""

    flops: float | None
    """Matrix-product FLOPs over all devices, including those of padding and of recomputation; None where they cannot be
    counted."""
    least_seconds: float | None
    """Time of these FLOPs at the peak rates of the devices; None where the peak is not known, as for CPUs."""


def work_of(flops: Counter[str] | None, mesh: Mesh) -> StepWork:
    """The work of a step on the devices of a mesh. `flops` is from `matrix_flops`, None where it cannot count them."""
    if flops is None:
        return StepWork(None, None)
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is None or not flops.keys() <= chip.flops.keys():
        return StepWork(float(flops.total()), None)
    seconds = sum(count / chip.flops[kind] for kind, count in flops.items()) / mesh.size
    return StepWork(float(flops.total()), seconds)


class StepClock:
    """Measures the time of steps, without the evaluations and checkpoints between them."""

    def __init__(self, work: StepWork, window: int) -> None:
        """Starts the clock.

        Args:
          work: the work of a step.
          window: number of latest steps that `speeds` measures.
        """
        self._work = work
        self._laps: deque[tuple[int, float]] = deque(maxlen=window)
        self._mark = time.perf_counter()
        self.seconds = 0.0
        """Time of all steps."""

    def step(self, sentences: int) -> None:
        """Records the end of a step with this number of sentences."""
        now = time.perf_counter()
        self._laps.append((sentences, now - self._mark))
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def restart(self) -> None:
        """Leaves out the time since the last step: it was not part of a step."""
        self._mark = time.perf_counter()

    def speeds(self) -> dict[str, float]:
        """`sentences_per_second`, and `utilisation` (0 to 1) where the devices' peak is known."""
        seconds = sum(taken for _, taken in self._laps)
        speeds = {"sentences_per_second": sum(sentences for sentences, _ in self._laps) / seconds}
        if self._work.least_seconds is not None:
            speeds["utilisation"] = self._work.least_seconds * len(self._laps) / seconds
        return speeds

    def describe(self) -> str:
        """The speeds in words; without a known peak, FLOP/s instead of the share of the peak."""
        if not self._laps:
            return ""
        speeds = self.speeds()
        words = f"{speeds['sentences_per_second']:,.0f} sentences/s"
        if "utilisation" in speeds:
            return f"{words}, {speeds['utilisation']:.0%} of peak"
        if self._work.flops is None:
            return words
        rate = self._work.flops * len(self._laps) / sum(taken for _, taken in self._laps)
        return f"{words}, {rate / 1e9:,.0f} GFLOP/s"
