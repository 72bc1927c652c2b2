"""The figure of a run: success probability over iterations beside its prediction, and prompt by prompt."""

from pathlib import Path
from typing import Any

import numpy as np

INK, MEASURED, PREDICTED = "#222222", "#0072b2", "#d55e00"


def plot_run(path: Path, *, rows: list[dict[str, Any]], result: dict[str, Any], iterates: np.ndarray | None) -> None:
    """Writes a PNG with two panels.

    Left: measured success probability with its intervals, the exact iterates, p_ref, p* and its band. Right: the prompts'
    measured final success probability over their measured p_ref, with the predicted curve.

    Args:
      path: of the PNG.
      rows: the probes: dicts with "iteration", "success/mean", "success/low", "success/high".
      result: the run's result (see `train`).
      iterates: [n + 1] mean success probability of exact iterates, or None where there is no prediction.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    over_time, per_prompt = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _over_time(over_time, rows, result, iterates)
    _per_prompt(per_prompt, result)
    for axes in (over_time, per_prompt):
        axes.set_ylim(-0.02, 1.02)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _over_time(axes: Any, rows: list[dict[str, Any]], result: dict[str, Any], iterates: np.ndarray | None) -> None:
    n = np.array([row["iteration"] for row in rows])
    mean, low, high = (np.array([row[f"success/{k}"] for row in rows]) for k in ("mean", "low", "high"))
    last = int(n.max())
    axes.axhline(result["p_ref"]["mean"], color=INK, linestyle=":", linewidth=1.2)
    axes.text(0.01 * last, result["p_ref"]["mean"] - 0.015, r"$p_\mathrm{ref}$", ha="left", va="top", color=INK)
    if "p_star" in result:
        star = result["p_star"]
        axes.axhspan(star["low"], star["high"], color=PREDICTED, alpha=0.25, linewidth=0)
        axes.axhline(star["mean"], color=PREDICTED, linewidth=1.2, label=r"predicted $p^*$ and its band")
    if iterates is not None:
        shown = iterates[: last + 1]
        axes.plot(
            np.arange(len(shown)),
            shown,
            color=PREDICTED,
            linestyle="--",
            linewidth=1,
            label=r"exact iterates $p_n=h(p_{n-1})$",
        )
    axes.errorbar(
        n, mean, yerr=[mean - low, high - mean], color=MEASURED, marker="o", markersize=3, linewidth=1, capsize=0,
        label=r"measured $\hat p_n$",
    )  # fmt: skip
    axes.set(xlabel="iteration n", ylabel="success probability, mean over prompts", xlim=(-0.01 * last, 1.01 * last))
    weights = "".join(
        f"{symbol} = {result[key]:g}, "
        for symbol, key in (("β", "beta"), (r"$β_\mathrm{mirror}$", "beta_mirror"))
        if result[key]
    )
    axes.set_title(f"{weights}G = {result['group_size']}, {result['objective']}, seed {result['seed']}", fontsize=10)
    axes.legend(frameon=False, loc="best", fontsize=9)


def _per_prompt(axes: Any, result: dict[str, Any]) -> None:
    prompts = result["prompts"]
    p_ref, final = np.array(prompts["p_ref"]), np.array(prompts["p_final"])
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1, label="no change")
    if "p_star" in prompts:
        order = np.argsort(p_ref)
        star, low, high = (np.array(prompts[k])[order] for k in ("p_star", "p_star_low", "p_star_high"))
        axes.fill_between(p_ref[order], low, high, color=PREDICTED, alpha=0.25, linewidth=0)
        axes.plot(p_ref[order], star, color=PREDICTED, linewidth=1.2, label=r"predicted $p^*(p_\mathrm{ref})$")
    axes.plot(
        p_ref, final, "o", color=MEASURED, markersize=3.5, alpha=0.7, linestyle="none", label="measured, per prompt"
    )
    axes.set(
        xlabel=r"measured $p_\mathrm{ref}$ of the prompt",
        ylabel="measured final success probability",
        xlim=(-0.02, 1.02),
    )
    axes.set_title("prompt by prompt", fontsize=10)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
