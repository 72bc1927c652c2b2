"""Figure 1 of arXiv 2503.06639, the weights ω⁺ and ω⁻, and what other normalisers make of their sum Ω.

python -m experiments.theory.weights [--out=runs/theory]
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.theory import figures
from grpo_jax.theory import Group, MeanOnly, Weights, Whitened, WhitenedStd, omega, omega_minus, omega_plus

NORMALISERS: dict[str, Weights] = {
    "population, ε = 0": Whitened(0.0),
    "population, √(v + 1e-5)": Whitened(1e-5),
    "population, √v + 1e-2": WhitenedStd(1e-2),
    "groups of 16": Group(16),
    "groups of 8": Group(8),
    "groups of 4": Group(4),
    "mean only (Dr. GRPO)": MeanOnly(),
}
CAPTION = (
    "Left: stated by the paper (Fig. 1; the axis is cut at 10, as there): ω⁺ = √((1−p)/p) credits a success and ω⁻ ="
    " √(p/(1−p)) blames a failure, ε = 0.\n"
    "Right: derived here: the dynamics sees only the sum Ω = ω⁺ + ω⁻, which is symmetric in p and 1 − p, so half of"
    " it is drawn. Smoothing caps it at 1/√ε or 1/ε, groups of G (ddof 0, ε = 0) at √(G−1): a group acts like a much"
    " larger ε, about 1/(G−1). Mean only is Ω = 1."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes weights.png and weights.json into ``out``."""
    numbers = compute(50 if quick else 500)
    figure, ((left, right),) = figures.new_figure(1, 2, size=(10, 4.8))
    pair = numbers["figure_1"]
    left.plot(pair["p"], pair["omega_plus"], label="ω⁺, successes", **figures.line(0))
    left.plot(pair["p"], pair["omega_minus"], label="ω⁻, failures", **figures.line(2))
    left.set(xlim=(0, 1), ylim=(0, 10), xlabel="p", ylabel="weight")
    figures.title(left, "the weights at ε = 0")
    left.legend(frameon=False)
    for k, (name, values) in enumerate(numbers["omega"].items()):
        right.plot(numbers["p"], values, label=name, **figures.line(k))
    right.set(xscale="log", yscale="log", xlim=(1e-6, 0.5), ylim=(0.7, 1500), xlabel="p", ylabel="Ω")
    figures.title(right, "their sum, by normaliser")
    right.legend(frameon=False, fontsize=8.5)
    figures.save(figure, "weights", numbers, out=out, caption=CAPTION)


def compute(points: int) -> dict[str, Any]:
    """The curves of both panels, at ``points`` values of p each."""
    unit = np.linspace(0, 1, points + 2)[1:-1]
    low = np.geomspace(1e-6, 0.5, points)
    exact = Whitened(0.0)
    return {
        "figure_1": {"p": unit, "omega_plus": omega_plus(unit, exact), "omega_minus": omega_minus(unit, exact)},
        "p": low,
        "omega": {name: omega(low, weights) for name, weights in NORMALISERS.items()},
    }


if __name__ == "__main__":
    figures.run(experiment)
