"""Figure 5 of arXiv 2503.06639: fifty exact iterations, from the start the paper used and from the one it states.

python -m experiments.theory.trajectories [--out=runs/theory]
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.theory import figures
from grpo_jax.theory import Whitened, iterate, limit_point

BETAS, P_REFS = (0.01, 0.2, 0.4, 0.8, 1.0, 5.0), (1e-4, 0.2, 0.5, 0.8)
WEIGHTS, ITERATIONS = Whitened(1e-5), 50
CAPTION = (
    "Stated by the paper (Fig. 5): p_n = h(p_{n−1}), 50 iterations, ε = 1e-5. Found here: its curves are those of the"
    " upper row, p_0 = 0.1 whatever p_ref is (the limits .6813, .2807, .6007, .8813 and .0442 at iteration 50 of the"
    " panel it calls divergent), not of the lower row, p_0 = p_ref, which is how training starts.\n"
    "Derived here: upper left, β = 5 is chaos (positive Lyapunov exponent), an effect of the start: from p_ref the"
    " first exact step jumps past everything to p ≈ 1."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes trajectories.png and trajectories.json into ``out``."""
    del quick  # it is quick
    panels = compute()
    figure, axes = figures.new_figure(2, len(P_REFS), size=(12, 6.6), sharex=True, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        for k, orbit in enumerate(panel["orbits"]):
            style = figures.marker(len(BETAS) - 1 - k, markevery=(2 * k, 12), markersize=4.5)
            axis.plot(np.arange(ITERATIONS + 1), orbit["p"], label=f"β = {orbit['beta']:g}", **style)
        axis.set(xlim=(0, ITERATIONS), ylim=(-0.02, 1.03))
        figures.title(axis, f"p_ref = {panel['p_ref']:g}, p_0 = {panel['p_0']:g}")
    axes[1, 0].legend(frameon=False, fontsize=8.5, loc="center right")
    for axis in axes[-1]:
        axis.set_xlabel("iteration n")
    for axis in axes[:, 0]:
        axis.set_ylabel("p_n")
    figures.save(figure, "trajectories", panels, out=out, caption=CAPTION)


def compute() -> list[dict[str, Any]]:
    """One dict per panel: p_ref, p_0, and for every β the orbit and its limit."""
    return [
        {
            "p_ref": p_ref,
            "p_0": p_0,
            "orbits": [
                {
                    "beta": beta,
                    "p": iterate(p_ref, ITERATIONS, beta=beta, weights=WEIGHTS, p_0=p_0),
                    "limit": limit_point(p_ref, beta=beta, weights=WEIGHTS, p_0=p_0),
                }
                for beta in BETAS
            ],
        }
        for starts_at in (lambda p_ref: 0.1, lambda p_ref: p_ref)
        for p_ref, p_0 in ((p_ref, starts_at(p_ref)) for p_ref in P_REFS)
    ]


if __name__ == "__main__":
    figures.run(experiment)
