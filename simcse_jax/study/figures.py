"""The figures of a study, through matplotlib's object-oriented interface; nothing is shown on a screen."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simcse_jax.study.grid import Cell, Study
from simcse_jax.study.table import Row, mean_sd, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"constant": "#0072B2", "sqrt": "#D55E00", "linear": "#009E73"}
_MARKERS = {"constant": "o", "sqrt": "s", "linear": "^"}
_STYLE: dict[Any, Any] = {
    **{"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.color": "#e3e3e3", "axes.axisbelow": True, "legend.frameon": False},
    **{"svg.hashsalt": "simcse_jax", "svg.fonttype": "none"},
}

Panel = tuple[str, str, str, bool]
"""Measure, title, label of the axis, logarithmic or not."""


def write_figures(study: Study, rows: list[Row], measures: dict[Cell, Any], before: dict[str, float]) -> list[str]:
    """Writes each figure as .png and .svg.

    Args:
      study: the study, whose folder takes them.
      rows: from `rows_of`.
      measures: of each cell, for the paths.
      before: test scores before training.

    Returns:
      Their names, without ending; a figure of which nothing was measured is left out.
    """
    from matplotlib import rc_context

    spread = f"mean and standard deviation of {len(study.seeds)} seeds"
    score = [("dev", "Dev", "Spearman × 100", False), ("test", "Test average", "Spearman × 100", False)]
    hardness = [
        ("loss", "Loss, last quarter of steps", "nats", False),
        ("effective_negatives", "Effective number of negatives", "perplexity", True),
        ("false_negatives", "False negatives an anchor", "number", True),
        ("false_negative_anchors", "Anchors with a false negative", "share", False),
    ]
    dynamics = [
        ("noise_scale_before", "Gradient noise scale, before training", "examples", True),
        ("noise_scale", "Gradient noise scale, selected parameters", "examples", True),
        ("steps_per_second", "Speed", "steps / s", True),
        ("memory_bytes", "Peak memory", "bytes", True),
    ]
    written = []
    with rc_context(_STYLE):
        for name, panels, title in (
            ("score", score, "Score against global batch"),
            ("hardness", hardness, "Hardness of the negatives against global batch"),
            ("dynamics", dynamics, "Gradient noise and cost against global batch"),
        ):
            panels = [panel for panel in panels if len(values(rows, panel[0]))]
            if panels:
                baseline = {"test": before["Avg."], "dev": float(np.mean(values(rows, "dev_before")))}
                draw = _lines(study, rows, panels, baseline if name == "score" else {})
                _write(study.folder / name, draw, f"{title} ({spread})", panels=len(panels))
                written.append(name)
        if any(len(m.get("path", [])) > 1 for m in measures.values()):
            draw = _paths(study, measures)
            _write(study.folder / "path", draw, "Alignment and uniformity during training", panels=len(study.rules))
            written.append("path")
    return written


def _write(file: Path, draw: "Callable[[Figure, list[Axes]], None]", title: str, panels: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * panels if panels < 4 else 8.4, 3.7 if panels < 4 else 6.6), layout="constrained")
    axes = figure.subplots(1 if panels < 4 else 2, panels if panels < 4 else 2, squeeze=False)
    draw(figure, list(axes.flat))
    figure.suptitle(title, fontsize=12)
    figure.savefig(file.with_suffix(".png"), dpi=150)
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


def _batch_axis(axes: "Axes", batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{b:,}" for b in batches])
    axes.minorticks_off()
    axes.set_xlabel("global batch (examples)")


def _lines(
    study: Study, rows: list[Row], panels: list[Panel], baseline: dict[str, float]
) -> "Callable[[Figure, list[Axes]], None]":
    """A panel a measure: one line a rule, the band its standard deviation over seeds."""
    batches = sorted(study.batch_sizes)

    def draw(figure: "Figure", axes: "list[Axes]") -> None:
        for a, (name, title, unit, logarithmic) in zip(axes, panels, strict=False):
            for rule in study.rules:
                points = [mean_sd(values(rows, name, batch_size=b, rule=rule)) for b in batches]
                mean, sd = np.array(points).T
                style: dict[str, Any] = {
                    "color": _COLOURS[rule],
                    "marker": _MARKERS[rule],
                    "markersize": 5,
                    "linewidth": 1.6,
                }
                a.plot(batches, mean, label=rule, **style)
                sd = np.nan_to_num(sd)
                low = np.maximum(mean - sd, mean / 10) if logarithmic else mean - sd
                a.fill_between(batches, low, mean + sd, color=_COLOURS[rule], alpha=0.15, linewidth=0)
            if name in baseline:
                a.axhline(baseline[name], color="#555555", linestyle=":", linewidth=1.2, label="before training")
            if logarithmic and len(values(rows, name)) and np.any(values(rows, name) > 0):
                a.set_yscale("log")
            _batch_axis(a, batches)
            a.set(title=title, ylabel=unit)
        for unused in axes[len(panels) :]:
            unused.set_axis_off()
        axes[0].legend(title="learning rate")

    return draw


def _paths(study: Study, measures: dict[Cell, Any]) -> "Callable[[Figure, list[Axes]], None]":
    """A panel a rule: the mean path of each batch over seeds, the seeds' own paths thin."""
    from matplotlib import colormaps

    batches = sorted(study.batch_sizes)
    colours = colormaps["viridis"](np.linspace(0.0, 0.88, len(batches)))

    def draw(figure: "Figure", axes: "list[Axes]") -> None:
        for a, rule in zip(axes, study.rules, strict=False):
            for batch, colour in zip(batches, colours, strict=True):
                found = [measures[study.cell(batch, rule, seed)].get("path", []) for seed in study.seeds]
                paths = [np.array(path, np.float64)[:, 1:] for path in found if len(path) > 1]
                for path in paths:
                    a.plot(path[:, 1], path[:, 0], color=colour, linewidth=0.7, alpha=0.45)
                if paths and len({len(path) for path in paths}) == 1:
                    alignment, uniformity = np.mean(paths, axis=0).T
                    a.plot(uniformity, alignment, color=colour, linewidth=1.8, label=f"{batch:,}")
                    a.plot(uniformity[-1:], alignment[-1:], color=colour, marker="o", markersize=6)
                    a.plot(uniformity[:1], alignment[:1], color="black", marker="x", markersize=6, zorder=5)
            a.set(title=f"{rule} learning rate", xlabel="uniformity (lower: more uniform)")
        axes[0].set_ylabel("alignment (lower: closer)")
        for a in axes[1:]:
            a.sharex(axes[0])
            a.sharey(axes[0])
        axes[-1].legend(title="batch; × start, ● end", loc="best")

    return draw
