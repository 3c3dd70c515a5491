"""report.md: the findings of a study, in sentences that its figures support and no others."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.reports.paths import portable
from simcse_jax.reports.tables import Row, formatted, markdown_table, write_csv
from simcse_jax.study.figures import write_figures
from simcse_jax.study.grid import Cell, Study
from simcse_jax.study.table import mean_sd, rows_of, slope, values

_CAPTIONS = {
    "score": "Score against batch.",
    "path": "Alignment and uniformity on the dev pairs, evaluation by evaluation.",
    "hardness": "Hardness of the negatives and false negatives against batch.",
    "dynamics": "Gradient noise scale, speed and memory against batch.",
}
_TABLE = {
    "dev": ("dev", 2),
    "test": ("test average", 2),
    "alignment": ("alignment", 3),
    "uniformity": ("uniformity", 3),
    "loss": ("loss", 4),
    "effective_negatives": ("effective negatives", 1),
    "false_negatives": ("false negatives an anchor", 4),
    "noise_scale_before": ("noise scale before", 0),
    "noise_scale": ("noise scale after", 0),
    "seconds": ("seconds", 0),
    "memory_bytes": ("memory, MB", 0),
}
_SLOPES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "effective_negatives": ("effective negatives", np.log2, "exponent"),
    "false_negatives": ("false negatives an anchor", np.log2, "exponent"),
    "noise_scale_before": ("noise scale before training", np.log2, "exponent"),
    "noise_scale": ("noise scale at the selected parameters", np.log2, "exponent"),
    "loss": ("loss", lambda x: x, "each doubling"),
    "alignment": ("alignment", lambda x: x, "each doubling"),
    "uniformity": ("uniformity", lambda x: x, "each doubling"),
}


Condition = tuple[np.ndarray, int, str]
"""Dev scores of a batch and rule, one per seed."""


def write_report(study: Study, measures: dict[Cell, dict[str, Any]], before: dict[str, float | None]) -> None:
    """Writes study.csv, the figures and report.md into the study folder.

    Args:
      study: the study.
      measures: the measures of each cell.
      before: test scores before training.
    """
    rows = rows_of(study, measures)
    write_csv(study.folder / "study.csv", rows)
    figures = write_figures(study, rows, measures, before)
    sections = [
        "# Batch-size study",
        _setting(study, rows),
        "## What was found",
        "\n".join(f"- {sentence}" for sentence in findings(study, rows, before)),
        "## By batch and rule",
        f"Mean ± standard deviation over seeds ({len(study.seeds)}). The run at the reference batch is the same for "
        "all rules. Every figure of every run is in [study.csv](study.csv).",
        _table(study, rows),
        "## How figures move with the batch",
        "Least squares over runs, ± standard error. *Exponent*: p in figure ∝ batch^p. *Each doubling*: what a batch "
        "twice as large adds.",
        _slopes(study, rows),
        *(f"## {_CAPTIONS[name]}\n\n![{_CAPTIONS[name]}]({name}.png)" for name in figures),
    ]
    partial = study.folder / ".report.md.partial"
    partial.write_text("\n\n".join(sections) + "\n", "utf-8")
    partial.replace(study.folder / "report.md")


def _setting(study: Study, rows: list[Row]) -> str:
    base = study.base
    budget = f"{study.sentences:,} examples" if study.sentences else f"{study.steps:,} steps"
    reference = portable(study.reference_model or base.model.path)
    noise = (
        f"gradients of {study.noise_scale_batches} batches"
        f"{f' (or as many as fit in {study.noise_scale_sentences:,} examples)' if study.noise_scale_sentences else ''}"
        if study.noise_scale_batches
        else "not measured"
    )
    pooler = base.model.pooler or "its own"
    return "\n".join(
        [
            f"- model {portable(base.model.path)}, pooler {pooler}, length {base.data.max_length}",
            f"- text {portable(base.data.train)}",
            f"- budget of each run: {budget}",
            f"- batches {_list(study.batch_sizes)}; seeds {_list(study.seeds)}; {len({r['cell'] for r in rows})} runs",
            f"- learning rate {base.optimizer.learning_rate:g} at batch {study.reference_batch_size}, at others by "
            f"rule ({_list(study.rules)}); temperature {base.objective.temperature:g}",
            f"- checkpoint selected by {Path(base.evaluation.dev).stem} (dev); test average over "
            f"{_list(Path(t).stem for t in base.evaluation.test)}",
            f"- false negatives: cosine above {study.false_negative_threshold:g} under the frozen model {reference}",
            f"- gradient noise scale: {noise}",
        ]
    )


def findings(study: Study, rows: list[Row], before: dict[str, float | None]) -> list[str]:
    """The findings about scores, spread and selection, in sentences."""
    runs = {r["cell"]: r for r in rows}
    diverged = [name for name, r in runs.items() if "diverged" in r]
    sentences = [f"{len(diverged)} of {len(runs)} runs diverged: {', '.join(diverged)}."] if diverged else []
    scored: dict[tuple[str, int], Condition] = {}
    for b in sorted(study.batch_sizes):
        for rule in study.rules:
            if len(x := values(rows, "dev", batch_size=b, rule=rule)):
                scored[study.cell(b, rule, 0).rule, b] = (x, b, rule)
    if not scored:
        return [*sentences, "No run has a dev score."]
    conditions = list(scored.values())
    best, batch, best_rule = max(conditions, key=lambda c: float(np.mean(c[0])))
    test = values(rows, "test", batch_size=batch, rule=best_rule)
    start = _spread(mean_sd(values(rows, "dev_before"))[0], math.nan, 2), formatted("{:.2f}", before["Avg."])
    sentences.append(
        f"Highest mean dev score: {_condition(study, batch, best_rule)}, {_spread(*mean_sd(best), 2)}, with a test "
        f"average of {_spread(*mean_sd(test), 2)}. Before training: dev {start[0]}, test {start[1]}."
    )
    sentences.append(_selection(runs, study))
    sentences += _differences(study, conditions, best)
    sentences += _trade(study, rows)
    return sentences


def _selection(runs: dict[str, Row], study: Study) -> str:
    first = sum(r.get("best_step") == 0 for r in runs.values())
    last = sum(r.get("best_step") == r["steps"] for r in runs.values())
    return (
        f"The dev score selected the untrained model in {first} of {len(runs)} runs and the last step in {last}"
        f"{'; for those the budget, not the batch, may set the score' if last else ''}."
    )


def _differences(study: Study, conditions: list[Condition], best: np.ndarray) -> list[str]:
    """Whether the differences between conditions exceed the spread over seeds."""
    spread = [float(np.var(x, ddof=1)) for x, _, _ in conditions if len(x) > 1]
    means = [float(np.mean(x)) for x, _, _ in conditions]
    span = max(means) - min(means)
    if not spread:
        return [f"Mean dev scores span {span:.2f}; with one seed there is no spread to hold this against."]
    sd = math.sqrt(float(np.mean(spread)))
    near = [
        _condition(study, b, rule)
        for x, b, rule in conditions
        if x is not best and np.mean(best) - np.mean(x) <= 2 * sd * math.sqrt(1 / len(best) + 1 / len(x))
    ]
    error = 2 * sd * math.sqrt(2 / len(best))
    verdict = "exceeds" if span > error else "does not exceed"
    return [
        f"Mean dev scores of the {len(conditions)} conditions span {span:.2f}; the standard deviation over seeds, "
        f"pooled, is {sd:.2f}. The span {verdict} two standard errors of a difference ({error:.2f}; a rough yardstick "
        f"with {len(best)} seeds: the highest and lowest of many differ by chance, too).",
        f"Within two standard errors of the highest: {_list(near)}."
        if near
        else "No other condition is within two standard errors of the highest.",
    ]


def _trade(study: Study, rows: list[Row]) -> list[str]:
    """The figures that move with the batch, at its first and last size, in words."""
    small, large = min(study.batch_sizes), max(study.batch_sizes)
    if small == large:
        return []
    sentences = []
    for name, (label, digits) in _TABLE.items():
        if name in ("dev", "test", "seconds", "memory_bytes"):
            continue
        a, b = (mean_sd(values(rows, name, batch_size=size)) for size in (small, large))
        if not math.isnan(a[0] + b[0]):
            sentences.append(
                f"{label[0].upper()}{label[1:]}: {_spread(*a, digits)} at batch {small:,}, "
                f"{_spread(*b, digits)} at batch {large:,} (over rules and seeds){_trend(rows, name)}."
            )
    return sentences


def _trend(rows: list[Row], name: str) -> str:
    """The trend of a figure with the batch, over the runs of all rules, in words."""
    _, transform, kind = _SLOPES[name]
    fit = slope(rows, name, transform)
    if fit is None:
        return ""
    by = f"{fit[0]:.3f} ± {fit[1]:.3f}"
    return f"; fitted, as the batch to the power {by}" if kind == "exponent" else f"; fitted, {by} at {kind}"


def _condition(study: Study, batch: int, rule: str) -> str:
    return f"batch {batch:,}" + ("" if batch == study.reference_batch_size else f" with the {rule} rule")


def _table(study: Study, rows: list[Row]) -> str:
    names = [name for name in _TABLE if len(values(rows, name))]
    lines = []
    for b in sorted(study.batch_sizes):
        at_reference = b == study.reference_batch_size
        for rule in study.rules[:1] if at_reference else study.rules:
            row = next(r for r in rows if (r["batch_size"], r["rule"]) == (b, rule))
            figures = [_spread(*mean_sd(_shown(rows, n, b, rule)), _TABLE[n][1]) for n in names]
            label = "all" if at_reference else rule
            lines.append([f"{b:,}", label, f"{row['learning_rate']:.3g}", f"{row['steps']:,}", *figures])
    return markdown_table(["batch", "rule", "learning rate", "steps", *(_TABLE[name][0] for name in names)], lines)


def _shown(rows: list[Row], name: str, batch: int, rule: str) -> np.ndarray:
    found = values(rows, name, batch_size=batch, rule=rule)
    return found / 1e6 if name == "memory_bytes" else found


def _slopes(study: Study, rows: list[Row]) -> str:
    lines = []
    for name, (label, transform, kind) in _SLOPES.items():
        fits = [slope([r for r in rows if r["rule"] == rule], name, transform) for rule in study.rules]
        if any(fits):
            lines.append([label, kind, *("–" if fit is None else f"{fit[0]:.3f} ± {fit[1]:.3f}" for fit in fits)])
    return markdown_table(["figure", "kind", *study.rules], lines) if lines else "Too few runs for a fit."


def _spread(mean: float, sd: float, digits: int) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:,.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:,.{digits}f}")


def _list(items: Any) -> str:
    return ", ".join(f"{item:,}" if isinstance(item, int) and item > 9999 else str(item) for item in items)
