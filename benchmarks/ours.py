"""What is measured of this project, each made in a process of its own."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import peak_bytes, seconds
from benchmarks.work import SEED
from simcse_jax import hf
from simcse_jax.checkpoint import Checkpoints, Progress
from simcse_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig
from simcse_jax.data.batches import EpochOrder, load_rows, prefetch
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.embedder import load_model
from simcse_jax.encode import BatchEncoder
from simcse_jax.loss import BLOCK_SIZES
from simcse_jax.objectives import dense, info_nce, tiled
from simcse_jax.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.prepare import Prepared, prepare
from simcse_jax.sharding import make_mesh
from simcse_jax.step import TrainState, create_state


class OnJax:
    """What all contenders on JAX can say."""

    def peak(self) -> int:
        """Bytes at most: of an accelerator's memory where there is one, else of the process."""
        stats = None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()
        return int(stats["peak_bytes_in_use"]) if stats else peak_bytes()

    def ceiling(self, size: int, dtype: str) -> float:
        """FLOP/s of the best of five products of two square matrices."""
        a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
        product = jax.jit(jnp.dot)
        jax.block_until_ready(product(a, a))
        return 2 * size**3 / min(seconds(lambda: product(a, a)) for _ in range(5))


class Step(OnJax):
    """The train step of unsupervised SimCSE as `simcse-jax train` makes it, the state donated."""

    def __init__(
        self, model: str, text: str, cache: str, batch_size: int, length: int, dtype: str, steps: int = 10_000
    ) -> None:
        self.config = Config(
            seed=SEED,
            batch_size=batch_size,
            max_steps=steps,
            model=ModelConfig(path=model, pooler="cls", head="checkpoint", dtype=dtype),  # type: ignore[arg-type]
            data=DataConfig(train=text, max_length=length, cache=cache),
            checkpoint=CheckpointConfig(keep=1),
        )
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._running: tuple[Prepared, Iterator[Any]] | None = None
        self.state: TrainState | None = None

    def _start(self, dropout: float, name: str) -> tuple[Prepared, TrainState]:
        model = replace(self.config.model, dropout=dropout)
        prepared = prepare(replace(self.config, model=model, output=f"{self._folder.name}/{name}"))
        settings = prepared.run.config.optimizer
        optimizer = make_optimizer(settings, learning_rate_schedule(settings, prepared.total_steps))
        return prepared, create_state(prepared.run.config, prepared.mesh, prepared.initial(), optimizer)

    def run(self) -> None:
        """A step; the first makes everything, from the token cache to the compiled step."""
        if self._running is None:
            prepared, self.state = self._start(0.1, "run")
            steps = min(prepared.order.steps_per_epoch, prepared.total_steps)
            batches = list(prefetch(prepared.tokens, prepared.order, prepared.mesh, 0, steps))
            self._running = prepared, (batches[i % steps] for i in count())
        prepared, batches_in_turn = self._running
        assert prepared.step is not None
        self.state, metrics = prepared.step.function(self.state, next(batches_in_turn))
        jax.block_until_ready((self.state, metrics))

    def check(self) -> dict[str, float]:
        """Loss and gradient norm of the first batch under the first weights, without dropout."""
        # On GPUs the products of a float32 model are otherwise of about three digits.
        with jax.default_matmul_precision("highest"):
            prepared, state = self._start(0.0, "check")
            assert prepared.step is not None
            batch = next(prefetch(prepared.tokens, prepared.order, prepared.mesh, 0, 1))
            _, metrics = prepared.step.function(state, batch)
        return {"loss": float(metrics["loss"]), "gradient norm": float(metrics["grad_norm"])}

    def waits(self, steps: int) -> tuple[float, float]:
        """Seconds that a loop of so many steps waits for its input, and seconds that it takes, the first step left out.

        Loaded and tokenised as in training: a thread loads batches from the token cache ahead of time.
        """
        assert self._running is not None
        prepared, waited, started = self._running[0], 0.0, 0.0
        assert prepared.step is not None
        batches = prefetch(prepared.tokens, prepared.order, prepared.mesh, 0, steps + 1)
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
    """So many steps, with a checkpoint before them or without."""

    def __init__(self, loop: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loop = loop
        self._saved = count(1)
        self._checkpoints: Checkpoints | None = None

    def steps(self) -> None:
        """The steps alone."""
        for _ in range(self.loop):
            self.run()

    def save_and_steps(self) -> None:
        """Starts an asynchronous checkpoint and goes on."""
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(Path(self._folder.name), self.config.checkpoint, writing=True)
        assert self.state is not None
        self._checkpoints.save(self.state, next(self._saved), Progress(), None)
        self.steps()

    def written(self) -> None:
        """Returns once the checkpoint is on disk."""
        assert self._checkpoints is not None
        self._checkpoints.wait()


class Encode(OnJax):
    """Sentences to vectors of length 1, as `SimCSE.encode` has it, in any type."""

    def __init__(self, model: str, sentences: list[str], batch_size: int, dtype: str) -> None:
        self._loaded = load_model(model, dtype=dtype)
        checkpoint = self._loaded.checkpoint
        self._encoder = BatchEncoder(
            self._loaded.model, hf.load_tokenizer(checkpoint.folder), make_mesh(), checkpoint.max_length, batch_size
        )
        self._sentences = sentences

    def run(self) -> np.ndarray:
        """All sentences."""
        vectors = self._encoder(self._loaded.params, self._sentences)
        unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    def check(self) -> dict[str, np.ndarray]:
        """The vectors."""
        with jax.default_matmul_precision("highest"):
            return {"vectors": self.run()}


class Loss(OnJax):
    """InfoNCE of two views, forward and backward, tiled or dense."""

    def __init__(self, views: tuple[np.ndarray, np.ndarray], temperature: float, form: str) -> None:
        self._views = tuple(map(jnp.asarray, views))
        block = BLOCK_SIZES[jax.default_backend()]
        pairs = dense if form == "dense" else partial(tiled, block=block)
        loss = partial(info_nce, temperature=temperature, pairs=pairs)
        self._function = jax.value_and_grad(lambda z: loss(*z), has_aux=True)
        self._compiled = jax.jit(self._function)

    def run(self) -> None:
        """The loss and both gradients."""
        jax.block_until_ready(self._compiled(self._views))

    def check(self) -> dict[str, Any]:
        """The same."""
        with jax.default_matmul_precision("highest"):
            (loss, _), gradients = jax.jit(self._function)(self._views)
        return {"loss": float(loss), "gradient 1": np.asarray(gradients[0]), "gradient 2": np.asarray(gradients[1])}


class Tokens(OnJax):
    """A text tokenised into a new cache."""

    def __init__(self, model: str, text: str, length: int) -> None:
        self._tokenizer = hf.load_tokenizer(model)
        self._text, self._length = text, length

    def run(self) -> dict[str, int]:
        """Reads the text, tokenises it and writes the cache; gives the number and the sum of its tokens."""
        with tempfile.TemporaryDirectory(prefix="benchmark-") as cache:
            corpus = open_corpus(DataConfig(train=self._text))
            table = tokenize_corpus(corpus, self._tokenizer, self._length, cache, progress=False)
            return {"tokens": len(table.ids), "sum of ids": int(table.ids.sum(dtype=np.int64))}

    check = run


class Batches(OnJax):
    """An epoch of padded batches from the token cache, on the host."""

    def __init__(self, model: str, text: str, length: int, cache: str, batch_size: int) -> None:
        corpus = open_corpus(DataConfig(train=text))
        self._table = tokenize_corpus(corpus, hf.load_tokenizer(model), length, cache, progress=False)
        self._order = EpochOrder(len(self._table), batch_size, SEED)

    def run(self) -> dict[str, int]:
        """All batches, in the order of a run; gives the number and the sum of their tokens."""
        tokens, total = 0, 0
        for step in range(self._order.steps_per_epoch):
            batch = load_rows(self._table, self._order, step, slice(None))
            valid = np.asarray(batch.valid)
            tokens += int(np.asarray(batch.lengths)[valid].sum())
            total += int(np.asarray(batch.input_ids)[valid].sum(dtype=np.int64))
        return {"tokens": tokens, "sum of ids": total}

    check = run


