"""Figure 4 of arXiv 2503.06639, the local bound B(p*) on β, and beside it the β at which the dynamics really changes.

python -m experiments.theory.local_bound [--out=runs/theory]
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.theory import figures
from grpo_jax.theory import Whitened, bistable_window, cusp, flip_limit, flip_window
from grpo_jax.theory.convergence import local_beta_bound

EPSILON = 1e-5
WEIGHTS = Whitened(EPSILON)
CAPTION = (
    "Left: stated by the paper (Thm 6, Fig. 4; ε = 1e-5): a fixed point p* is locally attracting if β > B(p*) ="
    " v|2p*−1| / (2(v+ε)^1.5), v = p*(1−p*). It is no threshold in β: p* moves with β, and by taking the largest B, as"
    " a bound for all prompts does, one gives up nearly all learning.\n"
    "Right: derived here: the thresholds per prompt. Below β_c, the lower fold, no moderate fixed point is left and p"
    " goes to ≈ 1. Between the folds there are three fixed points, above β_c2 the low one alone. In the hatched flip"
    " window the low fixed point is unstable and exact iterations may oscillate; it closes at p_ref = 1.0037 % (1.0039"
    " % at ε = 0), above which nothing ever oscillates."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes local_bound.png and local_bound.json into ``out``."""
    numbers = compute(12 if quick else 100)
    figure, ((left, right),) = figures.new_figure(1, 2, size=(11, 5.6))
    _plot_bound(left, numbers)
    _plot_thresholds(right, numbers)
    figures.save(figure, "local_bound", numbers, out=out, caption=CAPTION)


def compute(points: int) -> dict[str, Any]:
    """B over p, its largest value, and the thresholds over p_ref."""
    logit = np.linspace(-16, 16, 10 * points)
    limit = flip_limit(WEIGHTS)
    top = cusp(WEIGHTS)
    assert limit is not None and top is not None  # ε is small
    p_fold = _between(1e-7, top.p_ref, points)
    p_flip = np.geomspace(1e-7, limit * (1 - 1e-9), points)
    shown = np.array([0.01, 0.1, 0.5, 0.9])
    return {
        "epsilon": EPSILON,
        "p": 1 / (1 + np.exp(-logit)),
        "bound": local_beta_bound(logit, weights=WEIGHTS, logits=True),
        "largest_bound": top.beta,  # B is dΩ/dL, which is largest at the cusp
        "bound_table": {"p": shown, "bound": local_beta_bound(shown, weights=WEIGHTS)},
        "folds": {"p_ref": p_fold, "beta": [bistable_window(float(p), weights=WEIGHTS) for p in p_fold]},
        "flips": {"p_ref": p_flip, "beta": [flip_window(float(p), weights=WEIGHTS) for p in p_flip]},
        "flip_limit": limit,
        "cusp": top,
    }


def _between(low: float, high: float, points: int) -> np.ndarray:
    """Evenly spaced in log-odds, and as close as can be to the upper end, which is a cusp."""
    ends = np.log([low, high]) - np.log1p([-low, -high])
    return 1 / (1 + np.exp(-np.linspace(ends[0], ends[1] - 1e-6, points)))


def _plot_bound(axis: Axes, numbers: dict[str, Any]) -> None:
    axis.plot(numbers["p"], numbers["bound"], **figures.line(0))
    axis.axhline(numbers["largest_bound"], color=figures.INK, linewidth=0.8, linestyle="--")
    text = f"largest: {numbers['largest_bound']:.1f}, at p* ≈ 2ε and 1 − 2ε"
    axis.text(0.5, numbers["largest_bound"] * 0.93, text, ha="center", va="top", fontsize=8.5)
    axis.set(yscale="log", xlim=(0, 1), ylim=(0.02, 100), xlabel="p*", ylabel="B(p*)")
    figures.title(axis, "the paper's local condition: β > B(p*)")


def _plot_thresholds(axis: Axes, numbers: dict[str, Any]) -> None:
    folds, flips = numbers["folds"], numbers["flips"]
    fold, flip = np.array(folds["beta"]), np.array(flips["beta"])
    axis.fill_between(folds["p_ref"], fold[:, 0], fold[:, 1], color=figures.SHADE, linewidth=0)
    axis.fill_between(
        flips["p_ref"], flip[:, 0], flip[:, 1], facecolor="none", edgecolor=figures.COLOURS[2], hatch="///", linewidth=0
    )
    axis.plot(folds["p_ref"], fold[:, 0], label="β_c, lower fold", **figures.line(0))
    axis.plot(folds["p_ref"], fold[:, 1], label="β_c2, upper fold", **figures.line(1))
    axis.plot(flips["p_ref"], flip[:, 0], label="flip window", **figures.line(2))
    axis.plot(flips["p_ref"], flip[:, 1], **figures.line(2))
    axis.set(xscale="logit", yscale="log", xlim=(1e-7, 1 - 1e-4), ylim=(0.08, 800), xlabel="p_ref", ylabel="β")
    ticks = [1e-6, 1e-4, 1e-2, 0.5, 0.99, 0.999]
    axis.set_xticks(ticks, ["1e-6", "1e-4", "0.01", "0.5", "0.99", "0.999"])
    axis.set_xticks([], minor=True)
    axis.text(0.5, 0.25, "p → ≈ 1", ha="center", fontsize=9)
    axis.text(0.15, 5, "three fixed points", ha="center", fontsize=9)
    axis.text(0.5, 100, "one fixed point, the low one", ha="center", fontsize=9)
    figures.title(axis, "where the dynamics changes")
    axis.legend(frameon=False, fontsize=8.5, loc="upper right")


if __name__ == "__main__":
    figures.run(experiment)
