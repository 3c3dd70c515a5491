"""`simcse-jax study`."""

import shlex
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from simcse_jax.commands.options import Configured
from simcse_jax.config.load import load_variable
from simcse_jax.runs.quiet import quiet_orbax
from simcse_jax.study import Study as StudySettings


@dataclass(frozen=True)
class StudyCommand(Configured):
    """Train over a grid of batch × learning-rate rule × seed, or continue; write table, figures and report."""

    config_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Python file that defines `study`, or the name of one that comes with the package: study_batch_size,
    study_negatives."""
    study: Annotated[StudySettings, tyro.conf.arg(name="")] = field(default_factory=StudySettings)

    @classmethod
    def from_file(cls, file: str) -> "StudyCommand":
        """The command with the settings of a config file."""
        return cls(file, load_variable(file, "study", StudySettings))

    def run(self) -> None:
        """Runs the cells that are not done yet."""
        import jax

        from simcse_jax.study.run import run_study

        quiet_orbax()
        results = run_study(self.study)
        if jax.process_index() != 0:
            return
        if "stopped" in results:
            done, name = results["done"], results["stopped"]
            print(f"{done} cells are done, stopped in {name} and saved; the same command continues")
        else:
            print(f"{results['cells']} cells are done; the report is {shlex.quote(results['report'])}")
