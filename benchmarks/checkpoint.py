"""The time that a checkpoint holds up a training loop, and what it takes to verify one before it is read."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np

from benchmarks.report import Row, Table
from benchmarks.step import Step
from benchmarks.timing import alternate, spread
from benchmarks.worker import Contender, Worker
from simcse_jax.config import CheckpointConfig
from simcse_jax.inference.loading import load_model
from simcse_jax.runs.checkpoints import Progress, check_whole, checkpoint_folders, open_checkpoints, restore
from simcse_jax.storage.manifest import VERIFY, faults


@dataclass(frozen=True)
class Checkpoint:
    """Steps with a checkpoint before them, against as many without: ours, written while the steps go on, and
    torch.save. Besides, a checkpoint of three arrays per parameter and an export, read as they are and verified."""

    step: Step = field(default_factory=Step)
    steps: int = 3
    """Steps per call: enough for the checkpoint to be written meanwhile."""
    rounds: int = 5

    def quick(self) -> "Checkpoint":
        """The same part at the size of a rehearsal."""
        return replace(self, step=self.step.quick(), rounds=2)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument see `Step.run`."""
        work = self.step.work(folder)
        ours = work.ours(kind="Checkpointing", loop=self.steps)
        torch = work.peer("peers_torch:Checkpointing", loop=self.steps)
        tables = [self._table("ours, asynchronous", ours), self._table("torch.save", torch)]
        tables.append(_verified(folder, self.step.size.layers * self.step.size.width**2 * 36, self.rounds))
        return [*tables, _verified_export(work.model, self.rounds)]

    def _table(self, name: str, contender: Contender) -> Table:
        with Worker(name, contender) as worker:
            worker.call("steps")

            def save_and_steps() -> float:
                taken = worker.timed("save_and_steps")
                worker.call("written")
                return taken

            plain = f"{self.steps} steps"
            plain_steps = partial(worker.timed, "steps")
            measured = alternate({plain: plain_steps, f"{plain}, one checkpoint": save_and_steps}, self.rounds)
            peak = worker.call("peak")
        without, with_one = measured.values()
        stalls = [b - a for a, b in zip(without.seconds, with_one.seconds, strict=True)]
        rows = [Row(key, m.seconds, m.ratios, peak=peak) for key, m in measured.items()]
        rows = [replace(row, items=2 * self.step.batch_size * self.steps) for row in rows]
        size = self.step.size
        title = f"Checkpoint of BERT {size.layers} × {size.width} with its optimizer: {name}"
        note = f"The checkpoint holds the loop up by {spread(stalls)} s."
        return Table(title, rows, notes=[note], figures={"stalls, s": stalls})


def _verified(folder: Path, values: int, rounds: int) -> Table:
    """Reading a checkpoint of random numbers, which do not compress, and comparing it with its manifest."""
    (folder / "run.json").write_text("{}")
    arrays = [np.random.default_rng(seed).normal(size=values // 8).astype(np.float32) for seed in range(8)]
    with open_checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save({"params": [jax.device_put(x) for x in arrays]}, 1, Progress(), None)
    checkpoint = checkpoint_folders(folder)[1]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for x in arrays]

    return _against_reading(
        *("A checkpoint", 4 * values, rounds),
        lambda: restore(checkpoint, {"params": shapes}),
        lambda: check_whole(checkpoint),
    )


def _verified_export(model: Path, rounds: int) -> Table:
    """Loading an export without verification, and comparing its files with its manifest."""
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())

    def load() -> Any:
        with patch.dict(os.environ, {VERIFY: "0"}):
            return load_model(model).params

    return _against_reading("An export", size, rounds, load, lambda: faults(model))


def _against_reading(what: str, size: int, rounds: int, read: Callable[[], Any], verify: Callable[[], object]) -> Table:
    """A table of reading `what`, of `size` bytes, and of verifying it, in turn."""

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    measured = alternate({"read": partial(timed, read), "verified": partial(timed, verify)}, rounds)
    rows = [Row(name, m.seconds, m.ratios, items=size) for name, m in measured.items()]
    return Table(f"{what} of {1e-9 * size:.2f} GB, its files in memory", rows, unit="bytes")
