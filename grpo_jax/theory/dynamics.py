"""What one exact GRPO iteration does to the success probability of a prompt, and what iterates cost in KL.

Maximising E[A] − β KL(π‖anchor) exactly tilts the anchor by exp(A/β), so the log-odds of success rise by Ω/β. All of it
happens on one line: the distribution among correct answers, and among wrong ones, stays that of the reference policy.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.weights import Weights, log_odds, variance


def success_map(
    p: ArrayLike,
    p_ref: ArrayLike,
    *,
    beta: ArrayLike,
    weights: Weights,
    alpha: ArrayLike = 1.0,
    p_prev: ArrayLike | None = None,
    logits: bool = False,
) -> jax.Array:
    """The success probability h(p) after one exactly solved iteration whose advantages were measured at p.

    logit h = α L_ref + (1 − α) L_prev + Ω(p)/β. α = 1 is GRPO with its KL to the reference, α = 0 mirror GRPO, between
    them the two-KL form β[α KL(π‖π_ref) + (1−α) KL(π‖π_prev)].

    The paper adds a Rényi correction Δ_R to the two-KL form. It is identically zero for iterates that started at the
    reference, whose conditionals among correct and among wrong answers all agree, and so is absent here.

    Args:
      p: [...] success probability of the policy that was sampled.
      p_ref: [...] of the reference policy; 0 and 1 are returned unchanged.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      alpha: share of the KL that goes to the reference, in [0, 1].
      p_prev: [...] of the policy that the mirror term holds on to; None: the one that was sampled, ``p``.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [...] h.

    Source: arXiv 2503.06639, Thm 2 (α = 1), Thm 4 (α = 0), Thm 9 with Δ_R = 0 (derived).

    >>> from grpo_jax.theory import Whitened
    >>> round(float(success_map(0.3, 0.2, beta=1.0, weights=Whitened(1e-5))), 5)
    0.68908
    """
    logit, reference = log_odds(p, logits=logits), log_odds(p_ref, logits=logits)
    previous = logit if p_prev is None else log_odds(p_prev, logits=logits)
    mapped = _log_odds_map(logit, reference, previous, beta=beta, weights=weights, alpha=alpha)
    return mapped if logits else jax.nn.sigmoid(mapped)


def success_map_slope(
    p: ArrayLike, p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False
) -> jax.Array:
    """The slope h'(p) of `success_map` at α = 1: at a fixed point, the factor by which an error shrinks per iteration.

    h' = h(1 − h) Ω'(p)/β; in log-odds d logit h/dL = p(1 − p) Ω'(p)/β. The two agree at a fixed point.

    Args:
      p: [...] success probability of the policy that was sampled.
      p_ref: [...] of the reference policy.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      logits: probabilities are taken as log-odds and the slope is that of log-odds against log-odds.

    Returns:
      [...] the slope.

    Source: arXiv 2503.06639, Prop. 1.

    >>> from grpo_jax.theory import Whitened
    >>> round(float(success_map_slope(0.3, 0.2, beta=1.0, weights=Whitened(1e-5))), 5)
    -0.44523
    """
    logit, reference = log_odds(p, logits=logits), log_odds(p_ref, logits=logits)
    if logits:
        return log_odds_slope(logit, weights) / jnp.asarray(beta, logit.dtype)
    v = variance(_log_odds_map(logit, reference, logit, beta=beta, weights=weights, alpha=1.0))
    return jnp.where(v == 0, 0.0, v * jnp.where(v == 0, 0.0, weights.slope(logit))) / jnp.asarray(beta, logit.dtype)


@partial(jax.jit, static_argnames=("num_iterations", "logits"))
def iterate(
    p_ref: ArrayLike,
    num_iterations: int,
    *,
    beta: ArrayLike,
    weights: Weights,
    alpha: ArrayLike = 1.0,
    p_0: ArrayLike | None = None,
    logits: bool = False,
) -> jax.Array:
    """The success probabilities p_0, p_1, … of exactly solved iterations.

    L_n = α L_ref + (1 − α) L_{n−1} + Ω(p_{n−1})/β.

    Args:
      p_ref: [...] success probability of the reference policy.
      num_iterations: how many iterations; static.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      alpha: share of the KL that goes to the reference (see `success_map`).
      p_0: [...] where to start; None: at ``p_ref``. It may differ from the reference in p only.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [num_iterations + 1, ...], the start included.

    Source: arXiv 2503.06639, Thms 2, 4 and 9.

    >>> from grpo_jax.theory import MeanOnly
    >>> [round(float(p), 4) for p in iterate(0.2, 5, beta=2.0, weights=MeanOnly(), alpha=0.0)]
    [0.2, 0.2919, 0.4046, 0.5284, 0.6488, 0.7528]
    """
    reference = log_odds(p_ref, logits=logits)
    start = reference if p_0 is None else jnp.broadcast_to(log_odds(p_0, logits=logits), reference.shape)

    def step(logit: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        mapped = _log_odds_map(logit, reference, logit, beta=beta, weights=weights, alpha=alpha)
        return mapped, mapped

    _, path = jax.lax.scan(step, start, None, length=num_iterations)
    path = jnp.concatenate([start[None], path])
    return path if logits else jax.nn.sigmoid(path)


def bernoulli_kl(p: ArrayLike, q: ArrayLike, *, logits: bool = False) -> jax.Array:
    """The KL divergence p ln(p/q) + (1 − p) ln((1−p)/(1−q)) between two coins, in nats.

    For exact iterates it is the KL of whole sequences, KL(π_n‖π_ref) = kl(p_n‖p_ref); for any other policy a lower bound of it.

    Args:
      p: [...] success probability of the first.
      q: [...] of the second.
      logits: both are given as log-odds.

    Returns:
      [...] nats; infinite where q excludes what p allows.

    Source: derived from arXiv 2503.06639, Thm 1; checked on explicit policies in tests/theory.

    >>> round(float(bernoulli_kl(1.0, 0.2)), 5), float(bernoulli_kl(0.0, 0.0))
    (1.60944, 0.0)
    """
    a, b = jnp.broadcast_arrays(log_odds(p, logits=logits), log_odds(q, logits=logits))

    def term(a: jax.Array, b: jax.Array) -> jax.Array:
        mass = jax.nn.sigmoid(a)
        gap = jax.nn.log_sigmoid(a) - jax.nn.log_sigmoid(b)
        return jnp.where(mass == 0, 0.0, mass * jnp.where(mass == 0, 0.0, gap))

    # Where the coins are close the two terms cancel; there a series in d = b − a, from the cumulants of a coin, replaces them.
    d = jnp.where(jnp.isinf(a) & (a == b), 0.0, b - a)
    near = jnp.abs(d) < (2520 * jnp.finfo(d.dtype).eps) ** (1 / 6)
    d = jnp.where(near, d, 0.0)
    v, tilt = variance(a), -jnp.tanh(a / 2)
    cumulants = (jnp.ones_like(v), tilt, 1 - 6 * v, tilt * (1 - 12 * v), 1 - 30 * v + 120 * v**2)
    series = jnp.stack([c * d**k / math.factorial(k + 2) for k, c in enumerate(cumulants)]).sum(0)
    return jnp.where(near, v * d**2 * series, term(a, b) + term(-a, -b))


def kl_budget(p_ref: ArrayLike, *, logits: bool = False) -> jax.Array:
    """The most KL(π‖π_ref), ln(1/p_ref) nats per sequence, that training on a prompt can ever spend.

    Args:
      p_ref: [...] success probability of the reference policy.
      logits: it is given as log-odds.

    Returns:
      [...] nats.

    Source: derived; kl(p‖p_ref) for p in [p_ref, 1] is largest at p = 1.

    >>> round(float(kl_budget(0.01)), 3)
    4.605
    """
    return -jax.nn.log_sigmoid(log_odds(p_ref, logits=logits))


def log_odds_slope(logit: jax.Array, weights: Weights) -> jax.Array:
    """dΩ/dL = p(1 − p) dΩ/dp at log-odds [...]; 0 where p has rounded to an end.

    >>> from grpo_jax.theory import Whitened
    >>> float(log_odds_slope(jnp.zeros(()), Whitened())), float(log_odds_slope(jnp.asarray(jnp.inf), Whitened()))
    (0.0, 0.0)
    """
    v = variance(logit)
    return jnp.where(v == 0, 0.0, v * jnp.where(v == 0, 0.0, weights.slope(logit)))


def finite_if_unused(previous: jax.Array, alpha: jax.Array) -> jax.Array:
    """Log-odds that are about to be multiplied by 1 − α: zero where they are infinite and α = 1, because 0·∞ is nan.

    >>> one = jnp.ones(())
    >>> float(finite_if_unused(jnp.asarray(jnp.inf), one)), float(finite_if_unused(one, one))
    (0.0, 1.0)
    """
    return jnp.where(jnp.isinf(previous) & (alpha == 1), 0.0, previous)


def _log_odds_map(
    logit: jax.Array, reference: jax.Array, previous: jax.Array, *, beta: ArrayLike, weights: Weights, alpha: ArrayLike
) -> jax.Array:
    """`success_map` on log-odds."""
    alpha = jnp.asarray(alpha, logit.dtype)
    at_end = jnp.isinf(reference)
    logit, reference_inside, previous = (jnp.where(at_end, 0.0, x) for x in (logit, reference, previous))
    anchor = alpha * reference_inside + (1 - alpha) * finite_if_unused(previous, alpha)
    return jnp.where(at_end, reference, anchor + weights.omega(logit) / jnp.asarray(beta, logit.dtype))
