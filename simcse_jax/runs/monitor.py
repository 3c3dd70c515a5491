"""The output of a run while it trains: the progress line, metrics.jsonl, and the trackers that the config names."""

from collections.abc import Callable, Mapping

import jax

from simcse_jax.config.values import to_dict
from simcse_jax.reports.progress import progress_bar
from simcse_jax.runs.checkpoints import Progress
from simcse_jax.runs.folder import Run, writing_to
from simcse_jax.runs.metrics_log import MetricsLog, Record, problem_of, read_log, spoilt_lines
from simcse_jax.runs.speed import StepClock
from simcse_jax.runs.tracking import follow
from simcse_jax.storage.files import finite

_LINES = 200  # of progress, at most, where it is not drawn over one line


class Monitor:
    """Shows and records the progress of a run. Only process 0 shows and writes anything."""

    def __init__(
        self,
        run: Run,
        total: int,
        start: int,
        resumed: bool,
        clock: StepClock,
        echo: Callable[[str], None],
        metric: str = "",
        log: Record | None = None,
    ) -> None:
        """Opens the log, the trackers and the progress line of a run that continues after step `start`.

        Args:
          run: the run, whose config names the trackers.
          total: steps of the whole run.
          start: steps done.
          resumed: whether the run continues an earlier one, even if only from the checkpoint of step 0.
          clock: the clock of the steps.
          echo: prints beside the progress line.
          metric: the name of the dev score.
          log: `record_log` of the checkpoint that the run continues from, if there is one.
        """
        self._clock, self._metric = clock, metric
        self._folder = run.folder
        self._gaps = list((log or {}).get("gaps", []))
        with writing_to(run.folder):
            if resumed and jax.process_index() == 0:
                self._look_at_log(run, start, log or {}, echo)
            self._log = MetricsLog(run.metrics_file, start if resumed else -1)
        self._bar, self._followers = None, []
        if jax.process_index() == 0:
            history = read_log(run.metrics_file)
            config = to_dict(run.config)
            self._followers = follow(run.config.tracking, run.folder, config, history, echo)
            self._bar = progress_bar(total, "step", start=start, most_lines=_LINES)
        self._loss: float | None = None
        self._dev: float | None = None

    def _look_at_log(self, run: Run, start: int, written: Record, echo: Callable[[str], None]) -> None:
        """Says what the log has lost that was written when step `start` was saved."""
        if spoilt := spoilt_lines(run.metrics_file):
            echo(f"metrics   {run.metrics_file}: lines that cannot be read are dropped: {spoilt:,}")
        if problem := problem_of(run.metrics_file, start, written):
            echo(f"metrics   {run.metrics_file} is damaged: {problem}; the run goes on")
            self._gaps.append(start)

    def record_log(self) -> Record:
        """What the checkpoint of this step keeps of the log: `MetricsLog.record`, and the steps before which lines were
        lost, `gaps`."""
        return self._log.record() | {"gaps": self._gaps}

    def step(self) -> None:
        """Records that a step has been handed to the devices."""
        if self._bar:
            self._bar.update()

    def show(self, progress: Progress, loss: float | None = None) -> None:
        """Sets the text of the progress line for the next time it is drawn; without `loss`, the last loss stays."""
        if not self._bar:
            return
        self._loss = self._loss if loss is None else loss
        words = ["" if self._loss is None else f"loss {self._loss:.4f}", self._clock.describe()]
        if progress.best_score is not None:
            last = "" if self._dev is None else f"dev {self._metric} {self._dev:.2f}, "
            words.append(f"{last}best {progress.best_score:.2f} at {progress.best_step:,}")
        self._bar.set_postfix_str(", ".join(filter(None, words)), refresh=False)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records the metrics of a step, and the speed of the latest steps."""
        self._write(step, values | self._clock.speeds())

    def scores(self, step: int, values: Mapping[str, float | None]) -> None:
        """Records the scores of an evaluation."""
        self._dev = values["dev"]
        self._write(step, values)

    def close(self) -> None:
        """Closes the progress line and the log, and the trackers once they have written all lines."""
        if self._bar:
            self._bar.close()
        with writing_to(self._folder):
            self._log.close()
        for follower in self._followers:
            follower.close()

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        with writing_to(self._folder):
            self._log.write(step, values)
        for follower in self._followers:
            follower.log({"step": step, **finite(values)})
