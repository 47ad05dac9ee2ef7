"""Empty figures in the style of all plots, and their files. matplotlib is imported when one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
FORMATS = (".png", ".svg", ".pdf")


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Two spines, a pale grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def check_figure_file(file: Path | None) -> None:
    """Refuse a file that no figure could be written to, before the work that the figure shows.

    Raises:
        CheckpointError: no such format, or no such folder.
    """
    if file is None:
        return
    if file.suffix.lower() not in FORMATS:
        raise CheckpointError(f"{file}: no format of images is known by that name. Use {', '.join(FORMATS)}.")
    if not file.parent.is_dir():
        raise CheckpointError(f"{file}: there is no folder {file.parent}. Make it first.")


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure in the format that its name says.

    Raises:
        CheckpointError: no such format, or the file cannot be written.
    """
    try:
        figure.savefig(file)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be written ({error}).") from None
