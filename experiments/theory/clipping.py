"""What PPO's clip changes when every clipped iteration is solved exactly: the way, not the fixed points.

python -m experiments.theory.clipping [--out=runs/theory]
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes

from experiments.theory import figures
from grpo_jax.theory import Whitened, fixed_points, iterate, success_map
from grpo_jax.theory.clipping import clipped_success_map

WEIGHTS, CLIP, ITERATIONS = Whitened(1e-5), 0.2, 60
JUMP = {"p_ref": 0.01, "beta": 0.45, "p_0": 0.01}
CHAOS = {"p_ref": 1e-4, "beta": 5.0, "p_0": 0.1}
CYCLE = {"p_ref": 1e-3, "beta": 3.0, "p_0": 1e-3}
TAIL = 1000  # iterations after which an orbit is looked at for where it stays
CAPTION = (
    "Derived here; the paper leaves clipping open. Each iteration maximises ω⁺ min(p, 1.2 p_old) − ω⁻ max(1−p, 0.8"
    " (1−p_old)) − β kl(p‖p_ref) exactly (c = .2 on whole completions, ε = 1e-5). Fixed points (dots and lines; open"
    " and dashed: unstable) and multipliers are those of h; the climb is at most a factor 1.2 while p is small, the"
    " way down is free.\n"
    "Top: the first exact step of GRPO jumps over the middle fixed point and ends at p ≈ 1; the clipped orbit climbs"
    " to the low one. It can pass the middle one, p_m, only if p_m < (1+c)/(2+c), which for c = .2 needs p_ref < 1e-9."
    " Bottom: chaos and a 2-cycle shrink to a small saw-tooth, they do not vanish: the fixed point stays unstable."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes clipping.png and clipping.json into ``out``."""
    numbers = compute(100 if quick else 1000)
    figure, axes = figures.new_figure(2, 2, size=(10.5, 8.4))
    _plot_map(axes[0, 0], numbers["map"])
    for axis, name in zip(axes.flat[1:], ("jump", "chaos", "cycle"), strict=True):
        _plot_orbits(axis, numbers[name])
    figures.title(axes[0, 0], "the clipped map beside h (p_ref = 0.01, β = 0.45)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figures.save(figure, "clipping", numbers, out=out, caption=CAPTION)


def compute(points: int) -> dict[str, Any]:
    """The maps, three pairs of orbits, and where these stay."""
    p = np.sin(np.linspace(0, np.pi / 2, points)) ** 2
    settings: dict[str, Any] = {"beta": JUMP["beta"], "weights": WEIGHTS}
    return {
        "clip": CLIP,
        "map": {
            "p": p,
            "h": success_map(p, JUMP["p_ref"], **settings),
            "clipped": clipped_success_map(p, JUMP["p_ref"], clip=CLIP, **settings),
            "fixed_points": fixed_points(JUMP["p_ref"], **settings),
        },
        "jump": _orbits(**JUMP),
        "chaos": _orbits(**CHAOS),
        "cycle": _orbits(**CYCLE),
    }


@partial(jax.jit, static_argnames="num_iterations")
def clipped_iterate(p_ref: ArrayLike, num_iterations: int, *, beta: ArrayLike, p_0: ArrayLike) -> jax.Array:
    """[num_iterations + 1] success probabilities of exactly solved clipped iterations from p_0."""

    def step(p: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        mapped = clipped_success_map(p, p_ref, beta=beta, weights=WEIGHTS, clip=CLIP)
        return mapped, mapped

    start = jnp.asarray(p_0, float)
    return jnp.concatenate([start[None], jax.lax.scan(step, start, None, length=num_iterations)[1]])


def _orbits(p_ref: float, beta: float, p_0: float) -> dict[str, Any]:
    plain = np.asarray(iterate(p_ref, TAIL + 64, beta=beta, weights=WEIGHTS, p_0=p_0))
    clipped = np.asarray(clipped_iterate(p_ref, TAIL + 64, beta=beta, p_0=p_0))
    return {
        "p_ref": p_ref,
        "beta": beta,
        "p_0": p_0,
        "plain": plain[: ITERATIONS + 1],
        "clipped": clipped[: ITERATIONS + 1],
        "plain_stays_in": [plain[TAIL:].min(), plain[TAIL:].max()],
        "clipped_stays_in": [clipped[TAIL:].min(), clipped[TAIL:].max()],
        "fixed_points": fixed_points(p_ref, beta=beta, weights=WEIGHTS),
    }


def _plot_map(axis: Axes, numbers: dict[str, Any]) -> None:
    axis.plot([0, 1], [0, 1], color=figures.PALE, linewidth=1)
    axis.plot(numbers["p"], numbers["h"], label="not clipped: h", **figures.line(1))
    axis.plot(numbers["p"], numbers["clipped"], label="clipped, c = 0.2", **figures.line(0))
    for point in numbers["fixed_points"]:
        face = figures.INK if point.stable else "white"
        axis.plot(point.p, point.p, "o", color=figures.INK, markerfacecolor=face, markersize=6, clip_on=False, zorder=3)
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="p, this iteration", ylabel="the next iteration")


def _plot_orbits(axis: Axes, numbers: dict[str, Any]) -> None:
    n = np.arange(ITERATIONS + 1)
    axis.plot(n, numbers["plain"], **figures.marker(1, markersize=3))
    axis.plot(n, numbers["clipped"], **figures.marker(0, markersize=3))
    low, *others = numbers["fixed_points"]
    for point in (low, *others[:1]):
        axis.axhline(point.p, color=figures.INK, linewidth=0.7, linestyle="-" if point.stable else (0, (8, 4)))
    p_ref, p_0 = numbers["p_ref"], numbers["p_0"]
    start = "p_0 = p_ref" if p_0 == p_ref else f"p_0 = {p_0:g}"
    figures.title(axis, f"p_ref = {p_ref:g}, β = {numbers['beta']:g}, {start}")
    axis.set(yscale="log", xlim=(0, ITERATIONS), ylim=(0.5 * p_ref, 1.5), xlabel="iteration n", ylabel="p_n")


if __name__ == "__main__":
    figures.run(experiment)
