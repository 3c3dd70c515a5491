"""The figures of a study, through matplotlib's object-oriented interface."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simcse_jax.reports import plots
from simcse_jax.reports.tables import Row
from simcse_jax.study.grid import Cell, Study
from simcse_jax.study.table import mean_sd, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "os^Dv<>P"
Draw = Callable[[list["Axes"]], None]
Panel = tuple[str, str, str, bool]
"""Measure, title, label of the axis, and whether the axis is logarithmic."""


def write_figures(
    study: Study, rows: list[Row], measures: dict[Cell, Any], before: dict[str, float | None]
) -> list[str]:
    """Writes each figure as .png and .svg.

    Args:
      study: the study; the figures go to its folder.
      rows: from `rows_of`.
      measures: measures of each cell, for the paths.
      before: test scores before training.

    Returns:
      The names of the figures, without ending; figures without measures are left out.
    """
    seeds = len(study.seeds)
    spread = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    score = [("dev", "Dev", "score × 100", False), ("test", "Test average", "Spearman × 100", False)]
    hardness = [
        ("loss", "Loss, last quarter of steps", "nats", False),
        ("effective_negatives", "Effective number of negatives", "perplexity", True),
        ("false_negatives", "False negatives per anchor", "number", True),
        ("false_negative_anchors", "Anchors with a false negative", "share", False),
        ("hardest_share", "Gradient from the hardest negatives", "share", False),
        ("masked_share", "Masked negatives", "share", False),
    ]
    dynamics = [
        ("noise_scale_before", "Gradient noise scale, before training", "examples", True),
        ("noise_scale", "Gradient noise scale, selected parameters", "examples", True),
        ("direction", "Cosine with the gradient of a large batch", "cosine", False),
        ("steps_per_second", "Speed", "steps / s", True),
        ("memory_bytes", "Memory of the step", "GB", False),
    ]
    collapse = [
        ("effective_rank", "Effective rank of the test vectors", "dimensions", False),
        ("average_cosine", "Average cosine of the test vectors", "cosine", False),
    ]
    written = []
    with plots.style():
        for name, panels, title in (
            ("score", score, "Score against global batch"),
            ("hardness", hardness, "Hardness of the negatives against global batch"),
            ("dynamics", dynamics, "Gradient noise and cost against global batch"),
            ("collapse", collapse, "Spread of the vectors against global batch"),
        ):
            panels = [panel for panel in panels if len(values(rows, panel[0]))]
            if panels:
                known = {"test": before["Avg."], "dev": mean_sd(values(rows, "dev_before"))[0]}
                baseline = {n: x for n, x in known.items() if x is not None and np.isfinite(x)}
                draw = _lines(study, rows, panels, baseline if name == "score" else {})
                _write(study.folder / name, draw, f"{title} ({spread})", len(panels))
                written.append(name)
        if any(len(m.get("path", [])) > 1 for m in measures.values()):
            draw = _paths(study, measures)
            title = "Alignment and uniformity of the dev pairs during training (× start, ● end)"
            _write(study.folder / "path", draw, title, len(study.series), share=True)
            written.append("path")
    return written


def _write(file: Path, draw: Draw, title: str, panels: int, share: bool = False) -> None:
    from matplotlib.figure import Figure

    rows = 1 if panels < 4 else 2
    columns = -(-panels // rows)
    figure = Figure(figsize=(max(4.2 * columns, 7.0), 3.4 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    draw(list(axes.flat))
    figure.suptitle(title, fontsize=12)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    for ncols in range(min(len(labels), 2 * columns), 0, -1):  # as many as the figure has room for
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
        if legend.get_window_extent().width <= figure.bbox.width or ncols == 1:
            break
        legend.remove()
    plots.save(figure, file)


def _lines(study: Study, rows: list[Row], panels: list[Panel], baseline: dict[str, float]) -> Draw:
    """One panel per measure, with one line per series; bars are the standard deviation over seeds."""
    batches = sorted(study.batch_sizes)

    def draw(axes: "list[Axes]") -> None:
        for a, (name, title, unit, logarithmic) in zip(axes, panels, strict=False):
            a.set_xscale("log", base=2)
            logarithmic = logarithmic and bool(np.all(values(rows, name) > 0))
            if logarithmic:
                plots.logarithmic(a)
            for number, label in enumerate(map(study.label, study.series)):
                # The lines stand a little apart, so that equal figures do not hide each other.
                x = np.array(batches) * 2.0 ** (0.1 * (number - (len(study.series) - 1) / 2))
                found = [values(rows, name, batch_size=b, series=label) for b in batches]
                mean, sd = np.array([mean_sd(y / 1e9 if unit == "GB" else y) for y in found]).T
                # On a logarithmic axis, a bar that reaches below zero would have no end.
                low = np.minimum(sd, 0.9 * np.abs(mean)) if logarithmic else sd
                style: dict[str, Any] = {"markersize": 5, "linewidth": 1.4, "capsize": 2.5}
                style |= {"marker": _MARKERS[number % len(_MARKERS)], "color": _COLOURS[number % len(_COLOURS)]}
                bars = np.nan_to_num(np.stack([low, sd]))
                a.errorbar(x, mean, bars, label=label, **style)
            if name in baseline:
                a.axhline(baseline[name], color="#555555", linestyle=":", linewidth=1.3, label="before training")
            a.set_xticks(batches, [f"{b:,}" for b in batches])
            a.minorticks_off()
            a.set(title=title, ylabel=unit, xlabel="global batch (examples)")
        for unused in axes[len(panels) :]:
            unused.set_axis_off()

    return draw


def _paths(study: Study, measures: dict[Cell, Any]) -> Draw:
    """One panel per series: the mean path of each batch over seeds, with each seed's path as a thin line."""
    from matplotlib import colormaps

    batches = sorted(study.batch_sizes)
    colours = colormaps["viridis"](np.linspace(0.0, 0.88, len(batches)))

    def draw(axes: "list[Axes]") -> None:
        for a, series in zip(axes, study.series, strict=False):
            ends = []  # between them, paths lie too close for labels to tell whose they are
            for batch, colour in zip(batches, colours, strict=True):
                found = [measures[study.cell(batch, series, seed)].get("path", []) for seed in study.seeds]
                paths = [np.array(path, np.float64) for path in found if len(path) > 1]
                for path in paths:
                    a.plot(path[:, 2], path[:, 1], color=colour, linewidth=0.7, alpha=0.45)
                if paths and len({len(path) for path in paths}) == 1:
                    step, alignment, uniformity = np.mean(paths, axis=0).T
                    a.plot(uniformity, alignment, color=colour, linewidth=1.8, label=f"batch {batch:,}")
                    a.plot(uniformity[-1:], alignment[-1:], color=colour, marker="o", markersize=6)
                    a.plot(uniformity[:1], alignment[:1], color="black", marker="x", markersize=6, zorder=5)
                    ends.append(np.stack([step, uniformity, alignment], axis=1)[[0, -1]])
            plots.label_steps(a, ends)
            a.set(title=study.label(series), xlabel="uniformity (lower: more uniform)")
        for unused in axes[len(study.series) :]:
            unused.set_axis_off()
        axes[0].set_ylabel("alignment (lower: closer)")

    return draw
