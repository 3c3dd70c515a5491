"""The training loop: everything around the step that is not the step."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from simcse_jax.config import Config
from simcse_jax.data.batch import Batch
from simcse_jax.errors import InputError
from simcse_jax.evaluation.suite import expand_tasks
from simcse_jax.model.params import Params
from simcse_jax.reports.progress import say, telling
from simcse_jax.runs.checkpoints import (
    Checkpoints,
    Progress,
    check_whole,
    checkpoint_folders,
    drop_damaged_results,
    open_checkpoints,
    read_progress,
    record_of,
    restore,
    set_damaged_aside,
    settings_digest,
)
from simcse_jax.runs.folder import writing_to
from simcse_jax.runs.lock import only_writer
from simcse_jax.runs.monitor import Monitor
from simcse_jax.runs.speed import StepClock, work_of
from simcse_jax.runtime.mesh import state_sharding, with_sharding
from simcse_jax.runtime.preemption import StopRequest, stop_on_signal
from simcse_jax.runtime.processes import first_on_process_0
from simcse_jax.runtime.provenance import provenance
from simcse_jax.storage.manifest import Damage, digest, write_sealed
from simcse_jax.storage.mirror import Mirror, mirrored
from simcse_jax.training.describe import describe
from simcse_jax.training.job import joined
from simcse_jax.training.loss import Metrics
from simcse_jax.training.prepare import Prepared, prepare
from simcse_jax.training.spec import create_state
from simcse_jax.training.state import from_items, sentence_encoder, to_items
from simcse_jax.training.trace import Trace, save_memory


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite."""


def train(config: Config) -> dict[str, Any]:
    """Trains, or continues, the run that a config describes.

    Returns:
      What `results.json` holds: `step`, `best_step`, `dev` (best score) and its `metric`, `before` and `after` (test
      scores, where the config names test tasks) and their `test_metric`, `memory` (bytes of one device for the compiled
      step) and its `micro_batch`, and `untrained`, a sentence, where the best score is that of before the first step;
      or `{"stopped": step}` when a signal ended the run early. Besides, of this call alone: `steps` it took, and
      `seconds` they took without evaluations and checkpoints.

    Raises:
      InputError: see `prepare`; also a run folder that can no longer be written.
      TrainingDiverged: the loss or gradient became NaN or infinite; the last checkpoint is from before that.
    """
    if not isinstance(config, Config):
        raise InputError(
            f"train takes a Config, not {type(config).__name__}: make one, or read one with "
            'simcse_jax.config.load_config_file("quickstart")'
        )
    with joined(config), telling(quiet=jax.process_index() != 0):
        return _train(config)


def _train(config: Config) -> dict[str, Any]:
    prepared = prepare(config)
    say(describe(prepared))
    folder, store = prepared.run.folder, prepared.run.store
    first = jax.process_index() == 0
    copied = mirrored(folder, config.output, prepared.fetched, say) if first else nullcontext()
    with only_writer(folder), copied as mirror:
        if prepared.step is None:  # its checkpoints may be gone: nothing needs them
            results = prepared.run.results()
            say(f"resumed   at step {results['step']:,} of {prepared.spec.total_steps:,}")
            return results | {"steps": 0, "seconds": 0.0}
        mend: Callable[[], list[str]] = partial(set_damaged_aside, folder, store)
        if not first:  # on a store, each process has a folder of its own
            mend = partial(drop_damaged_results, folder) if store else list
        for line in first_on_process_0(mend):
            say(line)
        secure = mirror.push if mirror and store else None
        with open_checkpoints(folder, config.checkpoint, store, secure) as checkpoints, stop_on_signal() as stop:
            return Trainer(prepared, checkpoints, mirror, stop).run()


class Trainer:
    """A run from where it stands to its end: `run` is the loop, and each thing that happens at a step is a method."""

    def __init__(
        self,
        prepared: Prepared,
        checkpoints: Checkpoints,
        mirror: Mirror | None,
        stop: StopRequest,
    ) -> None:
        """Restores the latest checkpoint, or makes the state before the first step.

        Args:
          prepared: the run, which has not ended.
          checkpoints: its checkpoints, open for writing.
          mirror: the copy on an object store, where there is one.
          stop: whether a signal asked the run to end.
        """
        self._config, self._run, self._spec = prepared.run.config, prepared.run, prepared.spec
        assert prepared.step is not None
        self._parts, self._feed, self._step = prepared.parts, prepared.feed, prepared.step
        self._checkpoints, self._mirror, self._stop = checkpoints, mirror, stop
        folders = checkpoint_folders(self._run.root)
        self._resumed = bool(folders)  # also where the latest is that of step 0
        self.step, self.progress = max(folders, default=0), Progress()
        self._record = record_of(folders[self.step]) if folders else {}
        self._record["run"] = settings_digest(self._run.folder) or digest(self._run.folder / "run.json")
        parts, made = self._record.setdefault("parts", []), provenance()
        if not parts or parts[-1]["made"] != made:
            parts.append({"from": self.step, "made": made})
        if not folders:
            self.state = create_state(self._spec, prepared.start.params())
        else:
            self.progress = read_progress(folders[self.step])
            self.state = from_items(restore(folders[self.step], to_items(self._spec.state_shapes())))
            if self.progress.best_step not in (None, *folders):
                self._forget_best("gone")
        self._first = self.step
        self._pending: tuple[int, Metrics] | None = None
        self._clock: StepClock
        self._monitor: Monitor
        self._trace = Trace(self._config.profiled, self._run.folder, say)

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or early stopping ends the run."""
        patience = self._config.evaluation.patience
        return self.step >= self._spec.total_steps or 0 < patience <= self.progress.stale

    def run(self) -> dict[str, Any]:
        """Trains to the end, or until a signal; see `train`."""
        total, results = self._spec.total_steps, self._run.results()
        if self._resumed:
            say(f"resumed   at step {self.step:,} of {total:,}")
            if "before" in results:  # the files of the tasks may have moved
                names = [*expand_tasks(self._config.evaluation.test, "test"), "Avg."]
                if len(names) != len(results["before"]):
                    raise InputError(
                        f"{self._run.results_file} has {len(results['before'])} scores before training; expected those "
                        f"of {', '.join(names)}: restore it, or choose another --output"
                    )
                results["before"] = dict(zip(names, results["before"].values(), strict=True))
            elif self._parts.test_scores:
                say("results   the scores before training are lost with results.json")
        elif self._parts.test_scores:
            results = {"before": self._parts.test_scores(sentence_encoder(self.state.params))}
            self._write(results)
        # Fewer steps than ten would give a speed that jumps.
        self._clock = StepClock(work_of(self._step.flops, self._spec.mesh), max(10, self._config.log_every))
        metric, log = self._parts.dev_metric, self._record.get("log")
        self._monitor = Monitor(self._run, total, self.step, self._resumed, self._clock, say, metric, log)
        batches = self._feed.batches(self.step, total)
        self._clock.restart()
        try:
            if not self._resumed and (score := self.evaluate()) is not None:
                self.save(score)
            while not self.ended:
                self.take(next(batches))
                stopping = self._stop(self.step)
                score = self.evaluate()
                best = score is not None and self.progress.best_step == self.step
                if stopping or self.ended or best or self.step % self._config.checkpoint.every == 0:
                    self.save(score)
                if self._pending is None:  # what was done meanwhile was not the step
                    self._clock.restart()
                if stopping and not self.ended:
                    self._checkpoints.wait()
                    return {"stopped": self.step}
            self._checkpoints.wait()
        except jax.errors.JaxRuntimeError as error:
            if (memory := save_memory(self._run.folder, self._run.store, error)) is None:
                raise
            raise InputError(
                f"after step {self.step} the devices had no memory left: --micro-batch auto, or a smaller one, makes "
                f"a step smaller{memory}"
            ) from error
        finally:
            self._trace.close()
            batches.close()
            self._monitor.close()
        # First of all: the best checkpoint may turn out to be damaged.
        tested = self._parts.test_scores(self._best_params()) if self._parts.test_scores else None
        results |= {"step": self.step, "best_step": self.progress.best_step, "dev": self.progress.best_score}
        if self._parts.dev_scores:
            results["metric"] = self._parts.dev_metric
        results |= {"memory": self._step.needed, "micro_batch": self._step.micro_batch}
        if self.progress.best_step == 0:
            results["untrained"] = (
                f"no evaluation scored higher than the model before training (dev {self.progress.best_score:.2f} at "
                "step 0), so the best checkpoint is untrained"
            )
        if tested is not None:
            results |= {"test_metric": self._parts.test_metric, "after": tested}
        self._write(results)
        return results | {"steps": self.step - self._first, "seconds": self._clock.seconds}

    def take(self, batch: Batch) -> None:
        """Hands the next step to the devices, and looks at the metrics of the one before."""
        with self._trace.step(self.step + 1, self.state), jax.transfer_guard("disallow"):
            self.state, metrics = self._step.function(self.state, batch)
        self.look_back()
        self.step += 1
        self._trace.after(self.step, self.state)
        self._pending = self.step, metrics
        self._monitor.step()

    def look_back(self) -> None:
        """Looks at the metrics of the last step, a step late, so that the devices are never idle.

        Raises:
          TrainingDiverged: they are not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        self._clock.step(self._feed.order.size(step - 1) * self._feed.table.columns)
        if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm", "weight_norm")):
            self._checkpoints.wait()
            latest = max(checkpoint_folders(self._run.root), default=None)
            raise TrainingDiverged(_diverged(step, values, latest))
        if step % self._config.log_every == 0 or step == self._spec.total_steps:
            self._monitor.metrics(step, values)
        self._monitor.show(self.progress, values["loss"])

    def evaluate(self) -> float | None:
        """The dev score where one is due for the selection and is a number; keeps account of the best."""
        settings, step = self._config.evaluation, self.step
        selects = step % settings.every == 0 or step == self._spec.total_steps
        path = settings.geometry_every and step % settings.geometry_every == 0
        if self._parts.dev_scores is None or not (selects or path):
            return None
        self.look_back()
        scores = self._parts.dev_scores(sentence_encoder(self.state.params))
        if not selects:
            self._monitor.scores(step, scores)
            return None
        score = scores["dev"]
        if score is None:
            say(f"step {step:,}: there is no dev score (all pairs alike?), so the step does not count")
            return None
        self._monitor.scores(step, scores)
        best = self.progress.best_score
        if best is None or score > best:
            self.progress, note = Progress(step, score), " (best so far)"
        else:
            # Of equal scores the last counts, as the one that has learnt more, though it is no progress.
            at, note = (step, " (equals the best so far)") if score == best else (self.progress.best_step, "")
            self.progress = replace(self.progress, best_step=at, stale=self.progress.stale + 1)
        self._monitor.show(self.progress)
        say(f"step {step:,}: dev {self._parts.dev_metric} {score:.2f}{note}")
        return score

    def save(self, score: float | None) -> None:
        """Starts writing a checkpoint.

        Args:
          score: the dev score of this step, if it was measured.
        """
        self.look_back()
        record = self._record | {"log": self._monitor.record_log()}
        self._checkpoints.save(to_items(self.state), self.step, self.progress, score, record)
        if self._mirror and self.step:
            self._mirror.check()

    def _best_params(self) -> Params:
        """The sentence encoder's parameters with the best dev score; the last ones without dev scores."""
        params = sentence_encoder(self.state.params)
        if (best := self.progress.best_step) in (None, self.step):
            return params
        folder = self._run.root / "checkpoints" / str(best)
        try:
            check_whole(folder)
        except Damage as damage:
            self._forget_best(f"damaged ({damage})")
            return params
        shapes = with_sharding(params, state_sharding(self._spec.mesh, params))
        found: Params = restore(folder, {"params": shapes})["params"]
        return found

    def _forget_best(self, problem: str) -> None:
        say(f"the best checkpoint, of step {self.progress.best_step:,}, is {problem}: it no longer counts")
        self.progress = Progress()

    def _write(self, results: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            with writing_to(self._run.folder):
                write_sealed(self._run.results_file, results)


def _diverged(step: int, values: dict[str, float], latest: int | None) -> str:
    kept = "there is no checkpoint yet" if latest is None else f"the last checkpoint, of step {latest}, is intact"
    return (
        f"at step {step} the loss is {values['loss']}, the gradient norm {values['grad_norm']} and the norm of the "
        f"weights {values['weight_norm']}: {kept}. Lower the learning rate or raise the temperature, in another "
        "--output; with bfloat16 try float32"
    )
