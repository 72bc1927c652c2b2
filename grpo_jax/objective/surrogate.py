"""The surrogate that is maximised: a ratio ρ = π/π_old times an advantage A, bounded in one of several ways.

Dimension key: see grpo_jax.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.objective.objective import Objective

LARGEST_LOG_RATIO = 20.0  # a ratio beyond e²⁰ is far outside of any trust region, and must not become infinite


class Surrogate(NamedTuple):
    """What is maximised, of tokens [B, T] or of completions [B, 1].

    Attributes:
      value: differentiable.
      ratio: π/π_old as the surrogate sees it; one where the objective has no ratio.
      below, above: bool, where the lower and the upper bound decide the gradient.
    """

    value: jax.Array
    ratio: jax.Array
    below: jax.Array
    above: jax.Array


def surrogate_terms(
    logps: jax.Array,
    log_ratio: jax.Array,
    lengths: jax.Array,
    advantages: jax.Array,
    *,
    objective: Objective,
    clip_low: float | jax.Array | None,
    clip_high: float | jax.Array | None,
) -> Surrogate:
    """The surrogate of `Objective.surrogate`, with the ratio of `Objective.ratio`.

    Args:
      logps, log_ratio: [B, T] log π and log π/π_old, zero outside the mask.
      lengths: [B] tokens.
      advantages: [B].
      objective: the choices.
      clip_low, clip_high: widths; None does not clip.

    Returns:
      `Surrogate` of shape [B, T] for ratio="token" and "none", else [B, 1].

    Source: arXiv 2503.06639, §2; 2506.13585 (CISPO), 2511.20347 (SAPO), 1912.09729 (dual clip), 2505.07291 (ratio cap).

    >>> ratio, advantages = jnp.array([[1.5], [0.5]]), jnp.array([1.0, -1.0])
    >>> logs, lengths, clip = jnp.log(ratio), jnp.ones(2), {"clip_low": 0.2, "clip_high": 0.2}
    >>> terms = surrogate_terms(logs, logs, lengths, advantages, objective=Objective(), **clip)
    >>> [round(float(x), 3) for x in terms.value[:, 0]]
    [1.2, -0.8]
    """
    advantages = advantages[:, None]  # [B, 1]
    if objective.ratio == "none":
        nowhere = jnp.zeros(logps.shape, bool)
        return Surrogate(logps * advantages, jnp.ones_like(logps), nowhere, nowhere)

    # ρ of tokens [B, T], or of completions [B, 1]: the product over their tokens, or its geometric mean.
    if objective.ratio != "token":
        log_ratio = log_ratio.sum(-1, keepdims=True)
        if objective.ratio == "sequence":
            log_ratio = log_ratio / jnp.maximum(lengths, 1.0)[:, None]
    ratio = bounded_exp(log_ratio)
    low = None if clip_low is None else 1.0 - clip_low
    high = None if clip_high is None else 1.0 + clip_high

    if objective.surrogate == "sapo":
        tau = jnp.where(advantages > 0, objective.tau_plus or 1.0, objective.tau_minus or 1.0)  # [B, 1]
        nowhere = jnp.zeros(ratio.shape, bool)
        return Surrogate(4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0)) * advantages, ratio, nowhere, nowhere)
    if objective.surrogate == "cispo":
        weight = jax.lax.stop_gradient(jnp.clip(ratio, low, objective.ratio_cap))
        return Surrogate(weight * advantages * logps, ratio, weight > ratio, weight < ratio)

    # min(ρA, clip(ρ)A): a success is not raised above the upper bound, a failure not pushed below the lower one.
    value = jnp.minimum(jnp.clip(ratio, max=objective.ratio_cap) * advantages, jnp.clip(ratio, low, high) * advantages)
    if objective.dual_clip is not None:
        value = jnp.where(advantages < 0, jnp.maximum(value, objective.dual_clip * advantages), value)
    below = (ratio < (0.0 if low is None else low)) & (advantages < 0)
    above = (ratio > (jnp.inf if high is None else high)) & (advantages > 0)
    return Surrogate(value, ratio, below, above)


def bounded_exp(log_ratio: jax.Array) -> jax.Array:
    """exp of the argument clipped to ±20, so that no ratio is infinite; beyond ±20 the gradient is zero.

    >>> float(bounded_exp(jnp.array(1e4))) == float(jnp.exp(20.0))
    True
    """
    return jnp.exp(jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
