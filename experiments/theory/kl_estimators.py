"""Which KL estimator the loss contains decides where training ends: the true reverse KL against k3 and k1.

python -m experiments.theory.kl_estimators [--out=runs/theory]
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.theory import figures
from grpo_jax.theory import Group, Weights, Whitened, flow_point, forward_kl_fixed_point

P_REFS = (0.01, 0.05, 0.2, 0.5)
WEIGHTS: dict[str, Weights] = {
    "population, ε = 1e-5": Whitened(1e-5),
    "groups of 16": Group(16),
    "groups of 8": Group(8),
}
CAPTION = (
    "Derived here; the paper says KL(π‖π_ref) and leaves the estimator open. Solid: where many small on-policy steps"
    " from p_ref end with the true gradient of KL(π‖π_ref) (k2, or the KL in the reward): logit p* = logit p_ref +"
    " Ω(p*)/β, smallest root; it jumps at the fold. Dashed: the k3 term of most libraries as a loss, whose gradient at"
    " π = π_old is that of KL(π_ref‖π): p* − p_ref = p*(1−p*)Ω(p*)/β. It lets a hard prompt rise much further at the"
    " same β. k1 as a loss has zero expected gradient there: no pull, p → 1 at every β (the line at the top)."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes kl_estimators.png and kl_estimators.json into ``out``."""
    betas = np.geomspace(0.05, 20, 40 if quick else 400)
    numbers = compute(betas)
    figure, (axes,) = figures.new_figure(1, len(WEIGHTS), size=(12, 5), sharey=True)
    for axis, panel in zip(axes, numbers["panels"], strict=True):
        axis.axhline(1.0, color=figures.INK, linewidth=0.8)
        for k, curve in enumerate(panel["curves"]):
            style = figures.marker(k, markevery=(k * len(betas) // 40, len(betas) // 8))
            axis.plot(betas, curve["reverse"], label=f"p_ref = {curve['p_ref']:g}", **style | {"linestyle": "-"})
            axis.plot(betas, curve["forward"], **style | {"linestyle": "--", "markerfacecolor": "white"})
        axis.set(xscale="log", ylim=(0, 1.04), xlim=(betas[0], betas[-1]), xlabel="β")
        figures.title(axis, panel["weights"])
    axes[0].text(20, 1.005, "k1: p → 1", ha="right", va="bottom", fontsize=8.5)
    axes[0].set_ylabel("p* where training ends")
    axes[0].plot([], [], color=figures.INK, linestyle="-", label="KL(π‖π_ref): k2, KL in reward")
    axes[0].plot([], [], color=figures.INK, linestyle="--", label="KL(π_ref‖π): k3")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=8.5
    )
    figures.save(figure, "kl_estimators", numbers, out=out, caption=CAPTION)


def compute(betas: np.ndarray) -> dict[str, Any]:
    """p*(β) of both divergences, per normaliser and p_ref."""
    scale = jnp.asarray(betas)
    return {
        "beta": betas,
        "panels": [
            {
                "weights": name,
                "curves": [
                    {
                        "p_ref": p_ref,
                        "reverse": flow_point(jnp.full_like(scale, p_ref), beta=scale, weights=weights),
                        "forward": forward_kl_fixed_point(jnp.full_like(scale, p_ref), beta=scale, weights=weights),
                    }
                    for p_ref in P_REFS
                ],
            }
            for name, weights in WEIGHTS.items()
        ],
        "at_beta_1": {
            name: {
                f"{p_ref:g}": {
                    "reverse": flow_point(p_ref, beta=1.0, weights=weights),
                    "forward": forward_kl_fixed_point(p_ref, beta=1.0, weights=weights),
                }
                for p_ref in P_REFS
            }
            for name, weights in WEIGHTS.items()
        },
    }


if __name__ == "__main__":
    figures.run(experiment)
