"""Compiled programs kept between runs: JAX's persistent compilation cache, in a folder of this machine's own."""

import hashlib
import os
import platform
from pathlib import Path

import jax

FOLDER = Path("~/.cache/simcse_jax/programs")
MAX_BYTES = 4 * 2**30


def keep_programs() -> None:
    """Turns the cache on, unless it is on already; to be called before anything is compiled.

    `JAX_COMPILATION_CACHE_DIR` in the environment names another folder and `JAX_ENABLE_COMPILATION_CACHE=false` does
    without, as for any JAX program; a folder that cannot be written is none. The least recently used programs go when
    there are more than 4 GiB of them.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = FOLDER.expanduser() / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def machine() -> str:
    """The architecture and a digest of what the CPU is able to.

    XLA compiles for the instructions of the CPU it runs on, and runs what another compiled after no more than a
    warning: nodes of a cluster that share a home folder must not share these programs.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    else:
        # Not all of it: the clock varies. `flags` are x86's, `Features` ARM's.
        telling = ("model name", "flags", "Features")
        lines = sorted({line for line in lines if line.partition(":")[0].strip() in telling})
    return f"{platform.machine()}-{hashlib.sha256(repr(lines).encode()).hexdigest()[:12]}"
