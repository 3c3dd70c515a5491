"""The figures of the report: paths in training, singular values and cosines before and after."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.results.cells import Figures
from benchmarks.results.experiments import FIRST, PATHS, ablation_cell
from benchmarks.results.measure import BINS
from benchmarks.results.tables import Found
from simcse_jax.reports import plots

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
SPREAD = ("first-last average", "[CLS]", "unsupervised SimCSE", "supervised SimCSE")
"""The rows whose vectors are drawn."""


def draw(found: Found, folder: Path) -> dict[str, str]:
    """Writes the figures that the records allow. A file that would stay the same is left alone.

    Returns:
      For each figure, by name without ending, its caption.
    """
    vectors = {name: row for name in SPREAD for row in found.row(name)[:1] if "spectrum" in row}
    paths = {name: rows[0]["path"] for name, changes in PATHS.items() if (rows := _path(found, changes))}
    drawn: dict[str, tuple[str, Callable[[], Figure]]] = {}
    if paths:
        caption = "Alignment and uniformity of STS-B dev, every 10 steps of training (SimCSE, figure 2)"
        drawn["paths"] = caption, lambda: _paths(paths)
    if vectors:
        drawn["spectrum"] = "Singular values of the sentences of STS-B dev", lambda: _spectra(vectors)
        drawn["cosines"] = "Cosines of the pairs of STS-B dev, by gold score", lambda: _densities(vectors)
    folder.mkdir(parents=True, exist_ok=True)
    with plots.style(), tempfile.TemporaryDirectory() as fresh:
        for name, (_, make) in drawn.items():
            plots.save(make(), Path(fresh) / name)
        for file in Path(fresh).iterdir():
            target = folder / file.name
            if not target.is_file() or target.read_bytes() != file.read_bytes():
                target.write_bytes(file.read_bytes())
    return {name: caption for name, (caption, _) in drawn.items()}


def _path(found: Found, changes: dict[str, Any]) -> list[Figures]:
    """The seed of a variant whose path was measured every 10 steps."""
    rows = found.figures([ablation_cell("unsup_bert_base", changes, FIRST, found.scale, found.rate)])
    return [row for row in rows if len(row.get("path", [])) > 2]


def _paths(paths: dict[str, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    lines = []
    for colour, (name, points) in zip(COLOURS, paths.items(), strict=False):
        step, _, alignment, uniformity = np.array(points, float).T
        axes.plot(uniformity, alignment, "-o", color=colour, markersize=3, linewidth=1, label=name)
        axes.plot(uniformity[-1:], alignment[-1:], "s", color=colour, markersize=8)
        lines.append(np.stack([step, uniformity, alignment], axis=1)[[0, -1]])
    axes.set(xlabel="uniformity", ylabel="alignment")
    axes.legend()
    plots.label_steps(axes, lines)
    return figure


def _spectra(rows: dict[str, Figures]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (name, row) in zip(COLOURS, rows.items(), strict=False):
        rank, value = np.array(row["spectrum"]).T
        axes.plot(rank, value, color=colour, label=name)
    axes.set(xlabel="rank", ylabel="singular value ÷ largest", xscale="log")
    axes.legend()
    return figure


def _densities(rows: dict[str, Figures]) -> Figure:
    figure = Figure(figsize=(3.2 * len(rows), 6), layout="constrained")
    grid = figure.subplots(5, len(rows), sharex=True, sharey="col", squeeze=False)
    centres = np.linspace(-1, 1, BINS + 1)[:-1] + 1 / BINS
    for column, (name, row) in zip(grid.T, rows.items(), strict=True):
        for axes, density, label in zip(column, row["cosines"], row["groups"], strict=True):
            axes.fill_between(centres, density, step="mid", color=COLOURS[0], alpha=0.6)
            axes.text(0.02, 0.85, label, transform=axes.transAxes, fontsize=8)
        column[0].set_title(name)
        column[-1].set_xlabel("cosine")
    return figure
