"""The checkpoints of a run on disk: the train state by step, through orbax."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from simcse_jax.config import CheckpointConfig
from simcse_jax.model.params import Params
from simcse_jax.runs.folder import writing_to
from simcse_jax.training.state import TrainState, _items

_policies = ocp.training.preservation_policies


@dataclass(frozen=True)
class Progress:
    """What a resumed loop must know besides the train state. Data order and keys follow from the step alone."""

    best_step: int | None = None
    """Step of the best dev score so far."""
    best_score: float | None = None
    stale: int = 0
    """Evaluations since the best."""


class Checkpoints:
    """The checkpoints of one run folder: written asynchronously, each complete or absent.

    `save`, `wait` and `close` raise `InputError` where the system refuses to write a checkpoint.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, writing: bool) -> None:
        """Opens `folder/checkpoints`, creating it when absent.

        Args:
          folder: the run folder.
          config: what to keep.
          writing: remove the remains of interrupted writes; False for a reader, which may run beside a writer.
        """
        self._run, self._folder = folder, (folder / "checkpoints").resolve()
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            # The loop decides when to save; the latest are needed to resume, the best to export.
            preservation_policy=_policies.AnyPreservationPolicy(
                [
                    _policies.LatestN(config.keep),
                    _policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
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
        """Steps of all that are kept, ascending."""
        return sorted(int(checkpoint.step) for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, step: int, progress: Progress, score: float | None) -> None:
        """Starts writing a checkpoint and returns once the state may be donated.

        Args:
          state: the state.
          step: its step.
          progress: see `Progress`.
          score: dev score at this step, if it was measured and is a number.
        """
        with writing_to(self._run):
            if not self._folder.is_dir():  # orbax would make it anew, without the rest of the run
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._folder))
            self._checkpointer.save_checkpointables_async(
                step,
                _items(state),
                force=True,
                metrics=None if score is None else {"dev": score, "step": step},
                custom_metadata=asdict(progress),
            )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Progress]:
        """Reads a checkpoint onto the shardings of `abstract`, whatever mesh wrote it."""
        loaded = self._checkpointer.load_checkpointables(step, _items(abstract))
        metadata: Any = self._checkpointer.metadata(step).custom_metadata
        training = loaded["training"]
        state = TrainState(
            training["step"],
            loaded["params"] | loaded.get("auxiliary", {}),
            training["opt_state"],
            training.get("buffer"),
        )
        return state, Progress(**metadata)

    def restore_params(self, step: int, abstract: Params) -> Params:
        """Reads the sentence encoder's parameters alone."""
        params: Params = self._checkpointer.load_checkpointables(step, {"params": abstract})["params"]
        return params

    def restore_auxiliary(self, step: int, abstract: Params) -> Params:
        """Reads the parameters that only training needs alone."""
        params: Params = self._checkpointer.load_checkpointables(step, {"auxiliary": abstract})["auxiliary"]
        return params

    def progress(self) -> Progress:
        """The progress stored with the newest checkpoint."""
        metadata: Any = self._checkpointer.metadata(self._checkpointer.latest).custom_metadata
        return Progress(**metadata)

    def wait(self) -> None:
        """Returns once everything saved is on disk."""
        with writing_to(self._run):
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits and releases the writer."""
        with writing_to(self._run):
            self._checkpointer.close()


@contextmanager
def open_checkpoints(folder: Path, config: CheckpointConfig, writing: bool = True) -> Iterator[Checkpoints]:
    """`Checkpoints` that are closed at the end."""
    checkpoints = Checkpoints(folder, config, writing)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _rank(metrics: Any) -> Any:
    """Orders checkpoints from worst to best; of equal scores the first counts, as in `Progress`."""
    return metrics["dev"], -metrics["step"]


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, types and shardings of a tree, to restore onto."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
