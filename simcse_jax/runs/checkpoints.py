"""The checkpoints of a run on disk: the train state by step, through orbax."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simcse_jax.config import CheckpointConfig
from simcse_jax.runs.folder import writing_to
from simcse_jax.runs.quiet import no_root_handler

with no_root_handler():
    from orbax.checkpoint import v1 as ocp

_policies = ocp.training.preservation_policies

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


class Checkpoints:
    """The checkpoints of one run folder: written asynchronously, each complete or absent.

    Opening them for writing, `save`, `wait` and `close` raise `InputError` where the system refuses to write.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, writing: bool) -> None:
        """Opens `folder/checkpoints`, and creates it if absent.

        Args:
          folder: the run folder.
          config: the settings: how many checkpoints to keep.
          writing: remove the remains of interrupted writes; pass False for a reader, which may run beside a writer.
        """
        self._run, self._folder = folder, (folder / "checkpoints").resolve()
        self._best: int | None = None
        with writing_to(folder) if writing else nullcontext():
            self._checkpointer = ocp.training.Checkpointer(
                self._folder,
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
                cleanup_tmp_directories=writing,
            )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return sorted(int(checkpoint.step) for checkpoint in self._checkpointer.checkpoints)

    def save(self, items: Items, step: int, progress: Progress, score: float | None) -> None:
        """Starts writing a checkpoint and returns once its arrays may be donated.

        Args:
          items: the named trees of the checkpoint.
          step: its step.
          progress: see `Progress`.
          score: dev score at this step; None if it was not measured or is not a number.
        """
        self._best = progress.best_step
        with writing_to(self._run):
            if not self._folder.is_dir():  # orbax would make it again, without the rest of the run
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._folder))
            self._checkpointer.save_checkpointables_async(
                step,
                items,
                force=True,
                metrics=None if score is None else {"dev": score, "step": step},
                custom_metadata=asdict(progress),
            )

    def restore(self, step: int, items: Items) -> Items:
        """Reads the named trees of a checkpoint, whatever mesh wrote them.

        Args:
          step: its step.
          items: the trees to read, as `ShapeDtypeStruct`s with the shardings of the result.
        """
        found: Items = self._checkpointer.load_checkpointables(step, items)
        return found

    def progress(self) -> Progress:
        """The progress stored with the newest checkpoint."""
        metadata: Any = self._checkpointer.metadata(self._checkpointer.latest).custom_metadata
        return Progress(**metadata)

    def wait(self) -> None:
        """Waits until everything saved is on disk."""
        with writing_to(self._run):
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits and releases the writer."""
        with writing_to(self._run):
            self._checkpointer.close()


@contextmanager
def open_checkpoints(folder: Path, config: CheckpointConfig, writing: bool = True) -> Iterator[Checkpoints]:
    """`Checkpoints` that are closed at the end."""
    with no_root_handler():
        checkpoints = Checkpoints(folder, config, writing)
        try:
            yield checkpoints
        finally:
            checkpoints.close()
