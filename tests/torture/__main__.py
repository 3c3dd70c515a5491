"""`python -m tests.torture`."""

import os

# Before anything is imported: a process that forks must have no threads, and programs for tests compile in a third.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
for _name in ("JAX_COMPILATION_CACHE_DIR", "SIMCSE_DATA", "PYTHONWARNINGS"):
    os.environ.pop(_name, None)

from tests.torture.campaign import main  # noqa: E402

if __name__ == "__main__":
    main()
