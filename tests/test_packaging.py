"""What users install: a wheel and a source archive, built from a copy of the sources."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import simcse_jax

pytestmark = pytest.mark.release
ROOT = Path(__file__).parents[1]


def files_of(package: Path) -> set[str]:
    """All that a folder of the sources holds, as a wheel names it."""
    found = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def python(*arguments: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that is built from it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("simcse_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python(
        "-c", "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])", output, cwd=source
    )
    (archive,) = output.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(source / "unpacked", filter="data")
    (unpacked,) = (source / "unpacked").iterdir()
    python(
        "-c", "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])", output, cwd=unpacked
    )
    return output


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    """Modules, configs, py.typed, and data files of any kind; nothing of the tests or benchmarks."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"simcse_jax-{simcse_jax.__version__}.dist-info/METADATA").decode()
    expected = {f"simcse_jax/{name}" for name in files_of(ROOT / "simcse_jax")}
    expected |= {f"simcse_jax/configs/{name}" for name in files_of(ROOT / "configs")}
    assert names == expected
    assert {"simcse_jax/py.typed", "simcse_jax/configs/quickstart.py", "simcse_jax/data/demo_sts_test.tsv"} <= names
    # Dependencies are read from requirements.txt, their reasons left out.
    assert "Requires-Dist: jax>=0.10.2\n" in metadata
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(f"Provides-Extra: {name}\n" in metadata for name in extras)


def test_the_installed_wheel_runs_from_another_folder(built: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the dependencies of this one."""
    venv.create(tmp_path / "venv", symlinks=True)
    (wheel,) = built.glob("*.whl")
    fresh = tmp_path / "venv" / "bin"
    python(
        "-m",
        "pip",
        "--python",
        fresh / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        wheel,
    )
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv")}))
    (own / "borrowed.pth").write_text("\n".join(folders) + "\n")

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def says(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    asked = says(fresh / "python", "-c", "import simcse_jax; print(simcse_jax.__version__, simcse_jax.__file__)")
    assert asked == f"{simcse_jax.__version__} {own / 'simcse_jax' / '__init__.py'}\n"
    assert "--optimizer.learning-rate" in says(fresh / "simcse-jax", "train", "sup_bert_base", "--help")
