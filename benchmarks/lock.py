"""How long the work of a process keeps its other threads waiting, such as those by which the processes of a job watch
each other.

SIMCSE_DATA=FOLDER python -m benchmarks.lock --examples 1e8
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from benchmarks.report import status_of
from benchmarks.work import Size, bert_folder, training_text
from simcse_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig
from simcse_jax.data.order import EpochOrder
from simcse_jax.pretrained.tensors import find_tensors
from simcse_jax.training.trainer import train

_TICK = 0.05
"""Seconds between two signs of life."""


@dataclass(frozen=True)
class Settings:
    """The settings of the command."""

    examples: float = 1e6
    """Examples of the orders that are drawn."""
    sentences: int = 20_000
    """Sentences that are tokenised."""
    size: Size = field(default_factory=Size)
    """The model that is read and trained."""


@contextmanager
def watched(name: str) -> Iterator[None]:
    """A block of work; prints its seconds, those of a processor, and the longest that a ticking thread had to wait."""
    longest, over = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        last, ended = time.monotonic(), False
        while not ended:
            ended = over.wait(_TICK)
            now = time.monotonic()
            longest, last = max(longest, now - last - _TICK), now

    thread = threading.Thread(target=tick)
    thread.start()
    start, processor = time.monotonic(), time.process_time()
    yield
    seconds, processor = time.monotonic() - start, time.process_time() - processor
    over.set()
    thread.join()
    print(f"{name}: {seconds:.1f} s, {processor:.1f} s of a processor, no sign of life for {longest:.2f} s", flush=True)


def main(settings: Settings) -> None:
    """Prints one line per kind of work."""
    n, texts = int(settings.examples), np.random.default_rng(0)
    with watched(f"the order of {n:,} examples"):
        EpochOrder(n, 512, 0).examples(0)
    with watched("with data.distinct"):
        EpochOrder(n, 512, 0, texts.integers(0, 2**63, (n, 1), np.uint64)).examples(0)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        model = bert_folder(settings.size, folder)
        with watched("weights"):
            for tensor in find_tensors(model).values():
                tensor.read()
        text = training_text("wiki" if "SIMCSE_DATA" in os.environ else "padded", settings.sentences, 32, folder)
        config = Config(
            output=str(folder / "run"),
            batch_size=8,
            max_steps=3,
            model=ModelConfig(path=str(model), pooler="cls"),
            data=DataConfig(train=str(text), max_length=32, cache=str(folder / "cache")),
            checkpoint=CheckpointConfig(every=1),
        )
        with watched(f"a run of {config.max_steps} steps, with a checkpoint of each"):
            train(config)


if __name__ == "__main__":
    sys.exit(status_of(lambda: main(tyro.cli(Settings, prog="python -m benchmarks.lock"))))
