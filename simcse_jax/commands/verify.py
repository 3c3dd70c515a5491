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
        """Prints a report of each folder; ends with status 1 where something is damaged.

        Raises:
          InputError: a path is none of these; the reports of the others are printed.
        """
        import json
        from dataclasses import asdict

        # A run may be training on the same device, and needs its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from simcse_jax.inference.verification import inspect

        if not self.paths:
            raise InputError("no path given: name runs, exports, indexes or token caches right after verify")
        reports = []
        problems: list[str] = []
        for path in self.paths:
            try:
                reports.append(inspect(path))
            except InputError as error:
                problems += error.args
        if self.json:
            found = [asdict(r) | {"whole": r.whole, "repeatable": r.repeatable} for r in reports]
            print(json.dumps(found, indent=2))
        elif reports:
            print("\n\n".join(map(str, reports)))
        if problems:
            raise InputError(*problems)
        if not all(report.whole for report in reports):
            raise SystemExit(1)
