"""Figure 2 of arXiv 2503.06639: the map h from one iteration's success probability to the next, and its fixed points.

python -m experiments.theory.success_map [--out=runs/theory]
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from experiments.theory import figures
from grpo_jax.theory import Whitened, fixed_points, success_map

BETAS, P_REFS = (0.01, 0.2, 1.0, 5.0), (1e-4, 0.2, 0.8)
EPSILONS = (1e-2, 1e-5)
DRAWN_BY = {1e-2: "ε = 1e-2, as the paper draws it", 1e-5: "ε = 1e-5, as its caption says"}
CAPTION = (
    "Stated by the paper (Fig. 2): h(p) = σ(logit p_ref + Ω(p)/β) and that it has a fixed point, above p_ref. Found"
    " here: the paper's picture is drawn with ε = 1e-2 (its minima are .645 at p_ref = 1e-4, β = .2 and .640 at p_ref"
    " = .2, β = 1; its h(1) is .65 at p_ref = .2, β = 5), while its caption says 1e-5; both are shown.\n"
    "Derived here: all fixed points and their stability. Filled: stable, |h′| < 1. Open: unstable. There are one or"
    " three; at ε = 1e-5 the highest lies within 1e-6 of p = 1 in every panel."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes success_map.png and success_map.json into ``out``."""
    numbers = compute(200 if quick else 1000)
    figure, axes = figures.new_figure(len(EPSILONS), len(P_REFS), size=(11, 8), sharex=True, sharey=True)
    for axis, panel in zip(axes.flat, numbers["panels"], strict=True):
        _plot(axis, numbers["p"], panel)
    axes[0, 2].legend(frameon=False, loc="center left", fontsize=8.5, bbox_to_anchor=(0.02, 0.6))
    for axis in axes[-1]:
        axis.set_xlabel("p, this iteration")
    for axis in axes[:, 0]:
        axis.set_ylabel("h(p), the next iteration")
    figures.save(figure, "success_map", numbers, out=out, caption=CAPTION)


def compute(points: int) -> dict[str, Any]:
    """Per panel its ε, p_ref, and for every β the curve over p, its minimum, its end and the fixed points."""
    p = np.sin(np.linspace(0, np.pi / 2, points)) ** 2  # dense at the ends, where the map is steep
    panels = [
        {"epsilon": epsilon, "p_ref": p_ref, "curves": [_curve(p, p_ref, beta, epsilon) for beta in BETAS]}
        for epsilon in EPSILONS
        for p_ref in P_REFS
    ]
    return {"p": p, "panels": panels}


def _curve(p: np.ndarray, p_ref: float, beta: float, epsilon: float) -> dict[str, Any]:
    weights = Whitened(epsilon)
    special = success_map(jnp.array([0.5, 1.0]), p_ref, beta=beta, weights=weights)  # h is lowest at ½
    return {
        "beta": beta,
        "h": success_map(p, p_ref, beta=beta, weights=weights),
        "minimum": special[0],
        "h(1)": special[1],
        "fixed_points": fixed_points(p_ref, beta=beta, weights=weights),
    }


def _plot(axis: Axes, p: np.ndarray, panel: dict[str, Any]) -> None:
    axis.plot([0, 1], [0, 1], color=figures.PALE, linewidth=1, zorder=1)
    for k, curve in enumerate(panel["curves"]):
        style = figures.line(k)
        axis.plot(p, curve["h"], label=f"β = {curve['beta']:g}", **style)
        for point in curve["fixed_points"]:
            face = style["color"] if point.stable else "white"
            axis.plot(
                point.p, point.p, "o", color=style["color"], markerfacecolor=face, markersize=6, zorder=3, clip_on=False
            )
    axis.set(xlim=(0, 1), ylim=(-0.02, 1.02), aspect="equal")
    figures.title(axis, f"p_ref = {panel['p_ref']:g}; {DRAWN_BY[panel['epsilon']]}")


if __name__ == "__main__":
    figures.run(experiment)
