"""The figures of an analysis. Models differ by marker, line style and colour, also in grey print."""

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from simcse_jax.analysis.measure import GradedPairs, Measured
from simcse_jax.reports import plots
from simcse_jax.reports.tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "os^DvPX*<>ph"
_LINES: list[Any] = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#444444")  # Okabe & Ito, without the palest
_MAP = "viridis"  # its luminance rises from end to end
_COLUMNS = 4  # panels in a row
_GRID = np.linspace(-1, 1, 401)


def write_figures(folder: Path, measured: list[Measured], paths: dict[str, list[Row]], pairs: GradedPairs) -> None:
    """Writes plane, spectrum and cosines, each as .png and .svg.

    Args:
      folder: folder of the figures.
      measured: models and checkpoints.
      paths: evaluations in training by model, see `training_path`.
      pairs: the pairs that were analysed.
    """
    with plots.style():
        _plane(folder, measured, paths, pairs)
        _spectrum(folder, measured, pairs)
        _cosines(folder, measured, pairs)


def _plane(folder: Path, measured: list[Measured], paths: dict[str, list[Row]], pairs: GradedPairs) -> None:
    """Alignment against uniformity (SimCSE, figures 2 and 3): models in large, training paths in small."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    scores = [m.figures.get("score", np.nan) for m in measured] + [
        row["score"] for path in paths.values() for row in path
    ]
    finite = [s for s in scores if np.isfinite(s)] or [0.0]
    norm = Normalize(min(finite), max(finite) if max(finite) > min(finite) else min(finite) + 1)
    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    axes = figure.subplots()
    drawn: dict[str, Any] = {"cmap": _MAP, "norm": norm, "edgecolors": "black"}
    for number, name in enumerate(dict.fromkeys(m.name for m in measured)):
        marker, line = _MARKERS[number % len(_MARKERS)], _LINES[number % len(_LINES)]
        path = paths.get(name, [])
        if len(path) > 1:
            x, y = [row["uniformity"] for row in path], [row["alignment"] for row in path]
            axes.plot(x, y, color="#777777", linestyle=line, linewidth=1, zorder=1)
            axes.scatter(x, y, c=[row["score"] for row in path], s=16, linewidths=0.3, zorder=2, **drawn)
        own = [m for m in measured if m.name == name]
        x, y, colours = ([m.figures.get(n, np.nan) for m in own] for n in ("uniformity", "alignment", "score"))
        axes.scatter(x, y, c=colours, marker=marker, s=110, linewidths=1, zorder=3, **drawn)
        axes.scatter([], [], marker=marker, s=70, color="white", edgecolors="black", label=name)
    axes.margins(0.09)
    axes.set(xlabel="uniformity (lower: more uniform)", ylabel="alignment (lower: closer)")
    figure.colorbar(ScalarMappable(norm, _MAP), ax=axes, label=f"Spearman × 100, {_title(pairs)}")
    axes.set_title("Alignment and uniformity" + ("; small: in training" if any(map(len, paths.values())) else ""))
    _legend(figure, axes)
    checkpoints = [[{"step": m.step, **m.figures}] for m in measured if m.label != m.name]
    names = ("step", "uniformity", "alignment")
    labelled = [path for path in [*checkpoints, *paths.values()] if path]
    plots.label_steps(
        axes, [np.array([[row.get(n, np.nan) for n in names] for row in path], np.float64) for path in labelled]
    )
    plots.save(figure, folder / "plane")


def _spectrum(folder: Path, measured: list[Measured], pairs: GradedPairs) -> None:
    """Singular values over the largest (SimCSE, appendix on the distribution of singular values)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, m in enumerate(measured):
        shown = m.spectrum[m.spectrum > 1e-4]  # smaller values are rounding errors
        every = max(1, len(shown) // 8)
        axes.plot(
            np.arange(1, len(shown) + 1),
            shown,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_LINES[number % len(_LINES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markevery=(number * every // max(1, len(measured)), every),
            markersize=5,
            linewidth=1.4,
            label=m.label,
        )
    axes.set_yscale("log")
    axes.set(xlabel="index of the singular value", ylabel="singular value / largest")
    axes.set_title(f"Singular values of the sentence vectors, {_title(pairs)}")
    _legend(figure, axes)
    plots.save(figure, folder / "spectrum")


def _cosines(folder: Path, measured: list[Measured], pairs: GradedPairs) -> None:
    """Densities of the cosine by group of the gold score: one panel per model, the groups above one another."""
    from matplotlib.figure import Figure

    rows = -(-len(measured) // _COLUMNS)
    columns = -(-len(measured) // rows)
    figure = Figure(figsize=(2.1 + 2.5 * columns, 0.8 + 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low = min(float(np.min(m.cosines)) for m in measured)
    for axes, m in zip(panels.flat, measured, strict=False):
        densities = {g: _density(m.cosines[pairs.group == g]) for g in range(5)}
        top = max((float(np.max(d)) for d in densities.values() if d is not None), default=1.0)
        for g, density in densities.items():
            values = m.cosines[pairs.group == g]
            if density is not None:
                axes.fill_between(_GRID, g, g + 0.95 * density / top, color="#9ecae1", linewidth=0, zorder=2 + (5 - g))
                axes.plot(_GRID, g + 0.95 * density / top, color="#08306b", linewidth=1, zorder=2 + (5 - g))
            if len(values):
                axes.plot([np.mean(values)] * 2, [g, g + 0.3], color="black", linewidth=1.8, zorder=9)
        axes.set_title(m.label, fontsize=9)
        axes.set_xlim(max(-1.0, low - 0.1), 1.02)
        axes.set_yticks(range(5), pairs.labels)
        axes.tick_params(axis="y", length=0)
    for axes in panels.flat[len(measured) :]:
        axes.set_axis_off()
    for axes in panels.flat[max(0, len(measured) - columns) : len(measured)]:  # the lowest of each column
        axes.set_xlabel("cosine")
        axes.tick_params(axis="x", labelbottom=True)
    for axes in panels[:, 0]:
        axes.set_ylabel("gold score (pairs)")
    title = f"Density of the cosine by gold score, {_title(pairs)} (| is the mean; each panel has a scale of its own)"
    figure.suptitle("\n".join(wrap(title, int(10 * figure.get_figwidth()))), fontsize=11)
    plots.save(figure, folder / "cosines")


def _density(values: Float[np.ndarray, " P"]) -> Float[np.ndarray, " G"] | None:
    """A Gaussian kernel estimate (Scott's rule) on `_GRID`; None for too few values, or values that are all equal."""
    from scipy.stats import gaussian_kde

    if len(values) < 3 or np.ptp(values) < 1e-6:
        return None
    density: Float[np.ndarray, " G"] = gaussian_kde(values)(_GRID)
    return density


def _title(pairs: GradedPairs) -> str:
    split = "" if pairs.task.reported == "all" else f" {pairs.task.reported}"
    return Path(pairs.task.name).stem + split


def _legend(figure: Any, axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    widest = max(map(len, labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(len(labels), 96 // (widest + 8))))
