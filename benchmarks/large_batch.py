"""Time and memory of large global batches: tiled against dense InfoNCE, micro-batches against the batch at once.

    python -m benchmarks.large_batch tiled              # tiled against dense, alternately, where dense fits
    python -m benchmarks.large_batch micro-batch        # a step in chunks against the step at once, alternately
    python -m benchmarks.large_batch loss               # the tiled loss alone, forward and backward
    python -m benchmarks.large_batch memory             # by the compiler's account; computes nothing
    python -m benchmarks.large_batch step --train wiki.txt    # one optimisation step of a run at 65,536
    python -m benchmarks.large_batch step --batch-size 1048576 --micro-batch 1024 --size.layers 12 --size.width 768 \
        --dtype bfloat16                                      # one of BERT-base at 1,048,576, on a GPU

Ratios are of neighbouring measurements; the tables give their median and range.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.ours import OnJax
from benchmarks.timing import alternate, seconds, spread
from benchmarks.work import DTYPES, QUICK, Size, training_text
from simcse_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, ObjectiveConfig
from simcse_jax.data.batch import Batch
from simcse_jax.data.demo import minilm_folder
from simcse_jax.model.build import build_model, init_params
from simcse_jax.objectives import Pairs, dense, info_nce, tiled
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer, save_tokenizer
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.training.compiled_step import compile_step
from simcse_jax.training.loss import BLOCK_SIZES
from simcse_jax.training.spec import StepSpec, create_state
from simcse_jax.training.trainer import train


def compiled_loss(rows: int, width: int, pairs: Pairs) -> jax.stages.Compiled:
    """Loss, metrics and gradients of two views as one program."""

    def loss(z: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return info_nce(*z, temperature=0.05, pairs=pairs)

    shape = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower((shape, shape)).compile()


def vectors(rows: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Two views of random sentences, of cosine about 0.7."""
    first, other = (jax.random.normal(key, (rows, width)) for key in jax.random.split(jax.random.key(0)))
    return first, first + other


def print_times(functions: Mapping[str, Callable[[], Any]], repeats: int) -> None:
    """Prints the time of each function, called in turn, and its ratio to the first."""
    measured = alternate({name: partial(seconds, function) for name, function in functions.items()}, repeats)
    for name, m in measured.items():
        ratio = f"{spread(m.ratios)} × {next(iter(measured))}" if m.ratios else ""
        print(f"{name:<16} {statistics.median(m.seconds):8.2f} s   {ratio}")


def peak() -> str:
    """The most memory that was held, of the accelerator's or else by the process, in words."""
    return f"peak {OnJax().peak() / 1e9:.2f} GB"


@dataclass
class Tiled:
    """Forward and backward of the loss, tiled against dense."""

    rows: tuple[int, ...] = (256, 1024, 4096, 16384)
    widths: tuple[int, ...] = (384, 768)
    repeats: int = 5

    def run(self) -> None:
        """Prints a table for each size."""
        block = BLOCK_SIZES[jax.devices()[0].platform]
        for rows in self.rows:
            for width in self.widths:
                z = vectors(rows, width)
                ways: dict[str, Pairs] = {"dense": dense, f"tiled {block}": partial(tiled, block=block)}
                programs = {name: compiled_loss(rows, width, pairs) for name, pairs in ways.items()}
                (value, _), gradients = programs["dense"](z)
                for name, program in programs.items():
                    (other, _), others = program(z)
                    both = zip((value, *gradients), (other, *others), strict=True)
                    error = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in both)
                    assert error < 5e-6, f"{name} computes something else"
                del gradients, others
                print(f"\n{rows:,} rows of width {width}")
                print_times({name: partial(program, z) for name, program in programs.items()}, self.repeats)


def step_config(batch_size: int, micro_batch: int, layers: int) -> tuple[Config, Any]:
    """A run of a random encoder of MiniLM's width, and its module."""
    config = Config(batch_size=batch_size, micro_batch=micro_batch, data=DataConfig(train="random", max_length=32))
    config = replace(config, model=ModelConfig(random_init=True, mlp_only_train=True))
    encoder = replace(read_checkpoint(str(minilm_folder())).config, num_hidden_layers=layers)
    return config, build_model(encoder, config.model)


@dataclass
class MicroBatch:
    """One optimisation step of an encoder of MiniLM's width, in chunks against at once."""

    batch_size: int = 256
    micro_batches: tuple[int, ...] = (128, 64, 32)
    layers: int = 6
    repeats: int = 5

    def run(self) -> None:
        """Prints the ratios."""
        mesh, n = make_mesh(devices=jax.devices()[:1]), self.batch_size
        ids = jax.random.randint(jax.random.key(0), (n, 1, 32), 1000, 20000)
        batch = Batch(ids, jnp.full((n, 1, 1), 32), jnp.ones(n, bool))
        steps = {}
        for size in (n, *self.micro_batches):
            config, model = step_config(n, size, self.layers)
            spec = StepSpec(config, model, mesh, 1, 100)
            step = compile_step(spec)
            state = create_state(spec, partial(init_params, model, 0))

            def advance(step: Any = step, held: list[Any] = [state]) -> Any:  # noqa: B006  the state is donated
                held[0], metrics = step.function(held[0], batch)
                return metrics

            name = "at once" if size == n else f"chunks of {size}"
            steps[name] = advance
            print(f"{name:<16} {(step.needed or 0) / 1e9:8.2f} GB")
        losses = [float(advance()["loss"]) for advance in steps.values()]
        assert max(losses) - min(losses) < 1e-4 * max(losses), losses
        print_times(steps, self.repeats)


@dataclass
class Loss:
    """The tiled loss alone, forward and backward."""

    rows: int = 131072
    width: int = 384

    def run(self) -> None:
        """Prints its time, once."""
        program = compiled_loss(self.rows, self.width, partial(tiled, block=BLOCK_SIZES[jax.devices()[0].platform]))
        z = vectors(self.rows, self.width)
        taken = seconds(lambda: program(z))
        rate = 8 * self.rows**2 * self.width / taken / 1e9
        print(f"{self.rows:,} rows of width {self.width}: {taken:.1f} s, {rate:.0f} GFLOP/s, {peak()}")


@dataclass
class Memory:
    """The memory of the compiled programs on one device, by the compiler's account."""

    def run(self) -> None:
        """Prints the tables."""
        print("loss, forward and backward: GB of arguments, results, temporaries")
        for rows, width, name, pairs in (
            (16384, 768, "dense", dense),
            (65536, 768, "dense", dense),
            (65536, 768, "tiled", partial(tiled, block=1024)),
            (131072, 768, "tiled", partial(tiled, block=1024)),
            (1048576, 768, "tiled", partial(tiled, block=1024)),
        ):
            used: Any = compiled_loss(rows, width, pairs).memory_analysis()
            sizes = (used.argument_size_in_bytes, used.output_size_in_bytes, used.temp_size_in_bytes)
            print(f"{rows:>9,} × {width} {name}  " + "  ".join(f"{size / 1e9:8.3f}" for size in sizes))
        print("step of a 6-layer encoder of width 384, chunks of 64: GB in all")
        for batch_size in (64, 1024, 4096, 16384, 65536):
            config, model = step_config(batch_size, 64, layers=6)
            config = replace(config, objective=ObjectiveConfig(implementation="tiled"))
            needed = compile_step(StepSpec(config, model, make_mesh(devices=jax.devices()[:1]), 1, 100)).needed
            print(f"{batch_size:>9,}  {(needed or 0) / 1e9:8.3f}")


@dataclass
class Step:
    """One optimisation step of a run with a random encoder: by default of 2 layers of width 128."""

    train: Path | None = None
    """Text file, one sentence per line, at least `batch_size` of them; made-up sentences of 32 tokens where None."""
    batch_size: int = 65536
    micro_batch: int = 256
    size: Size = QUICK
    dtype: DTYPES = "float32"

    def run(self) -> None:
        """Prints the time and memory of the step."""
        width = self.size.width
        sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = read_checkpoint(str(minilm_folder()))
            save_tokenizer(load_tokenizer(checkpoint.folder), Path(folder) / "model")
            about = {**checkpoint.hf_config, **sizes, "num_hidden_layers": self.size.layers}
            (Path(folder) / "model" / "config.json").write_text(json.dumps(about))
            text = self.train or training_text("padded", self.batch_size, 32, Path(folder))
            results = train(
                Config(
                    output=f"{folder}/run",
                    batch_size=self.batch_size,
                    micro_batch=self.micro_batch,
                    max_steps=1,
                    log_every=1,
                    model=ModelConfig(path=f"{folder}/model", random_init=True, mlp_only_train=True, dtype=self.dtype),
                    data=DataConfig(train=str(text), max_length=32, cache=f"{folder}/tokens"),
                    checkpoint=CheckpointConfig(keep=1),
                )
            )
            print((Path(folder) / "run" / "metrics.jsonl").read_text().strip())
        print(f"{results['seconds']:.1f} s; {results['memory'] / 1e9:.2f} GB by the compiler's account; {peak()}")


Command = Tiled | MicroBatch | Loss | Memory | Step


def parse(arguments: list[str]) -> Command:
    """The command that the arguments name, ready to `run`."""
    return tyro.cli(Command, description=__doc__, args=arguments)


if __name__ == "__main__":
    parse(sys.argv[1:]).run()
