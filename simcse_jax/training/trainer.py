"""The training loop: everything around the step that is not the step."""

import fcntl
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import optax
from tqdm import tqdm

from simcse_jax.config import Config
from simcse_jax.data.feed import prefetch
from simcse_jax.errors import InputError
from simcse_jax.runs.checkpoints import Checkpoints, Progress, abstract, open_checkpoints
from simcse_jax.runs.folder import Run, writing_to
from simcse_jax.runs.monitor import Monitor
from simcse_jax.runs.speed import StepClock, work_of
from simcse_jax.runtime.mesh import state_sharding
from simcse_jax.runtime.preemption import StopRequest, stop_on_signal
from simcse_jax.runtime.processes import join_processes
from simcse_jax.storage.files import write_json
from simcse_jax.storage.mirror import Mirror, mirrored
from simcse_jax.training.compiled_step import state_shapes
from simcse_jax.training.describe import describe
from simcse_jax.training.loss import Metrics
from simcse_jax.training.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.training.prepare import Prepared, prepare
from simcse_jax.training.state import TrainState, create_state, sentence_encoder


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite."""


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Holds the run folder's lock, which the system releases however the process ends."""
    if jax.process_index() != 0:
        yield
        return
    with writing_to(folder):
        lock = (folder / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is training in {folder}: wait for it, or choose another --output"
            ) from error
        yield


def train(config: Config) -> dict[str, Any]:
    """Trains, or continues, the run that a config describes.

    Returns:
      What `results.json` holds: `step`, `best_step`, `dev` (best score), `before` and `after` (test scores, where the
      config names test tasks), `memory` (bytes a device of the compiled step) and its `micro_batch`; or
      `{"stopped": step}` when a signal ended the run early. Besides, of this call alone: `steps` it took, and `seconds`
      they took without evaluations and checkpoints.

    Raises:
      InputError: see `prepare`; also a run folder that can no longer be written.
      TrainingDiverged: the loss or gradient became NaN or infinite; the last checkpoint is from before that.
    """
    join_processes(config.multi_host)
    prepared = prepare(config)
    echo: Callable[[str], None] = tqdm.write if jax.process_index() == 0 else lambda text: None
    echo(describe(prepared))
    folder = prepared.run.folder
    with (
        _only_writer(folder),
        mirrored(folder, config.output, prepared.fetched, echo) as mirror,
        open_checkpoints(folder, config.checkpoint) as checkpoints,
        stop_on_signal() as stop,
    ):
        return _loop(prepared, checkpoints, mirror, stop, echo)


def _loop(
    prepared: Prepared,
    checkpoints: Checkpoints,
    mirror: Mirror | None,
    stop: StopRequest,
    echo: Callable[[str], None],
) -> dict[str, Any]:
    config, mesh, run, total = prepared.run.config, prepared.mesh, prepared.run, prepared.total_steps
    schedule = learning_rate_schedule(config.optimizer, total)
    resumed = checkpoints.latest is not None  # also where the latest is that of step 0
    state, start, progress = _start(prepared, checkpoints, make_optimizer(config.optimizer, schedule))
    results = run.results()
    if resumed:
        echo(f"resumed   at step {start:,} of {total:,}")
        if prepared.step is None:
            return results | {"steps": 0, "seconds": 0.0}
    elif prepared.test_scores:
        results = {"before": prepared.test_scores(sentence_encoder(state.params))}
        _write_results(run, results)

    assert prepared.step is not None
    step_fn = prepared.step.function
    clock = StepClock(work_of(prepared.step.flops, mesh), config.log_every)
    monitor = Monitor(run, total, start, resumed, clock, echo)
    batches = prefetch(prepared.tokens, prepared.order, mesh, start, total, prepared.augmenter, prepared.packing)
    pending: tuple[int, Metrics] | None = None
    clock.restart()

    def check_metrics() -> None:
        """Looks at the metrics of the last step, a step late, so that the devices are never idle."""
        nonlocal pending
        if pending is None:
            return
        (step, metrics), pending = pending, None
        values = {name: float(value) for name, value in metrics.items()}
        clock.step(prepared.order.size(step - 1) * prepared.tokens.columns)
        if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm", "weight_norm")):
            checkpoints.wait()
            raise TrainingDiverged(_diverged(step, values, checkpoints.latest))
        if step % config.log_every == 0 or step == total:
            monitor.metrics(step, values)
        monitor.show(progress, values["loss"])

    def measure_dev(step: int) -> float | None:
        """The dev score where one is due for the selection and is a number; keeps account of the best."""
        nonlocal progress
        selects = step % config.evaluation.every == 0 or step == total
        every = config.evaluation.geometry_every
        if prepared.dev_scores is None or not (selects or (every and step % every == 0)):
            return None
        check_metrics()
        scores = prepared.dev_scores(sentence_encoder(state.params))
        if not selects:
            monitor.scores(step, scores)
            return None
        score = scores["dev"]
        if math.isnan(score):
            echo(f"step {step:,}: the dev score is not a number (all pairs alike?) and does not count")
            return None
        monitor.scores(step, scores)
        improved = progress.best_score is None or score > progress.best_score
        progress = Progress(step, score) if improved else replace(progress, stale=progress.stale + 1)
        monitor.show(progress)
        echo(f"step {step:,}: dev {score:.2f}{' (best so far)' if improved else ''}")
        return score

    try:
        step = start
        if not resumed and (score := measure_dev(0)) is not None:
            checkpoints.save(state, 0, progress, score)
        while step < total and not _exhausted(config, progress):
            batch = next(batches)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch)
            check_metrics()
            step, pending = step + 1, (step + 1, metrics)
            monitor.step()
            stopping = stop(step)
            score = measure_dev(step)
            ended = step == total or _exhausted(config, progress)
            best = score is not None and progress.best_step == step
            if stopping or ended or best or step % config.checkpoint.every == 0:
                check_metrics()
                checkpoints.save(state, step, progress, score)
                if mirror:
                    mirror.check()
            if pending is None:  # what was done meanwhile was not the step
                clock.restart()
            if stopping and not ended:
                checkpoints.wait()
                return {"stopped": step}
        checkpoints.wait()
    finally:
        batches.close()
        monitor.close()

    results |= {"step": step, "best_step": progress.best_step, "dev": progress.best_score}
    results |= {"memory": prepared.step.needed, "micro_batch": prepared.step.micro_batch}
    params = sentence_encoder(state.params)
    if progress.best_step not in (None, step):
        params = checkpoints.restore_params(progress.best_step, abstract(params, state_sharding(mesh, params)))
    if prepared.test_scores:
        results["after"] = prepared.test_scores(params)
    _write_results(run, results)
    return results | {"steps": step - start, "seconds": clock.seconds}


def _start(
    prepared: Prepared, checkpoints: Checkpoints, optimizer: optax.GradientTransformation
) -> tuple[TrainState, int, Progress]:
    """The state, step and progress to go on from: the latest checkpoint's, or those before the first step."""
    config, mesh, latest = prepared.run.config, prepared.mesh, checkpoints.latest
    if latest is None:
        spread = prepared.model.config.initializer_range
        return create_state(config, mesh, prepared.initial(), optimizer, spread), 0, Progress()
    shapes = state_shapes(config, prepared.model, optimizer)
    state, progress = checkpoints.restore(latest, abstract(shapes, state_sharding(mesh, shapes)))
    return state, latest, progress


def _exhausted(config: Config, progress: Progress) -> bool:
    """Whether early stopping ends the run."""
    return 0 < config.evaluation.patience <= progress.stale


def _diverged(step: int, values: dict[str, float], latest: int | None) -> str:
    kept = "there is no checkpoint yet" if latest is None else f"the last checkpoint, of step {latest}, is intact"
    return (
        f"at step {step} the loss is {values['loss']}, the gradient norm {values['grad_norm']} and the norm of the "
        f"weights {values['weight_norm']}: {kept}. Lower the learning rate or raise the temperature, in another "
        "--output; with bfloat16 try float32"
    )


def _write_results(run: Run, results: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        with writing_to(run.folder):
            write_json(run.results_file, results)
