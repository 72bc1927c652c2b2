"""Where exact iterations started at p_ref end, over (p_ref, β): 2,000 iterations at each of 400 × 400 points, panel by panel.

    python -m experiments.theory.phase_diagram [--out=runs/theory] [--quick]

The same work is done in plain NumPy for two of the panels and timed beside it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import partial
from math import comb
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.theory import figures
from grpo_jax.theory.dynamics import log_odds_slope
from grpo_jax.theory.orbits import LONGEST_CYCLE, orbit_end
from grpo_jax.theory.thresholds import cusp, flip_limit
from grpo_jax.theory.weights import Group, Weights, Whitened, as_tree, log_odds

POINTS, ITERATIONS = 400, 2000
P_REF, BETA = (1e-6, 0.9999), (0.05, 200.0)
EPSILONS, SIZES = (1e-5, 1e-3, 1e-2, 1e-1), (4, 8, 16, 64)
SATURATED = 0.99
CLASSES = ("saturates (> .99)", "interior fixed point", "2-cycle", "longer cycle", "chaos", "not settled")
COLOURS = ("#ffffff", "#cfe3f2", "#e69f00", "#a50f15", "#000000", "#8c8c8c")
CAPTION = (
    "Stated by the paper: the iteration L_n = L_ref + Ω(p_{n−1})/β, that a fixed point exists and exceeds p_ref, and that it"
    " attracts if |h′(p*)| < 1. Ours (computed): everything drawn. Each of 400 × 400 points per panel is iterated 2,000 times"
    " from p_0 = p_ref and then watched for a return within 64 iterations; chaos: no return and a positive Lyapunov exponent."
    " Solid line: the two folds, meeting in the cusp; hatched between them: three fixed points, elsewhere one. Dashed line:"
    " the flip, inside which the low fixed point has h′(p*) < −1. Inside both lines orbits may still saturate: the first step"
    " jumps over the middle fixed point. Upper row: whitening with ε inside the root; lower row: mean over groups of G, std"
    " of the group, ε = 0. In none of these does a prompt above p_ref = 1.004 % oscillate."
)

Kernel = Callable[[Any], tuple[Any, Any]]


@as_tree("coefficients")
@dataclass(frozen=True)
class EvenPolynomial:
    """Ω = Σ_i a_i w^i in w = (2p − 1)² = tanh²(L/2), with the a_i of `group_polynomial`: Ω_G without its matrix product."""

    coefficients: jax.Array

    def omega(self, logit: jax.Array) -> jax.Array:
        """Ω at log-odds [...], by Horner's rule: all terms are positive, so nothing cancels."""
        return _horner(self.coefficients, jnp.square(jnp.tanh(logit / 2)))


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes phase_diagram.png and phase_diagram.json into ``out``, and prints the speeds."""
    points, iterations = (60, 400) if quick else (POINTS, ITERATIONS)
    low, high = log_odds(jnp.asarray(P_REF))
    reference = jnp.linspace(low, high, points, dtype=jnp.float32)
    beta = jnp.geomspace(*BETA, points, dtype=jnp.float32)
    panels: list[tuple[str, Weights]] = [(f"ε = {epsilon:g}", Whitened(epsilon)) for epsilon in EPSILONS]
    panels += [(f"G = {size}", Group(size)) for size in SIZES]

    figure, axes = figures.new_figure(2, len(EPSILONS), size=(13, 8.6), sharex=True, sharey=True)
    numbers: dict[str, Any] = {"p_ref": P_REF, "beta": BETA, "points": points, "iterations": iterations, "panels": []}
    for axis, (name, weights) in zip(axes.flat, panels, strict=True):
        start = time.perf_counter()
        kinds = np.asarray(classify(reference, beta, fast(weights), iterations))
        seconds = time.perf_counter() - start
        _plot(axis, kinds, weights)
        figures.title(axis, name)
        shares = {label: float((kinds == k).mean()) for k, label in enumerate(CLASSES)}
        tip = cusp(weights)
        numbers["panels"].append(
            {"name": name, "shares": shares, "cusp": tip, "flip_limit": flip_limit(weights), "seconds_cold": seconds}
        )
    numbers["speed"] = [speed(name, reference, beta, weights, iterations) for name, weights in (panels[0], panels[6])]
    for row in numbers["speed"]:
        print(
            "{name}: jax {jax:.3g}, NumPy {numpy:.3g} points·iterations/s in float32, ratio {ratio:.1f}".format(**row)
        )
    _label(axes)
    figures.save(figure, "phase_diagram", numbers, out=out, caption=CAPTION)


@partial(jax.jit, static_argnums=3)
def classify(reference: jax.Array, beta: jax.Array, weights: Weights, iterations: int) -> jax.Array:
    """[B, P] index into `CLASSES` over β [B] and references in log-odds [P]."""
    end = orbit_end(reference[None], beta=beta[:, None], weights=weights, num_iterations=iterations, logits=True)
    return _kind(jnp, end.period, end.low, end.lyapunov)


def fast(weights: Weights) -> Weights:
    """The same weights, with Ω_G as a polynomial."""
    if not isinstance(weights, Group):
        return weights
    return cast(Weights, EvenPolynomial(jnp.asarray(group_polynomial(weights.size), jnp.float32)))


def group_polynomial(size: int) -> list[float]:
    """The a_i of Ω_G = Σ_i a_i w^i, w = (2p − 1)², for groups whitened with ddof 0 and ε = 0; exact but for one rounding.

    Ω_G = E[(G−1)/√(k(G−k))] with k = 1 + Binomial(G−2, p). With s the mean of G − 2 spins of mean x = 2p − 1 that is
    2(1 − 1/G) E[(1 − (1 − 2/G)² s²)^−½], whose series in s² is positive; and E[s^{2m}] is a sum of positive multiples of even
    powers of x. So every a_i > 0: Horner's rule on [0, 1] loses no digits.

    >>> [round(a, 6) for a in group_polynomial(4)]  # √3 + (3 − 2√3)(1 − w)/4
    [1.616025, 0.116025]
    """
    n = size - 2
    with localcontext() as context:
        context.prec = 40 + size  # the sum over j cancels fewer than ``size`` digits
        total = [Decimal(0)] * (n + 1)
        for j in range(n + 1):
            weight = Decimal(comb(n, j) * (size - 1)) / Decimal((j + 1) * (size - 1 - j)).sqrt() / 2**n
            # (1 + x)^j (1 − x)^{n−j} in powers of x
            for power in range(n + 1):
                signed = sum((-1) ** i * comb(n - j, i) * comb(j, power - i) for i in range(power + 1))
                total[power] += weight * signed
        return [float(a) for a in total[::2]]


def speed(name: str, reference: jax.Array, beta: jax.Array, weights: Weights, iterations: int) -> dict[str, Any]:
    """Points·iterations per second of `classify`, compiled, and of NumPy at the same work, with how often they agree."""
    quick = fast(weights)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        kinds = jax.block_until_ready(classify(reference, beta, quick, iterations))
        seconds.append(time.perf_counter() - start)
    coefficients = None if isinstance(weights, Whitened) else np.asarray(cast(Any, quick).coefficients)
    epsilon = float(cast(Any, weights).epsilon)
    start = time.perf_counter()
    plain = plain_classify(np.asarray(reference), np.asarray(beta), epsilon, coefficients, iterations)
    plain_seconds = time.perf_counter() - start
    work = reference.size * beta.size * (iterations + LONGEST_CYCLE)
    return {
        "name": name,
        "jax": work / min(seconds),
        "numpy": work / plain_seconds,
        "ratio": plain_seconds / min(seconds),
        "agreement": float((np.asarray(kinds) == plain).mean()),
    }


def plain_classify(
    reference: np.ndarray, beta: np.ndarray, epsilon: float, coefficients: np.ndarray | None, iterations: int
) -> np.ndarray:
    """`classify` in NumPy, vectorised over the points, in the type of ``reference``; coefficients None: whitened."""
    real = reference.dtype.type
    reference = np.broadcast_to(reference, (len(beta), len(reference)))
    pull = real(1) / np.broadcast_to(beta[:, None], reference.shape)
    tolerance = np.finfo(real).eps ** (2 / 3)

    def both(logit: np.ndarray, slope: bool) -> tuple[np.ndarray, Any]:
        """The next log-odds, and ln|dL_n/dL_{n−1}|."""
        e = np.exp(-np.abs(logit))
        x = (1 - e) / (1 + e)
        v = e / (1 + e) ** 2
        if coefficients is None:
            omega = 1 / np.sqrt(v + real(epsilon))
            rise = real(0.5) * x * v * omega**3 if slope else None
        else:
            omega = _horner(coefficients, x * x)
            powers = np.arange(1, len(coefficients), dtype=real)
            rise = 4 * v * x * _horner(coefficients[1:] * powers, x * x) if slope else None
        return reference + pull * omega, None if rise is None else np.log(rise * pull)

    logit, total = reference, np.zeros_like(reference)
    with np.errstate(divide="ignore"):
        for _ in range(iterations // 2):
            logit, _none = both(logit, False)
        for _ in range(iterations - iterations // 2):
            logit, slope = both(logit, True)
            total = total + slope
        start = low = logit
        period, cycle = np.zeros(logit.shape, np.int32), np.zeros_like(total)
        for k in range(1, LONGEST_CYCLE + 1):
            logit, slope = both(logit, True)
            cycle = cycle + slope
            back = (logit == start) | ((np.abs(logit - start) <= tolerance * (1 + np.abs(start))) & (cycle <= 0))
            low = np.where(period == 0, np.minimum(low, logit), low)
            period = np.where((period == 0) & back, k, period)
    return _kind(np, period, low, total / (iterations - iterations // 2))


def _kind(xp: Any, period: Any, low: Any, lyapunov: Any) -> Any:
    """Index into `CLASSES`; ``xp`` is numpy or jax.numpy."""
    edge = xp.asarray(np.log(SATURATED / (1 - SATURATED)), low.dtype)
    fixed = xp.where(low > edge, 0, 1)
    cycle = xp.where(period == 2, 2, 3)
    none = xp.where(lyapunov > 0, 4, 5)
    return xp.where(period == 1, fixed, xp.where(period > 0, cycle, none)).astype(xp.int8)


def _horner(coefficients: Any, w: Any) -> Any:
    total = coefficients[-1] + 0 * w
    for k in range(len(coefficients) - 2, -1, -1):
        total = total * w + coefficients[k]
    return total


def bifurcations(weights: Weights, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve (L_ref, β) of folds (sign +1) or of flips (−1): on it some L has β = ±dΩ/dL and L_ref = L − Ω/β."""
    at = jnp.linspace(-40.0, 40.0, 16001)
    slope = sign * log_odds_slope(at, weights)
    on = slope > 1e-6
    return np.asarray((at - weights.omega(at) / slope)[on]), np.asarray(slope[on])


def _plot(axis: Axes, kinds: np.ndarray, weights: Weights) -> None:
    left, right = log_odds(jnp.asarray(P_REF)).tolist()
    low, high = np.log10(BETA)
    axis.imshow(
        kinds, origin="lower", extent=(left, right, low, high), aspect="auto", interpolation="nearest",
        cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=len(COLOURS) - 0.5,
    )  # fmt: skip
    reference, beta = bifurcations(weights, 1)
    if len(beta) > 1:
        axis.fill(reference, np.log10(beta), fill=False, hatch="////", edgecolor="0.55", linewidth=0)
        axis.plot(reference, np.log10(beta), color="#08519c", linewidth=1.4)
    reference, beta = bifurcations(weights, -1)
    axis.plot(reference, np.log10(beta), color=figures.INK, linewidth=1.4, linestyle=(0, (5, 2)))
    axis.set(xlim=(left, right), ylim=(low, high))
    axis.grid(False)


def _label(axes: Any) -> None:
    ticks = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 0.999)
    for axis in axes.flat:
        axis.set_xticks(
            log_odds(jnp.asarray(ticks)).tolist(),
            ["10⁻⁵", "10⁻⁴", "10⁻³", ".01", ".1", ".5", ".9", ".99", ".999"],
            fontsize=8,
        )
        axis.set_yticks(np.log10([0.1, 1, 10, 100]), ["0.1", "1", "10", "100"])
    for axis in axes[-1]:
        axis.set_xlabel(r"$p_\mathrm{ref}$ (log-odds scale)")
    for axis in axes[:, 0]:
        axis.set_ylabel(r"$\beta$")
    handles: list[Any] = [
        Patch(facecolor=colour, edgecolor=figures.INK, label=label)
        for colour, label in zip(COLOURS, CLASSES, strict=True)
    ]
    handles.append(Patch(facecolor="white", edgecolor="0.55", hatch="////", label="three fixed points"))
    handles.append(Line2D([], [], color="#08519c", label="folds"))
    handles.append(Line2D([], [], color=figures.INK, linestyle=(0, (5, 2)), label="flip"))
    axes[0, 0].figure.legend(handles=handles, loc="outside upper center", ncols=9, frameon=False, fontsize=9)


if __name__ == "__main__":
    figures.run(experiment)
