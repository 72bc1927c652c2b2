"""Exact iterations of every variant of the paper from the same references: GRPO, Dr. GRPO, their mirror forms, two-KL.

python -m experiments.theory.variants [--out=runs/theory]
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.theory import figures
from grpo_jax.theory import LimitPoint, MeanOnly, Weights, Whitened, iterate, limit_point

P_REFS, BETA, ITERATIONS = (1e-3, 0.02, 0.2), 3.0, 30


class Variant(NamedTuple):
    """An objective: its normaliser, the share α of the KL that goes to the reference, and its β."""

    name: str
    weights: Weights
    alpha: float
    beta: float = BETA


VARIANTS = (
    Variant("GRPO", Whitened(1e-5), 1.0),
    Variant("Dr. GRPO", MeanOnly(), 1.0),
    Variant("mirror GRPO", Whitened(1e-5), 0.0),
    Variant("mirror Dr. GRPO", MeanOnly(), 0.0),
    Variant("two-KL GRPO, α = ½", Whitened(1e-5), 0.5),
    Variant("two-KL GRPO, α = ½, β = 6", Whitened(1e-5), 0.5, 2 * BETA),
)
CAPTION = (
    "Stated by the paper: the recurrences logit p_n = α logit p_ref + (1−α) logit p_{n−1} + Ω(p_{n−1})/β (Thms 2, 4,"
    " 9, §5; ε = 1e-5, β = 3 unless said otherwise, p_0 = p_ref), that mirror iterations (α = 0) rise to 1, and that"
    " Dr. GRPO ends after one step.\n"
    "Derived here: the paper's correction Δ_R of two-KL is zero, so two-KL is GRPO's map, damped: it has the fixed"
    " points of αβ. At p_ref = .001 GRPO falls into a 2-cycle (.633 ↔ .002), and two-KL at β = 6, with the same fixed"
    " point .0151, converges to it. Mirror Dr. GRPO needs β steps per unit of log-odds; mirror GRPO, while its steps"
    " are small, β(π − 2 arcsin √p_0) ≤ πβ steps to the top however small p_0 is, and fewer where, as from .001 here,"
    " the first step is a long one."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes variants.png and variants.json into ``out``."""
    del quick  # it is quick
    panels = compute()
    figure, (axes,) = figures.new_figure(1, len(P_REFS), size=(12, 5.2), sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        for k, orbit in enumerate(panel["orbits"]):
            style = figures.marker(k, markevery=(k % 3, 3), markersize=4)
            axis.plot(np.arange(ITERATIONS + 1), orbit["p"], label=orbit["name"], **style)
        axis.set(xlim=(0, ITERATIONS), ylim=(-0.02, 1.03), xlabel="iteration n")
        figures.title(axis, f"p_ref = {panel['p_ref']:g}")
    axes[0].set_ylabel("p_n")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=8.5
    )
    figures.save(figure, "variants", panels, out=out, caption=CAPTION)


def compute() -> list[dict[str, Any]]:
    """One dict per panel: p_ref, and for every variant its orbit and limit."""
    return [{"p_ref": p_ref, "orbits": [_orbit(p_ref, variant) for variant in VARIANTS]} for p_ref in P_REFS]


def _orbit(p_ref: float, variant: Variant) -> dict[str, Any]:
    settings: dict[str, Any] = {"beta": variant.beta, "weights": variant.weights, "alpha": variant.alpha}
    limit: LimitPoint = limit_point(p_ref, **settings)
    return {
        "name": variant.name,
        "alpha": variant.alpha,
        "beta": variant.beta,
        "p": iterate(p_ref, ITERATIONS, **settings),
        "limit": limit,
    }


if __name__ == "__main__":
    figures.run(experiment)
