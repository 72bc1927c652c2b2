"""The two branches of the clipped contrastive loss: what a success and what a failure contribute, over the ratio.

python -m experiments.theory.clipped_branches [--out=runs/theory]
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.theory import figures
from grpo_jax.theory import Whitened, contrastive_term

WEIGHTS, CLIP, P_OLD = Whitened(0.0), 0.2, (0.2, 0.5, 0.8)
CAPTION = (
    "Stated by the paper (§2): per completion, ω⁺ min(ρ, 1+c) for a success and −ω⁻ max(ρ, 1−c) for a failure, to be"
    " maximised; ρ = π/π_old of the whole completion, c = 0.2, whitened rewards (ε = 0). Pale: not clipped.\n"
    "Shaded, a branch is flat and the completion no longer pulls or pushes: a success from ρ = 1+c up, a failure from"
    " ρ = 1−c down. Nothing is clipped in the other two directions. The slopes are ω⁺ and −ω⁻: at p = 0.8 a failure"
    " is pushed down with 2 where a success is raised with ½, at p = 0.2 the reverse, and at p = ½ both are 1."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes clipped_branches.png and clipped_branches.json into ``out``."""
    numbers = compute(41 if quick else 401)
    figure, ((left, right),) = figures.new_figure(1, 2, size=(10, 5.2))
    left.axvspan(1 + CLIP, 2, color=figures.SHADE, linewidth=0)
    right.axvspan(0, 1 - CLIP, color=figures.SHADE, linewidth=0)
    _plot_branches(left, numbers, "success")
    _plot_branches(right, numbers, "failure")
    left.set(ylim=(0, 4.1), ylabel="contribution to the objective")
    right.set(ylim=(-4.1, 0))
    figures.title(left, "a success: ω⁺ min(ρ, 1 + c)")
    figures.title(right, "a failure: −ω⁻ max(ρ, 1 − c)")
    left.text(1.6, 0.12, "flat: no gradient", ha="center", fontsize=9)
    right.text(0.4, -3.95, "flat: no gradient", ha="center", fontsize=9)
    left.legend(frameon=False, loc="upper left")
    figures.save(figure, "clipped_branches", numbers, out=out, caption=CAPTION)


def compute(points: int) -> dict[str, Any]:
    """The ratios, and for every p_old what a success and a failure contribute, clipped and not."""
    ratio = np.linspace(0, 2, points)

    def branch(reward: int, clip: float | None) -> list[Any]:
        return [contrastive_term(ratio, reward, p, weights=WEIGHTS, clip=clip) for p in P_OLD]

    return {
        "clip": CLIP,
        "p_old": P_OLD,
        "ratio": ratio,
        "success": {"clipped": branch(1, CLIP), "plain": branch(1, None)},
        "failure": {"clipped": branch(0, CLIP), "plain": branch(0, None)},
    }


def _plot_branches(axis: Axes, numbers: dict[str, Any], side: str) -> None:
    for values in numbers[side]["plain"]:
        axis.plot(numbers["ratio"], values, color=figures.PALE, linewidth=1)
    for k, (p, values) in enumerate(zip(P_OLD, numbers[side]["clipped"], strict=True)):
        axis.plot(numbers["ratio"], values, label=f"p_old = {p:g}", **figures.line(k))
    axis.axvline(1, color=figures.INK, linewidth=0.7)
    axis.set(xlim=(0, 2), xlabel="ρ = π/π_old of the completion")
    axis.set_xticks([0, 0.5, 1 - CLIP, 1, 1 + CLIP, 1.5, 2], ["0", "0.5", "1−c", "1", "1+c", "1.5", "2"])


if __name__ == "__main__":
    figures.run(experiment)
