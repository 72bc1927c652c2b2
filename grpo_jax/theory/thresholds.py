"""The values of β and p_ref at which the picture changes: folds, where fixed points are born, and flips, where one oscillates.

At every L above L_ref there is exactly one β, Ω(L)/Δ with Δ = L − L_ref, that makes it a fixed point, and its multiplier
is then m = Δ (ln Ω)'(L). Folds are m = 1, flips m = −1, so both are roots in L of an equation without β. Everything here
is computed in double precision on the host.

**One or three fixed points.** With u = 2p − 1, w = u² and a = 4ε, population whitening has
dΩ/dL = u(1 − w)(1 − w + a)^{−3/2}, and the logarithmic derivative of that in w has the sign of 1 + a − w(1 + 3a): it is
unimodal on L > 0 (and not positive elsewhere). L − Ω/β therefore rises, falls and rises at most, and takes a value at most
three times. With ε added to s = √v, dΩ/dL = s u (s + ε)^{−2}/2, whose logarithmic derivative in s has the sign of
ε − s − 8εs², and the same follows. For groups with a baseline v Ω_G' is a Bernstein polynomial; if its coefficients minus β
change sign at most twice, the same follows from the variation-diminishing property. That they do is a check in floating point per
group size, in tests/theory for all their normalisers, G ≤ 40 and some G up to 512. For noisy verifiers, uncentred groups and
dynamic sampling nothing is proven; no case with more than three is known.

**No flip, no oscillation.** A 2-cycle x = L_ref + b, y = L_ref + a of L → L_ref + Ω(L)/β has β b = Ω(L_ref + a) and
β a = Ω(L_ref + b), hence ψ(a) = ψ(b) for ψ(a) = a Ω(L_ref + a); conversely ψ(a) = ψ(b) with a ≠ b is a 2-cycle at β = ψ/(ab).
And ψ' = Ω (1 + m). So some β has a 2-cycle exactly if ψ is not monotone, which is exactly if some β has a fixed point with
m < −1. Where none has, there is no 2-cycle at any β, and every orbit converges from every start (W. A. Coppel, Proc. Cambridge
Phil. Soc. 51 (1955), 41). Coppel's theorem is about a continuous map of a compact interval. Here that is [0, 1], of p and not of
log-odds: where Ω is infinite at an end, as for ε = 0, h is 1 there and still continuous; and no 2-cycle has an end of the
interval, because h > 0.

Population whitening: |m| falls with ε on p < ½, so p_ref above `flip_limit` at ε = 0, 1.0039 %, never oscillates, whatever β, ε
and start. Plain groups have lower limits. Dynamic sampling has higher ones, 4.53 % for G = 2 and 3.02 % for G = 8.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.theory.dynamics import log_odds_slope
from grpo_jax.theory.roots import POINTS, REACH, sign_changes
from grpo_jax.theory.weights import Weights, log_odds, upward


class Cusp(NamedTuple):
    """Where the two folds meet: a reference above it has one fixed point at every β.

    p_ref: of the reference policy.
    beta: the β at which both folds meet there.
    p: the fixed point then.
    """

    p_ref: float
    beta: float
    p: float


def fold_beta(p_ref: float, *, weights: Weights, logits: bool = False) -> float | None:
    """The lower fold β_c: below it no moderate fixed point is left and p runs to nearly 1.

    It is the smallest β at which small steps do not saturate; exact iterations can jump past a moderate fixed point above it too.

    Population whitening with ε = 0: β_c = 2/√(Δ² − 4) where Δ = ln((Δ+2)/(Δ−2)) − L_ref, and p_c = ½ + 1/Δ.

    Args:
      p_ref: success probability of the reference policy, in (0, 1).
      weights: the normaliser.
      logits: ``p_ref`` is given as log-odds.

    Returns:
      β_c, or None where there is one fixed point at every β.

    Raises:
      ValueError: ``p_ref`` is not in (0, 1).

    Source: derived from arXiv 2503.06639, Thm 2; see `bistable_window`.

    >>> from grpo_jax.theory import Whitened
    >>> round(fold_beta(0.5, weights=Whitened(0.0)), 6)
    1.50888
    """
    window = bistable_window(p_ref, weights=weights, logits=logits)
    return None if window is None else window[0]


def bistable_window(p_ref: float, *, weights: Weights, logits: bool = False) -> tuple[float, float] | None:
    """The folds (β_c, β_c2): between them there are three fixed points, a low, an unstable middle and a high one.

    Below β_c only the high one is left, above β_c2 only the low one.

    Args:
      p_ref: success probability of the reference policy, in (0, 1).
      weights: the normaliser.
      logits: ``p_ref`` is given as log-odds.

    Returns:
      (β_c, β_c2), or None where there is one fixed point at every β. β_c2 is infinite where Ω is (ε = 0): then p = 1
      attracts at every β.

    Raises:
      ValueError: ``p_ref`` is not in (0, 1).

    Source: derived from arXiv 2503.06639, Thm 2: roots of m = 1, with m the multiplier of Lemma 1.

    >>> from grpo_jax.theory import Group, Whitened
    >>> [round(beta, 3) for beta in bistable_window(0.3, weights=Whitened(1e-2))]
    [1.036, 1.331]
    >>> bistable_window(0.3, weights=Group(8)) is None
    True
    """
    betas = _betas_with_multiplier(p_ref, 1.0, weights, logits)
    if not betas:
        return None
    return (betas[0], math.inf) if len(betas) == 1 else (betas[0], betas[-1])


def cusp(weights: Weights) -> Cusp | None:
    """The largest p_ref with three fixed points at some β, and where that happens.

    Population whitening: u² = (1 + 4ε)/(1 + 12ε) with p = (1 + u)/2, and logit p_ref = logit p − 3√((1 + 4ε)(1 + 12ε)).

    Args:
      weights: the normaliser.

    Returns:
      The cusp, or None where every p_ref has folds (ε = 0) or none has.

    Source: derived; the inflexion d²Ω/dL² = 0 with dΩ/dL = β > 0.

    >>> from grpo_jax.theory import Whitened
    >>> round(cusp(Whitened(1e-2)).p_ref, 5)
    0.67937
    """
    with jax.enable_x64(True):
        sign, weights = upward(weights)
        inflexions = _inflexions(weights)
        points = inflexions[~jnp.isnan(inflexions)]
        if not points.size:
            return None
        betas = log_odds_slope(points, weights)
        references = points - weights.omega(points) / betas
        last = int(references.argmax())
        p_ref, p = jax.nn.sigmoid(sign * jnp.stack([references[last], points[last]])).tolist()
        return Cusp(p_ref, float(betas[last]), p)


def flip_window(
    p_ref: float, *, weights: Weights, alpha: float = 1.0, logits: bool = False
) -> tuple[float, float] | None:
    """The βs (β_lo, β_hi) between which exactly solved iterations oscillate about the fixed point: its multiplier is < −1.

    Population whitening with ε = 0: both ends are 2/√(Δ² − 4) at the roots of Δ = ln((Δ−2)/(Δ+2)) − L_ref.

    Args:
      p_ref: success probability of the reference policy, in (0, 1).
      weights: the normaliser.
      alpha: share of the KL that goes to the reference (see `success_map`); less of it damps.
      logits: ``p_ref`` is given as log-odds.

    Returns:
      (β_lo, β_hi), or None: at no β does the fixed point lose its stability to an oscillation. β_lo is 0 where Ω vanishes
      at p = 1 (uncentred advantages), so that no β is small enough to calm it.

    Raises:
      ValueError: ``p_ref`` is not in (0, 1), or ``alpha`` not in (0, 1].

    Source: derived from arXiv 2503.06639, Thm 6. Two-KL has the fixed points of αβ with multipliers 1 − α + αm.

    >>> from grpo_jax.theory import Whitened
    >>> [round(beta, 4) for beta in flip_window(1e-3, weights=Whitened(0.0))]
    [0.3382, 5.6814]
    >>> flip_window(0.02, weights=Whitened(0.0)) is None
    True
    """
    betas = _betas_with_multiplier(p_ref, _flip_multiplier(alpha), weights, logits)
    if not betas:
        return None
    return (0.0 if len(betas) == 1 else betas[0] / alpha, betas[-1] / alpha)


def flip_limit(weights: Weights, *, alpha: float = 1.0) -> float | None:
    """The largest p_ref that can oscillate at some β; above it every orbit converges (at α = 1 proven; see this file).

    Population whitening with ε = 0 and c = (2 − α)/α: logit = ln((D − 2c)/(D + 2c)) − D with D = 2√(c² + c).

    Args:
      weights: the normaliser.
      alpha: share of the KL that goes to the reference (see `success_map`).

    Returns:
      p_ref, or None where no reference oscillates; 1 where all do (uncentred advantages). For a verifier worse than
      chance it is the smallest, and likewise in `cusp`.

    Raises:
      ValueError: ``alpha`` is not in (0, 1].

    Source: derived from arXiv 2503.06639, Thm 6.

    >>> from grpo_jax.theory import MeanOnly, Whitened
    >>> round(flip_limit(Whitened(0.0)), 8), flip_limit(MeanOnly()) is None
    (0.01003914, True)
    """
    with jax.enable_x64(True):
        sign, weights = upward(weights)
        limits = _flip_references(weights, _flip_multiplier(alpha))
        limits = [x for x in limits.tolist() if not math.isnan(x)]
        return float(jax.nn.sigmoid(sign * max(limits))) if limits else None


def _flip_multiplier(alpha: float) -> float:
    """The multiplier m of α = 1 at which 1 − α + αm is −1."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be in (0, 1]: mirror iterations have no fixed point but 1")
    return 1 - 2 / alpha


def _betas_with_multiplier(p_ref: float, multiplier: float, weights: Weights, logits: bool) -> list[float]:
    """Every β with a fixed point of that multiplier, ascending."""
    with jax.enable_x64(True):
        reference = log_odds(float(p_ref), logits=logits)
        if not jnp.isfinite(reference):
            raise ValueError(f"p_ref={p_ref!r} must be a probability strictly between 0 and 1")
        sign, weights = upward(weights)
        points = _points_with_multiplier(sign * reference, jnp.asarray(multiplier), weights)
        points = points[~jnp.isnan(points)]
        return sorted((weights.omega(points) / (points - sign * reference)).tolist())


@jax.jit
def _points_with_multiplier(reference: jax.Array, multiplier: jax.Array, weights: Weights) -> jax.Array:
    """The L > L_ref with (L − L_ref)(ln Ω)'(L) = m, padded with nan."""
    bend, grid = _log_slope(weights), _grid(reference.dtype)
    nodes = jnp.sort(jnp.maximum(jnp.concatenate([grid, reference + (grid - grid[0]) / 2]), reference))

    def excess(x: jax.Array) -> jax.Array:
        return (x - reference) * bend(x) - multiplier

    # The extrema are nodes too, so that no pair of roots hides between two points of the grid.
    extrema = sign_changes(_derivative(excess), nodes)
    return sign_changes(excess, jnp.sort(jnp.concatenate([nodes, jnp.where(jnp.isnan(extrema), nodes[0], extrema)])))


@jax.jit
def _inflexions(weights: Weights) -> jax.Array:
    """Where dΩ/dL is positive and largest, padded with nan."""
    points = sign_changes(_derivative(partial(log_odds_slope, weights=weights)), _grid(jnp.zeros(()).dtype))
    steepness = log_odds_slope(points, weights)
    return jnp.where(steepness > 1e-9 * weights.omega(points), points, jnp.nan)


@partial(jax.jit, static_argnames="multiplier")
def _flip_references(weights: Weights, multiplier: float) -> jax.Array:
    """Candidates for the largest L_ref: L − m/(ln Ω)'(L), whose fixed point at L has multiplier m < 0; padded with nan."""
    bend, grid = _log_slope(weights), _grid(jnp.zeros(()).dtype)
    extrema = sign_changes(lambda x: jnp.square(bend(x)) + multiplier * _derivative(bend)(x), grid)
    points = jnp.append(extrema, grid)
    slope = bend(points)
    return jnp.where(slope < -1e-9, points - multiplier / jnp.where(slope < 0, slope, 1.0), jnp.nan)


def _log_slope(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """(ln Ω)' in log-odds."""
    return lambda x: log_odds_slope(x, weights) / weights.omega(x)


def _derivative(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Of an elementwise function."""
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


def _grid(dtype: jnp.dtype) -> jax.Array:
    return jnp.linspace(-REACH, REACH, POINTS, dtype=dtype)
