"""What groups of G completions change: the weight they lose, where training ends, the groups that teach nothing.

python -m experiments.theory.finite_groups [--out=runs/theory]
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from experiments.theory import figures
from grpo_jax.theory import (
    Group,
    Weights,
    Whitened,
    dead_fraction,
    flow_point,
    fold_beta,
    groups_per_live_group,
    mean_dead_fraction,
    omega,
)

SIZES = (4, 8, 16, 64)
P_REF, SPREAD = 0.05, (0.5, 0.5)
CAPTION = (
    "Derived here; the paper has infinite groups only. Groups as in its Algorithm 1 (ddof 0, ε = 0; for the"
    " population top right 1e-5). Top left: the mean group pushes with Ω_G(p) < Ω(p), the same direction with a"
    " smaller weight. Top right: where many small steps with the true KL(π‖π_ref) end: groups of 4 and 8 have no fold"
    " at this p_ref, so p* falls without a jump. Bottom left: groups whose rewards are all equal have zero gradient;"
    " the mean is over prompts with p ~ Beta(½, ½). Bottom right: dynamic sampling draws dead groups again, which"
    " multiplies Ω_G by the number of groups drawn per live one: on rare successes it pushes like 1/p, harder than the"
    " population (black) does."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes finite_groups.png and finite_groups.json into ``out``."""
    numbers = compute(40 if quick else 400)
    figure, axes = figures.new_figure(2, 2, size=(10.5, 8.6))
    _shrink(axes[0, 0], numbers)
    _ends(axes[0, 1], numbers)
    _dead(axes[1, 0], numbers)
    _dynamic(axes[1, 1], numbers)
    figures.save(figure, "finite_groups", numbers, out=out, caption=CAPTION)


def compute(points: int) -> dict[str, Any]:
    """The curves of all four panels, and the shrink factors of a table."""
    low, unit, betas = np.geomspace(1e-4, 0.5, points), np.linspace(0, 1, points), np.geomspace(0.1, 10, points)
    table = np.array([0.01, 0.05, 0.1, 0.3, 0.5])
    ends: dict[str, Weights] = {"∞": Whitened(1e-5), **{f"{size}": Group(size) for size in SIZES}}
    scale = jnp.asarray(betas)
    return {
        "p": low,
        "shrink": {size: _factor(low, size) for size in SIZES},
        "shrink_table": {"p": table, **{size: _factor(table, size) for size in SIZES}},
        "beta": betas,
        "p_ref": P_REF,
        "p_star": {
            name: flow_point(jnp.full_like(scale, P_REF), beta=scale, weights=weights) for name, weights in ends.items()
        },
        "fold_beta": {name: fold_beta(P_REF, weights=weights) for name, weights in ends.items()},
        "unit": unit,
        "dead": {size: dead_fraction(unit, size) for size in SIZES},
        "mean_dead": {size: mean_dead_fraction(*SPREAD, size) for size in SIZES},
        "population": omega(low, Whitened(0.0)),
        "plain": {size: omega(low, Group(size)) for size in SIZES},
        "dynamic": {size: omega(low, Group(size, dynamic_sampling=True)) for size in SIZES},
        "groups_per_live_group": {size: groups_per_live_group(low, size) for size in SIZES},
    }


def _factor(p: np.ndarray, size: int) -> Any:
    """Ω_G / Ω."""
    return omega(p, Group(size)) / omega(p, Whitened(0.0))


def _shrink(axis: Axes, numbers: dict[str, Any]) -> None:
    for k, (size, factor) in enumerate(numbers["shrink"].items()):
        axis.plot(numbers["p"], factor, label=f"G = {size}", **figures.line(k + 1))
    axis.set(xscale="log", xlim=(1e-4, 0.5), ylim=(0, 1.02), xlabel="p", ylabel="Ω_G / Ω")
    figures.title(axis, "the weight that is left")
    axis.legend(frameon=False, fontsize=8.5)


def _ends(axis: Axes, numbers: dict[str, Any]) -> None:
    for k, (name, ends) in enumerate(numbers["p_star"].items()):
        axis.plot(numbers["beta"], ends, label=f"G = {name}", **figures.line(k))
    axis.axhline(P_REF, color=figures.INK, linewidth=0.8)
    axis.text(0.105, P_REF - 0.01, "p_ref", va="top", fontsize=8.5)
    axis.set(xscale="log", xlim=(0.1, 10), ylim=(0, 1.02), xlabel="β", ylabel="p*")
    figures.title(axis, f"where training ends, p_ref = {P_REF:g}")
    axis.legend(frameon=False, fontsize=8.5)


def _dead(axis: Axes, numbers: dict[str, Any]) -> None:
    for k, (size, dead) in enumerate(numbers["dead"].items()):
        label = f"G = {size} (mean {float(numbers['mean_dead'][size]):.3f})"
        axis.plot(numbers["unit"], dead, label=label, **figures.line(k + 1))
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="p", ylabel="share of dead groups")
    figures.title(axis, "groups that teach nothing")
    axis.legend(frameon=False, fontsize=8.5, loc="upper center")


def _dynamic(axis: Axes, numbers: dict[str, Any]) -> None:
    axis.plot(numbers["p"], numbers["population"], label="population", **figures.line(0))
    for k, size in enumerate(SIZES):
        axis.plot(numbers["p"], numbers["dynamic"][size], label=f"G = {size}, dynamic", **figures.line(k + 1))
        axis.plot(numbers["p"], numbers["plain"][size], **figures.line(k + 1, linewidth=0.8))
    axis.set(xscale="log", yscale="log", xlim=(1e-4, 0.5), xlabel="p", ylabel="Ω")
    figures.title(axis, "dynamic sampling (thick) and none (thin)")
    axis.legend(frameon=False, fontsize=8.5)


if __name__ == "__main__":
    figures.run(experiment)
