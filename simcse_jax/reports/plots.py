"""The style of all figures, the labels of paths, and the files they are written to. Nothing is shown on a screen."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    **{"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.color": "#e3e3e3", "axes.axisbelow": True, "legend.frameon": False},
    **{"svg.hashsalt": "simcse_jax", "svg.fonttype": "none"},
}


def style() -> AbstractContextManager[None]:
    """A context in which figures are drawn in the common style."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def save(figure: "Figure", file: Path) -> None:
    """Writes a figure as .png and .svg with the same bytes each time; `file` has no ending."""
    figure.savefig(file.with_name(f"{file.name}.png"), dpi=150)
    figure.savefig(file.with_name(f"{file.name}.svg"), metadata={"Date": None})


def logarithmic(axes: "Axes") -> None:
    """Makes the y axis logarithmic, with plain numbers as labels, a few per power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1000 else f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_steps(axes: "Axes", paths: Sequence[Float[np.ndarray, "_ 3"]]) -> None:
    """Writes the steps of training beside the points of paths: the ends of each, and between them what has room.

    Args:
      axes: the axes, with all else drawn.
      paths: for each path its step, x and y, in the order of the steps.
    """
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # settles the scale
    ends = [path[i] for path in paths for i in (0, -1)]
    taken: list[Float[np.ndarray, " 2"]] = []
    for step, x, y in [*ends, *(point for path in paths for point in path[1:-1])]:
        if not np.isfinite([x, y]).all():
            continue
        place = axes.transData.transform((x, y)) * 72 / figure.dpi
        if all(np.any(np.abs(place - other) > _ROOM) for other in taken):
            taken.append(place)
            axes.annotate(
                f"step {step:,.0f}", (x, y), (7, 5), textcoords="offset points", fontsize=8, color="#333333", zorder=5
            )


_ROOM = np.array([56.0, 14.0])
"""Width and height of a label with some space around it, in points."""
