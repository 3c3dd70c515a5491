"""`simcse-jax ablate`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from simcse_jax.ablation.settings import Ablation
from simcse_jax.commands.options import Configured
from simcse_jax.config.load import load_variable
from simcse_jax.runs.quiet import quiet_orbax


@dataclass(frozen=True)
class Ablate(Configured):
    """Train the variants of a config, each with each seed, or continue; print and write the table."""

    config_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Python file that defines `ablation`, or the name of one that comes with the package, e.g. dropout."""
    ablation: Annotated[Ablation, tyro.conf.arg(name="")] = field(default_factory=Ablation)

    @classmethod
    def from_file(cls, file: str) -> "Ablate":
        """The command with the settings of a config file."""
        return cls(file, load_variable(file, "ablation", Ablation))

    def run(self) -> None:
        """Trains the runs that are not done yet."""
        from simcse_jax.ablation.run import run_ablation

        quiet_orbax()
        table = run_ablation(self.ablation)
        print("stopped and saved; the same command continues" if table is None else table)
