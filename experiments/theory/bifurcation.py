"""From a fixed point to chaos: cobwebs, a bifurcation diagram over β with its Lyapunov exponents, and all 2-cycles there are.

    python -m experiments.theory.bifurcation [--out=runs/theory] [--quick]

**Flips are supercritical** (ours). In log-odds the map is f = L_ref + Ω/β, and for population whitening, with v = p(1 − p)
and x = 2p − 1, its Schwarzian derivative f‴/f′ − (3/2)(f″/f′)² is (3/8) x² v²/(v + ε)² + 1 − 12v − (3/2)(1 − 6v)²/x², at most
its value at ε = 0, ¼ − 3/(8x²) < 0. So every flip gives birth to a stable 2-cycle inside the window; by the curve of
equal ψ (computed below) there is none outside; and by
Singer's theorem an attracting cycle attracts p = ½, the one critical point, or p → 1: there are at most two, and no others.
With a share α of the KL on the reference the slope at a flip is f′ = −(2 − α), and the Schwarzian there stays negative.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from experiments.theory import figures
from grpo_jax.theory.dynamics import iterate, success_map
from grpo_jax.theory.orbits import OrbitEnd, orbit_end
from grpo_jax.theory.thresholds import flip_window
from grpo_jax.theory.weights import Group, Weights, Whitened, log_odds

EPSILON, P_REF = 1e-5, 1e-4
STARTS = {"p_0 = 0.1": 0.1, "p_0 = p_ref": P_REF}
SHOWN, CHAOS = (3.5, 20.0), 5.0
# What it shows, p_ref, β, p_0
COBWEBS = (("fixed point", 1e-3, 7.0, 0.3), ("2-cycle", 1e-3, 3.0, 0.1), ("chaos", 1e-4, CHAOS, 0.1))
TICKS = {1e-4: "10⁻⁴", 1e-3: "10⁻³", 1e-2: ".01", 0.1: ".1", 0.5: ".5", 0.9: ".9", 0.99: ".99", 0.999: ".999"}
COBWEB_CAPTION = (
    "Exactly solved iterations at ε = 1e-5 as cobwebs, on log-odds scales: up or down to the map (solid), across to the diagonal"
    " (dotted). Stated by the paper: the map, and that p_n may fail to converge; its Fig. 5 shows the third orbit. Ours: that the"
    " second is an exact 2-cycle, .00199 ↔ .63301, and the third is chaos, with Lyapunov exponent +0.35."
)
CAPTION = (
    "Orbits at p_ref = 10⁻⁴, ε = 1e-5 over β: 150 iterations after 2,000 (upper), and their Lyapunov exponents (lower;"
    " positive: chaos); p near 1 is drawn at the top. Stated by the paper: convergence if |h′(p*)| < 1, and the orbit at"
    " β = 5 from p_0 = 0.1 (dashed line). Ours: everything else. Dotted line: β_hi = 17.76, the upper end of the flip"
    " window, which reaches down to β_lo = 0.235; within it the low fixed point repels. The flip is supercritical, and"
    " 2-cycles were found exactly inside the window, one for each β. Where chaos reaches the middle fixed point, orbits escape"
    " to p = 1; from p_0 = p_ref the first step jumps past it at β = 5 already."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes cobwebs and bifurcation as .png and .json into ``out``."""
    figure, axes = figures.new_figure(1, len(COBWEBS), size=(12, 5.0))
    webs = [_cobweb(axis, *web) for axis, web in zip(axes[0], COBWEBS, strict=True)]
    axes[0, 0].set_ylabel("h(p), the next iteration")
    figures.save(figure, "cobwebs", {"epsilon": EPSILON, "panels": webs}, out=out, caption=COBWEB_CAPTION)

    figure, axes = figures.new_figure(2, 2, size=(12, 7.8), sharex=True, sharey="row", height_ratios=(2.2, 1))
    betas = jnp.geomspace(*SHOWN, 150 if quick else 1500)
    orbits = {name: _diagram(axes[:, k], betas, name) for k, name in enumerate(STARTS)}
    axes[0, 0].set_ylabel("p of the last iterations")
    axes[1, 0].set_ylabel("Lyapunov exponent")
    cycles = []
    for p_ref in (P_REF,) if quick else (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 9e-3):
        for weights in (Whitened(EPSILON), Whitened(1e-2), Group(16), Group(64)):
            window = flip_window(p_ref, weights=weights)
            if window is not None:
                cycle_range = two_cycles(p_ref, window, weights)
                cycles.append({"p_ref": p_ref, "weights": repr(weights), "flip_window": window, **cycle_range})
    numbers = {
        "p_ref": P_REF,
        "epsilon": EPSILON,
        "beta": betas,
        "orbits": orbits,
        "flip_window": flip_window(P_REF, weights=Whitened(EPSILON)),
        "chaos": orbit_end(P_REF, beta=CHAOS, weights=Whitened(EPSILON), p_0=0.1, num_iterations=100_000),
        "two_cycles": cycles,
    }
    figures.save(figure, "bifurcation", numbers, out=out, caption=CAPTION)


def two_cycles(p_ref: float, window: tuple[float, float], weights: Weights, points: int = 2001) -> dict[str, Any]:
    """The βs of all 2-cycles of the exact iteration.

    L_ref + a ↔ L_ref + b is one exactly if ψ(a) = ψ(b) for ψ(a) = a Ω(L_ref + a), and then β = ψ/(ab). ψ rises to the flip at
    β_hi, falls to the flip at β_lo, and rises: three branches x < y < z per level, so the pairs (x, y), (x, z), (z, y) form one
    curve from flip to flip, along which β falls if it is alone at each β.

    Args:
      p_ref: of the reference policy.
      window: (β_lo, β_hi), from `flip_window`.
      weights: the normaliser.
      points: levels of ψ.

    Returns:
      lowest and highest: β at the ends of the curve. rise: the largest rise of β along it, relative (rounding if ≤ 1e-8).
    """
    curve = _two_cycle_betas(log_odds(p_ref), jnp.asarray(window), weights, points)
    return {"lowest": curve.min(), "highest": curve.max(), "rise": (jnp.diff(curve) / curve[1:]).max()}


@partial(jax.jit, static_argnames="points")
def _two_cycle_betas(reference: jax.Array, window: jax.Array, weights: Weights, points: int) -> jax.Array:
    """β along the curve of 2-cycles, from β_hi down to β_lo."""

    def psi(a: jax.Array) -> jax.Array:
        return a * weights.omega(reference + a)

    # The fixed points at the flips: Ω/a = β, which falls with a as long as Ω does, up to p = ½.
    both = jnp.zeros(2)
    first, second = _solve(lambda a: window[::-1] - weights.omega(reference + a) / a, both + 1e-12, both - reference)
    top, bottom = psi(first), psi(second)
    level = bottom + (top - bottom) * jnp.square(jnp.sin(jnp.linspace(0, jnp.pi / 2, points)[1:-1]))
    zero = jnp.zeros_like(level)
    x = _solve(lambda a: psi(a) - level, zero, zero + first)
    y = _solve(lambda a: level - psi(a), zero + first, zero + second)
    z = _solve(lambda a: psi(a) - level, zero + second, zero + top / weights.omega(jnp.zeros(())))
    return jnp.concatenate([(level / (x * y))[::-1], level / (x * z), (level / (z * y))[::-1]])


def _solve(f: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Where f, rising from low to high, changes sign."""

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = (bracket[0] + bracket[1]) / 2
        below = f(middle) < 0
        return jnp.where(below, middle, bracket[0]), jnp.where(below, bracket[1], middle)

    return jax.lax.fori_loop(0, 100, halve, (low, high))[1]


def _cobweb(axis: Axes, name: str, p_ref: float, beta: float, p_0: float) -> dict[str, Any]:
    options: dict[str, Any] = {"beta": beta, "weights": Whitened(EPSILON)}
    low, high = log_odds(jnp.asarray([5e-5, 0.9995]))
    grid = jnp.linspace(low, high, 1000)
    path = np.asarray(iterate(log_odds(p_ref), 60, p_0=log_odds(p_0), logits=True, **options))
    end = orbit_end(p_ref, p_0=p_0, num_iterations=100_000, **options)
    mapped = success_map(grid, log_odds(p_ref), logits=True, **options)
    axis.plot(grid, mapped, color=figures.INK, linewidth=1.8)
    axis.plot(grid, grid, color=figures.INK, linewidth=1, linestyle=":")
    axis.plot(
        np.repeat(path, 2)[:-1], np.concatenate([path[:1], np.repeat(path[1:], 2)]), color="#d55e00", linewidth=0.8
    )
    axis.plot(path[0], path[0], "o", color="#d55e00", markersize=5)
    axis.set(xlim=(grid[0], grid[-1]), ylim=(grid[0], grid[-1]), xlabel="p, this iteration", aspect="equal")
    ticks = log_odds(jnp.asarray(list(TICKS))).tolist()
    axis.set_xticks(ticks, TICKS.values(), fontsize=8)
    axis.set_yticks(ticks, TICKS.values(), fontsize=8)
    figures.title(axis, f"{name}: p_ref = {p_ref:g}, β = {beta:g}, p_0 = {p_0:g}")
    return {"name": name, "p_ref": p_ref, "beta": beta, "p_0": p_0, "end": end}


def _diagram(axes: Any, betas: jax.Array, name: str) -> OrbitEnd:
    options: dict[str, Any] = {"beta": betas, "weights": Whitened(EPSILON), "p_0": STARTS[name]}
    path = iterate(jnp.full_like(betas, P_REF), 2150, **options)[-150:]
    end = orbit_end(P_REF, **options)
    shown = np.asarray(log_odds(jnp.clip(path, 1e-6, 0.9998)))
    axes[0].plot(np.tile(betas, len(shown)), shown.ravel(), ",", color=figures.INK, alpha=0.6, rasterized=True)
    axes[0].set_yticks(log_odds(jnp.asarray(list(TICKS))).tolist(), TICKS.values())
    axes[1].axhline(0, color=figures.INK, linewidth=0.8)
    axes[1].plot(betas, jnp.clip(end.lyapunov, -3, 1), color=figures.COLOURS[1], linewidth=0.9)
    axes[1].set(ylim=(-2, 0.9), xlabel="β", xscale="log")
    axes[1].set_xticks([4, 5, 6, 8, 10, 14, 20], ["4", "5", "6", "8", "10", "14", "20"])
    axes[1].minorticks_off()
    window = flip_window(P_REF, weights=Whitened(EPSILON))
    for axis in axes:
        axis.axvline(CHAOS, color="#d55e00", linestyle="--", linewidth=1.1)
        if window is not None:
            axis.axvline(window[1], color="#0072b2", linestyle=":", linewidth=1.6)
        axis.set_xlim(*SHOWN)
    axes[0].text(CHAOS, 9.3, " β = 5", color="#d55e00", fontsize=9)
    axes[0].text(0.99 * SHOWN[1], 9.3, r"$\beta_\mathrm{hi}$", color="#0072b2", fontsize=10, ha="right")
    figures.title(axes[0], name)
    return end


if __name__ == "__main__":
    figures.run(experiment)
