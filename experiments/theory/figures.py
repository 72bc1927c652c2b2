"""The look and the output of every theory experiment: NAME.png with its caption, NAME.json with its numbers.

Curves differ by colour (safe for the colour-blind), by line style and by darkness, so they survive a black-and-white print.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

Experiment: TypeAlias = Callable[..., None]

INK, PALE, SHADE = "#222222", "#bbbbbb", "#e4e4e4"
# Okabe and Ito's colours, dark to light, each with a line style of its own.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", (0, (6, 2)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (3, 1, 1, 1, 1, 1)), (0, (10, 3)), (0, (2, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

DPI, CAPTION_SIZE = 180, 8.5


def new_figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **subplots: Any) -> tuple[Figure, Any]:
    """A figure that needs no display, and its panels.

    Args:
      rows: of panels.
      columns: of panels.
      size: width and height in inches, caption included.
      **subplots: further arguments of `Figure.subplots`, such as ``sharey=True`` or ``width_ratios=(2, 1)``.

    Returns:
      The figure and an array [rows, columns] of axes, also where there is only one.

    >>> figure, axes = new_figure(2, 3, size=(9, 5))
    >>> axes.shape
    (2, 3)
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    for panel in axes.flat:
        panel.grid(color="0.9", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    return figure, axes


def line(k: int, **changes: Any) -> dict[str, Any]:
    """The k-th line style, as arguments of `Axes.plot`.

    >>> line(1)["color"], line(8)["color"]
    ('#0072b2', '#0072b2')
    """
    style = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)], "linewidth": 1.5}
    return style | changes


def marker(k: int, **changes: Any) -> dict[str, Any]:
    """The k-th marker on the k-th line, as arguments of `Axes.plot`.

    >>> marker(1)["marker"]
    's'
    """
    return line(k, marker=MARKERS[k % len(MARKERS)], markersize=4, linewidth=1.1) | changes


def title(panel: Axes, text: str) -> None:
    """A panel's title, to the left and of the size of the labels."""
    panel.set_title(text, fontsize=10, loc="left")


def save(figure: Figure, name: str, numbers: Any, *, out: Path, caption: str) -> None:
    """Writes NAME.png, the caption beneath the panels, and NAME.json.

    Args:
      figure: drawn on by `new_figure`'s panels.
      name: of both files.
      numbers: what the figure shows: dicts, lists, arrays, named tuples, numbers and strings. What is not finite becomes null.
      out: the folder, made where it is absent.
      caption: plain text; wrapped to the width of the figure.
    """
    out.mkdir(parents=True, exist_ok=True)
    figure.supxlabel(caption, x=0.012, ha="left", fontsize=CAPTION_SIZE, color=INK, wrap=True)
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    # A palette loses nothing visible here and makes the file a third of the size.
    drawn.quantize(256, dither=Image.Dither.NONE).save(out / f"{name}.png", optimize=True, dpi=(DPI, DPI))
    write_json(out / f"{name}.json", numbers)


def write_json(path: Path, numbers: Any) -> None:
    """Writes strict JSON."""
    path.write_text(json.dumps(_plain(numbers), allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def run(experiment: Experiment) -> None:
    """The command line of an experiment: ``experiment(out, quick=…)`` in double precision, and the time it took.

    Args:
      experiment: writes its files into the folder it is given; ``quick`` asks for coarser grids.
    """
    folder = flags.DEFINE_string("out", "runs/theory", "Where the files go.", module_name=sys.argv[0])
    quick = flags.DEFINE_bool("quick", False, "Coarser grids, for tests.", module_name=sys.argv[0])

    def main(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
        logging.set_verbosity(logging.WARNING)
        start = time.perf_counter()
        with jax.enable_x64(True):
            experiment(Path(folder.value), quick=quick.value)
        print(f"{folder.value}: {time.perf_counter() - start:.1f} s")

    app.run(main)


def _plain(value: Any) -> Any:
    """Arrays as lists, named tuples as dicts, nan and infinities as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
