"""What a run shows and records while it trains: the progress line, metrics.jsonl, and the trackers it asks for."""

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from simcse_jax.config.values import to_dict
from simcse_jax.runs.checkpoints import Progress
from simcse_jax.runs.folder import Run, writing_to
from simcse_jax.runs.metrics_log import MetricsLog, read_log
from simcse_jax.runs.speed import StepClock
from simcse_jax.runs.tracking import follow
from simcse_jax.storage.files import finite

_LINES = 200  # of progress, at most, in a file


class _Lines:
    """A file that is no terminal, for a progress bar: each state is a line of its own."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Writes a state that tqdm would draw over the last."""
        if text := text.strip():
            self._file.write(f"{text}\n")

    def flush(self) -> None:
        """Flushes the file."""
        self._file.flush()


def progress_bar(total: int, start: int, file: Any = None) -> tqdm:
    """A bar of steps on `file` (stderr); in a log file a line now and then, `_LINES` at most over a run."""
    file = file or sys.stderr
    settings: dict[str, Any] = {"mininterval": 0.5}
    if not file.isatty():
        settings = {"mininterval": 10, "miniters": -(-total // _LINES), "maxinterval": math.inf}
    return tqdm(
        total=total,
        initial=start,
        unit=" steps",
        smoothing=0.05,
        file=file if file.isatty() else _Lines(file),
        bar_format="step {n:,} of {total:,} {bar}{percentage:3.0f}%, {remaining} left{postfix}"
        if file.isatty()
        else "step {n:,} of {total:,}, {remaining} left{postfix}",
        dynamic_ncols=file.isatty(),
        **settings,
    )


class Monitor:
    """The eyes on a run. Only process 0 shows and writes anything."""

    def __init__(
        self, run: Run, total: int, start: int, resumed: bool, clock: StepClock, echo: Callable[[str], None]
    ) -> None:
        """Opens the log, the trackers and the progress line of a run that goes on after step `start`.

        Args:
          run: the run, whose config names the trackers.
          total: steps of the whole run.
          start: steps done.
          resumed: whether the run has been here before, if only with the checkpoint of step 0.
          clock: the clock of the steps.
          echo: prints beside the progress line.
        """
        self._clock = clock
        self._folder = run.folder
        with writing_to(run.folder):
            self._log = MetricsLog(run.metrics_file, start if resumed else -1)
        self._bar, self._followers = None, []
        if jax.process_index() == 0:
            history = read_log(run.metrics_file)
            config = to_dict(run.config)
            self._followers = follow(run.config.tracking, run.folder, config, history, echo)
            self._bar = progress_bar(total, start)
        self._loss: float | None = None
        self._dev: float | None = None

    def step(self) -> None:
        """A step has been handed to the devices."""
        if self._bar:
            self._bar.update()

    def show(self, progress: Progress, loss: float | None = None) -> None:
        """What the progress line says the next time it is drawn; the loss as before where none is given."""
        if not self._bar:
            return
        self._loss = self._loss if loss is None else loss
        words = ["" if self._loss is None else f"loss {self._loss:.4f}", self._clock.describe()]
        if progress.best_score is not None:
            last = "" if self._dev is None else f"dev {self._dev:.2f}, "
            words.append(f"{last}best {progress.best_score:.2f} at {progress.best_step:,}")
        self._bar.set_postfix_str(", ".join(filter(None, words)), refresh=False)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records the metrics of a step, with the speed of the last steps."""
        self._write(step, values | self._clock.speeds())

    def scores(self, step: int, values: dict[str, float]) -> None:
        """Records what an evaluation gave."""
        self._dev = values["dev"]
        self._write(step, values)

    def close(self) -> None:
        """Ends all, trackers after they have written what they were given."""
        if self._bar:
            self._bar.close()
        with writing_to(self._folder):
            self._log.close()
        for follower in self._followers:
            follower.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        with writing_to(self._folder):
            self._log.write(step, values)
        for follower in self._followers:
            follower.log({"step": step, **finite(values)})
