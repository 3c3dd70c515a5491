"""`simcse-jax train`."""

import shlex
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from simcse_jax.commands.options import Configured, senteval_folder
from simcse_jax.config import Config
from simcse_jax.config.load import load_config_file
from simcse_jax.runs.quiet import quiet_orbax

if TYPE_CHECKING:
    from simcse_jax.runs.folder import Run


@dataclass(frozen=True)
class Train(Configured):
    """Train a model, or continue the run in the output folder."""

    config_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Python file that defines `config`, or the name of a config that comes with the package."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check everything and compile the step, print all settings and the plan, and end without training."""
    stopped_status: int = 0
    """Exit status when a signal stops the run early, after it has saved: e.g. 75, for a scheduler to start it again."""

    @classmethod
    def from_file(cls, file: str) -> "Train":
        """The command with the settings of a config file."""
        return cls(file, load_config_file(file))

    def run(self) -> None:
        """Trains and prints the scores."""
        import jax

        from simcse_jax.evaluation.sts import format_table
        from simcse_jax.reports.tables import metric_title
        from simcse_jax.runs.folder import open_run
        from simcse_jax.storage.mirror import copy_again, working_folder
        from simcse_jax.training.trainer import TrainingDiverged, train

        if self.dry_run:
            plan = plan_of(self.config)
            if jax.process_index() == 0:
                print(plan)
            return
        quiet_orbax()
        try:
            results = train(self.config)
        except TrainingDiverged as error:
            if self.debug:
                raise
            print(f"simcse-jax: training diverged: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if "stopped" in results:
            if jax.process_index() == 0:
                print(f"stopped at step {results['stopped']:,} and saved; the same command continues")
            raise SystemExit(self.stopped_status)
        if jax.process_index() != 0:
            return
        run = open_run(working_folder(self.config.output, self.config.data.cache))
        figures = _draw(run)
        copy_again(run.folder, self.config.output)  # the figures
        if "after" in results:
            print(f"{metric_title(results.get('test_metric', 'spearman'))} × 100, test")
            print(format_table({moment: results[moment] for moment in ("before", "after") if moment in results}))
        print(summary(replace(run, config=self.config), results, figures))


def plan_of(config: Config) -> str:
    """All settings of a run and what it would do, checked as a run is; nothing but caches is written."""
    import jax

    from simcse_jax.config.values import listed
    from simcse_jax.reports.progress import telling
    from simcse_jax.runs.folder import is_run
    from simcse_jax.training.describe import describe
    from simcse_jax.training.job import joined
    from simcse_jax.training.prepare import prepare

    with joined(config), telling(quiet=jax.process_index() != 0):
        prepared = prepare(config, write=False)
    if prepared.step is None:
        end = "the run there has ended; to train anew, give another folder, e.g. --output runs/NEW"
    else:
        there = "the run there would continue" if is_run(prepared.run.folder) else "nothing was written there"
        end = f"{there}; leave out --dry-run to train"
    return "\n".join([*listed(prepared.run.config), "", describe(prepared), f"dry run   {end}"])


def _draw(run: "Run") -> list[str]:
    """Draws the figures of a run; where that fails, the run is kept and a line says why."""
    from simcse_jax.errors import reason
    from simcse_jax.runs.figures import draw_run

    try:
        return [path.stem for path in draw_run(run)]
    except Exception as error:  # a full disk, or whatever matplotlib raises
        print(f"simcse-jax: the figures could not be drawn ({reason(error)})", file=sys.stderr)
        return []


def summary(run: "Run", results: dict[str, Any], figures: list[str]) -> str:
    """The lines that say where a finished run keeps its files, and which commands take it further.

    Args:
      run: the run.
      results: from `train`.
      figures: names of the figures that were drawn.
    """
    from simcse_jax.evaluation.sts import STS_TASKS

    folder, settings = shlex.quote(run.config.output), run.config.evaluation
    data = f" --data {shlex.quote(settings.data)}" if settings.data else ""
    tasks = f" --tasks {shlex.join(settings.test)}" if settings.test and settings.test != STS_TASKS else ""
    if not (data or tasks or senteval_folder()):
        tasks = " --tasks PAIRS.tsv"
    best, untrained = "", results.get("untrained", "")
    if results["best_step"] is not None:
        best = f"dev {results.get('metric', 'spearman')} {results['dev']:.2f} at step {results['best_step']:,}"
    found = {
        "run in": f"{folder}, {results['step']:,} steps",
        "best": best,
        "metrics": f"{folder}/metrics.jsonl",
        "figures": f"{folder}/figures: {', '.join(figures)} (.png, .svg)" if figures else "",
        "results": f"{folder}/results.json",
        "tracked": f"tensorboard --logdir {folder}/tensorboard" if "tensorboard" in run.config.tracking else "",
        "evaluate": f"simcse-jax evaluate {folder}{data}{tasks}",
        "export": f"simcse-jax export {folder} OUT",
        "WARNING": untrained and f"{untrained}: simcse-jax export {folder} OUT --step latest takes the last step",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in found.items() if text)
