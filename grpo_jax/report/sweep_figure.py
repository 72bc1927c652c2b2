"""A sweep as a table and, over β, as a figure: where the runs ended, and where the theory says they end."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from grpo_jax.objective import Objective
from grpo_jax.report.figure import INK, MEASURED, PREDICTED, new_figure, save_figure
from grpo_jax.report.forecast import group_weights
from grpo_jax.report.markdown import inline
from grpo_jax.theory.planning import curve

COLOURS = (MEASURED, PREDICTED, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
MARKERS = "os^Dv<>PX*"
COLUMNS = ("point", "state", "p_ref", "p*", "p†", "p̂ and its interval", "p̂ − p*")


def p_star_curve(
    p_ref: np.ndarray, betas: np.ndarray, *, objective: Objective, group_size: int, trials: int | None = None
) -> np.ndarray | None:
    """The mean over prompts of the predicted success probability at each of ``betas``, from ``p_ref`` [Q] of the prompts.

    ``p_ref`` is the share of successes in ``trials`` samples of each prompt, or exact where that is None. None where the
    objective has no KL to the reference, or where the theory does not know it.

    >>> from grpo_jax.objective import GRPO
    >>> p_star_curve(np.array([0.2, 0.4]), np.array([0.5, 2.0]), objective=GRPO, group_size=8).round(3).tolist()
    [0.984, 0.512]
    """
    weights = group_weights(objective, group_size)
    if objective.kl_direction == "none" or weights is None:
        return None
    counts = np.asarray(p_ref, float) if trials is None else np.rint(np.asarray(p_ref) * trials)
    with jax.enable_x64(True):
        shape: dict[str, Any] = {"weights": weights, "kl": objective.kl_direction, "quantiles": []}
        return np.array([point.p_star for point in curve(counts, trials, betas.tolist(), **shape)])


def plot_sweep(
    path: Path, curves: Sequence[tuple[str, Any, Any]], points: Sequence[dict[str, Any]], *, title: str = ""
) -> None:
    """Writes a PNG: measured p̂ with intervals over the predicted p*(β), on a logarithmic β axis.

    A label has one colour, a seed one marker. Points of different seeds at one β stand side by side, 0.5 % of the axis apart.

    Args:
      path: of the PNG.
      curves: (label, betas, p_star at each of them).
      points: dicts of "label", "beta" > 0, "seed", "p", "low", "high"; "p_star", shown as a dash, where a point has a prediction
        of its own, from its seed's p_ref; "arrived", which makes a point hollow where it is false.
      title: above the axes.
    """
    figure, (axes,) = new_figure((7.4, 4.8))
    labels = list(dict.fromkeys([*(label for label, _, _ in curves), *(point["label"] for point in points)]))
    seeds = sorted({point["seed"] for point in points})
    betas = [point["beta"] for point in points] + [beta for _, ends, _ in curves for beta in (ends[0], ends[-1])]
    # With one label, colours tell what is measured from what is predicted; with several, they tell the labels apart.
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    alone = len(labels) == 1
    dash = {"marker": "_", "markersize": 9, "linestyle": "none"}
    dot = {"linestyle": "none", "markersize": 4.5}
    markers = dict(zip(seeds, itertools.cycle(MARKERS), strict=False))

    # The predicted curves. A label without one has a line in the legend all the same, for its colour.
    for label, over, p_star in curves:
        colour = PREDICTED if alone else colours[label]
        axes.plot(over, p_star, color=colour, linewidth=1.4, label=_joined(r"predicted $p^*(β)$", label))
    for label in labels:
        if label not in [predicted for predicted, _, _ in curves]:
            axes.plot([], [], color=colours[label], linewidth=1.4, label=_joined("no prediction", label))

    step = 0.005 * np.log(max(betas) / min(betas)) if betas else 0.0
    for label, (i, seed) in itertools.product(labels, enumerate(seeds)):
        shown = [point for point in points if (point["label"], point["seed"]) == (label, seed)]
        beta, p, low, high = (np.array([point[key] for point in shown]) for key in ("beta", "p", "low", "high"))
        x = beta * np.exp(step * (i - (len(seeds) - 1) / 2))
        own = [point.get("p_star", np.nan) for point in shown]
        axes.plot(x, own, color=PREDICTED if alone else colours[label], alpha=0.7, **dash)
        axes.errorbar(
            x, p, yerr=np.clip([p - low, high - p], 0.0, None), color=colours[label], marker=markers[seed], alpha=0.85,
            markeredgecolor="white", markeredgewidth=0.4, elinewidth=1, capsize=0, **dot,
        )  # fmt: skip
        # A white centre makes a point hollow.
        hollow = np.array([not point.get("arrived", True) for point in shown], bool)
        axes.plot(x[hollow], p[hollow], color="white", linestyle="none", marker="o", markersize=2.2, zorder=4)

    # The legend of the markers.
    for seed, marker in markers.items():
        name = _joined(r"measured $\hat p$", f"seed {seed}")
        axes.plot([], [], color=MEASURED if alone else "0.4", marker=marker, label=name, **dot)
    if any("p_star" in point for point in points):
        name = r"$p^*$ from that seed's $p_\mathrm{ref}$"
        axes.plot([], [], color=PREDICTED if alone else "0.4", label=name, **dash)
    if not all(point.get("arrived", True) for point in points):
        name = "hollow: not arrived"
        axes.plot([], [], "o", color="0.4", markersize=4.5, markeredgewidth=1.1, markerfacecolor="white", label=name)

    # The axes. The ticks are the values of β; where these are many, or none, round numbers.
    axes.set(title=title, xlabel="β, weight of the KL to the reference", xscale="log")
    axes.set(ylabel="success probability, mean over prompts", ylim=(-0.02, 1.02))
    ticks = sorted({point["beta"] for point in points})
    if betas and not 0 < len(ticks) <= 8:
        rounded = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
        ticks = [tick for tick in rounded if min(betas) <= tick <= max(betas)]
        ticks = ticks if len(ticks) > 1 else [min(betas), max(betas)]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    if labels:
        axes.legend(frameon=False, loc="best", fontsize=9)
    save_figure(figure, path)


def sweep_table(records: Sequence[dict[str, Any]]) -> Table:
    """The points for a terminal.

    Args:
      records: dicts of "point", "state", "words", "why" and, of finished runs, their result's "standing", "p_ref", "p_final"
        and, where there is a prediction, "p_star", "attainable" and "difference".
    """
    grid = Table(box=None, padding=(0, 2, 0, 0))
    rows = [_cells(record) for record in records]
    for i, name in enumerate(COLUMNS):  # where there is no room, the state is folded first, then the point
        longest = max((len(row[i]) for row in rows), default=0)
        grid.add_column(name, overflow="fold", min_width=None if name == "state" else min(longest, 40))
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def sweep_page(records: Sequence[dict[str, Any]], figure: str | None) -> str:
    """The points as a Markdown page, with the name of the figure beside it; ``records`` as for `sweep_table`."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, records)]
    rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines]
    done = sum(record["state"] == "done" for record in records)
    parts = [f"# A sweep: {done} of {len(records)} points are done", "", *rows]
    failed = [f"- {inline(record['point'])} failed: `{inline(record['why'])}`" for record in records if record["why"]]
    parts += ["", *failed] if failed else []
    parts += ["", f"![success probability over β, measured and predicted]({figure})"] if figure else []
    return "\n".join(parts) + "\n"


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    if record["state"] != "done":
        return inline(record["point"]), record["words"], "", "", "", "", ""
    final, difference = record["p_final"], record.get("difference")
    predicted = [record.get(name) for name in ("p_star", "attainable")]
    return (
        inline(record["point"]),
        record.get("standing", "done"),
        f"{record['p_ref']['mean']:.3f}",
        *("" if interval is None else f"{interval['mean']:.3f}" for interval in predicted),
        f"{final['mean']:.3f} [{final['low']:.3f}, {final['high']:.3f}]",
        "" if difference is None else f"{difference['mean']:+.3f}",
    )


def _joined(*parts: str) -> str:
    return ", ".join(part.replace("$", r"\$") if i else part for i, part in enumerate(parts) if part)
