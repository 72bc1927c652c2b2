"""Mirror GRPO, whose KL is taken to the previous policy: it never stops short of p = 1, so what matters is how long it takes.

While Ω(p) ≪ β, whitened rewards give every prompt the same speed in the angle θ = arcsin √p, and every iteration the same KL,
1/(2β²): β is a trust region.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import bernoulli_kl
from grpo_jax.theory.weights import Weights, Whitened, log_odds

_PANELS = 256
_FAR = 80.0  # log-odds beyond which ∫ √v dL is below 1e-17


def mirror_flow(p_0: ArrayLike, steps: ArrayLike, *, beta: ArrayLike, logits: bool = False) -> jax.Array:
    """The success probability after many small mirror iterations with whitened rewards: sin²(arcsin √p_0 + n/(2β)).

    Args:
      p_0: [...] success probability at the start; 0 stays 0.
      steps: [...] n ≥ 0, the number of iterations; nan below.
      beta: [...] weight of the KL to the previous policy, ≫ 1.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [...] p(n); 1 from n = β(π − 2 arcsin √p_0) on.

    Source: derived; dp/dn = √(p(1−p))/β from arXiv 2503.06639, Thm 4, for small 1/β and ε = 0.

    >>> round(float(mirror_flow(0.5, 100, beta=400.0)), 5)
    0.6237
    """
    start = log_odds(p_0, logits=logits)
    at_end = jnp.isinf(start)
    half = jnp.where(at_end, 0.0, start) / 2  # ln tan θ_0
    turned = jnp.asarray(steps, start.dtype) / (2 * jnp.asarray(beta, start.dtype))
    inside = turned < jnp.pi / 2
    tangent = jnp.tan(jnp.where(inside, turned, 0.0))
    # ln tan(θ_0 + τ) = ln(tan θ_0 + tan τ) − ln(1 − tan θ_0 tan τ), which keeps both small and large log-odds
    moved = tangent > 0
    log_tangent = jnp.log(jnp.where(moved, tangent, 1.0))
    inside &= ~moved | (log_tangent + half < 0)
    still = half + tangent * jnp.exp(-jnp.maximum(half, -80.0))  # at τ = 0, with its derivative
    top = jnp.where(moved, jnp.logaddexp(half, log_tangent), still)
    logit = 2 * (top - jnp.log1p(jnp.where(inside, -tangent * jnp.exp(half), 0.0)))
    logit = jnp.where(at_end, start, jnp.where(inside, logit, jnp.inf))
    logit = jnp.where(turned < 0, jnp.nan, logit)
    return logit if logits else jax.nn.sigmoid(logit)


def mirror_steps(
    p_0: ArrayLike, p_1: ArrayLike, *, beta: ArrayLike, weights: Weights | None = None, logits: bool = False
) -> jax.Array:
    """How many small mirror iterations lead from p_0 to p_1: β ∫ dL/Ω(L).

    Whitened rewards with ε = 0 need 2β(arcsin √p_1 − arcsin √p_0), at most πβ however rare success is; mean-only ones
    β(logit p_1 − logit p_0).

    Args:
      p_0: [...] success probability at the start.
      p_1: [...] the one wanted, not below it.
      beta: [...] weight of the KL to the previous policy.
      weights: the normaliser; None: `Whitened` with ε = 0.
      logits: probabilities are given as log-odds.

    Returns:
      [...] the number, not rounded; infinite from p_0 = 0, and to p_1 = 1 where Ω is finite there.

    Source: derived from arXiv 2503.06639, Thm 4, for small 1/β.

    >>> round(float(mirror_steps(0.01, 1.0, beta=1.0)), 5)  # π − 2 arcsin 0.1
    2.94126
    """
    weights = Whitened(0.0) if weights is None else weights
    low, high = jnp.broadcast_arrays(log_odds(p_0, logits=logits), log_odds(p_1, logits=logits))
    endless = jnp.isneginf(low) | (jnp.isposinf(high) & jnp.isfinite(weights.omega(jnp.asarray(jnp.inf, low.dtype))))
    # Infinite ends are replaced by log-odds beyond which nothing is left to integrate.
    start, stop = (jnp.clip(x, -_FAR, jnp.maximum(_FAR, jnp.where(jnp.isinf(low), 0.0, low))) for x in (low, high))
    start = jnp.where(jnp.isinf(low), start, low)
    stop = jnp.where(jnp.isinf(high), stop, high)
    # Five-point Gauss-Legendre on each panel.
    inner, outer = (jnp.sqrt(5 + s * 2 * jnp.sqrt(10 / 7)) / 3 for s in (-1, 1))
    nodes = jnp.stack([-outer, -inner, jnp.zeros_like(inner), inner, outer]).astype(low.dtype)
    near, far = (322 + 13 * 70**0.5) / 1800, (322 - 13 * 70**0.5) / 1800
    shares = jnp.asarray([far, near, 64 / 225, near, far], low.dtype)
    at = ((jnp.arange(_PANELS, dtype=low.dtype)[:, None] + (nodes + 1)[None] / 2) / _PANELS).reshape(-1)
    axes = tuple(range(low.ndim))
    points = start[..., None] + (stop - start)[..., None] * jnp.expand_dims(at, axes)
    mean = (jnp.expand_dims(jnp.tile(shares, _PANELS) / _PANELS, axes) / weights.omega(points)).sum(-1)
    return jnp.asarray(beta, low.dtype) * jnp.where(endless, jnp.inf, (stop - start) * mean)


def mirror_step_kl(p: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False) -> jax.Array:
    """The KL(π_n‖π_{n−1}) that one exact mirror iteration from p spends.

    kl(p_n‖p) with logit p_n = logit p + Ω(p)/β; for large β about p(1−p)Ω²/(2β²): 1/(2β²) at every p when whitened.

    Args:
      p: [...] success probability before.
      beta: [...] weight of the KL to the previous policy, > 0.
      weights: the normaliser.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] nats per sequence.

    Source: derived from arXiv 2503.06639, Thm 4.

    >>> [round(20000 * float(mirror_step_kl(p, beta=100.0, weights=Whitened(0.0))), 2) for p in (0.01, 0.5)]
    [1.07, 1.0]
    """
    logit = log_odds(p, logits=logits)
    moved = logit + weights.omega(logit) / jnp.asarray(beta, logit.dtype)
    return jnp.where(jnp.isinf(logit), 0.0, bernoulli_kl(moved, jnp.where(jnp.isinf(logit), 0.0, logit), logits=True))
