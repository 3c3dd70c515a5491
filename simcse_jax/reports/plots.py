"""The style of all figures, and the files they are written to. Nothing is shown on a screen."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
