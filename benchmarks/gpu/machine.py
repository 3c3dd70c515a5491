"""What the machine is: its GPU, devices and versions.

python -m benchmarks.gpu.machine
"""

import shutil
import subprocess
import sys

import psutil

from benchmarks.report import provenance


def main() -> int:
    """Prints it; returns 1 where there is a GPU that JAX does not see: every other part would measure the CPU."""
    about = provenance()
    about["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    for name in ("date", "commit", "cpu", "cores", "memory", "load", "devices", "versions"):
        print(f"{name:<9} {about[name]}", flush=True)
    if shutil.which("nvidia-smi") is None:
        print("no nvidia-smi here")
        return 0
    found = subprocess.run(["nvidia-smi"]).returncode == 0
    if found and "gpu" not in about["devices"]["jax"]:
        print("error: JAX does not see the GPU: install jax[cuda13] or jax[cuda12]", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
