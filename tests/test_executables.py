"""Compiled steps kept between runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh

from simcse_jax import executables, memory, programs
from simcse_jax.batch import Batch, Packing
from simcse_jax.config import CheckpointConfig, Config, DataConfig, EvaluationConfig
from simcse_jax.embedder import build_model, init_params
from simcse_jax.errors import InputError
from simcse_jax.memory import CompiledStep, compile_step
from simcse_jax.model import read_encoder_config
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.sharding import make_mesh, put_batch
from simcse_jax.step import create_state
from tests.conftest import TINY_BERT

CONFIG = Config(batch_size=16, data=DataConfig(train="unused", max_length=12))
MODEL = build_model(read_encoder_config(TINY_BERT | {"num_hidden_layers": 1}), CONFIG.model)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Programs are kept here, as the commands keep them."""
    used = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setattr(programs, "FOLDER", tmp_path)
    jax.config.update("jax_compilation_cache_dir", None)
    programs.keep_programs()
    reset_cache()  # JAX opens its cache once
    yield tmp_path / programs.machine()
    jax.config.update("jax_compilation_cache_dir", used)
    reset_cache()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An element for each step that is traced."""
    found: list[int] = []
    trace = memory.trace_step

    def counted(*arguments: Any) -> Any:
        found.append(1)
        return trace(*arguments)

    monkeypatch.setattr(memory, "trace_step", counted)
    return found


def mesh_of(devices: int = 1, fsdp: int = 1) -> Mesh:
    return make_mesh(devices=jax.devices()[:devices], fsdp=fsdp)


def compiled(config: Config = CONFIG, mesh: Mesh | None = None) -> CompiledStep:
    return compile_step(config, MODEL, mesh or mesh_of(), 1, 10)


def steps(step: CompiledStep, mesh: Mesh) -> tuple[list[float], bool]:
    """Losses and gradient norms of three steps, and whether the state given was donated."""
    optimizer = make_optimizer(CONFIG.optimizer, learning_rate_schedule(CONFIG.optimizer, 10))
    state = first = create_state(CONFIG, mesh, lambda: init_params(MODEL, 0), optimizer)
    ids = np.random.default_rng(0).integers(5, 100, (16, 1, 12), np.int32)
    batch = Batch(ids, np.full((16, 1, 1), 12, np.int32), np.ones(16, bool))
    placed = put_batch(mesh, 16, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    figures: list[float] = []
    for _ in range(3):
        state, metrics = step.function(state, placed)
        figures += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return figures, all(x.is_deleted() for x in jax.tree.leaves(first.params))


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (8, 1), (8, 2)])
def test_a_kept_step_is_the_step(folder: Path, traced: list[int], devices: int, fsdp: int) -> None:
    mesh = mesh_of(devices, fsdp)
    fresh = compiled(mesh=mesh)
    assert len(list(folder.glob("step-*"))) == len(traced) == 1
    kept = compiled(mesh=mesh)
    assert len(traced) == 1
    assert (kept.flops, kept.memory, kept.needed) == (fresh.flops, fresh.memory, fresh.needed)
    expected, donated = steps(fresh, mesh)
    assert donated
    assert len(set(expected)) == 6
    assert steps(kept, mesh) == (expected, donated)


def file_of(config: Config = CONFIG, mesh: Mesh | None = None, model: Any = MODEL, **more: Any) -> Path | None:
    """Where a step is kept."""
    arguments = {"columns": 1, "total_steps": 10, "vocabulary": None, "packing": None} | more
    return memory._kept_file(config, model, mesh or mesh_of(), **arguments)


def test_settings_that_no_step_depends_on(folder: Path) -> None:
    other = replace(CONFIG, output="elsewhere", log_every=3, checkpoint=CheckpointConfig(every=7))
    other = replace(other, evaluation=EvaluationConfig(every=5), data=replace(CONFIG.data, train="another"))
    file = file_of(replace(other, model=replace(CONFIG.model, path="another")))
    assert file == file_of()
    assert file
    assert file.parent == folder


def test_all_else_tells_steps_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [
        replace(CONFIG, seed=1),
        replace(CONFIG, micro_batch=4),
        replace(CONFIG, optimizer=replace(CONFIG.optimizer, learning_rate=1e-3)),
        replace(CONFIG, objective=replace(CONFIG.objective, temperature=0.1)),
        replace(CONFIG, objective=replace(CONFIG.objective, options={"margin": 0.2})),
        replace(CONFIG, data=replace(CONFIG.data, max_length=13)),
    ]
    files = [file_of(), *map(file_of, changed)]
    files += [file_of(mesh=mesh_of(*axes)) for axes in ((4, 1), (4, 2))]
    files += [file_of(model=MODEL.clone(**{name: True})) for name in ("remat", "mlp_only_train")]
    files += [file_of(model=build_model(MODEL.config, replace(CONFIG.model, dropout=0.2)))]
    files += [file_of(**{name: 3}) for name in ("columns", "total_steps")]
    files += [file_of(vocabulary=Vocabulary(4, (0,), 100)), file_of(packing=Packing(24, 2, 8))]
    with jax.default_matmul_precision("highest"):
        files.append(file_of())
    for name, value in {"_FLAGS": ("HOME",), "version": lambda name: "0", "_SOURCE": ""}.items():
        monkeypatch.setattr(executables, name, value)
        files.append(file_of())
    flags = folder / "flags"
    for text in ("--xla_cpu_enable_fast_math=true", "--xla_cpu_enable_fast_math=false"):
        monkeypatch.setattr(executables, "_FLAGS", ("XLA_FLAGS",))
        monkeypatch.setenv("XLA_FLAGS", str(flags))
        flags.write_text(text)
        files.append(file_of())
    assert None not in files
    assert len(set(files)) == len(files)


def test_what_follows_from_more_is_not_kept(folder: Path) -> None:
    assert file_of()
    assert file_of(replace(CONFIG, micro_batch="auto")) is None
    own = replace(CONFIG, objective=replace(CONFIG.objective, loss="mine:loss"))
    assert file_of(own) is None


def test_a_kept_step_that_no_longer_fits(folder: Path, traced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled()
    monkeypatch.setattr(memory, "available_memory", lambda mesh: 1000)
    with pytest.raises(InputError, match=r"a step of 16 examples, 16 encoded at a time, takes .* are available"):
        compiled()
    assert len(traced) == 1


def add_one() -> jax.stages.Compiled:
    """Compiled here: what JAX's cache gave cannot be written again."""
    with programs.without_cache():
        return jax.jit(lambda x: x + 1).lower(1.0).compile()


def test_a_damaged_file_is_none(folder: Path) -> None:
    devices = jax.devices()[:1]
    file = executables.place("x + 1", devices)
    assert file
    assert executables.find(file, devices) is None
    executables.keep(file, add_one(), "about it")
    found = executables.find(file, devices)
    assert found
    assert (float(found[0](2.0)), found[1]) == (3.0, "about it")
    assert list(folder.glob("step-*")) == [file]
    for damaged in (b"", b"no program", file.read_bytes()[:-1000]):
        file.write_bytes(damaged)
        assert executables.find(file, devices) is None


def test_nothing_is_kept_where_none_is_wanted_or_can_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = jax.devices()[:1]
    file = executables.place("x + 1", devices)
    assert file
    compiled = add_one()
    folder.rename(folder.with_name("gone"))
    executables.keep(file, compiled, None)
    folder.with_name("gone").rename(folder)

    def refused(executable: Any) -> Any:
        raise ValueError("Compilation does not support serialization")

    def full(self: Path, target: Path) -> Path:
        raise OSError("No space left on device")

    for place, name, failing in ((executables.serialize_executable, "serialize", refused), (Path, "replace", full)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing)
            executables.keep(file, compiled, None)
    for name, value in {"enable_compilation_cache": False, "compilation_cache_dir": f"{folder}/of-the-user"}.items():
        used = jax.config.values[f"jax_{name}"]
        jax.config.update(f"jax_{name}", value)
        assert executables.place("x + 1", devices) is None
        jax.config.update(f"jax_{name}", used)
    assert executables.place("x + 1", devices) == file
    assert not list(folder.glob("step-*"))
    assert not list(folder.glob("partial-*"))
