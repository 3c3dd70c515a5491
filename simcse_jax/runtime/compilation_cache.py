"""Compiled programs kept between runs: JAX's persistent compilation cache, in one folder per machine."""

import grp
import hashlib
import os
import platform
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from simcse_jax.errors import InputError, warn
from simcse_jax.runtime.provenance import cores
from simcse_jax.storage.files import CACHE, check_writable_folder, expanded, is_remote, make_folder
from simcse_jax.storage.objects import open_store

FOLDER = Path(CACHE, "programs")
MAX_BYTES = 4 * 2**30
MAX_FILES = 10_000

_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_programs() -> None:
    """Turns the cache on, unless it is on already; call it before anything is compiled.

    `JAX_COMPILATION_CACHE_DIR` in the environment names another folder and `JAX_ENABLE_COMPILATION_CACHE=false` turns
    the cache off, as for any JAX program. A folder that cannot be written is not used; nor is one that others can
    write, because programs are native code. The oldest programs are removed beyond 4 GiB or 10,000 files.
    """
    ours = _ours()
    if _setting() or ours is None:
        return
    folder = ours / machine()
    try:
        make_folder(ours.parent)
        ours.mkdir(0o700, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
        if other := next((place for place in (folder, ours, ours.parent) if _is_of_others(place)), None):
            warn(
                f"compiled programs are not kept: {other} belongs to another user or can be written by others, who "
                "could put programs of their own there; close it to them (chmod go-w), or name a folder with "
                "JAX_COMPILATION_CACHE_DIR"
            )
            return
        _prune(folder)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        _keep_in(str(folder))


def _keep_in(folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    if _LEAST not in os.environ:
        # JAX's own limit, a second, leaves out the dozens of small programs that a command compiles.
        jax.config.update(_LEAST.lower(), 0)


def drop_programs() -> None:
    """Turns the cache off again, unless the user named the folder: for jobs of several processes.

    Only the first process writes to the cache. Where the processes share no home folder or run on several kinds of
    CPU, the others would still compile while the first already waits for them.
    """
    folder = _setting()
    if folder is not None and Path(folder).parent == _ours():
        jax.config.update("jax_compilation_cache_dir", None)


@contextmanager
def shared_programs(folder: str) -> Iterator[None]:
    """A block that keeps compiled programs in a folder of the user's, which all processes of a job see.

    Process 0 writes there. "" changes nothing.

    Args:
      folder: a path, or gs://.

    Raises:
      InputError: a local folder that cannot be made, or written; another store; or the package for gs:// is missing.
    """
    if not folder:
        yield
        return
    if is_remote(folder):
        if not folder.startswith("gs://"):
            raise InputError(f"compilation_cache is {folder}: give a folder that all processes share, or one on gs://")
        open_store(folder)
    else:
        folder = str(expanded(folder).absolute())
        check_writable_folder(Path(folder))
        make_folder(Path(folder))
    before = _setting()
    try:
        _keep_in(folder)
        reset_cache()  # JAX decides once where its cache is
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()


@contextmanager
def without_cache() -> Iterator[None]:
    """Turns JAX's cache off for the block; JAX otherwise uses it for all programs of a process or for none."""
    used = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # JAX decides once whether it has a cache
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        reset_cache()


def machine() -> str:
    """The architecture, with a digest of the CPU's features and of the number of cores this process may use.

    XLA compiles for the instructions and the number of cores of its machine, and runs a program that another machine
    compiled after no more than a warning: nodes of a cluster that share a home folder must not share these programs.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    else:
        # Not all of it: the clock varies. `flags` are x86's, `Features` ARM's.
        telling = ("model name", "flags", "Features")
        lines = sorted({line for line in lines if line.partition(":")[0].strip() in telling})
    about = (lines, cores(), os.environ.get("NPROC"))
    return f"{platform.machine()}-{hashlib.sha256(repr(about).encode()).hexdigest()[:12]}"


def _is_of_others(folder: Path) -> bool:
    """Whether others than this user and the system's could put a file, which JAX would run, into a folder."""
    about = folder.stat()
    of_group = about.st_mode & stat.S_IWGRP and not _is_own(about.st_gid)
    return about.st_uid not in (0, os.geteuid()) or bool(of_group or about.st_mode & stat.S_IWOTH)


def _is_own(group: int) -> bool:
    """Whether a group is that of this user alone, to which many systems let new folders be open."""
    try:
        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user and {user}.issuperset(found.gr_mem)


def _ours() -> Path | None:
    """The folder of the programs; None without a home folder."""
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
    size, count = sum(about.st_size for about, _ in files), len(files)
    for about, path in sorted(files, key=lambda file: file[0].st_mtime):
        if size <= MAX_BYTES and count <= MAX_FILES:
            return
        path.unlink(missing_ok=True)
        size, count = size - about.st_size, count - 1
