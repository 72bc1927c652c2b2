"""The figure of a run: success probability over iterations beside its prediction, and prompt by prompt."""

from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.report.figure import ATTAINABLE, FORECAST, INK, MEASURED, PREDICTED, new_figure, save_figure

_SHORT = {"objective.beta": "β", "train.iterations": "iterations", "optimizer.learning_rate": "learning rate"}


def plot_run(path: Path, *, rows: list[dict[str, Any]], result: dict[str, Any], iterates: np.ndarray | None) -> None:
    """Writes a PNG with two panels, or three where the probes have a ledger.

    Left: measured success probability with its intervals, the exact iterates, p_ref, p* and its band, and the live forecasts
    that were made first. Right: the prompts' measured final success probability over their measured p_ref, with the
    predicted curve. Between them: the KL of the probes, what of it bought success, and what a rest point would spend.

    Args:
      path: of the PNG.
      rows: the probes: dicts with "iteration", "success/mean", "success/low", "success/high", and the same of "held_out/…".
      result: the run's result (see `train`).
      iterates: [n + 1] mean success probability of exact iterates, or None where there is no prediction.
    """
    accounts = [row for row in rows if "ledger/useful" in row]
    ratios = (1.5, 1, 1) if accounts else (1.5, 1)
    figure, (left, *middle, right) = new_figure((15.5 if accounts else 11, 4.4), ncols=len(ratios), width_ratios=ratios)
    _plot_iterations(left, rows, result, iterates)
    for axes in middle:
        _plot_ledger(axes, accounts)
    _plot_prompts(right, result)
    for axes in (left, right):
        axes.set_ylim(-0.02, 1.02)
    save_figure(figure, path)


def _plot_iterations(
    axes: Any, rows: list[dict[str, Any]], result: dict[str, Any], iterates: np.ndarray | None
) -> None:
    n = np.array([row["iteration"] for row in rows])
    mean, low, high = (np.array([row[f"success/{end}"] for row in rows]) for end in ("mean", "low", "high"))
    last = int(n.max())

    # What the theory says: where the run starts, where it ends, and exact iterations in between.
    p_ref = result["p_ref"]["mean"]
    axes.axhline(p_ref, color=INK, linestyle=":", linewidth=1.2)
    axes.text(0.01 * last, p_ref - 0.015, r"$p_\mathrm{ref}$", ha="left", va="top", color=INK)
    if star := result.get("p_star"):
        axes.axhspan(star["low"], star["high"], color=PREDICTED, alpha=0.25, linewidth=0)
        axes.axhline(star["mean"], color=PREDICTED, linewidth=1.2, label=r"predicted $p^*$ and its band")
    if least := result.get("attainable"):
        axes.axhspan(least["low"], least["high"], color=ATTAINABLE, alpha=0.2, linewidth=0)
        label = r"attainable $p^\dagger$, from a lower bound on $R^2$"
        axes.axhline(least["mean"], color=ATTAINABLE, linewidth=1.2, label=label)
    if iterates is not None:
        label = r"exact iterates $p_n=h(p_{n-1})$"
        axes.plot(iterates[: last + 1], color=PREDICTED, linestyle="--", linewidth=1, label=label)

    for one in result.get("extended", []):
        changed = ", ".join(f"{_SHORT.get(key, key)} → {new:g}" if isinstance(new, (int, float)) else f"{key} → {new}"
                            for key, (_, new) in one["changed"].items())  # fmt: skip
        axes.axvline(one["after"], color=INK, linewidth=0.8, linestyle=(0, (5, 3)))
        axes.text(one["after"] + 0.01 * last, 0.01, changed, rotation=90, va="bottom", ha="left", color=INK, fontsize=8)

    # What was forecast early in the run: the later, the darker.
    for forecast, alpha in zip(result.get("forecasts", [])[:2], (0.18, 0.38), strict=False):
        path, made = forecast["path"], forecast["iteration"]
        label = f"forecast made at iteration {made}, {result['confidence']:.0%}"
        axes.fill_between(
            path["iteration"], path["low"], path["high"], color=FORECAST, alpha=alpha, linewidth=0, label=label
        )
        axes.plot(path["iteration"], path["mean"], color=FORECAST, linewidth=0.8, alpha=0.8)

    # What was measured.
    axes.errorbar(
        n, mean, yerr=[mean - low, high - mean], color=MEASURED, marker="o", markersize=3, linewidth=1, capsize=0,
        label=r"measured $\hat p_n$",
    )  # fmt: skip
    if all("held_out/mean" in row for row in rows):
        apart, least, most = (np.array([row[f"held_out/{end}"] for row in rows]) for end in ("mean", "low", "high"))
        axes.errorbar(
            n, apart, yerr=[apart - least, most - apart], color=MEASURED, marker="s", markersize=3, linewidth=1, capsize=0,
            markerfacecolor="white", linestyle=":", label=r"the same of prompts held out",
        )  # fmt: skip
    if "average" in result:
        p, over = result["average"]["p_final"], result["average"]["iterations"]
        axes.errorbar(
            [last], [p["mean"]], yerr=[[p["mean"] - p["low"]], [p["high"] - p["mean"]]], color=MEASURED, marker="D",
            markerfacecolor="white", markersize=6, label=f"average of the last {over:,}", zorder=5,
        )  # fmt: skip

    axes.set(xlabel="iteration n", ylabel="success probability, mean over prompts", xlim=(-0.01 * last, 1.01 * last))
    symbols = {"β": result["beta"], r"$β_\mathrm{mirror}$": result["beta_mirror"]}
    weights = "".join(f"{symbol} = {weight:g}, " for symbol, weight in symbols.items() if weight)
    axes.set_title(f"{weights}G = {result['group_size']}, {result['objective']}, seed {result['seed']}")
    many = len(axes.get_legend_handles_labels()[0]) > 5
    axes.legend(frameon=False, loc="best", fontsize=8 if many else 9, ncols=2 if many else 1, columnspacing=1.0)


def _plot_ledger(axes: Any, rows: list[dict[str, Any]]) -> None:
    def column(name: str) -> np.ndarray:
        return np.array([0.0, *(row[name] for row in rows)])

    n, kl, useful = (column(name) for name in ("iteration", "kl/sequence", "ledger/useful"))
    axes.plot(n, kl, color=INK, linewidth=1.2, label=r"KL$(\pi\Vert\pi_\mathrm{ref})$")
    axes.plot(n, useful, color=MEASURED, linewidth=1.2, label=r"useful, kl$(\hat p\Vert p_\mathrm{ref})$")
    spent = kl >= useful  # an estimate of no KL within can be negative
    axes.fill_between(n, useful, kl, where=spent, color=INK, alpha=0.12, linewidth=0, label="bought no success")
    lowest = [0.0, *useful, *kl]
    if all("ledger/at_rest" in row for row in rows):
        resting = useful + column("ledger/at_rest")
        axes.plot(n, resting, color=PREDICTED, linestyle=":", linewidth=1.2, label="useful + at rest")
        lowest += [*resting]
    axes.set(title="what the KL was spent on", xlabel="iteration n", ylabel="nats per completion, mean over prompts")
    axes.set_ylim(bottom=min(lowest))
    axes.legend(frameon=False, loc="best", fontsize=9)


def _plot_prompts(axes: Any, result: dict[str, Any]) -> None:
    prompts = {name: np.array(values) for name, values in result["prompts"].items()}
    p_ref = prompts["p_ref"]
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1, label="no change")
    if "p_star" in prompts:
        order = np.argsort(p_ref)
        star, low, high = (prompts[name][order] for name in ("p_star", "p_star_low", "p_star_high"))
        axes.fill_between(p_ref[order], low, high, color=PREDICTED, alpha=0.25, linewidth=0)
        axes.plot(p_ref[order], star, color=PREDICTED, linewidth=1.2, label=r"predicted $p^*(p_\mathrm{ref})$")
    if "attainable" in prompts:
        dash = {"marker": "_", "markersize": 9, "markeredgewidth": 1.5, "linestyle": "none"}
        axes.plot(p_ref, prompts["attainable"], color=ATTAINABLE, label=r"attainable $p^\dagger$ of the prompt", **dash)
    style = {"color": MEASURED, "markersize": 3.5, "alpha": 0.7, "linestyle": "none"}
    axes.plot(p_ref, prompts["p_final"], "o", label="measured, per prompt", **style)
    axes.set(title="prompt by prompt", xlabel=r"measured $p_\mathrm{ref}$ of the prompt", xlim=(-0.02, 1.02))
    axes.set_ylabel("measured final success probability")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
