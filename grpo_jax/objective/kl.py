"""KL terms, named after what their gradient descends.

Dimension key: see grpo_jax.
"""

import jax
import jax.numpy as jnp

from grpo_jax.objective.surrogate import LARGEST_LOG_RATIO, bounded_exp


def sequence_kl(log_ratio: jax.Array, anchor_log_ratio: jax.Array, group_size: int | None) -> jax.Array:
    """One term per row. Their expectation is KL(π‖anchor) of whole completions, and their expected gradient is its gradient.

    With ρ = π/π_old and ℓ = log π/anchor of the completion: value ρℓ and gradient ∇ρ(ℓ − b), where b is the mean ℓ of the
    group's other rows (zero without a group). E_old[ρℓ] = KL(π‖anchor); ∇E_old[ρℓ] = E_old[∇ρ ℓ], because E_old[ρ∇ℓ] =
    ∇Σπ = 0; and E_old[∇ρ b] = 0 because b is independent of the row's own completion.

    Args:
      log_ratio: [B] log π/π_old of completions sampled from π_old, differentiated.
      anchor_log_ratio: [B] log π/anchor; its gradient is not used.
      group_size: G of contiguous groups, or None.

    Returns:
      [B] float32, in nats.

    Source: derived; checked by enumeration in tests/objective.

    >>> sequence_kl(jnp.zeros(2), jnp.array([0.25, -0.125]), group_size=2).tolist()
    [0.25, -0.125]
    """
    ratio, anchor_log_ratio = bounded_exp(log_ratio), jax.lax.stop_gradient(anchor_log_ratio)  # [B] each
    if group_size is None:
        return ratio * anchor_log_ratio
    groups = anchor_log_ratio.reshape(-1, group_size)  # [P, G]
    baseline = ((groups.sum(-1, keepdims=True) - groups) / (group_size - 1)).reshape(-1)  # [B]
    return ratio * (anchor_log_ratio - baseline) + jax.lax.stop_gradient(ratio * baseline)


def token_kl(log_ratio: jax.Array, anchor_log_ratio: jax.Array, kl: str) -> jax.Array:
    """One term per token. At a given prefix, and on-policy, their expected gradient is that of a KL of the next token.

    With x = log π/anchor, ∇x = ∇log π and Σπ∇log π = 0, sums over the next token:

        "token_reverse", k2 = ½x²:             Σπ∇k2 = Σπ x∇log π = ∇Σπ x = ∇KL(π‖anchor)
        "token_forward", k3 = e^{−x} + x − 1:  Σπ∇k3 = Σπ(1 − e^{−x})∇log π = −Σ anchor ∇log π = ∇KL(anchor‖π)
        "token_reverse_weighted", r·k3 with r = π/π_old: Σπ_old r·k3 = Σπ(e^{−x} + x − 1) = KL(π‖anchor), and its gradient
                                               is ∇KL(π‖anchor), whatever π_old is

    Args:
      log_ratio: [B, T] log π/π_old, differentiated.
      anchor_log_ratio: [B, T] log π/anchor, differentiated.
      kl: one of the token-wise choices of `Objective.kl`.

    Returns:
      [B, T] float32, in nats.

    Raises:
      ValueError: any other ``kl``.

    Source: the estimators k2 and k3 of Schulman's note "Approximating KL divergence"; gradients derived, and checked by
    enumeration in tests/objective.

    >>> token_kl(jnp.zeros((1, 1)), jnp.full((1, 1), 0.5), "token_reverse").tolist()
    [[0.125]]
    """
    if kl == "token_reverse":
        return 0.5 * jnp.square(anchor_log_ratio)
    if kl == "token_reverse_weighted":
        # r·k3 = r·e^{−x} + r(x − 1). Its first part is π_anchor/π_old, which has no gradient; the gradient of the
        # second is r·x·∇log π.
        anchor_over_old = jax.lax.stop_gradient(bounded_exp(log_ratio - anchor_log_ratio))  # [B, T]
        return anchor_over_old + bounded_exp(log_ratio) * (anchor_log_ratio - 1.0)
    if kl == "token_forward":
        # Where e^{−x} meets its upper bound, x is bounded too: its slope alone would push away from the anchor.
        x = jnp.maximum(anchor_log_ratio, -LARGEST_LOG_RATIO)
        return bounded_exp(-x) + x - 1.0
    raise ValueError(f"kl={kl!r} has no token-wise term here")
