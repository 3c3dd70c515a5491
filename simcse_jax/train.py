"""The training loop: everything around the step that is not the step."""

import fcntl
import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from simcse_jax import hf
from simcse_jax.checkpoint import Checkpoints, Progress, abstract, open_checkpoints
from simcse_jax.config import Config
from simcse_jax.data.batches import EpochOrder, prefetch
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.tokens import TokenTable, tokenize_corpus
from simcse_jax.embedder import build_model, init_params, param_dtype, with_fresh_head
from simcse_jax.encode import BatchEncoder
from simcse_jax.errors import InputError, reason
from simcse_jax.evaluation.sts import evaluate, load_task
from simcse_jax.files import write_json
from simcse_jax.hf import Params
from simcse_jax.model import SentenceEncoder
from simcse_jax.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.run import Run, check_output, check_resume, create_run, is_run, open_run
from simcse_jax.sharding import check_batch_size, join_processes, make_mesh, state_sharding
from simcse_jax.step import Metrics, TrainState, create_state, make_train_step, state_of


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite."""


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, checked and loaded before anything is written to the run folder."""

    run: Run
    mesh: Mesh
    model: SentenceEncoder
    initial: Callable[[], Params | Callable[[], Params]]
    """Host parameters before the first step, or a function to be jitted that draws them."""
    tokens: TokenTable
    order: EpochOrder
    total_steps: int
    dev_score: Callable[[Params], float] | None
    test_scores: Callable[[Params], dict[str, float]] | None


def prepare(config: Config) -> Prepared:
    """Checks a config against the machine and the files it names, tokenises the text, and makes the run folder.

    Raises:
      InputError: anything that the run could not work with; the run folder is then as it was.
    """
    config.validate()
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch_size(mesh, config.batch_size)
    folder = Path(config.output).expanduser()
    check_output(folder)

    resuming = open_run(folder) if is_run(folder) else None
    if resuming:
        # Before anything is loaded: settings that changed make the rest pointless.
        check_resume(resuming, config, resuming.data_fingerprint)
    checkpoint = hf.read_checkpoint(resuming.model_folder if resuming else config.model.path)
    if config.data.max_length > checkpoint.config.max_length:
        raise InputError(
            f"data.max_length is {config.data.max_length} but {config.model.path} has positions for "
            f"{checkpoint.config.max_length} tokens: use at most that"
        )
    model = build_model(checkpoint.config, config.model)
    tokenizer = hf.load_tokenizer(checkpoint.folder)
    encoder = BatchEncoder(model, tokenizer, mesh)
    dev_score, test_scores = _scorers(config, encoder)

    corpus = open_corpus(config.data)
    # Process 0 fills a cache that others may share; where they do not, each fills its own afterwards.
    tokens = _first_on_process_0(
        lambda: tokenize_corpus(corpus, tokenizer, config.data.max_length, config.data.cache, jax.process_index() == 0)
    )
    if len(tokens) < 2:
        raise InputError(f"{config.data.train} holds one example; contrast needs two or more")
    order = EpochOrder(len(tokens), config.batch_size, config.seed)
    total_steps = config.max_steps or config.epochs * order.steps_per_epoch

    def initial() -> Params | Callable[[], Params]:
        if config.model.random_init:
            return lambda: init_params(model, config.seed)
        source = hf.read_checkpoint(config.model.path)
        params = hf.load_params(source, param_dtype(config.model.dtype))
        if config.model.head == "fresh" or "head" not in params:
            if config.model.pooler == "cls" and config.model.head == "checkpoint":
                raise InputError(f"model.head is 'checkpoint' but {config.model.path} has no weights pooler.dense")
            # A head that no pooler uses stays what the checkpoint holds, so that exporting it changes nothing.
            if config.model.pooler == "cls" or "head" not in params:
                params = with_fresh_head(params, model, config.seed)
        return params

    if resuming:
        check_resume(resuming, config, tokens.fingerprint)
        run = replace(resuming, config=config)
    else:
        loaded = initial()  # unreadable weights are found before the folder exists
        _check_space(folder, config, model)
        _first_on_process_0(
            lambda: is_run(folder) or bool(create_run(folder, config, tokens.fingerprint, checkpoint, tokenizer))
        )
        run = Run(folder, config, tokens.fingerprint)
        return Prepared(run, mesh, model, lambda: loaded, tokens, order, total_steps, dev_score, test_scores)
    return Prepared(run, mesh, model, initial, tokens, order, total_steps, dev_score, test_scores)


def _scorers(
    config: Config, encoder: BatchEncoder
) -> tuple[Callable[[Params], float] | None, Callable[[Params], dict[str, float]] | None]:
    """Functions from parameters to the dev score and to the table of test scores, where the config asks for them."""
    settings = config.evaluation
    dev = [load_task(settings.dev, settings.data, "dev")] if settings.dev else []
    test = [load_task(name, settings.data, "test") for name in settings.test]

    def scores(tasks: list[Any], params: Params) -> dict[str, float]:
        reported: dict[str, float] = evaluate(tasks, lambda sentences: encoder(params, sentences))["reported"]
        return reported

    return (
        (lambda params: scores(dev, params)[dev[0].name]) if dev else None,
        (lambda params: scores(test, params)) if test else None,
    )


T = TypeVar("T")


def _first_on_process_0(action: Callable[[], T]) -> T:
    """Runs `action` on process 0, then on the others."""
    result = action() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_on_process_0")
        result = action() if result is None else result
    assert result is not None
    return result


def _check_space(folder: Path, config: Config, model: SentenceEncoder) -> None:
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    # Parameters and two moments; one checkpoint more than is kept exists while the next is written.
    needed = 3 * size * (config.checkpoint.keep + 1 + bool(config.evaluation.dev))
    free = shutil.disk_usage(next(p for p in folder.absolute().parents if p.exists())).free
    if needed > free:
        raise InputError(
            f"checkpoints in {folder} need up to {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            "free space or choose another --output"
        )


class StopRequest:
    """Whether SIGTERM (a preemption notice) or Ctrl-C has asked the run to save and end."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, step: int) -> bool:
        """True on every process at the same step."""
        if jax.process_count() > 1:
            # The coordination service picks a step that no process has passed.
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.signal is not None


@contextmanager
def _stop_on_signal() -> Iterator[StopRequest]:
    request = StopRequest()

    def handle(number: int, frame: Any) -> None:
        request.signal = number
        tqdm.write(f"{signal.Signals(number).name}: saving and stopping after this step; once more to stop at once")
        signal.signal(number, previous[signal.Signals(number)])

    # Under jax.distributed SIGTERM belongs to its preemption service; only a main thread may set handlers.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Holds the run folder's lock, which the system releases however the process ends."""
    if jax.process_index() != 0:
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is training in {folder}: wait for it, or choose another --output"
            ) from error
        yield


class MetricsLog:
    """metrics.jsonl, written by process 0."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log of a run that continues after `step` (-1: begins): lines of a part that is repeated go."""
        self._file = None
        if jax.process_index() == 0:
            lines = path.read_text("utf-8").splitlines() if path.is_file() else []
            kept = [line for line in lines if _step_of(line) <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept), "utf-8")
            partial.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line."""
        if self._file:
            # JSON has no word for a figure that is not finite, such as the uniformity of a batch of one.
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


def _step_of(line: str) -> float:
    """Step of a line of the log; infinite for one that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


def describe(prepared: Prepared) -> str:
    """What a run is about to do, in a few lines."""
    config, mesh, tokens = prepared.run.config, prepared.mesh, prepared.tokens
    shapes = jax.eval_shape(lambda: init_params(prepared.model, 0))
    size = sum(x.size for x in jax.tree.leaves(shapes))
    n = min(config.batch_size, len(tokens))
    hard = tokens.columns == 3
    skipped = f" ({tokens.skipped:,} with a blank sentence left out)" if tokens.skipped else ""
    kind = {1: "sentences", 2: "pairs", 3: "triplets"}[tokens.columns]
    return "\n".join(
        [
            f"model     {config.model.path}, {size / 1e6:.1f} M parameters, {config.model.dtype}, "
            f"pooler {config.model.pooler}{' (head in training only)' if config.model.mlp_only_train else ''}",
            f"devices   {mesh.size} × {mesh.devices.flat[0].device_kind} in {jax.process_count()} process(es), "
            f"data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}",
            f"data      {len(tokens):,} {kind}{skipped} from {config.data.train}",
            f"batch     {config.batch_size} over all devices: {2 * n - 1 if hard else n - 1} negatives per anchor"
            f"{f' ({n} of them hard negatives)' if hard else ''}",
            f"steps     {prepared.total_steps:,}, peak learning rate {config.optimizer.learning_rate:g}",
            f"output    {prepared.run.folder}",
        ]
    )


def train(config: Config) -> dict[str, Any]:
    """Trains, or continues, the run that a config describes.

    Returns:
      What `results.json` holds: `step`, `best_step`, `dev` (best score), and `before` and `after` (test scores, where
      the config names test tasks); or `{"stopped": step}` when a signal ended the run early.

    Raises:
      InputError: see `prepare`; also a run folder that can no longer be written.
      TrainingDiverged: the loss or gradient became NaN or infinite; the last checkpoint is from before that.
    """
    join_processes(config.multi_host)
    prepared = prepare(config)
    echo: Callable[[str], None] = tqdm.write if jax.process_index() == 0 else lambda text: None
    echo(describe(prepared))
    folder = prepared.run.folder
    try:
        with (
            _only_writer(folder),
            open_checkpoints(folder, config.checkpoint) as checkpoints,
            _stop_on_signal() as stop,
        ):
            return _loop(prepared, checkpoints, stop, echo)
    except OSError as error:
        raise InputError(
            f"writing to {folder} failed ({reason(error)}): free space there and run the same command again; "
            "it continues from the last complete checkpoint"
        ) from error


def _loop(
    prepared: Prepared, checkpoints: Checkpoints, stop: StopRequest, echo: Callable[[str], None]
) -> dict[str, Any]:
    config, mesh, run, total = prepared.run.config, prepared.mesh, prepared.run, prepared.total_steps
    schedule = learning_rate_schedule(config.optimizer, total)
    state, start, progress = _start(prepared, checkpoints, make_optimizer(config.optimizer, schedule))
    results = run.results()
    if start:
        echo(f"resumed   at step {start:,} of {total:,}")
        if "step" in results:
            return results
    elif prepared.test_scores:
        results = {"before": prepared.test_scores(state.params)}
        _write_results(run, results)

    log = MetricsLog(run.metrics_file, -1 if checkpoints.latest is None else start)
    step_fn = make_train_step(config, prepared.model, schedule, mesh, state)
    batches = prefetch(prepared.tokens, prepared.order, mesh, start, total)
    bar = tqdm(total=total, initial=start, desc="training", unit=" steps", disable=jax.process_index() != 0)
    pending: tuple[int, Metrics] | None = None

    def check_metrics() -> None:
        """Looks at the metrics of the last step, a step late, so that the devices are never idle."""
        nonlocal pending
        if pending is None:
            return
        (step, metrics), pending = pending, None
        values = {name: float(value) for name, value in metrics.items()}
        if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm", "weight_norm")):
            checkpoints.wait()
            raise TrainingDiverged(_diverged(step, values, checkpoints.latest))
        if step % config.log_every == 0 or step == total:
            log.write(step, values)
        dev = {} if progress.best_score is None else {"best_dev": f"{progress.best_score:.2f}"}
        bar.set_postfix(loss=f"{values['loss']:.4f}", **dev, refresh=False)

    def measure_dev(step: int) -> float | None:
        """Scores the dev task where one is due, and says whether the run goes on."""
        nonlocal progress
        if prepared.dev_score is None or (step % config.evaluation.every and step != total):
            return None
        check_metrics()
        score = prepared.dev_score(state.params)
        if math.isnan(score):
            echo(f"step {step:,}: the dev score is not a number (all pairs alike?) and does not count")
            return None
        log.write(step, {"dev": score})
        improved = progress.best_score is None or score > progress.best_score
        progress = Progress(step, score) if improved else replace(progress, stale=progress.stale + 1)
        echo(f"step {step:,}: dev {score:.2f}{' (best so far)' if improved else ''}")
        return score

    try:
        step = start
        if start == 0 and (score := measure_dev(0)) is not None:
            checkpoints.save(state, 0, progress, score)
        while step < total and not _exhausted(config, progress):
            batch = next(batches)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch)
            check_metrics()
            step, pending = step + 1, (step + 1, metrics)
            bar.update()
            stopping = stop(step)
            score = measure_dev(step)
            ended = step == total or _exhausted(config, progress)
            best = score is not None and progress.best_step == step
            if stopping or ended or best or step % config.checkpoint.every == 0:
                check_metrics()
                checkpoints.save(state, step, progress, score)
            if stopping and not ended:
                checkpoints.wait()
                return {"stopped": step}
        checkpoints.wait()
    finally:
        batches.close()
        bar.close()
        log.close()

    results |= {"step": step, "best_step": progress.best_step, "dev": progress.best_score}
    params = state.params
    if progress.best_step not in (None, step):
        params = checkpoints.restore_params(progress.best_step, abstract(params, state_sharding(mesh, params)))
    if prepared.test_scores:
        results["after"] = prepared.test_scores(params)
    _write_results(run, results)
    return results


def _start(
    prepared: Prepared, checkpoints: Checkpoints, optimizer: optax.GradientTransformation
) -> tuple[TrainState, int, Progress]:
    """The state, step and progress to go on from: the latest checkpoint's, or those before the first step."""
    mesh, latest = prepared.mesh, checkpoints.latest
    if latest is None:
        return create_state(mesh, prepared.initial(), optimizer), 0, Progress()
    shapes = jax.eval_shape(lambda: state_of(init_params(prepared.model, 0), optimizer))
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
        write_json(run.results_file, results)
