"""Figures say what happened: a loss that falls is seen to fall, and the points of a path name their steps."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from simcse_jax.analysis.figures import write_figures as write_analysis
from simcse_jax.analysis.measure import GradedPairs, Measured
from simcse_jax.config import Config
from simcse_jax.evaluation.sts import Subset, Task
from simcse_jax.reports import plots
from simcse_jax.runs.figures import _loss, _path
from simcse_jax.study import Cell, Study
from simcse_jax.study.figures import _write
from simcse_jax.study.figures import write_figures as write_study


def losses(steps: int, every: int) -> Any:
    """A loss that falls from 0.3 to 0.003 within 30 steps, and a hard batch that doubles it now and then."""
    step = np.arange(every, steps + 1, every)
    return np.stack([step, (0.3 * 10 ** -np.minimum(step / 15, 2)) * np.where(step % 20, 1, 3)], axis=1)


def test_a_loss_that_falls_is_seen_to_fall() -> None:
    (axes,) = _loss(losses(100, 1)).axes
    assert axes.get_yscale() == "log"
    steps, mean = axes.get_lines()
    assert len(steps.get_xdata()) == 100
    assert steps.get_label() == "each step"
    assert mean.get_label() == "mean of 10 steps"
    shown = np.asarray(mean.get_ydata())
    assert shown[0] / shown[-1] > 30
    assert len(shown) == 91
    assert all(float(label.get_text().replace(",", "")) > 0 for label in axes.get_yticklabels() if label.get_text())


@pytest.mark.parametrize(("points", "label"), [(4, None), (40, "mean of 10 logged steps"), (400, "mean of 20 logged")])
def test_the_mean_is_of_as_many_losses_as_it_says(points: int, label: str | None) -> None:
    (axes,) = _loss(losses(10 * points, 10)).axes
    means = [line for line in axes.get_lines() if str(line.get_label()).startswith("mean")]
    assert [str(line.get_label())[: len(label or "")] for line in means] == ([label] if label else [])


def test_steps_are_whole() -> None:
    """Of a run of a few steps, too, whose axis would be divided into parts of a step."""
    lines = [{"step": step, "uniformity": -1.0 - step, "alignment": 0.1 * step} for step in (1, 2, 3)]
    loss, path = _loss(np.array([[1.0, 0.5], [2.0, 0.4], [3.0, 0.3]])), _path(lines, None)
    for ticks in (loss.axes[0].get_xticks(), path.axes[1].get_yticks()):
        assert np.array_equal(ticks, np.round(ticks))


def test_a_loss_of_zero_has_no_logarithm() -> None:
    figure = _loss(np.array([[1.0, 0.5], [2.0, 0.0], [3.0, 0.0]]))
    assert figure.axes[0].get_yscale() == "linear"


def labels_of(figure: Figure) -> list[Any]:
    """The labels of steps in a figure."""
    return [text for axes in figure.axes for text in axes.texts if text.get_text().startswith("step")]


def test_the_points_of_a_path_name_their_steps() -> None:
    lines = [{"step": s, "dev_uniformity": -1.6 - s / 100, "dev_alignment": 0.15 + s / 500} for s in range(0, 101, 25)]
    labels = labels_of(_path(lines, 50))
    assert sorted(text.get_text() for text in labels) == [f"step {s}" for s in (0, 100, 25, 50, 75)]
    for text in labels:
        step = int(text.get_text().split()[1])
        np.testing.assert_allclose(text.xy, (-1.6 - step / 100, 0.15 + step / 500))


def test_labels_of_steps_do_not_collide() -> None:
    """A path of many points that turns back on itself: the ends are named, and what has room."""
    angle = np.linspace(0, 3 * np.pi, 200)
    path = np.stack([np.arange(0, 200_000, 1000), np.cos(angle), np.sin(angle)], axis=1)
    with plots.style():
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(path[:, 1], path[:, 2])
        plots.label_steps(axes, [path, np.array([[7.0, np.nan, 1.0]])])
        figure.draw_without_rendering()
    texts = labels_of(figure)
    named = {text.get_text() for text in texts}
    assert {"step 0", "step 199,000"} <= named
    assert "step 7" not in named
    assert 8 < len(texts) < 100
    for a, b in combinations([text.get_window_extent() for text in texts], 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)


def steps_in(svg: Path) -> set[str]:
    return set(re.findall(r">(step [\d,]+)<", svg.read_text("utf-8")))


PAIRS = GradedPairs(
    Task("a_dev_set_with_a_long_name", [Subset("dev", ["a", "b"], ["c", "d"], np.array([0.0, 5.0]))], "all"),
    np.array([0.0, 5.0] * 4),
    np.array([0, 4] * 4),
    [f"{group} to {group + 1} (n = 2)" for group in range(5)],
)


def measured(number: int) -> list[Measured]:
    figures = {"score": 80.0, "uniformity": -2.0, "alignment": 0.2}
    names = [f"run {i} of a long name" for i in range(number)]
    cosines = np.linspace(0.1, 0.9, 8)
    return [Measured(name, name, None, {}, figures, {}, np.array([1.0, 0.5]), cosines) for name in names]


def path(name: str, *steps: int) -> dict[str, Any]:
    return {name: [{"step": s, "uniformity": -1 - s / 2e3, "alignment": 0.1 + s / 9e3, "score": 70} for s in steps]}


def study(folder: Path) -> tuple[Study, dict[Cell, Any]]:
    """A study of one batch under three rules, and the path of its cell."""
    folder.mkdir()
    measures = {Cell(64, "reference", 1): {"path": [[0, 0.1, -1.0], [20, 0.2, -1.5], [40, 0.3, -2.0]]}}
    return Study(Config(), str(folder), (64,), ("constant", "sqrt", "linear"), (1,), 64, steps=40), measures


def test_the_plane_of_an_analysis_and_the_paths_of_a_study_name_their_steps(tmp_path: Path) -> None:
    models = measured(1)
    write_analysis(tmp_path, models, path(models[0].name, 0, 500, 1500), PAIRS)
    assert steps_in(tmp_path / "plane.svg") == {"step 0", "step 500", "step 1,500"}
    (model,) = models
    kept = [
        replace(model, label=f"a, step {step}", step=step, figures={**model.figures, "uniformity": -step / 100})
        for step in (80, 90)
    ]
    write_analysis(tmp_path, kept, {}, PAIRS)
    assert steps_in(tmp_path / "plane.svg") == {"step 80", "step 90"}
    grid, measures = study(tmp_path / "study")
    assert write_study(grid, [], measures, {"Avg.": 1.0}) == ["path"]
    assert steps_in(tmp_path / "study" / "path.svg") == {"step 0", "step 40"}


def test_nothing_of_a_figure_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(plots, "save", lambda figure, file: drawn.update({f"{len(drawn)} {file.name}": figure}))
    for number in (1, 5):
        models = measured(number)
        write_analysis(tmp_path, models, path(models[0].name, 0, 500, 1500), PAIRS)
    grid, measures = study(tmp_path / "study")
    write_study(grid, [], measures, {"Avg.": 1.0})
    with plots.style():
        lines = [{"step": s, "dev_uniformity": -1.6 - s / 100, "dev_alignment": 0.15 + s / 500} for s in (0, 25, 50)]
        drawn |= {"loss": _loss(losses(100, 1)), "path of a run": _path(lines, 25)}
        for name, figure in drawn.items():
            figure.draw_without_rendering()
            inside, box = figure.bbox, figure.get_tightbbox().padded(-0.01)
            low, high = np.array(box.get_points()) * figure.dpi
            assert (low >= 0).all(), name
            assert (high <= [inside.width, inside.height]).all(), name
    assert len(drawn) == 9


def test_the_legend_of_a_study_fits_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure))

    def draw(axes: list[Any]) -> None:
        for number in range(5):
            axes[0].plot([0, 1], label=f"guide of a long name {number}, equal examples")

    for panels in (1, 2, 6):
        _write(tmp_path / "figure", draw, "a title", panels)
        (legend,) = figures[-1].legends
        assert legend.get_window_extent().width <= figures[-1].bbox.width
        assert len(legend.get_texts()) == 5
