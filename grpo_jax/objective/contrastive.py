"""The paper's form of the loss: successes against failures, weighed by how often the prompt is solved.

Dimension key: see grpo_jax.
"""

import jax
import jax.numpy as jnp

from grpo_jax.objective.advantages import check_normaliser
from grpo_jax.objective.checks import check_group_size, check_mask, check_scalar
from grpo_jax.objective.surrogate import bounded_exp


def contrastive_loss(
    logps: jax.Array,
    old_logps: jax.Array | None,
    rewards: jax.Array,
    mask: jax.Array,
    *,
    group_size: int,
    epsilon: float | jax.Array = 1e-4,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 0,
    epsilon_in: str = "variance",
    clip_low: float | jax.Array | None = None,
    clip_high: float | jax.Array | None = None,
) -> jax.Array:
    """GRPO's surrogate for binary rewards as an adaptively weighted contrast of successes and failures.

    For each group with k successes, p̂ = k/G, the weights ω⁺(p̂) and ω⁻(p̂) of a success and of a failure give

        −(1/B) [ω⁺ Σ_successes min(ρ, 1 + clip_high) − ω⁻ Σ_failures max(ρ, 1 − clip_low)],   ρ = π/π_old of the completion,

    with ω⁺ = (1 − p̂)/√(p̂(1−p̂) + ε), ω⁻ = p̂/√(p̂(1−p̂) + ε) by default. No row gets an advantage: all that enters is the
    group's p̂ and whether each row is a success. With the same normaliser and clip widths it equals `grpo_loss` of GRPO without
    KL, in value and gradient.

    Args:
      logps: [B, T] log π of the completion tokens, differentiated.
      old_logps: [B, T] of the policy that sampled them; None where π_old is the current policy.
      rewards: [B]; bool, integer or real. 1 is a success and anything else a failure. Groups are contiguous.
      mask: [B, T] bool, True on the tokens of the completion.
      group_size: G; static.
      epsilon, baseline, scale, ddof, epsilon_in: the normaliser; see `group_advantages`. "batch_std" is refused: it is no
        function of p̂ alone.
      clip_low, clip_high: widths, may be traced; None does not clip.

    Returns:
      The loss, scalar float32.

    Raises:
      ValueError: shapes that do not match, a group_size that does not divide B, an unknown choice, or scale="batch_std".
      TypeError: a mask that is not bool, log-probs that are not real, or an integer clip width.

    Source: arXiv 2503.06639, §2.

    >>> logps, mask = jnp.full((4, 2), -1.0), jnp.ones((4, 2), bool)
    >>> rewards = jnp.array([1.0, 0.0, 0.0, 0.0])
    >>> float(contrastive_loss(logps, logps - 0.1, rewards, mask, group_size=4)) < 1e-6  # all ratios alike: no contrast
    True
    """
    check_normaliser(baseline=baseline, scale=scale, epsilon=epsilon, ddof=ddof, epsilon_in=epsilon_in)
    if scale == "batch_std":
        raise ValueError("scale='batch_std' is no function of one group's success rate, so it has no contrastive form")
    if logps.ndim != 2 or mask.shape != logps.shape or (old_logps is not None and old_logps.shape != logps.shape):
        shapes = [logps.shape, None if old_logps is None else old_logps.shape, mask.shape]
        raise ValueError(f"logps, old_logps and mask must be [B, T] alike, got {shapes}")
    if rewards.shape != logps.shape[:1]:
        raise ValueError(f"rewards must be [B] = {logps.shape[:1]}, got {rewards.shape}")
    check_group_size(group_size, logps.shape)
    check_mask(mask)
    if not jnp.issubdtype(logps.dtype, jnp.floating):
        raise TypeError(f"logps must be real, got {logps.dtype}")
    check_scalar("clip_low", clip_low)
    check_scalar("clip_high", clip_high)

    # ρ of each completion.
    logps = jnp.where(mask, logps.astype(jnp.float32), 0.0)  # [B, T]
    old = logps if old_logps is None else jnp.where(mask, old_logps.astype(jnp.float32), 0.0)  # [B, T]
    ratio = bounded_exp((logps - jax.lax.stop_gradient(old)).sum(-1)).reshape(-1, group_size)  # [P, G]
    # ω⁺ and ω⁻ of each group, from its number of successes.
    success = rewards.astype(jnp.float32).reshape(-1, group_size) == 1  # [P, G]
    epsilon = jnp.asarray(epsilon, jnp.float32)
    plus, minus = _weights(success.sum(-1), group_size, epsilon, baseline, scale, ddof, epsilon_in)  # [P] each
    # ω⁺ Σ_successes min(ρ, 1 + clip_high) − ω⁻ Σ_failures max(ρ, 1 − clip_low)
    raised = ratio if clip_high is None else jnp.minimum(ratio, 1.0 + jnp.asarray(clip_high, jnp.float32))  # [P, G]
    lowered = ratio if clip_low is None else jnp.maximum(ratio, 1.0 - jnp.asarray(clip_low, jnp.float32))  # [P, G]
    has_tokens = mask.any(-1).reshape(-1, group_size)  # [P, G]
    successes = jnp.where(has_tokens & success, raised, 0.0).sum(-1) * plus  # [P]
    failures = jnp.where(has_tokens & ~success, lowered, 0.0).sum(-1) * minus  # [P]
    return -(successes - failures).sum() / logps.shape[0]


def _weights(
    successes: jax.Array,
    group_size: int,
    epsilon: jax.Array,
    baseline: str,
    scale: str,
    ddof: int,
    epsilon_in: str,
) -> tuple[jax.Array, jax.Array]:
    """(ω⁺, ω⁻) [P] of groups with so many successes [P]."""
    p = successes.astype(jnp.float32) / group_size  # [P]
    dead = (successes == 0) | (successes == group_size)
    # What divides, as in `group_advantages`, from a variance or a mean of one where the weights will be zero.
    variance = jnp.where(dead, 1.0, p * (1 - p) * group_size / (group_size - ddof))
    if scale == "std":
        divisor = jnp.sqrt(variance + epsilon) if epsilon_in == "variance" else jnp.sqrt(variance) + epsilon
    else:
        divisor = jnp.where(successes == 0, 1.0, p) if scale == "mean" else jnp.ones_like(p)
    if baseline == "none":
        no_weight = dead if scale == "std" else successes == 0
        return jnp.where(no_weight, 0.0, 1 / divisor), jnp.zeros_like(p)
    factor = group_size / (group_size - 1) if baseline == "leave_one_out" else 1.0
    weight = jnp.where(dead, 0.0, factor / divisor)
    return (1 - p) * weight, p * weight
