"""What importing costs, and which way imports point."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from simcse_jax.cli import COMMANDS

PACKAGE = Path(__file__).parents[1] / "simcse_jax"

# Modules from the bottom up: each may import only from lower levels.
LEVELS = [
    ["batch", "chunks", "errors", "flops", "hlo", "noise", "plots", "rng", "vectors"],
    ["collectives", "files", "kernels", "nearest", "poolers", "preemption", "topology"],
    ["config", "metrics_log", "model", "programs", "recognise", "speed", "storage", "tables", "tracking"],
    ["hf", "mirror", "objectives", "optimizer", "sharding"],
    ["masked"],
    ["loss"],
    ["step", "run", "postprocess"],
    ["checkpoint", "data"],
    ["encode"],
    ["embedder", "index"],
    ["tool"],
    ["evaluation"],
    ["export", "memory", "replace_words"],
    ["monitor", "plan", "prepare", "run_figures"],
    ["train"],
    ["ablation", "analysis", "serve", "study"],
    ["commands"],
    ["cli"],
    ["__main__", "__init__"],
]


def module_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def imports_of(path: Path) -> list[str]:
    """Full names of all that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from simcse_jax import hf` imports the module hf.
            whole = node.module == "simcse_jax"
            names += [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports_of(path):
        if name.startswith("simcse_jax") and (other := module_of(name)) in level and other != own:
            assert level[other] < level[own] or other == "__init__", f"{own} imports {other}"
        if name.split(".")[0] == "flax":
            assert own == "model", f"{own} imports flax"
    if own == "objectives":
        assert not any(name.startswith(("simcse_jax.runtime.mesh", "simcse_jax.model")) for name in imports_of(path))


def test_every_module_has_a_level() -> None:
    known = {name for names in LEVELS for name in names}
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == known


LIGHT = ("cli", "train", "embedder", "tool", "evaluation.suite", "evaluation.mteb")


@pytest.mark.parametrize("module", ["simcse_jax", *(f"simcse_jax.{name}" for name in LIGHT)])
def test_importing_loads_no_other_framework(module: str) -> None:
    heavy = "torch", "matplotlib", "datasets", "tensorflow", "tensorflow_datasets", "transformers", "pyarrow", "sklearn"
    heavy += "tensorboardX", "wandb", "fsspec.implementations", "s3fs", "gcsfs"
    heavy += "faiss", "fastapi", "uvicorn", "pydantic"
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


# Their settings stand beside the code that uses them.
HEAVY = ("ablate", "postprocess")


@pytest.mark.parametrize(
    "words",
    [(), ("--help",), ("trian",), ("data",), ("data", "inspec"), ("train", "nothing")]
    + [(*name.split(), "--help") for name in COMMANDS if name not in HEAVY],
    ids=" ".join,
)
def test_a_command_pays_for_what_it_uses(words: tuple[str, ...]) -> None:
    """What is answered without a model imports none of the packages that a model needs."""
    heavy = {"jax", "flax", "orbax", "optax", "scipy", "transformers"}
    if len(words) < 2:
        heavy.add("numpy")
    code = f"""
import sys
from simcse_jax.cli import main
try:
    main({list(words)})
except SystemExit:
    print(*[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""


def test_public_names_exist() -> None:
    import simcse_jax

    for names in LEVELS:
        for name in names:
            importlib.import_module(f"simcse_jax.{name}".removesuffix(".__init__"))
    for name in simcse_jax.__all__:
        assert not isinstance(getattr(simcse_jax, name), ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        simcse_jax.nothing  # noqa: B018
