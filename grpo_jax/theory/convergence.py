"""Which fixed points attract, bounds that no exact iteration leaves, and how errors add up on the way."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import log_odds_slope
from grpo_jax.theory.roots import POINTS, REACH, sign_changes
from grpo_jax.theory.weights import Group, NoisyVerifier, Weights, as_float, log_odds


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


def accumulated_error(errors: ArrayLike, slope: ArrayLike) -> jax.Array:
    """A bound on how far inexact iterations are from the exact ones: E_n = κ E_{n−1} + δ_n.

    With |h'| ≤ κ < 1 on an interval that holds both orbits, constant errors δ end at δ/(1 − κ) and old ones are forgotten.
    With κ = 1 it is the sum, which bounds |p̃_n − p_n| also where δ_n are total variations that add up (the paper's theorem has
    twice that, and half of it suffices).

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
