"""This project's contenders for the input pipeline: the token cache, written and read."""

import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from benchmarks.work import SEED
from benchmarks.worker import OnHost
from simcse_jax.config import Config, DataConfig, ModelConfig
from simcse_jax.data.batch import Batch
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.feed import Feed
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.tokens import corpus_blocks, tokenize_corpus
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.runtime.processes import joined_processes
from simcse_jax.training.trainer import train


class Tokens(OnHost):
    """A text tokenised into a new cache."""

    def __init__(self, model: str, text: str, length: int) -> None:
        self._tokenizer = load_tokenizer(model)
        self._text, self._length = text, length

    def run(self) -> dict[str, int]:
        """Reads the text, tokenises it and writes the cache; returns the number and the sum of its tokens."""
        with tempfile.TemporaryDirectory(prefix="benchmark-") as cache:
            corpus = open_corpus(DataConfig(train=self._text))
            table = tokenize_corpus(corpus, self._tokenizer, self._length, cache, progress=False)
            return {"tokens": len(table.ids), "sum of ids": int(np.asarray(table.ids).sum(dtype=np.int64))}

    check = run


class Batches(OnHost):
    """An epoch of padded batches from the token cache, on the host."""

    def __init__(self, model: str, text: str, length: int, cache: str, batch_size: int) -> None:
        corpus = open_corpus(DataConfig(train=text))
        self._table = tokenize_corpus(corpus, load_tokenizer(model), length, cache, progress=False)
        self._order = EpochOrder(len(self._table), batch_size, SEED)

    def _epoch(self) -> Iterator[Batch]:
        for step in range(self._order.steps_per_epoch):
            yield Feed(self._table, self._order, make_mesh()).rows(step, slice(None))

    def run(self) -> None:
        """Loads all batches, in the order of a run."""
        for _ in self._epoch():
            pass

    def check(self) -> dict[str, int]:
        """Number and sum of the tokens."""
        tokens, total = 0, 0
        for batch in self._epoch():
            valid = np.asarray(batch.valid)  # the last batch is filled up
            tokens += int(np.asarray(batch.lengths)[valid].sum())
            total += int(np.asarray(batch.input_ids)[valid].sum(dtype=np.int64))
        return {"tokens": tokens, "sum of ids": total}


class Scale(OnHost):
    """A large text brought to batches, one stage after the other, each once; alone, or as one host of a job."""

    def __init__(self, model: str, text: str, length: int, cache: str, batch_size: int) -> None:
        self._job = joined_processes()  # for as long as the process lives
        self._job.__enter__()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which JAX takes for a preemption
        self._share = jax.process_index(), jax.process_count()
        self._model, self._tokenizer, self._length, self._cache = model, load_tokenizer(model), length, cache
        self._config, self._batch_size = DataConfig(train=text), batch_size

    def hash(self) -> None:
        """Finds the text, and the digest of its content."""
        self._corpus = open_corpus(self._config)

    def read(self) -> None:
        """Reads the text, or the files that fall to this host, without tokenising it."""
        for _ in corpus_blocks(self._corpus, *self._share):
            pass

    def tokenise(self) -> None:
        """Tokenises the text into the cache; where it is there already, compares that with its manifest."""
        self._table = tokenize_corpus(self._corpus, self._tokenizer, self._length, self._cache, progress=True)

    def processor(self) -> tuple[float, float]:
        """Seconds of a processor that the thread of the stages has had so far, and that all threads have."""
        return time.thread_time(), time.process_time()

    def sentences(self) -> int:
        """The number of sentences."""
        return len(self._table)

    def order(self) -> None:
        """Draws the order of an epoch."""
        self._order = EpochOrder(self.sentences(), self._batch_size, SEED)
        self._order.examples(0)

    def batches(self) -> None:
        """Loads an epoch of batches, or this host's rows of them."""
        feed, (process, count) = Feed(self._table, self._order, make_mesh()), self._share
        rows = slice(process * self._batch_size // count, (process + 1) * self._batch_size // count)
        for step in range(self._order.steps_per_epoch):
            feed.rows(step, rows)

    def train(self) -> None:
        """Trains for four steps on the cache."""
        train(
            Config(
                output=str(Path(self._cache).with_name("run")),
                batch_size=self._batch_size,
                max_steps=4,
                model=ModelConfig(path=self._model, pooler="cls"),
                data=replace(self._config, cache=self._cache, max_length=self._length),
            )
        )
