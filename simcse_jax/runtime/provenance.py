"""The code, packages and devices that a folder comes from, kept with it so that they can be compared later."""

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import xxhash

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)
_CODE = Path(__file__).parents[1]

NOT_COMPARED = ("revision", "simcse-jax")
"""Names in `provenance` of what changes no bit where `source` is the same."""


@cache
def software() -> dict[str, str]:
    """Version, source digest and git revision of this package, where there are such, and versions of others."""
    ours = {"simcse-jax": _version("simcse-jax"), "source": _source(), "revision": _revision()}
    found = ours | {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    return {name: x for name, x in found.items() if x}


def provenance() -> dict[str, str]:
    """`software`, the devices, and the settings of XLA and JAX that change bits. Starts the devices."""
    first = jax.devices()[0]
    kind = f"{processor()} with {cores()} cores" if first.platform == "cpu" else first.device_kind
    settings = [f"{name}={getattr(jax.config, name)}" for name in ("jax_enable_x64", "jax_default_matmul_precision")]
    # Without what is dumped, and without the folders of this machine, which exports would name.
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_dump")]
    return software() | {
        "devices": f"{jax.device_count()} x {kind}",
        "driver": first.client.platform_version.splitlines()[-1],
        "processes": str(jax.process_count()),
        "settings": " ".join([*settings, *(re.sub("=/.*/", "=", flag) for flag in flags)]),
    }


def _version(package: str) -> str:
    """The version of a package; "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _source() -> str:
    """A digest of the package's code, by which an edited clone differs from the version that it names."""
    found = xxhash.xxh3_128()
    for file in sorted(_CODE.rglob("*.py")):
        found.update(f"{file.relative_to(_CODE).as_posix()}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def _revision() -> str:
    """The commit of the clone that the code is in; "" outside of one."""
    if not (_CODE.parent / ".git").exists():
        return ""
    try:
        words = ["git", "-C", str(_CODE.parent), "rev-parse", "HEAD"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def processor() -> str:
    """The processor's name: XLA's code for CPUs follows from its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
