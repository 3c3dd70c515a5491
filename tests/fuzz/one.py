"""One target under atheris: `python -m tests.fuzz.one TARGET [libFuzzer's options and corpus folders]`."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import atheris

READ = ["simcse_jax", "numpy.lib._format_impl", "gzip"]
"""The modules whose branches count."""

with atheris.instrument_imports(include=READ):
    from tests.fuzz.mutate import mutate
    from tests.fuzz.targets import TARGETS, run_one, scratch


def main() -> None:
    """Fuzzes the target that the first argument names, until libFuzzer's options end it."""
    name, *options = sys.argv[1:]
    aim = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-", dir=scratch()) as place:
        folder = Path(place)
        with atheris.instrument_imports(include=READ):
            run_one(name, b"", folder)  # imports what the target needs

        def test(data: bytes) -> None:
            run_one(name, data, folder)

        def custom(data: bytes, most: int, seed: int) -> bytes:
            return mutate(data, most, seed, atheris.Mutate)

        # libFuzzer starts the program again by its first word, to merge a corpus.
        program = f"{sys.executable} -m tests.fuzz.one {name}"
        atheris.Setup([program, f"-max_len={aim.most}", *options], test, custom_mutator=custom)
        atheris.Fuzz()


main()
