"""The figures of one run, drawn from its metrics.jsonl."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from simcse_jax.reports import plots
from simcse_jax.reports.tables import metric_title
from simcse_jax.runs.folder import Run
from simcse_jax.runs.metrics_log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE = "#0072B2"
_PALE = "#9a9a9a"
_MEAN_OF = 10
"""Least number of losses in a running mean."""


def draw_run(run: Run) -> list[Path]:
    """Writes the figures of a run into `figures/` of its folder, each as .png and .svg.

    `loss`: the loss of the logged steps on a logarithmic axis, and its running mean. `dev`: the dev score and the step
    it selected. `path`: alignment against uniformity (Wang & Isola, arXiv 2005.10242; SimCSE, figure 2) of the dev
    pairs, or of the training batches where no dev pairs were measured.

    Returns:
      The .png files; a figure with fewer than two points is left out.

    Raises:
      OSError: the figures cannot be written.
    """
    lines = read_log(run.metrics_file)
    folder = run.folder / "figures"
    best, metric = run.results().get("best_step"), metric_title(run.results().get("metric", "spearman"))
    with plots.style():
        drawn = {
            "loss": _loss(_columns(lines, "loss")),
            "dev": _dev(_columns(lines, "dev"), run.config.evaluation.dev, metric, best),
            "path": _path(lines, best),
        }
        written = []
        for name, figure in drawn.items():
            if figure is not None:
                folder.mkdir(exist_ok=True)
                plots.save(figure, folder / name)
                written.append(folder / f"{name}.png")
    return written


def _columns(lines: list[dict[str, Any]], *names: str) -> Float[np.ndarray, "P C"]:
    """The step and the named figures, of the lines that have finite values for all."""
    rows = [[line["step"], *(line.get(name) for name in names)] for line in lines]
    return np.array([row for row in rows if None not in row], np.float64).reshape(-1, 1 + len(names))


def _figure(title: str, x: str, y: str) -> "tuple[Any, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    if x == "step":
        axes.locator_params("x", integer=True)
    return figure, axes


def _loss(points: Float[np.ndarray, "P 2"]) -> Any:
    if len(points) < 2:
        return None
    figure, axes = _figure("Training loss", "step", "loss (nats)")
    step, loss = points.T
    window = max(_MEAN_OF, len(loss) // 20)
    each, steps = ("each step", "steps") if np.all(np.diff(step) == 1) else ("logged steps", "logged steps")
    axes.plot(step, loss, color=_PALE, linewidth=0.8, marker=".", markersize=3, label=each)
    if len(loss) > window:
        # One step's loss is that of one batch: a few hard sentences double it.
        mean, middle = (np.convolve(x, np.full(window, 1 / window), "valid") for x in (loss, step))
        axes.plot(middle, mean, color=_LINE, linewidth=2.0, label=f"mean of {window} {steps}")
    if np.all(loss > 0):
        plots.logarithmic(axes)
    axes.legend()
    return figure


def _dev(points: Float[np.ndarray, "P 2"], task: str, metric: str, best: int | None) -> Any:
    if len(points) < 2:
        return None
    name = Path(task).stem if task.endswith(".tsv") else task
    figure, axes = _figure(f"Dev score, {name}", "step", f"{metric} × 100")
    step, score = points.T
    axes.plot(step, score, color=_LINE, marker="o", markersize=4, linewidth=1.6)
    for at in points[step == best][:1]:
        _mark(axes, at[0], at[1], "*", f"best: {at[1]:.2f} at step {at[0]:,.0f}")
        axes.legend()
    return figure


def _path(lines: list[dict[str, Any]], best: int | None) -> Any:
    """Alignment against uniformity, from × to ●, with labels; the step as colour from dark to light."""
    points, of = _columns(lines, "dev_uniformity", "dev_alignment"), "dev pairs"
    if len(points) < 2:
        points, of = _columns(lines, "uniformity", "alignment"), "training batches"
    if len(points) < 2:
        return None
    figure, axes = _figure(
        f"Alignment and uniformity in training, {of}", "uniformity (lower: more uniform)", "alignment (lower: closer)"
    )
    from matplotlib.ticker import MaxNLocator

    step, uniformity, alignment = points.T
    axes.plot(uniformity, alignment, color=_PALE, linewidth=1.0, zorder=1)
    dots = axes.scatter(
        uniformity, alignment, c=step, cmap="viridis", s=26, edgecolors="black", linewidths=0.3, zorder=2
    )
    _mark(axes, uniformity[0], alignment[0], "X", f"step {step[0]:,.0f}")
    _mark(axes, uniformity[-1], alignment[-1], "o", f"step {step[-1]:,.0f}")
    if of == "dev pairs" and best in step[1:-1]:
        (at,) = np.flatnonzero(step == best)
        _mark(axes, uniformity[at], alignment[at], "*", f"best dev score, step {best:,}")
    figure.colorbar(dots, ax=axes, label="step", ticks=MaxNLocator(integer=True))
    axes.margins(0.08)
    axes.legend()
    plots.label_steps(axes, [points])
    return figure


def _mark(axes: "Axes", x: float, y: float, marker: str, label: str) -> None:
    size = {"*": 15, "X": 10, "o": 9}[marker]
    axes.plot([x], [y], marker, markersize=size, color="white", markeredgecolor="black", label=label, zorder=3)
