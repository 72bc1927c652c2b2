"""Which fixed points attract, for one prompt or for all; bounds that no exact iteration leaves; how errors add up on the way."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import log_odds_slope
from grpo_jax.theory.limits import flow_point
from grpo_jax.theory.roots import POINTS, REACH, sign_changes
from grpo_jax.theory.weights import Group, NoisyVerifier, Weights, as_float, log_odds, variance

_FINER = 65  # points of the finer grids of `steepest_slope`


def local_beta_bound(p: ArrayLike, *, weights: Weights, logits: bool = False) -> jax.Array:
    """B(p) = p(1−p) |Ω'(p)|: a fixed point at p attracts exact iterations exactly if β > B(p).

    p* itself depends on β, so B is no threshold in β; those are `fold_beta` and `flip_window`.

    Args:
      p: [...] success probability.
      weights: the normaliser.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] B.

    Source: arXiv 2503.06639, Thm 6.

    >>> from grpo_jax.theory import Whitened
    >>> round(float(local_beta_bound(0.9, weights=Whitened(1e-5))), 5)
    1.33311
    """
    return jnp.abs(log_odds_slope(log_odds(p, logits=logits), weights))


def uniform_beta_bound(p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False) -> jax.Array:
    """The largest B(p*) over prompts: at one β for all, every prompt's fixed point attracts exactly if β is above it.

    The fixed points are those that small steps reach at this β. They move with it, so the bound is checked at a β and not
    solved for one. Every β above all the flip windows of the prompts (`flip_window`) passes, unless it is just a fold; where no
    prompt has a window, every other β does.

    Args:
      p_ref: [P] success probabilities of the reference policy, one a prompt.
      beta: the one weight of the KL, a scalar > 0.
      weights: the normaliser.
      logits: ``p_ref`` is given as log-odds.

    Returns:
      A scalar, max_i B(p*_i).

    Source: arXiv 2503.06639, Thm 6 and Remark 2.

    >>> from grpo_jax.theory import Whitened
    >>> p_ref = jnp.array([1e-3, 0.2, 0.5])
    >>> [bool(beta > uniform_beta_bound(p_ref, beta=beta, weights=Whitened(1e-5))) for beta in (3.0, 6.0)]
    [False, True]
    """
    ends = flow_point(log_odds(p_ref, logits=logits), beta=beta, weights=weights, logits=True)
    return local_beta_bound(ends, weights=weights, logits=True).max()


@partial(jax.jit, static_argnames="logits")
def steepest_slope(p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False) -> jax.Array:
    """The largest |h'(p)| over all p: below 1, h contracts everywhere, and this is a κ for `accumulated_error`.

    As a condition for convergence it is vacuous when whitening with a small ε. At the ends |h'| is about v_ref/(2βε^{3/2}), so
    it holds above β = v_ref/(2ε^{3/2}), four million at ε = 1e-5 and p_ref = ½, where nothing moves; and else only at so
    small a β that h is nearly 1 everywhere. Finite groups have a finite Ω'_G at the ends: for them it is a real condition.

    Args:
      p_ref: [...] success probability of the reference policy.
      beta: [...] weight of the sequence-level KL, > 0.
      weights: the normaliser.
      logits: ``p_ref`` is given as log-odds.

    Returns:
      [...] sup |h'|; infinite where ε is added to the standard deviation, which has no slope at the ends.

    Source: arXiv 2503.06639, Table 1 and Prop. 1; what it takes is derived.

    >>> from grpo_jax.theory import Group, Whitened
    >>> [round(float(steepest_slope(0.5, beta=3.0, weights=weights)), 3) for weights in (Whitened(1e-5), Group(8))]
    [5.434, 0.259]
    """

    def steepest(reference: jax.Array, scale: jax.Array) -> jax.Array:
        def steepness(logit: jax.Array) -> jax.Array:
            mapped = variance(reference + weights.omega(logit) / scale)
            flat = mapped == 0
            return jnp.where(flat, 0.0, mapped * jnp.abs(jnp.where(flat, 0.0, weights.slope(logit)))) / scale

        at_ends = steepness(jnp.asarray([-jnp.inf, jnp.inf], reference.dtype)).max()
        low, high = (jnp.asarray(end, reference.dtype) for end in (-REACH, REACH))
        for points in (POINTS, _FINER, _FINER):  # each grid lies between the neighbours of the best point of the last
            grid = jnp.linspace(low, high, points)
            values = steepness(grid)
            best, width = grid[values.argmax()], (high - low) / (points - 1)
            low, high = best - width, best + width
        return jnp.maximum(at_ends, values.max())

    reference = log_odds(p_ref, logits=logits)
    return jnp.vectorize(steepest)(reference, jnp.asarray(beta, reference.dtype))


def iterate_bounds(
    p_ref: ArrayLike,
    num_iterations: int = 1,
    *,
    beta: ArrayLike,
    weights: Weights,
    alpha: ArrayLike = 1.0,
    logits: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Bounds on p_n for exact iterations from the reference; at α = 1 for every n ≥ 1.

    L_ref + (Ω_min/β) s_n ≤ L_n ≤ L_ref + (Ω_max/β) s_n with s_n = Σ_{j<n} (1 − α)^j, which is 1 at α = 1 and n at α = 0.
    So GRPO at β is never below mean-only GRPO at β/Ω_min.

    Args:
      p_ref: [...] success probability of the reference policy.
      num_iterations: n ≥ 1.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      alpha: share of the KL that goes to the reference.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      (low, high), each [...].

    Source: derived from arXiv 2503.06639, Thms 2, 4 and 9.

    >>> from grpo_jax.theory import Whitened
    >>> [round(float(p), 4) for p in iterate_bounds(0.2, beta=5.0, weights=Whitened(1e-2))]
    [0.2701, 0.6488]
    """
    reference = log_odds(p_ref, logits=logits)
    share = 1 - jnp.asarray(alpha, reference.dtype)  # of the KL that goes to the previous policy
    steps = 1 + jnp.cumprod(jnp.broadcast_to(share, (num_iterations - 1, *share.shape)), axis=0).sum(0)
    reach = steps / jnp.asarray(beta, reference.dtype)
    at_end = jnp.isinf(reference)
    low, high = (
        jnp.where(at_end, reference, reference + reach * end) for end in _omega_range(weights, reference.dtype)
    )
    return (low, high) if logits else (jax.nn.sigmoid(low), jax.nn.sigmoid(high))


def limit_interval(p_star: ArrayLike, errors: ArrayLike, *, logits: bool = False) -> tuple[jax.Array, jax.Array]:
    """Where inexact iterations end: within Σ δ_n of p*, if TV(π̃_n, π_n) ≤ TV(π̃_{n−1}, π_{n−1}) + δ_n from a common start.

    The total variations add up to at most δ* = Σ δ_n, and no event, success included, differs by more than the total variation:
    p* ± δ*. The paper has twice that. Nothing less holds: moving δ* from wrong to correct answers attains it.

    Args:
      p_star: [...] the limit of the exact iterations.
      errors: [N, ...] δ_n ≥ 0 in total variation: sampling, approximation and optimisation together.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      (low, high), each [...], cut off at 0 and 1.

    Source: arXiv 2503.06639, Thm 10 and Assumption 1; the smaller constant is derived.

    >>> [round(float(p), 3) for p in limit_interval(0.6, jnp.array([0.1, 0.05, 0.025]))]
    [0.425, 0.775]
    """
    logit = log_odds(p_star, logits=logits)
    total = as_float(errors).sum(0).astype(logit.dtype)
    right, wrong = jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
    if not logits:
        return jnp.maximum(right - total, 0.0), jnp.minimum(right + total, 1.0)
    # From the smaller of p and 1 − p on either side, which keep their digits.
    low = jnp.log(jnp.maximum(right - total, 0.0)) - jnp.log(jnp.minimum(wrong + total, 1.0))
    high = jnp.log(jnp.minimum(right + total, 1.0)) - jnp.log(jnp.maximum(wrong - total, 0.0))
    return low, high


def accumulated_error(errors: ArrayLike, slope: ArrayLike) -> jax.Array:
    """A bound on how far inexact iterations are from the exact ones: E_n = κ E_{n−1} + δ_n.

    With |h'| ≤ κ < 1 on an interval that holds both orbits, constant errors δ end at δ/(1 − κ) and old ones are forgotten.
    With κ = 1 it is the sum, which bounds |p̃_n − p_n| also where δ_n are total variations that add up (`limit_interval`).

    Args:
      errors: [N, ...] δ_n ≥ 0, what iteration n adds.
      slope: [...] κ ≥ 0, a bound on |h'|.

    Returns:
      [N, ...] E_n.

    Source: arXiv 2503.06639, Thm 10 (κ = 1); the contraction is derived.

    >>> [round(float(e), 3) for e in accumulated_error(jnp.full(4, 0.1), 0.5)]
    [0.1, 0.15, 0.175, 0.188]
    """
    errors = as_float(errors)
    if errors.ndim == 0:
        raise ValueError("errors must be an array [N, ...], a row for each iteration")
    slope = jnp.broadcast_to(jnp.asarray(slope, errors.dtype), errors.shape[1:])

    def step(total: jax.Array, error: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = slope * total + error
        return total, total

    return jax.lax.scan(step, jnp.zeros_like(slope), errors)[1]


def _omega_range(weights: Weights, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(least, largest) value of Ω, which is monotone on either side of p = ½ where groups are treated symmetrically."""
    inner = weights.weights if isinstance(weights, NoisyVerifier) else weights
    if isinstance(inner, Group) and (inner.baseline == "none" or inner.scale == "mean"):
        # Not symmetric, so the peaks are searched for.
        grid = jnp.linspace(-REACH, REACH, POINTS, dtype=dtype)
        peaks = sign_changes(partial(log_odds_slope, weights=weights), grid)
        values = weights.omega(jnp.concatenate([jnp.asarray([-jnp.inf, jnp.inf], dtype), grid, peaks]))
    elif isinstance(weights, NoisyVerifier):
        rates = jnp.stack([jnp.asarray(rate, dtype) for rate in (weights.tpr, weights.fpr)])
        observed = log_odds(jnp.clip(jnp.asarray(0.5, dtype), rates.min(), rates.max()))
        values = weights.advantage(dtype) * inner.omega(jnp.append(log_odds(rates), observed))
    else:
        values = weights.omega(jnp.asarray([-jnp.inf, 0.0, jnp.inf], dtype))
    return jnp.nanmin(values), jnp.nanmax(values)
