"""How runs start: programs that the processes of a job share, memory of GPUs, and presets of XLA's options."""

import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from simcse_jax.config import Config
from simcse_jax.errors import InputError
from simcse_jax.runtime.mesh import PRESETS, batch_sharding, compiler_options, make_mesh, replicated
from simcse_jax.training.job import joined
from simcse_jax.xla.topology import devices_of, parse_topology
from tests.jobs import Job

MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")

COMPILE = """
import sys
import jax, jax.numpy as jnp
from simcse_jax.config import Config
from simcse_jax.runtime.mesh import make_mesh, put, replicated
from simcse_jax.training.job import joined

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
with joined(Config(compilation_cache=sys.argv[1])):
    mesh = make_mesh()
    print(float(jax.jit(lambda x: (x @ x).sum())(put(jnp.ones((64, 64)), replicated(mesh)))))
    found = [name.rpartition("/")[2] for name in events if "cache_" in name]
print("hits", found.count("cache_hits"), "misses", found.count("cache_misses"))
"""


@pytest.mark.full
def test_a_job_that_starts_again_compiles_nothing(tmp_path: Path) -> None:
    """Process 0 writes the programs, and reads them. To JAX the CPUs of another process are other devices, unlike GPUs
    and TPUs: the programs of those are not asked for here."""
    counts = []
    for start in ("first", "again"):
        with Job(2, ["-c", COMPILE, str(tmp_path / "programs")], tmp_path / start) as job:
            assert job.ends(120) == [0, 0], job.said()
            counts.append([int(count) for count in job.log(0).splitlines()[-1].split()[1::2]])
    (hits, misses), again = counts
    assert (hits, misses > 0) == (0, True)
    assert again == [misses, 0]


def test_memory_of_gpus_is_set_before_jax_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.devices()
    for name in MEMORY:
        monkeypatch.setenv(name, "of the user")
    config = Config(gpu_memory=0.9, gpu_preallocate=False)
    with pytest.raises(InputError, match=r"come too late.*MEM_FRACTION=0\.9 and XLA_PYTHON_CLIENT_PREALLOCATE=false"):
        joined(config).__enter__()
    assert [os.environ[name] for name in MEMORY] == ["of the user"] * 2
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with joined(config):
        assert [os.environ[name] for name in MEMORY] == ["0.9", "false"]
        assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ  # JAX refuses both
    with joined(Config(gpu_memory=1.5)):  # refused later, with all that is wrong
        assert os.environ[MEMORY[0]] == "0.9"
    monkeypatch.undo()
    with joined(Config()):
        pass


def test_a_folder_of_programs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, message in {str(tmp_path / "file" / "programs"): "file", "s3://bucket/programs": "gs://"}.items():
        with pytest.raises(InputError, match=message), joined(Config(compilation_cache=folder)):
            pass


def test_programs_are_shared_in_the_block_alone(tmp_path: Path) -> None:
    before = jax.config.values["jax_compilation_cache_dir"]
    with joined(Config(compilation_cache=str(tmp_path / "programs"))):
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "programs")
        jax.jit(lambda x: x * 2 + len(str(tmp_path)))(1.5)
    assert jax.config.values["jax_compilation_cache_dir"] == before
    kept = sorted((tmp_path / "programs").iterdir())
    assert kept
    jax.jit(lambda x: x * 3 - len(str(tmp_path)))(1.5)
    assert sorted((tmp_path / "programs").iterdir()) == kept


def test_presets_are_off_by_default_and_not_for_cpus() -> None:
    assert not Config().xla_preset
    assert compiler_options(make_mesh(devices=jax.devices()[:1]), preset=True) is None


@pytest.mark.release
@pytest.mark.parametrize(("topology", "package"), [("v5e:2x2", "libtpu"), ("h100:2", "jax_cuda13_plugin")])
def test_compilers_know_their_presets(topology: str, package: str) -> None:
    """And refuse what they do not know, so that a preset that has become wrong is found."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package}, which compiles for {topology}, is not installed")
    target = parse_topology(topology)
    assert target.chip
    mesh = make_mesh(devices=devices_of(target))
    x = jax.ShapeDtypeStruct((8 * mesh.size, 128), jnp.float32, sharding=batch_sharding(mesh))
    whole: NamedSharding = replicated(mesh)
    traced = jax.jit(lambda x: (x @ x.T).sum(0), out_shardings=whole).lower(x)
    preset = compiler_options(mesh, preset=True)
    assert preset == PRESETS[mesh.devices.flat[0].platform]
    traced.compile(compiler_options=target.chip.options | preset)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        traced.compile(compiler_options=target.chip.options | {f"{next(iter(preset))}_": True})
