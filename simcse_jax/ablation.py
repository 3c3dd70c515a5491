"""Ablations: one run a variant of a config and seed, and a table of what became of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from simcse_jax.config import Config
from simcse_jax.errors import InputError
from simcse_jax.files import local_only, write_text, writing
from simcse_jax.objectives import check_objective
from simcse_jax.run import Run, changes, is_run, open_run
from simcse_jax.sharding import join_processes
from simcse_jax.tables import Row, markdown_table, write_csv
from simcse_jax.train import TrainingDiverged, train


@dataclass(frozen=True)
class Ablation:
    """Runs that differ from one config in a few named settings."""

    base: Config = field(default_factory=Config)
    """What all runs share; its output and seed are the ablation's to set."""
    variants: Annotated[dict[str, dict[str, Any]], tyro.conf.Suppress] = field(default_factory=dict)
    """For each variant by name, the settings that it changes, e.g. {"model.dropout": 0.0}."""
    paper: Annotated[dict[str, float], tyro.conf.Suppress] = field(default_factory=dict)
    """What the paper reports for some of them."""
    output: str = "runs/ablation"
    """Folder of the runs, <variant>/seed<seed>, and of the table of all that are done. Those are not done again."""
    only: tuple[str, ...] = ()
    """Variants to run; all where empty."""
    seeds: tuple[int, ...] = (42,)
    """A run of each variant with each."""

    def chosen(self) -> dict[str, dict[str, Any]]:
        """The variants to run.

        Raises:
          InputError: an unknown variant, or a setting that a config does not have.
        """
        if unknown := [name for name in self.only if name not in self.variants]:
            raise InputError(f"no variant {', '.join(unknown)}; there are {', '.join(self.variants)}")
        if not self.seeds or not self.variants or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds is {list(self.seeds)}, variants are {len(self.variants)}: one or more, each once")
        return {name: self.variants[name] for name in self.only or self.variants}

    def config(self, name: str, seed: int) -> Config:
        """The run of a variant and seed."""
        config: Config = with_settings(self.base, self.variants[name])
        return replace(config, seed=seed, output=str(local_only(self.output) / name / f"seed{seed}"))


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """A dataclass with dotted fields set.

    Raises:
      InputError: a field that it does not have.
    """
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if not is_dataclass(config) or isinstance(config, type) or head not in {f.name for f in fields(config)}:
            raise InputError(f"{type(config).__name__} has no setting '{head}' (in '{name}')")
        value = with_settings(getattr(config, head), {rest: value}) if rest else value
        config = replace(config, **{head: value})
    return config


def run_ablation(ablation: Ablation) -> str | None:
    """Trains the runs that are not done, and writes table.md and ablation.csv.

    Returns:
      The table of all runs in the folder that are done, named or not ("" on other processes than the first); None
      where a signal stopped a run: the same call continues.

    Raises:
      InputError: see `prepare`; all configs are looked at before the first is trained.
    """
    cells = [(name, seed) for name in ablation.chosen() for seed in ablation.seeds]
    for name, seed in cells:
        config = ablation.config(name, seed)
        config.validate()
        check_objective(config.objective)
    join_processes(ablation.base.multi_host)
    first = jax.process_index() == 0
    diverged: dict[tuple[str, int], Row] = {}
    for number, (name, seed) in enumerate(cells, 1):
        config = ablation.config(name, seed)
        if first:
            tqdm.write(f"run       {number} of {len(cells)}: {name}, seed {seed}")
        try:
            # A run that is done is compared with the settings and the text as they are now, and not trained again.
            if "stopped" in train(config):
                return None
        except TrainingDiverged as error:
            diverged[name, seed] = {"variant": name, "seed": seed, "diverged": str(error)}
    if not first:  # the first process writes what is read here
        return ""
    rows = [row for name in ablation.variants for row in _rows(ablation, name, diverged)]
    table = format_rows(rows, ablation.paper)
    folder = local_only(ablation.output)
    with writing(folder / "ablation.csv"):
        write_csv(folder / "ablation.csv", rows)
    with writing(folder / "table.md"):
        write_text(folder / "table.md", table + "\n")
    return table


def _rows(ablation: Ablation, name: str, diverged: Mapping[tuple[str, int], Row]) -> list[Row]:
    """What became of a variant's runs by seed: those that diverged just now, and all in the folder that have ended."""
    rows = {seed: row for (variant, seed), row in diverged.items() if variant == name}
    for folder in (local_only(ablation.output) / name).glob("seed*"):
        if not is_run(folder):
            continue
        try:
            run = open_run(folder)
        except InputError as error:
            tqdm.write(f"left out  {error}")
            continue
        seed = run.config.seed
        if seed in rows or folder.name != f"seed{seed}" or not run.has_ended():
            continue
        config = ablation.config(name, seed)
        # The text may move between calls of one run, but runs side by side are of one text.
        others = ["data.train"] if run.config.data.train != config.data.train else []
        if changed := changes(run.config, config) + others:
            tqdm.write(f"left out  {folder}, a run with other {', '.join(changed)}")
            continue
        rows[seed] = {"variant": name, "seed": seed, **_measures(run)}
    return [rows[seed] for seed in sorted(rows)]


def _measures(run: Run) -> Row:
    """The dev scores of a run, its last alignment and uniformity on the dev task, and its test average."""
    lines = [json.loads(line) for line in run.metrics_file.read_text("utf-8").splitlines()]
    dev = [line for line in lines if "dev" in line]
    results = run.results()
    measures: Row = {"start": dev[0]["dev"], "best": results["dev"], "last": dev[-1]["dev"]} if dev else {}
    measures |= {n: dev[-1][f"dev_{n}"] for n in ("alignment", "uniformity") if dev}
    # A run that stops early may end before the first line is due.
    if losses := [line["loss"] for line in lines if "loss" in line]:
        measures["loss"] = losses[-1]
    return measures | ({"test": results["after"]["Avg."]} if "after" in results else {})


COLUMNS = {
    "start": "dev before",
    "best": "dev, best",
    "last": "dev, last",
    "test": "test average",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "loss": "loss",
}


def format_rows(rows: list[Row], paper: Mapping[str, float]) -> str:
    """A Markdown table: a line a variant, mean ± standard deviation over seeds."""
    shown = [c for c in COLUMNS if any(c in row for row in rows)]
    head = ["variant", "seeds", *(COLUMNS[c] for c in shown), *(["paper"] if paper else [])]
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name and "diverged" not in row]
        none = "–" if mine else "diverged"
        figures = ([row[c] for row in mine if c in row] for c in shown)
        cells = [name, str(len(mine)), *(_mean(values) if values else none for values in figures)]
        if paper:
            cells.append(f"{paper[name]:.1f}" if name in paper else "")
        lines.append(cells)
    return markdown_table(head, lines)


def _mean(values: list[float]) -> str:
    digits = 2 if max(map(abs, values)) >= 0.1 else 4
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
