"""The look of all figures: colours, panels, grid, resolution."""

from io import BytesIO
from pathlib import Path
from typing import Any

from grpo_jax.storage import write_bytes

INK, MEASURED, PREDICTED, FORECAST, ATTAINABLE = "#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7"


def new_figure(size: tuple[float, float], **panels: Any) -> tuple[Any, Any]:
    """A figure with a row of panels, each with a pale grid behind the data and without a frame above and on the right.

    Args:
      size: width and height in inches.
      **panels: of `matplotlib.figure.Figure.subplots`, such as ncols and width_ratios.

    Returns:
      The figure and the array of its panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    row = figure.subplots(squeeze=False, **panels)[0]
    for axes in row:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, in the resolution and with the size of titles that all figures have."""
    for axes in figure.axes:
        axes.title.set_fontsize(10)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_bytes(path, picture.getvalue())
