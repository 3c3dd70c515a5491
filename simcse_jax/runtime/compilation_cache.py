"""Compiled programs kept between runs: JAX's persistent compilation cache, in a folder of this machine's own."""

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from simcse_jax.storage.files import CACHE

FOLDER = Path(CACHE, "programs")
MAX_BYTES = 4 * 2**30
MAX_FILES = 10_000

_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_programs() -> None:
    """Turns the cache on, unless it is on already; to be called before anything is compiled.

    `JAX_COMPILATION_CACHE_DIR` in the environment names another folder and `JAX_ENABLE_COMPILATION_CACHE=false` does
    without, as for any JAX program; a folder that cannot be written is none. The oldest programs go when there are
    more than 4 GiB or 10,000 files of them.
    """
    ours = _ours()
    if _setting() or ours is None:
        return
    folder = ours / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if _LEAST not in os.environ:
            # JAX's own limit, a second, leaves out the dozens of small programs that a command compiles.
            jax.config.update(_LEAST.lower(), 0)


def drop_programs() -> None:
    """Turns it off again, unless the user named the folder: for jobs of several processes.

    JAX writes from the first of them. Where they share no home or are of several kinds of CPU, the others would compile
    while the first has long gone on to wait for them.
    """
    folder = _setting()
    if folder is not None and Path(folder).parent == _ours():
        jax.config.update("jax_compilation_cache_dir", None)


@contextmanager
def without_cache() -> Iterator[None]:
    """Compiles without JAX's cache, which is otherwise used for all programs of a process or for none."""
    used = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # JAX decides once whether it has a cache
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        reset_cache()


def machine() -> str:
    """The architecture and a digest of what the CPU is able to, and of how many of its cores are ours.

    XLA compiles for the instructions and the number of the cores it runs on, and runs what another compiled, after no
    more than a warning: nodes of a cluster that share a home folder must not share these programs.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    else:
        # Not all of it: the clock varies. `flags` are x86's, `Features` ARM's.
        telling = ("model name", "flags", "Features")
        lines = sorted({line for line in lines if line.partition(":")[0].strip() in telling})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = (lines, cores, os.environ.get("NPROC"))
    return f"{platform.machine()}-{hashlib.sha256(repr(about).encode()).hexdigest()[:12]}"


def _ours() -> Path | None:
    """Where programs are kept; None without a home."""
    try:
        return FOLDER.expanduser()
    except RuntimeError:
        return None


def _setting() -> str | None:
    folder: str | None = jax.config.values["jax_compilation_cache_dir"]
    return folder


def _prune(folder: Path) -> None:
    # JAX's own limit takes a lock for every program, and a folder that a killed process left with an entry half
    # registered takes no further entries.
    files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
    size, count = sum(stat.st_size for stat, _ in files), len(files)
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
        if size <= MAX_BYTES and count <= MAX_FILES:
            return
        path.unlink(missing_ok=True)
        size, count = size - stat.st_size, count - 1
