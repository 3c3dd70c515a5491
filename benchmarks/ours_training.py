"""This project's contenders for training: the step, its input, its checkpoints."""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import jax

from benchmarks.ours import OnJax
from benchmarks.work import PROGRAMS, SEED
from simcse_jax.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig
from simcse_jax.runs.checkpoints import Checkpoints, Progress
from simcse_jax.runtime import compilation_cache as programs
from simcse_jax.training.prepare import Prepared, prepare
from simcse_jax.training.spec import create_state
from simcse_jax.training.state import TrainState, to_items


class Step(OnJax):
    """The train step of unsupervised SimCSE as `simcse-jax train` makes it, the state donated."""

    def __init__(
        self,
        model: str,
        text: str,
        cache: str,
        batch_size: int,
        length: int,
        dtype: str,
        steps: int = 10_000,
        packed_length: int = 0,
        scan: bool | None = None,
        fsdp: int = 1,
    ) -> None:
        if folder := os.environ.get(PROGRAMS):
            programs.FOLDER = Path(folder)
            programs.keep_programs()
        self.config = Config(
            seed=SEED,
            batch_size=batch_size,
            max_steps=steps,
            model=ModelConfig(path=model, pooler="cls", head="checkpoint", dtype=dtype, scan=scan),  # type: ignore[arg-type]
            data=DataConfig(train=text, max_length=length, cache=cache, packed_length=packed_length),
            mesh=MeshConfig(fsdp=fsdp),
            checkpoint=CheckpointConfig(keep=1),
        )
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._running: tuple[Prepared, Iterator[Any]] | None = None
        self.state: TrainState | None = None

    def _start(self, dropout: float, name: str) -> tuple[Prepared, TrainState]:
        model = replace(self.config.model, dropout=dropout)
        prepared = prepare(replace(self.config, model=model, output=f"{self._folder.name}/{name}"))
        return prepared, create_state(prepared.spec, prepared.start.params())

    def run(self) -> None:
        """Takes a step; the first makes everything, from the token cache to the compiled step."""
        if self._running is None:
            prepared, self.state = self._start(0.1, "run")
            steps = min(prepared.feed.order.steps_per_epoch, prepared.spec.total_steps)
            batches = list(prepared.feed.batches(0, steps))
            self._running = prepared, (batches[i % steps] for i in count())
        prepared, batches_in_turn = self._running
        assert prepared.step is not None
        self.state, metrics = prepared.step.function(self.state, next(batches_in_turn))
        jax.block_until_ready((self.state, metrics))

    def check(self) -> dict[str, float]:
        """Loss and gradient norm of the first batch under the first weights, without dropout."""
        # On GPUs, the products of a float32 model otherwise have about three digits.
        with jax.default_matmul_precision("highest"):
            prepared, state = self._start(0.0, "check")
            assert prepared.step is not None
            batch = next(prepared.feed.batches(0, 1))
            _, metrics = prepared.step.function(state, batch)
        return {"loss": float(metrics["loss"]), "gradient norm": float(metrics["grad_norm"])}

    def waits(self, steps: int) -> tuple[float, float]:
        """Seconds that a loop of `steps` steps waits for its input, and seconds that it takes, without the first step.

        As in training, a thread loads batches from the token cache ahead of time.
        """
        assert self._running is not None
        prepared, waited, started = self._running[0], 0.0, 0.0
        assert prepared.step is not None
        batches = prepared.feed.batches(0, steps + 1)
        for step in range(steps + 1):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            self.state, metrics = prepared.step.function(self.state, batch)
            jax.block_until_ready(metrics)
            if step == 0:
                waited, started = 0.0, time.perf_counter()
        return waited, time.perf_counter() - started


class Checkpointing(Step):
    """The steps of a loop, with a checkpoint before them or without."""

    def __init__(self, loop: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loop = loop
        self._saved = count(1)
        self._checkpoints: Checkpoints | None = None

    def steps(self) -> None:
        """Takes the steps alone."""
        for _ in range(self.loop):
            self.run()

    def save_and_steps(self) -> None:
        """Starts an asynchronous checkpoint and goes on."""
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(Path(self._folder.name), self.config.checkpoint)
        assert self.state is not None
        self._checkpoints.save(to_items(self.state), next(self._saved), Progress(), None)
        self.steps()

    def written(self) -> None:
        """Returns once the checkpoint is on disk."""
        assert self._checkpoints is not None
        self._checkpoints.wait()
