"""`simcse-jax train`."""

import shlex
import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from simcse_jax.config import Config


@dataclass(frozen=True)
class Train:
    """Train a model, or continue the run in the output folder."""

    config_file: tyro.conf.Positional[str]
    """Python file that defines `config`, or the name of a config that comes with the package."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    stopped_status: int = 0
    """Exit status where a signal ended the run early, saved: e.g. 75, for a scheduler that is to start it again."""

    def run(self) -> None:
        """Trains and prints the scores."""
        import logging

        import jax

        from simcse_jax.evaluation.sts import format_table
        from simcse_jax.train import TrainingDiverged, train

        # Where a checkpoint cannot be written, orbax logs a traceback of each of its threads and then raises, too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        try:
            results = train(self.config)
        except TrainingDiverged as error:
            print(f"simcse-jax: training diverged: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if "stopped" in results:
            if jax.process_index() == 0:
                print(f"stopped at step {results['stopped']:,} and saved; the same command continues")
            raise SystemExit(self.stopped_status)
        if jax.process_index() != 0:
            return
        if results["best_step"] is not None:
            print(f"best dev score {results['dev']:.2f} at step {results['best_step']:,}")
        if "after" in results:
            print("Spearman × 100, test")
            print(format_table({moment: results[moment] for moment in ("before", "after")}))
        output = shlex.quote(self.config.output)
        print(f"run in {output}; export it with: simcse-jax export {output} OUT")
