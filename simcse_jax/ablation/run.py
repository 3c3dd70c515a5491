"""Training of an ablation's runs, and their table."""

from collections.abc import Mapping, Set
from pathlib import Path

import jax

from simcse_jax.ablation.settings import Ablation
from simcse_jax.errors import InputError
from simcse_jax.objectives import check_objective
from simcse_jax.reports.progress import say
from simcse_jax.reports.tables import Row, markdown_table, mean_sd, write_csv
from simcse_jax.runs.folder import Run, changes, check_outside_runs, is_run, open_run
from simcse_jax.runs.metrics_log import read_log
from simcse_jax.storage.files import check_writable_folder, local_only, write_text, writing
from simcse_jax.training.job import joined
from simcse_jax.training.prepare import check_request, load_parts
from simcse_jax.training.trainer import TrainingDiverged, train


def run_ablation(ablation: Ablation) -> str | None:
    """Trains the runs that are not done yet, and writes table.md and ablation.csv.

    Returns:
      The table of all runs in the folder that are done, also of variants not named here ("" on processes other than
      the first); None if a signal stopped a run: the same call continues.

    Raises:
      InputError: see `prepare`; all configs are checked before the first is trained, with the files they name.
    """
    cells = [(name, seed) for name in ablation.chosen() for seed in ablation.seeds]
    for name, seed in cells:
        config = ablation.config(name, seed)
        config.validate()
        check_objective(config.objective)
    output = local_only(ablation.output)
    check_writable_folder(output)
    check_outside_runs(output)
    with joined(ablation.base):
        return _run(ablation, cells, output)


def _run(ablation: Ablation, cells: list[tuple[str, int]], output: Path) -> str | None:
    for name in ablation.chosen():  # before the first is trained
        load_parts(check_request(ablation.config(name, ablation.seeds[0])))
    first = jax.process_index() == 0
    diverged: dict[tuple[str, int], Row] = {}
    for number, (name, seed) in enumerate(cells, 1):
        config = ablation.config(name, seed)
        if first:
            say(f"run       {number} of {len(cells)}: {name}, seed {seed}")
        try:
            # A run that is done is compared with the current settings and text, and not trained again.
            if "stopped" in train(config):
                return None
        except TrainingDiverged as error:
            diverged[name, seed] = {"variant": name, "seed": seed, "diverged": str(error)}
    if not first:  # the first process writes what the rest of this function reads
        return ""
    trained = {output / name / f"seed{seed}" for name, seed in cells}
    rows = [row for name in ablation.variants for row in _rows(ablation, name, diverged, trained)]
    table = format_rows(rows, ablation.paper)
    with writing(output / "ablation.csv"):
        write_csv(output / "ablation.csv", rows)
    with writing(output / "table.md"):
        write_text(output / "table.md", table + "\n")
    return table


def _rows(ablation: Ablation, name: str, diverged: Mapping[tuple[str, int], Row], trained: Set[Path]) -> list[Row]:
    """The rows of a variant's runs, by seed: those that diverged in this call, and the folder's that have ended.

    Those of `trained` have been compared with their config and with the content of what it names.
    """
    rows = {seed: row for (variant, seed), row in diverged.items() if variant == name}
    for folder in (local_only(ablation.output) / name).glob("seed*"):
        if not is_run(folder):
            continue
        try:
            run = open_run(folder)
        except InputError as error:
            say(f"left out  {error}")
            continue
        seed = run.config.seed
        if seed in rows or folder.name != f"seed{seed}" or not run.has_ended():
            continue
        config = ablation.config(name, seed)
        # The text may move between calls of one run, but all runs of a table have the same text.
        others = ["data.train"] if run.config.data.train != config.data.train else []
        if folder not in trained and (changed := changes(run.config, config) + others):
            say(f"left out  {folder}, a run with other {', '.join(changed)}")
            continue
        rows[seed] = {"variant": name, "seed": seed, **_measures(run)}
    return [rows[seed] for seed in sorted(rows)]


def _measures(run: Run) -> Row:
    """The dev scores of a run, its last alignment and uniformity on the dev task, and its test average."""
    lines = read_log(run.metrics_file)
    dev = [line for line in lines if "dev" in line]
    results = run.results()
    measures: Row = {"start": dev[0]["dev"], "best": results["dev"], "last": dev[-1]["dev"]} if dev else {}
    measures |= {n: dev[-1][f"dev_{n}"] for n in ("alignment", "uniformity") if dev}
    # A run that stops early may end before the first line of its log.
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
    """A Markdown table: one line per variant, mean ± standard deviation over seeds."""
    # A figure may be null: pairs without a high score have no alignment.
    shown = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    head = ["variant", "seeds", *(COLUMNS[c] for c in shown), *(["paper"] if paper else [])]
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name and "diverged" not in row]
        none = "–" if mine else "diverged"
        figures = ([row[c] for row in mine if row.get(c) is not None] for c in shown)
        cells = [name, str(len(mine)), *(_mean(values) if values else none for values in figures)]
        if paper:
            cells.append(f"{paper[name]:.1f}" if name in paper else "")
        lines.append(cells)
    return markdown_table(head, lines)


def _mean(values: list[float]) -> str:
    return mean_sd(values, 2 if max(map(abs, values)) >= 0.1 else 4)
