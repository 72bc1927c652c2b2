"""The paper's form of the loss: successes against failures, weighed by how often the prompt is solved."""

import jax
import jax.numpy as jnp

from grpo_jax.objective.advantages import check_normaliser
from grpo_jax.objective.checks import check_scalar
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

    with ω⁺ = (1 − p̂)/√(p̂(1−p̂) + ε), ω⁻ = p̂/√(p̂(1−p̂) + ε) by default. No advantage of a row is formed: of the rewards only
    the group's p̂ and the side of each row enter. It equals `grpo_loss` without KL, in value and gradient.

    Args:
      logps: [B, T] log π of the completion tokens, differentiated.
      old_logps: [B, T] of the policy that sampled them; None where π_old is the current policy.
      rewards: [B]; bool, integer or real. 1 is a success and anything else a failure. Groups are contiguous.
      mask: [B, T] bool, True on the tokens of the completion.
      group_size: G; static.
      epsilon, baseline, scale, ddof, epsilon_in: the normaliser; see `group_advantages`. "batch_std" is no function of p̂.
      clip_low, clip_high: widths, may be traced; None does not clip.

    Returns:
      The loss, scalar float32.

    Raises:
      ValueError: shapes that do not match, a group_size that does not divide B, or an unknown choice.
      TypeError: a mask that is not bool.

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
    if not isinstance(group_size, int) or group_size < 2 or logps.shape[0] % group_size:
        raise ValueError(
            f"group_size={group_size!r} must be an integer, at least 2 and divide the {logps.shape[0]} rows"
        )
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool (True counts), got {mask.dtype}")
    if not jnp.issubdtype(logps.dtype, jnp.floating):
        raise TypeError(f"logps must be real, got {logps.dtype}")
    check_scalar("clip_low", clip_low)
    check_scalar("clip_high", clip_high)

    logps = jnp.where(mask, logps.astype(jnp.float32), 0.0)
    old = logps if old_logps is None else jnp.where(mask, old_logps.astype(jnp.float32), 0.0)
    ratio = bounded_exp((logps - jax.lax.stop_gradient(old)).sum(-1)).reshape(-1, group_size)
    success = rewards.astype(jnp.float32).reshape(-1, group_size) == 1
    plus, minus = _weights(
        success.sum(-1), group_size, jnp.asarray(epsilon, jnp.float32), baseline, scale, ddof, epsilon_in
    )
    up = ratio if clip_high is None else jnp.minimum(ratio, 1.0 + jnp.asarray(clip_high, jnp.float32))
    down = ratio if clip_low is None else jnp.maximum(ratio, 1.0 - jnp.asarray(clip_low, jnp.float32))
    live = mask.any(-1).reshape(-1, group_size)
    pushed = jnp.where(live & success, up, 0.0).sum(-1) * plus - jnp.where(live & ~success, down, 0.0).sum(-1) * minus
    return -pushed.sum() / logps.shape[0]


def _weights(
    successes: jax.Array,
    group_size: int,
    epsilon: float | jax.Array,
    baseline: str,
    scale: str,
    ddof: int,
    epsilon_in: str,
) -> tuple[jax.Array, jax.Array]:
    """(ω⁺, ω⁻) of groups with the given number of successes."""
    p = successes.astype(jnp.float32) / group_size
    dead = (successes == 0) | (successes == group_size)
    variance = jnp.where(dead, 1.0, p * (1 - p) * group_size / (group_size - ddof))
    if scale == "std":
        size = jnp.sqrt(variance + epsilon) if epsilon_in == "variance" else jnp.sqrt(variance) + epsilon
    else:
        size = jnp.where(successes == 0, 1.0, p) if scale == "mean" else jnp.ones_like(p)
    if baseline == "none":
        silent = dead if scale == "std" else successes == 0
        return jnp.where(silent, 0.0, 1 / size), jnp.zeros_like(p)
    factor = group_size / (group_size - 1) if baseline == "leave_one_out" else 1.0
    alive = jnp.where(dead, 0.0, factor / size)
    return (1 - p) * alive, p * alive
