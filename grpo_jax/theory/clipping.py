"""PPO's clip in the paper's contrastive form, and the success map when each clipped problem is solved exactly.

The ratio is that of whole completions. Clipping token by token is another object.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import finite_if_unused
from grpo_jax.theory.policies import is_correct
from grpo_jax.theory.weights import NoisyVerifier, Weights, log_odds, omega_minus, omega_plus


def contrastive_term(
    ratio: ArrayLike,
    rewards: ArrayLike,
    p_old: ArrayLike,
    *,
    weights: Weights,
    clip: ArrayLike | None = None,
    clip_high: ArrayLike | None = None,
) -> jax.Array:
    """min(ρA, clip(ρ, 1−c, 1+c)A) of one completion as a contrastive loss has it.

    ω⁺ min(ρ, 1 + c_high) if correct, −ω⁻ max(ρ, 1 − c) if wrong. It is constant, with zero gradient, for a correct completion
    from ρ = 1 + c_high up and for a wrong one from ρ = 1 − c down; the other two directions are never clipped. Unclipped, its
    mean under π_old is Ω(p_old)(p − p_old), or Ω(p_old) p where no baseline is subtracted.

    Args:
      ratio: [...] ρ = π(o)/π_old(o) of whole completions.
      rewards: [...] 0 or 1.
      p_old: [...] success probability of π_old.
      weights: the normaliser.
      clip: c > 0; None: no clipping.
      clip_high: the width upwards, if it differs.

    Returns:
      [...] the term, to be maximised.

    Raises:
      ValueError: ``weights`` is a `NoisyVerifier` and there is a clip: correct completions then have advantages of both signs.

    Source: arXiv 2503.06639, §2.2 and §2.3.

    >>> from grpo_jax.theory import MeanOnly
    >>> ratios = jnp.array([0.5, 1.0, 1.2, 2.0])
    >>> [round(float(x), 2) for x in contrastive_term(ratios, 1, 0.25, weights=MeanOnly(), clip=0.2)]
    [0.38, 0.75, 0.9, 0.9]
    """
    old = log_odds(p_old)
    ratio = jnp.asarray(ratio, old.dtype)
    up = down = ratio
    if clip is not None:
        low, high = _widths(weights, clip, clip_high, old.dtype)
        # Not jnp.minimum and jnp.maximum: at the kink their gradient is the mean of both sides.
        up, down = jnp.where(ratio < 1 + high, ratio, 1 + high), jnp.where(ratio > 1 - low, ratio, 1 - low)
    right = is_correct(rewards)
    return jnp.where(right, omega_plus(old, weights, logits=True) * up, -omega_minus(old, weights, logits=True) * down)


def clipped_success_map(
    p: ArrayLike,
    p_ref: ArrayLike,
    *,
    beta: ArrayLike,
    weights: Weights,
    clip: ArrayLike,
    clip_high: ArrayLike | None = None,
    alpha: ArrayLike = 1.0,
    logits: bool = False,
) -> jax.Array:
    """The success probability after one exactly solved clipped iteration whose advantages were measured at p.

    The maximum over x of ω⁺ min(x, (1+c_high)p) − ω⁻ max(1−x, (1−c)(1−p)) − β kl(x‖p_a): by convexity the best policy stays
    on the line of the unclipped iterates. It has the fixed points and multipliers of `success_map`, and climbs at most to
    the further of the two kinks, (1 + c_high)p and p + c(1 − p), or to the anchor if that is further. With whitened rewards
    an orbit below an unstable fixed point p_m therefore stays below it if c_high ≤ (2p_m − 1)/(1 − p_m): from p ≥ ½ the
    unclipped map rises and cannot pass it either; from p < ½ it passes only if 1 − p > p_m, because Ω(p) = Ω(1 − p). There
    (1 + c_high)p < p_m, and beyond that kink the pull that is left, ω⁻(p) < Ω(½)/2, does not reach L_m = L_ref + Ω(p_m)/β.

    Args:
      p: [...] success probability of the policy that was sampled.
      p_ref: [...] of the reference policy; 0 and 1 are returned unchanged.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      clip: c in (0, 1].
      clip_high: the width upwards, if it differs.
      alpha: share of the KL that goes to the reference (see `success_map`).
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [...] the new success probability.

    Raises:
      ValueError: ``weights`` is a `NoisyVerifier`: correct completions then have advantages of both signs.

    Source: derived (the paper leaves clipping open); checked against an exact maximiser over all policies in tests/theory.

    >>> from grpo_jax.theory import Whitened
    >>> [round(float(clipped_success_map(0.2, 0.2, beta=b, weights=Whitened(1e-5), clip=0.2)), 5) for b in (1.0, 0.2)]
    [0.29187, 0.36]
    """
    old, reference = log_odds(p, logits=logits), log_odds(p_ref, logits=logits)
    dtype = old.dtype
    low, high = _widths(weights, clip, clip_high, dtype)
    beta, alpha = jnp.asarray(beta, dtype), jnp.asarray(alpha, dtype)
    at_end = jnp.isinf(reference)
    old = jnp.where(at_end, 0.0, old)
    anchor = alpha * jnp.where(at_end, 0.0, reference) + (1 - alpha) * finite_if_unused(old, alpha)
    plus, minus = omega_plus(old, weights, logits=True), omega_minus(old, weights, logits=True)

    right, wrong = jax.nn.sigmoid(old), jax.nn.sigmoid(-old)
    correct_kink = _log_ratio((1 + high) * right, wrong - high * right)  # correct completions stop gaining here
    wrong_kink = _log_ratio(right + low * wrong, (1 - low) * wrong)  # wrong ones stop losing here
    first, last = jnp.minimum(correct_kink, wrong_kink), jnp.maximum(correct_kink, wrong_kink)
    free = anchor + (plus + minus) / beta
    half = anchor + jnp.where(correct_kink < wrong_kink, minus, plus) / beta
    beyond = jnp.where(half <= first, first, jnp.where(half <= last, half, jnp.maximum(last, anchor)))
    mapped = jnp.where(at_end, reference, jnp.where(free <= first, free, beyond))
    return mapped if logits else jax.nn.sigmoid(mapped)


def _widths(
    weights: Weights, clip: ArrayLike, clip_high: ArrayLike | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    if isinstance(weights, NoisyVerifier):
        raise ValueError(
            "clipping under a NoisyVerifier has no contrastive form: correct completions are also punished"
        )
    return jnp.asarray(clip, dtype), jnp.asarray(clip if clip_high is None else clip_high, dtype)


def _log_ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """ln(top/bottom), ∞ from bottom = 0 down, without a nan in the gradient."""
    inside = (top > 0) & (bottom > 0)
    ends = jnp.where(top > 0, jnp.inf, -jnp.inf).astype(top.dtype)
    return jnp.where(inside, jnp.log(jnp.where(inside, top, 1.0) / jnp.where(inside, bottom, 1.0)), ends)
