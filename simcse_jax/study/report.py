"""report.md: the findings of a study, in sentences that its figures support and no others."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.reports.paths import portable
from simcse_jax.reports.tables import Row, formatted, markdown_table, write_csv
from simcse_jax.study.effects import effects
from simcse_jax.study.figures import write_figures
from simcse_jax.study.grid import Cell, Series, Study, in_words
from simcse_jax.study.table import mean_sd, rows_of, slope, values

_CAPTIONS = {
    "score": "Score against batch.",
    "path": "Alignment and uniformity on the dev pairs, evaluation by evaluation.",
    "hardness": "Hardness of the negatives and false negatives against batch.",
    "dynamics": "Gradient noise scale and direction, speed and memory against batch.",
    "collapse": "Spread of the test vectors against batch.",
}
_TABLE = {
    "dev": ("dev", 2),
    "test": ("test average", 2),
    "alignment": ("alignment", 3),
    "uniformity": ("uniformity", 3),
    "loss": ("loss", 4),
    "effective_negatives": ("effective negatives", 1),
    "false_negatives": ("false negatives per anchor", 4),
    "masked_share": ("masked share", 5),
    "hardest_share": ("gradient from the hardest", 3),
    "noise_scale_before": ("noise scale before", 0),
    "noise_scale": ("noise scale after", 0),
    "direction": ("gradient direction", 3),
    "effective_rank": ("effective rank", 1),
    "average_cosine": ("average cosine", 3),
    "seconds": ("seconds", 0),
    "memory_bytes": ("memory, MB", 0),
}
_SLOPES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "effective_negatives": ("effective negatives", np.log2, "exponent"),
    "false_negatives": ("false negatives per anchor", np.log2, "exponent"),
    "noise_scale_before": ("noise scale before training", np.log2, "exponent"),
    "noise_scale": ("noise scale at the selected parameters", np.log2, "exponent"),
    "loss": ("loss", lambda x: x, "each doubling"),
    "alignment": ("alignment", lambda x: x, "each doubling"),
    "uniformity": ("uniformity", lambda x: x, "each doubling"),
}


Condition = tuple[np.ndarray, int, Series]
"""Dev scores of a batch and series, one per seed."""


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
        " and ".join(["# Study of the global batch", *(name.rpartition(".")[2] for name in study.factors)]),
        _setting(study, rows),
        "## What was found",
        "\n".join(f"- {sentence}" for sentence in findings(study, rows, before)),
        "## What each setting changes",
        *_effects(study, rows),
        "## By batch",
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
    budgets = [f"{study.sentences:,} examples"] * bool(study.sentences) + [f"{study.steps:,} steps"] * bool(study.steps)
    hardest = f"{study.hardest:.0%} hardest of the negatives"
    reference = portable(study.reference_model or base.model.path)
    noise = (
        f"gradients of {study.noise_scale_batches} batches"
        f"{f' (or as many as fit in {study.noise_scale_sentences:,} examples)' if study.noise_scale_sentences else ''}"
        if study.noise_scale_batches
        else "not measured"
    )
    pooler = base.model.pooler or "its own"
    near = base.data.neighbours
    neighbours = f"; positive: one of the next {near} sentences" if near > 1 else "; positive: the next sentence" * near
    among = study.false_negative_sentences
    return "\n".join(
        [
            f"- model {portable(base.model.path)}, pooler {pooler}, length {base.data.max_length}",
            f"- text {portable(base.data.train)}{neighbours}",
            f"- budget of each run: {' or '.join(budgets)}",
            *(f"- {name}: {_list(map(in_words, values))}" for name, values in study.factors.items()),
            f"- batches {_list(study.batch_sizes)}; seeds {_list(study.seeds)}; {len({r['cell'] for r in rows})} runs",
            f"- learning rate {base.optimizer.learning_rate:g} at batch {study.reference_batch_size}, at others by "
            f"rule ({_list(study.rules)}); temperature {base.objective.temperature:g}",
            f"- checkpoint selected by {Path(base.evaluation.dev).stem} (dev); test average over "
            f"{_list(Path(t).stem for t in base.evaluation.test)}",
            f"- false negatives: cosine above {study.false_negative_threshold:g} under the frozen model {reference}"
            f"{f', counted in the first {among:,} sentences of a run' if among else ''}",
            f"- gradient noise scale: {noise}",
            f"- gradient from the hardest: the softmax weight of the {hardest if study.hardest else 'negatives: not'}"
            f"{'' if study.hardest else ' measured'}",
            "- gradient direction: "
            + (
                f"cosine of the gradient of a batch with that of {study.direction_batch:,} examples"
                if study.direction_batch
                else "not measured"
            ),
        ]
    )


def findings(study: Study, rows: list[Row], before: dict[str, float | None]) -> list[str]:
    """The findings about scores, spread and selection, in sentences."""
    runs = {r["cell"]: r for r in rows}
    diverged = [name for name, r in runs.items() if "diverged" in r]
    sentences = [f"{len(diverged)} of {len(runs)} runs diverged: {', '.join(diverged)}."] if diverged else []
    scored: dict[Cell, Condition] = {}
    for b in sorted(study.batch_sizes):
        for series in study.series:
            if len(x := values(rows, "dev", batch_size=b, series=study.label(series))):
                scored[study.cell(b, series, 0)] = (x, b, series)
    if not scored:
        return [*sentences, "No run has a dev score."]
    conditions = list(scored.values())
    best, batch, best_series = max(conditions, key=lambda c: float(np.mean(c[0])))
    test = values(rows, "test", batch_size=batch, series=study.label(best_series))
    start = _spread(mean_sd(values(rows, "dev_before"))[0], math.nan, 2), formatted("{:.2f}", before["Avg."])
    sentences.append(
        f"Highest mean dev score: {_condition(study, batch, best_series)}, {_spread(*mean_sd(best), 2)}, with a test "
        f"average of {_spread(*mean_sd(test), 2)}. Before training: dev {start[0]}, test {start[1]}."
    )
    sentences.append(_selection(runs))
    sentences += _budgets(runs, study)
    sentences += _differences(study, conditions, best)
    sentences += _trade(study, rows)
    return sentences


def _selection(runs: dict[str, Row]) -> str:
    first = sum(r.get("best_step") == 0 for r in runs.values())
    last = sum(r.get("best_step") == r["steps"] for r in runs.values())
    return f"The dev score selected the untrained model in {first} of {len(runs)} runs and the last step in {last}."


def _budgets(runs: dict[str, Row], study: Study) -> list[str]:
    """A warning for each batch at which the budget, and not the batch, may set the score."""
    sentences = []
    for b in sorted(study.batch_sizes):
        of_batch = [r for r in runs.values() if r["batch_size"] == b and "best_step" in r]
        last = sum(r["best_step"] == r["steps"] for r in of_batch)
        if 2 * last > len(of_batch):
            sentences.append(
                f"**The budget decides at batch {b:,}**: {last} of its {len(of_batch)} runs had their best dev score "
                "at the last step, and might have gone on to rise."
            )
    return sentences


def _differences(study: Study, conditions: list[Condition], best: np.ndarray) -> list[str]:
    """Whether the differences between conditions exceed the spread over seeds."""
    spread = [float(np.var(x, ddof=1)) for x, _, _ in conditions if len(x) > 1]
    means = [float(np.mean(x)) for x, _, _ in conditions]
    span = max(means) - min(means)
    if not spread:
        return [f"Mean dev scores span {span:.2f}; with one seed there is no spread to hold this against."]
    sd = math.sqrt(float(np.mean(spread)))
    near = [
        _condition(study, b, series)
        for x, b, series in conditions
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
    if name not in _SLOPES:
        return ""
    _, transform, kind = _SLOPES[name]
    fit = slope(rows, name, transform)
    if fit is None:
        return ""
    by = f"{fit[0]:.3f} ± {fit[1]:.3f}"
    return f"; fitted, as the batch to the power {by}" if kind == "exponent" else f"; fitted, {by} at {kind}"


def _condition(study: Study, batch: int, series: Series) -> str:
    label = study.label(series)
    return f"batch {batch:,}" + (f" ({label})" if label and len(study.series) > 1 else "")


def _effects(study: Study, rows: list[Row]) -> list[str]:
    """Differences in dev and test scores, with intervals over seeds."""
    found = {name: effects(study, rows, name) for name in ("dev", "test")}
    if not found["dev"]:
        return ["One condition: there is nothing to compare."]
    if len(study.seeds) < 2:
        return ["With one seed there is no noise to hold a difference against; train more seeds."]
    intervals = [effect for name in found for effect in found[name]]
    larger = sum(effect.is_larger_than_noise for effect in intervals)
    of_test = {(effect.change, effect.at): effect for effect in found["test"]}
    lines = []
    for effect in found["dev"]:
        other = of_test.get((effect.change, effect.at))
        pair = [effect] if other is None else [effect, other]
        verdicts = [x.is_larger_than_noise for x in pair]
        words = "larger than seed noise" if all(verdicts) else "not decided" if not any(verdicts) else "in one of both"
        shown = [f"{x.mean:+.2f} ± {x.half:.2f}" for x in pair] + ["–"] * (2 - len(pair))
        lines.append([effect.change, effect.at, *shown, words])
    return [
        f"Differences of scores between runs that differ in one setting, with 95 % intervals by Student's t over "
        f"{len(study.seeds)} seeds. {larger} of {len(intervals)} intervals leave out 0; about "
        f"{len(intervals) / 20:.0f} would by chance.",
        markdown_table(["change", "at", "dev", "test average", "effect"], lines),
    ]


def _table(study: Study, rows: list[Row]) -> str:
    names = [name for name in _TABLE if len(values(rows, name))]
    lines = []
    for b in sorted(study.batch_sizes):
        cells: dict[Cell, Series] = {}
        for series in study.series:
            cells.setdefault(study.cell(b, series, 0), series)
        for cell, series in cells.items():
            label = study.label(series)
            row = next(r for r in rows if (r["batch_size"], r["series"]) == (b, label))
            figures = [_spread(*mean_sd(_shown(rows, n, b, label)), _TABLE[n][1]) for n in names]
            of_reference = cell.rule == "reference" and len(study.rules) > 1
            label = label.replace(f"{series.rule} learning rate", "all rules") if of_reference else label
            lines.append([f"{b:,}", label, f"{row['learning_rate']:.3g}", f"{row['steps']:,}", *figures])
    return markdown_table(["batch", "settings", "learning rate", "steps", *(_TABLE[name][0] for name in names)], lines)


def _shown(rows: list[Row], name: str, batch: int, series: str) -> np.ndarray:
    found = values(rows, name, batch_size=batch, series=series)
    return found / 1e6 if name == "memory_bytes" else found


def _slopes(study: Study, rows: list[Row]) -> str:
    lines, labels = [], [study.label(series) for series in study.series]
    for name, (label, transform, kind) in _SLOPES.items():
        fits = [slope([r for r in rows if r["series"] == label], name, transform) for label in labels]
        if any(fits):
            lines.append([label, kind, *("–" if fit is None else f"{fit[0]:.3f} ± {fit[1]:.3f}" for fit in fits)])
    return markdown_table(["figure", "kind", *labels], lines) if lines else "Too few runs for a fit."


def _spread(mean: float, sd: float, digits: int) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:,.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:,.{digits}f}")


def _list(items: Any) -> str:
    return ", ".join(f"{item:,}" if isinstance(item, int) and item > 9999 else str(item) for item in items)
