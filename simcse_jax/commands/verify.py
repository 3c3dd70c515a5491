"""`simcse-jax verify`."""

import os
from dataclasses import dataclass
from typing import Annotated

import tyro

from simcse_jax.commands.options import Command
from simcse_jax.errors import InputError


@dataclass(frozen=True)
class Verify(Command):
    """Say what of runs, exports, indexes and token caches is whole, what made it, and whether it can be repeated."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH [PATH ...]")]
    """Folders of runs, exports, saved indexes or token caches, also on an object store."""
    json: bool = False
    """Print JSON."""

    keeps_programs = False

    def run(self) -> None:
        """Prints a report of each folder; ends with status 1 where something is damaged."""
        import json
        from dataclasses import asdict

        # A run may be training on the same device, and needs its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from simcse_jax.inference.verification import inspect

        if not self.paths:
            raise InputError("no path given: name runs, exports, indexes or token caches right after verify")
        reports = [inspect(path) for path in self.paths]
        if self.json:
            found = [asdict(r) | {"whole": r.whole, "repeatable": r.repeatable} for r in reports]
            print(json.dumps(found, indent=2))
        else:
            print("\n\n".join(map(str, reports)))
        if not all(report.whole for report in reports):
            raise SystemExit(1)
