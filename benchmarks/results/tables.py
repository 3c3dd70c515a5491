"""The sections of the report, from the records of its cells."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.results.cells import Cell, Figures, Records
from benchmarks.results.experiments import (
    MAIN,
    MODELS,
    POSTPROCESSED,
    RATES,
    SIDES,
    TRANSFER,
    UNTRAINED,
    Scale,
    ablation_cell,
    ablations,
    cells_of,
    equivalence_cell,
    main_cell,
    postprocessed_cell,
    untrained_cell,
)
from benchmarks.results.statistics import difference, is_equivalent
from simcse_jax.evaluation.bootstrap import interval
from simcse_jax.evaluation.sts import STS_TASKS
from simcse_jax.evaluation.transfer_tasks import TRANSFER_TASKS
from simcse_jax.reports.tables import markdown_table, mean_sd

SHORT = {"STSBenchmark": "STS-B", "SICKRelatedness": "SICK-R"}
MARGIN = 1.0
"""Points within which two trainers count as equivalent."""


@dataclass(frozen=True)
class Found:
    """The records of a report's cells."""

    records: Records
    scale: Scale
    rate: float

    def figures(self, cells: Iterable[Cell]) -> list[Figures]:
        """The figures of those cells that are measured."""
        return [figures for cell in cells if (figures := self.records.read(cell)) is not None]

    def row(self, name: str) -> list[Figures]:
        """The figures of a row of the ladder, by seed."""
        if name in UNTRAINED:
            return self.figures([untrained_cell(name)])
        if name in POSTPROCESSED:
            return self.figures([postprocessed_cell(name)])
        seeds = self.scale.seeds_of("ladder")
        return self.figures(main_cell(name, seed, self.scale, self.rate) for seed in seeds)

    def variant(self, config: str, changes: dict[str, Any], text: str = "wiki") -> list[Figures]:
        """The figures of a variant of an ablation, by seed."""
        seeds = self.scale.seeds_of("ablations")
        return self.figures(ablation_cell(config, changes, seed, self.scale, self.rate, text) for seed in seeds)

    def side(self, model: str, side: str) -> list[Figures]:
        """The figures of a trainer, by seed."""
        seeds = self.scale.seeds_of("equivalence")
        return self.figures(equivalence_cell(model, side, seed, self.scale) for seed in seeds)


def averages(rows: list[Figures]) -> list[float]:
    """The averages over the seven tasks."""
    return [row["sts"]["Avg."] for row in rows if row.get("sts", {}).get("Avg.") is not None]


def of_task(rows: list[Figures], task: str) -> str:
    """Mean ± standard deviation of a task, or of their average."""
    return mean_sd([row["sts"][task] for row in rows if row["sts"][task] is not None])


def runs_of(rows: list[Figures]) -> str:
    """The number of runs, and of those that diverged."""
    diverged = sum("diverged" in row for row in rows)
    return f"{len(rows) - diverged}" + (f", {diverged} diverged" if diverged else "")


def best_on_dev(rows: list[Figures]) -> list[float]:
    """The best scores on STS-B dev."""
    return [row["best"] for row in rows if row.get("best") is not None]


def rates(found: Found) -> str:
    """STS-B dev by learning rate."""
    cells = cells_of("learning_rate", found.scale, found.rate)
    scores = [mean_sd(best_on_dev(found.figures([cell]))) for cell in cells]
    return markdown_table(["learning rate", *(f"{x:g}" for x in RATES)], [["STS-B dev, best", *scores]])


def ladder(found: Found) -> str:
    """The seven tasks, row by row."""
    names = {**dict.fromkeys(UNTRAINED), **dict.fromkeys(POSTPROCESSED), **dict.fromkeys(MAIN)}
    lines = []
    for name in names:
        measured = found.row(name)
        rows = [row for row in measured if "sts" in row]
        label = f"{name} of the first-last average" if name in POSTPROCESSED else name
        scores = [row["dev"] if "dev" in row else row["best"] for row in rows]
        dev = mean_sd([score for score in scores if score is not None])
        lines.append(
            [label, runs_of(measured), dev, *(of_task(rows, t) for t in (*STS_TASKS, "Avg.")), _interval(rows)]
        )
    tasks = [SHORT.get(task, task) for task in STS_TASKS]
    return markdown_table(["", "runs", "STS-B dev", *tasks, "average", "95 % over pairs"], lines)


def _interval(rows: list[Figures]) -> str:
    """The interval of the mean over seeds, by resamples of the pairs that all seeds share."""
    drawn = [row["resamples"] for row in rows if row.get("resamples")]
    low, high = interval(np.mean(np.array(drawn, float), axis=0)) if drawn else (None, None)
    return "–" if low is None or high is None else f"{low:.1f} to {high:.1f}"


def transfer(found: Found) -> str:
    """The transfer tasks."""
    lines = []
    for name in ("first-last average", *TRANSFER):
        scores = [row["transfer"] for row in found.row(name) if "transfer" in row]
        tasks = [mean_sd([x[t] for x in scores if x[t] is not None]) for t in (*TRANSFER_TASKS, "Avg.")]
        lines.append([name, str(len(scores)), *tasks])
    return markdown_table(["", "runs", *TRANSFER_TASKS, "average"], lines)


def ablated(found: Found) -> str:
    """A table per ablation: STS-B dev, of the variants that are measured."""
    sections = []
    for ablation in ablations():
        lines = []
        for name, changes in ablation.variants.items():
            if not (rows := found.variant(ablation.base_name, changes, ablation.text)):
                continue
            fine = [row for row in rows if "diverged" not in row]
            last = [row["path"][-1] for row in fine if row["path"]]
            figures = [
                mean_sd(best_on_dev(fine)),
                mean_sd([x[1] for x in last]),
                mean_sd([x[2] for x in last if x[2] is not None], 3),
                mean_sd([x[3] for x in last if x[3] is not None], 3),
            ]
            paper = f"{ablation.paper[name]:.1f}" if name in ablation.paper else ""
            lines.append([name, runs_of(rows), *figures, paper])
        head = [ablation.name.replace("_", " "), "runs", "dev, best", "dev, last", "alignment", "uniformity", "paper"]
        sections += [markdown_table(head, lines)] * bool(lines)
    return "\n\n".join(sections) or "No variant is measured yet."


def equivalence(found: Found) -> str:
    """Both trainers beside each other, and the test of their equivalence."""
    lines, tests = [], []
    for model, label in MODELS.items():
        sides = {side: found.side(model, side) for side in SIDES}
        for side, measured in sides.items():
            rows = [row for row in measured if "sts" in row]
            scores = [of_task(rows, task) for task in (*STS_TASKS, "Avg.")]
            dev = mean_sd([max(score for _, score in row["path"]) for row in rows])
            seconds = mean_sd([row["seconds"] / row["steps"] for row in rows if row["steps"]])
            peak = mean_sd([row["peak"] / 1e9 for row in rows])
            lines.append([f"{label}, {SIDES[side]}", runs_of(measured), dev, *scores, seconds, peak])
        ours, theirs = (averages(sides[side]) for side in ("jax", "torch"))
        if min(len(ours), len(theirs)) > 1:
            apart = difference(ours, theirs)
            low, high = apart.interval(0.9)
            word = "equivalent" if is_equivalent(apart, MARGIN) else "not shown to be equivalent"
            close = "within" if abs(apart.mean) <= MARGIN / 2 else "not within"
            untrained = sum(_best_step(row) == 0 for rows in sides.values() for row in rows if "path" in row)
            tests.append(
                f"- {label}: ours − PyTorch {apart.mean:+.2f}, {close} {MARGIN / 2:g}; 90 % interval {low:+.2f} to "
                f"{high:+.2f}: {word} within ±{MARGIN:g} (two one-sided tests at 5 %). In {untrained} runs STS-B dev "
                "chose the model before training."
            )
    tasks = [SHORT.get(task, task) for task in STS_TASKS]
    head = ["", "runs", "STS-B dev, best", *tasks, "average", "seconds per step", "peak, GB"]
    paths = _paths(found)
    return "\n\n".join([markdown_table(head, lines), *(["\n".join(tests)] if tests else []), *paths])


def _best_step(row: Figures) -> int:
    return int(max(row["path"], key=lambda point: point[1])[0])


def _paths(found: Found) -> list[str]:
    """STS-B dev during training, by trainer."""
    tables = []
    for model, label in MODELS.items():
        lines, steps = [], list[int]()
        for side, name in SIDES.items():
            rows = [row for row in found.side(model, side) if "path" in row]
            steps = steps or [step for row in rows[:1] for step, _ in row["path"]]
            scores = [mean_sd([dict(row["path"])[step] for row in rows if step in dict(row["path"])]) for step in steps]
            lines.append([name, *scores])
        if steps:
            tables.append(markdown_table([f"STS-B dev, {label}, step", *map(str, steps)], lines))
    return tables
