"""A sweep as a table and, over β, as a figure: where runs ended, over where theory says they end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from grpo_jax import theory
from grpo_jax.objective import Objective
from grpo_jax.report.figure import INK, MEASURED, PREDICTED
from grpo_jax.report.forecast import group_weights
from grpo_jax.report.markdown import inline

COLOURS = (MEASURED, PREDICTED, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
MARKERS = "os^Dv<>PX*"
COLUMNS = ("point", "state", "p_ref", "predicted p*", "p̂ and its interval", "p̂ − p*")


def p_star_curve(p_ref: np.ndarray, betas: np.ndarray, *, objective: Objective, group_size: int) -> np.ndarray | None:
    """[N] mean over prompts of the predicted success probability at each of ``betas`` [N], from ``p_ref`` [Q] of the prompts.

    None where nothing holds to the reference, or where the theory does not know the objective.

    >>> from grpo_jax.objective import GRPO
    >>> p_star_curve(np.array([0.2, 0.4]), np.array([0.5, 2.0]), objective=GRPO, group_size=8).round(3).tolist()
    [0.984, 0.512]
    """
    weights = group_weights(objective, group_size)
    if objective.kl_direction == "none" or weights is None:
        return None
    solve = theory.flow_point if objective.kl_direction == "reverse" else theory.forward_kl_fixed_point
    with jax.enable_x64(True):
        found = [solve(np.asarray(p_ref, float), beta=float(beta), weights=weights) for beta in betas]
        return np.array([float(p.mean()) for p in found])


def draw_sweep(
    path: Path,
    curves: Sequence[tuple[str, np.ndarray, np.ndarray]],
    points: Sequence[dict[str, Any]],
    *,
    title: str = "",
) -> None:
    """Writes a PNG: measured p̂ with intervals over the predicted p*(β), on a logarithmic β axis.

    A label has one colour, a seed one marker. Seeds stand a little beside each other (β is 0.5 % of the axis off), so that none
    hides another.

    Args:
      path: of the PNG.
      curves: (label, betas [N], p_star [N]).
      points: dicts of "label", "beta" > 0, "seed", "p", "low", "high", and "p_star" where a point has a prediction of its own,
        from its seed's p_ref, which is drawn as a dash; "arrived", where it is false, makes a point hollow.
      title: above the axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = list(dict.fromkeys([*(label for label, _, _ in curves), *(point["label"] for point in points)]))
    seeds = sorted({point["seed"] for point in points})
    betas = [point["beta"] for point in points] + [beta for _, ends, _ in curves for beta in (ends[0], ends[-1])]
    step = 0.005 * np.log(max(betas) / min(betas)) if betas else 0.0
    for label, over, p_star in curves:
        colour = PREDICTED if len(labels) == 1 else _colour(labels, label)
        axes.plot(over, p_star, color=colour, linewidth=1.4, label=_joined(r"predicted $p^*(β)$", label))
    for label in labels:
        colour = _colour(labels, label)
        if label not in [known for known, _, _ in curves]:
            axes.plot([], [], color=colour, linewidth=1.4, label=_joined("no prediction", label))
        for j, seed in enumerate(seeds):
            chosen = [point for point in points if (point["label"], point["seed"]) == (label, seed)]
            x, p, low, high = (np.array([point[key] for point in chosen]) for key in ("beta", "p", "low", "high"))
            x = x * np.exp(step * (j - (len(seeds) - 1) / 2))
            own = [point.get("p_star", np.nan) for point in chosen]
            dash = PREDICTED if len(labels) == 1 else colour
            axes.plot(x, own, color=dash, marker="_", markersize=9, linestyle="none", alpha=0.7)
            axes.errorbar(
                x, p, yerr=np.clip([p - low, high - p], 0.0, None),
                color=colour, linestyle="none", marker=MARKERS[j % len(MARKERS)], markersize=4.5, alpha=0.85,
                markeredgecolor="white", markeredgewidth=0.4, elinewidth=1, capsize=0,
            )  # fmt: skip
            _hollow(
                axes, [(at, y) for at, y, point in zip(x, p, chosen, strict=True) if not point.get("arrived", True)]
            )
    for j, seed in enumerate(seeds):
        colour = MEASURED if len(labels) == 1 else "0.4"
        name = _joined(r"measured $\hat p$", f"seed {seed}")
        axes.plot([], [], color=colour, linestyle="none", marker=MARKERS[j % len(MARKERS)], markersize=4.5, label=name)
    if any("p_star" in point for point in points):
        colour = PREDICTED if len(labels) == 1 else "0.4"
        axes.plot(
            [],
            [],
            color=colour,
            marker="_",
            markersize=9,
            linestyle="none",
            label=r"$p^*$ from that seed's $p_\mathrm{ref}$",
        )
    if not all(point.get("arrived", True) for point in points):
        hollow = axes.plot([], [], "o", color="0.4", label="hollow: not arrived, by the flow of the theory")[0]
        hollow.set(markersize=4.5, markeredgewidth=1.1, markerfacecolor="white")
    axes.set(
        xscale="log", xlabel="β, weight of the KL to the reference", ylabel="success probability, mean over prompts"
    )
    ticks = sorted({point["beta"] for point in points})
    if betas and not 0 < len(ticks) <= 8:
        rounded = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
        ticks = [tick for tick in rounded if min(betas) <= tick <= max(betas)]
        ticks = ticks if len(ticks) > 1 else [min(betas), max(betas)]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if labels:
        axes.legend(frameon=False, loc="best", fontsize=9)
    figure.savefig(path, dpi=150)


def sweep_table(records: Sequence[dict[str, Any]]) -> Table:
    """The points for a terminal.

    Args:
      records: dicts of "point", "state", "words", "why" and, of finished runs, their result's "p_ref", "p_final" and, where
        there is a prediction, "p_star" and "difference".
    """
    grid = Table(box=None, padding=(0, 2, 0, 0))
    rows = [_cells(record) for record in records]
    for i, name in enumerate(COLUMNS):  # what is too long is broken in the state first, then in the point
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
        return inline(record["point"]), record["words"], "", "", "", ""
    after, star, difference = record["p_final"], record.get("p_star"), record.get("difference")
    solved = record["p_ref"]["mean"] > 0 or after["mean"] > 0
    test = "no prediction" if difference is None else "no test: nothing was solved"
    if difference is not None and solved:
        where = "inside" if difference["inside"] else "OUTSIDE"
        test = f"{difference['mean']:+.4f} {where}"
    return (
        inline(record["point"]),
        "done",
        f"{record['p_ref']['mean']:.4f}",
        "" if star is None else f"{star['mean']:.4f}",
        f"{after['mean']:.4f} [{after['low']:.4f}, {after['high']:.4f}]",
        test,
    )


def _hollow(axes: Any, at: Sequence[tuple[float, float]]) -> None:
    """White centres on the markers at the given places."""
    x, y = zip(*at, strict=True) if at else ((), ())
    axes.plot(x, y, color="white", linestyle="none", marker="o", markersize=2.2, zorder=4)


def _colour(labels: list[str], label: str) -> str:
    return COLOURS[labels.index(label) % len(COLOURS)]


def _joined(*parts: str) -> str:
    return ", ".join(part.replace("$", r"\$") if i else part for i, part in enumerate(parts) if part)
