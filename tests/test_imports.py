"""What importing costs, and which way imports point."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from simcse_jax.cli import COMMANDS

PACKAGE = Path(__file__).parents[1] / "simcse_jax"

# A wing (a package or module of the root) imports only from lines above its own.
RULE = """
errors noise rng
poolers storage xla
config reports runtime
model objectives
pretrained
data postprocess runs
inference
evaluation serve
training analysis
plan ablation study
commands
cli
__init__ __main__
"""
LEVEL = {wing: number for number, line in enumerate(RULE.split("\n")) for wing in line.split()}

# Wings that stand apart from others above them, and libraries that one wing alone imports.
APART = {"model": {"runtime"}, "objectives": {"model", "runtime"}, "xla": {"noise", "poolers", "rng", "storage"}}
OWNED = {"flax": "model"}


def wing_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from simcse_jax import rng` imports the module rng.
            whole = node.module == "simcse_jax"
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if whole else [node.module]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = wing_of(path)
    for name in imports_of(path):
        if name.split(".")[0] != "simcse_jax":
            owner = OWNED.get(name.split(".")[0], own)
            assert owner == own, f"{own} imports {name}, which {owner} alone may"
            continue
        other = name.split(".")[1]
        if other in (own, "configs"):  # configs/ holds data: Python files that are run
            continue
        assert other in LEVEL, f"{own} imports {name}, which is no wing"
        assert LEVEL[other] < LEVEL[own], f"{own} imports {name} from a line that is not above its own"
        assert other not in APART.get(own, ()), f"{own} imports {name}, from which it stands apart"


def test_the_rule_names_every_wing() -> None:
    assert {wing_of(path) for path in FILES} == set(LEVEL)


def test_files_are_short() -> None:
    """One concept each: none of 400 lines, half of them under 150."""
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES)
    assert lengths[-1] < 400
    assert lengths[len(lengths) // 2] < 150


LIGHT = (
    *("cli", "training.trainer", "inference.loading", "inference.simcse"),
    *("evaluation.suite", "evaluation.mteb"),
)


@pytest.mark.parametrize("module", ["simcse_jax", *(f"simcse_jax.{name}" for name in LIGHT)])
def test_importing_loads_no_other_framework(module: str) -> None:
    heavy = "torch", "matplotlib", "datasets", "tensorflow", "tensorflow_datasets", "transformers", "pyarrow", "sklearn"
    heavy += "tensorboardX", "wandb", "fsspec.implementations", "s3fs", "gcsfs"
    heavy += "faiss", "fastapi", "uvicorn", "pydantic"
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


@pytest.mark.parametrize(
    "words",
    [(), ("--help",), ("--version",), ("trian",), ("data",), ("data", "inspec"), ("train", "nothing")]
    + [("train", "quickstart", "--lr"), ("configs", "--json"), ("configs", "sup_bert_base")]
    + [(*name.split(), "--help") for name in COMMANDS],
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
    pass
finally:
    print(*[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""


def test_public_names_exist() -> None:
    """Functions and classes, also after every module was loaded."""
    import simcse_jax

    for path in FILES:
        served = wing_of(path) == "serve" and importlib.util.find_spec("fastapi") is None
        if path.name != "__main__.py" and not served:
            module = ".".join(("simcse_jax", *path.relative_to(PACKAGE).with_suffix("").parts))
            __import__(module.removesuffix(".__init__"))
    for name in simcse_jax.__all__:
        assert not isinstance(getattr(simcse_jax, name), ModuleType)
    assert {*simcse_jax.__all__} <= {*dir(simcse_jax)}  # a prompt that completes names offers them
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        simcse_jax.nothing  # noqa: B018
