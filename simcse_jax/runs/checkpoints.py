"""The checkpoints of a run on disk: the train state by step, through orbax, each with a manifest of its files."""

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import jax
from jax.tree_util import keystr
from jax.tree_util import tree_leaves_with_path as leaves_with_path

from simcse_jax.config import CheckpointConfig
from simcse_jax.config.values import check_types
from simcse_jax.errors import InputError
from simcse_jax.runs.folder import read_results, writing_to
from simcse_jax.runs.quiet import hearing_failures, no_root_handler
from simcse_jax.storage.files import is_remote, to_disk
from simcse_jax.storage.manifest import MANIFEST, Damage, faults, is_on, read_manifest, write_manifest
from simcse_jax.storage.objects import COMMITTED, move, readable
from simcse_jax.storage.places import Place, StoreError, reached
from simcse_jax.storage.records import parse_json, read_bounded

with no_root_handler():
    from orbax.checkpoint import v1 as ocp

_policies = ocp.training.preservation_policies
_METADATA = "_CHECKPOINT_METADATA"
"""orbax's file about a checkpoint, in which it notes the time when the checkpoint takes its name."""

Items = dict[str, Any]
"""The named trees of arrays in one checkpoint."""


@dataclass(frozen=True)
class Progress:
    """The state of a loop besides the train state, for resuming. Data order and keys follow from the step alone."""

    best_step: int | None = None
    """Step of the best dev score so far; of equal scores, that of the last."""
    best_score: float | None = None
    stale: int = 0
    """Number of evaluations since the best."""


def checkpoint_folders(run: Place) -> dict[int, Place]:
    """The folder of each checkpoint of a run by its step, ascending; on gs://, of each that was written to the end."""
    with reached(run):
        found = [path for path in (run / "checkpoints").glob("*") if path.name.isdecimal()]
        folders = [path for path in found if ((path / COMMITTED).exists() if is_remote(path) else path.is_dir())]
    return {int(path.name): path for path in sorted(folders, key=lambda path: int(path.name))}


def read_progress(folder: Place) -> Progress:
    """The progress stored with a checkpoint, read without its arrays.

    Raises:
      Damage: what is wrong with the checkpoint's manifest or with orbax's metadata.
      PermissionError: this user may not read them.
    """
    try:
        about = dict(parse_json(read_bounded(folder / _METADATA))["custom_metadata"])
        if about.pop("manifest", False) or _has_manifest(folder):
            written, about = about, read_manifest(folder)["about"]
            if (step := about.pop("step")) != int(folder.name):
                raise Damage(f"it is the checkpoint of step {step}")
            about.pop("record", None)
            if written != about:
                raise Damage(f"{_METADATA} was changed")
        if about.keys() != asdict(Progress()).keys():
            raise Damage(f"{_METADATA} lacks the progress of the run")
        check_types(progress := Progress(**about))
        return progress
    except (PermissionError, StoreError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(f"{_METADATA} cannot be read") from error


def record_of(folder: Place) -> dict[str, Any]:
    """What is noted of a run at one of its checkpoints; {} for a checkpoint of an earlier version.

    `run` is the digest of run.json, `log` what `MetricsLog.record` gives, and `parts` has for each part of the run the
    step `from` which it went on and the `provenance` of what `made` it.

    Raises:
      Damage: the manifest of the checkpoint was changed.
    """
    record: dict[str, Any] = read_manifest(folder)["about"].get("record", {}) if _has_manifest(folder) else {}
    return record


def check_whole(folder: Place, items: tuple[str, ...] = ()) -> Progress:
    """Compares a checkpoint with its manifest; one written before there were manifests is taken as it is.

    Args:
      folder: the checkpoint.
      items: names of the trees to compare; all where empty.

    Returns:
      The progress stored with it.

    Raises:
      Damage: the first fault found.
    """
    progress = read_progress(folder)
    if is_on() and (found := faults_of(folder, items)):
        raise Damage(found[0])
    return progress


def faults_of(folder: Place, items: tuple[str, ...] = ()) -> list[str]:
    """The differences between a checkpoint whose progress can be read and its manifest; see `check_whole`."""
    if not _has_manifest(folder):
        return []
    expected = settings_digest(folder.parents[1])
    if expected and record_of(folder).get("run", expected) != expected:
        return ["it is the checkpoint of a run with another run.json"]
    return faults(folder, lambda name: not items or name.split("/")[0] in items)


def _has_manifest(folder: Place) -> bool:
    with reached(folder):
        return bool((folder / MANIFEST).exists())


def settings_digest(run: Place) -> str:
    """The digest of run.json as it was written; "" for a run without a manifest."""
    try:
        return str(read_manifest(run)["files"]["run.json"][1])
    except (Damage, KeyError):
        return ""


def none_whole(run: Place, damaged: dict[int, str]) -> InputError:
    """The error for a run whose checkpoints are all damaged."""
    problems = "; ".join(f"step {step}: {problem}" for step, problem in sorted(damaged.items()))
    return InputError(
        f"no checkpoint of {run} is whole ({problems}): put a copy of one there, or choose another --output"
    )


def set_damaged_aside(run: Path, store: Place | None = None) -> list[str]:
    """Moves the damaged checkpoints of a run, and damaged results, into its folder `damaged`.

    Args:
      run: the run folder.
      store: the place of its checkpoints, where that is another.

    Returns:
      A line about each.

    Raises:
      InputError: something is damaged and no checkpoint is whole, and nothing was moved; or the folder cannot be
        written.
    """
    whole, damaged, place_of_all = [], {}, store or run
    for step, folder in checkpoint_folders(place_of_all).items():
        try:
            check_whole(folder)
            whole.append(step)
        except Damage as damage:
            damaged[step] = str(damage)
    if damaged and not whole:
        raise none_whole(place_of_all, damaged)
    lines = []
    for step, problem in damaged.items():
        place = _set_aside(place_of_all, place_of_all / "checkpoints" / str(step))
        lines.append(
            f"the checkpoint of step {step} is damaged ({problem}) and now in {place}: "
            f"the newest whole one is that of step {max(whole)}"
        )
    try:
        read_results(run, is_on())
    except Damage as damage:
        file = run / "results.json"
        if not whole:
            raise InputError(
                f"{file} is damaged ({damage}) and no checkpoint is left to write it from: copy it back, or remove it "
                "to train from the beginning"
            ) from damage
        lines.append(f"{file} is damaged ({damage}) and now in {_set_aside(run, file)}: the run ends again")
    return lines


def drop_damaged_results(run: Path) -> list[str]:
    """Removes damaged results from a copy of a run, of which `set_damaged_aside` keeps and names the original."""
    try:
        read_results(run, is_on())
    except Damage:
        (run / "results.json").unlink()
    return []


def _set_aside(run: Place, damaged: Place) -> Place:
    """Moves a file or folder into the run's folder `damaged`, and gives its place there."""
    place = run / "damaged" / damaged.name
    with readable(run) if is_remote(run) else writing_to(run):
        while place.exists():
            place = place.with_name(f"{place.name}+")
        move(damaged, place)
    return place


class Checkpoints:
    """The checkpoints of one run folder: written asynchronously, each complete or absent.

    Opening them for writing, `save`, `wait` and `close` raise `InputError` where the system or the store refuses to
    write.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        store: Place | None = None,
        secure: Callable[[], None] | None = None,
    ) -> None:
        """Opens the folder `checkpoints`, creates it if absent, and removes the remains of interrupted writes.

        Args:
          folder: the run folder.
          config: the settings: how many checkpoints to keep.
          store: the place of the run on gs://, where all processes write its checkpoints; else they are in `folder`.
          secure: called before a checkpoint is begun on a store, and before any becomes one: puts the log, of whose
            lines the checkpoint has the digest, where it outlives the process, or raises an error, for no checkpoint to
            be written. By default it writes the log to disk.
        """
        self._run, self._store = folder, store
        self._folder = store / "checkpoints" if store else (folder / "checkpoints").resolve()
        self._secure = secure or self._log_to_disk
        self._best: int | None = None
        self._saving: dict[str, Any] = {}
        self._failed: BaseException | None = None
        context = ocp.Context()
        # A function of its own, because orbax copies what it is given, and with a method the object.
        context.asynchronous.post_finalization_callback = lambda: self._write_manifest()
        with self._writing():
            self._checkpointer = ocp.training.Checkpointer(
                self._folder,
                context=context,
                # The loop decides when to save; the latest are needed to resume, the best to export.
                preservation_policy=_policies.AnyPreservationPolicy(
                    [
                        _policies.LatestN(config.keep),
                        # The score is not compared again: which of equal scores counts has not always been the same.
                        _policies.BestN(
                            get_metric_fn=lambda metrics: metrics["step"] == self._best,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            )

    def save(
        self, items: Items, step: int, progress: Progress, score: float | None, record: dict[str, Any] | None = None
    ) -> None:
        """Starts writing a checkpoint and returns once its arrays may be donated.

        Args:
          items: the named trees of the checkpoint.
          step: its step.
          progress: see `Progress`.
          score: dev score at this step; None if it was not measured or is not a number.
          record: see `record_of`.
        """
        self._best = progress.best_step
        with self._writing():
            self._await(self._checkpointer.wait)
            self._saving = {"step": step, **asdict(progress), "record": record or {}}
            if self._store:
                if jax.process_index() == 0:
                    self._secure()
            elif not self._folder.is_dir():  # orbax would make it again, without the rest of the run
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._folder))
            self._checkpointer.save_checkpointables_async(
                step,
                items,
                force=True,
                metrics=None if score is None else {"dev": score, "step": step},
                custom_metadata=asdict(progress) | {"manifest": True},
            )

    def _write_manifest(self) -> None:
        """Writes the manifest of a checkpoint whose files are there, just before orbax makes it one.

        orbax calls it on process 0, once all processes have written, and then renames the folder or, on a store, writes
        `COMMITTED`.
        """
        step = self._saving["step"]
        partial = self._folder / str(step) if self._store else next(self._folder.glob(f"{step}.orbax-checkpoint-tmp*"))
        write_manifest(partial, self._saving, without=[_METADATA])  # orbax still writes this one
        self._secure()

    def _log_to_disk(self) -> None:
        if (log := self._run / "metrics.jsonl").exists():
            to_disk(log)

    def _writing(self) -> AbstractContextManager[None]:
        return readable(self._store) if self._store else writing_to(self._run)

    def fail(self, error: BaseException) -> None:
        """Notes what has ended the writing of a checkpoint; from orbax's thread."""
        self._failed = error

    def _await(self, end: Callable[[], None]) -> None:
        """Calls what waits for orbax's threads, in several processes only as long as they have not failed in this one.

        They then wait, for twenty minutes, for those of the other processes, which wait for what this one has not done.
        """
        if jax.process_count() == 1:
            end()
            return
        ended: Future[None] = Future()

        def run() -> None:
            try:
                end()
                ended.set_result(None)
            except BaseException as error:
                ended.set_exception(error)

        Thread(target=run, daemon=True).start()
        while not wait([ended], 0.1).done:
            if self._failed:
                raise self._failed
        ended.result()

    def wait(self) -> None:
        """Waits until everything saved is on disk, or on the store."""
        with self._writing():
            self._await(self._checkpointer.wait)

    def close(self) -> None:
        """Waits and releases the writer."""
        with self._writing():
            self._await(self._checkpointer.close)


def restore(folder: Place, items: Items) -> Items:
    """Reads the named trees of a checkpoint, whatever mesh wrote them.

    Args:
      folder: its folder.
      items: the trees to read, as `ShapeDtypeStruct`s with the shardings of the result.

    Raises:
      InputError: the parameters have other shapes in the checkpoint.
    """
    place = folder if is_remote(folder) else folder.resolve()  # orbax takes absolute paths alone
    # Of the parameters alone: a reader needs no more, and the rest may be damaged.
    with reached(folder):
        stored, wanted = ocp.metadata(place, checkpointable_name="params").metadata, items.get("params", {})
    shapes, asked = ({keystr(path): x.shape for path, x in leaves_with_path(tree)} for tree in (stored, wanted))
    if wrong := [name for name, shape in asked.items() if shapes.get(name) != shape]:
        raise InputError(
            f"the checkpoint {folder} does not fit the config.json of its run: {wrong[0]} has shape "
            f"{shapes.get(wrong[0])}, config.json asks for {asked[wrong[0]]} ({len(wrong):,} such): copy the run again"
        )
    with reached(folder):
        found: Items = ocp.load_checkpointables(place, items)
    return found


@contextmanager
def open_checkpoints(
    folder: Path, config: CheckpointConfig, store: Place | None = None, secure: Callable[[], None] | None = None
) -> Iterator[Checkpoints]:
    """`Checkpoints` that are closed at the end."""
    with no_root_handler():
        checkpoints = Checkpoints(folder, config, store, secure)
        with hearing_failures(checkpoints.fail):
            try:
                yield checkpoints
            finally:
                checkpoints.close()
