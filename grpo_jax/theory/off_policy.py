"""GRPO from samples of another policy: what one step gains at least, what it gains exactly, and how old the samples are.

Three policies take part: π_k, which is trained, α, which is sampled and normalises the rewards, and π, which comes out. The
surrogate L_α(π) = E_α[(π/α) A] with A = (r − J(α))/σ and σ² = Var_α(r) + ε is (J(π) − J(α))/σ, where J is the expected reward,
so that J(π) − J(π_k) = σ L_α(π) + J(α) − J(π_k): an identity. The bound of the paper follows from it, with half the paper's
constants, because rewards in [0, 1] have |J(π) − J(α)| ≤ TV(π, α):

    J(π) − J(π_k) − L_α(π) = −((1 − σ)/σ) (J(π) − J(α)) − (J(π_k) − J(α)) ≥ −(|1 − σ|/σ) TV(π, α) − TV(π_k, α).

Nothing smaller than 1 does: for binary rewards and policies of one family (policies.py) TV is |p − p_α|, and the bound is an
equality for σ ≤ 1 wherever p ≥ p_α and p_k ≥ p_α.

A prompt whose rewards are all equal under α has L_α = 0 at every π, and no gradient, but σ = √ε, so that its bound is
−(1/√ε − 1) TV(π, α): a few such prompts make the mean over prompts say nothing. Masked, they cost nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class OffPolicyGain(NamedTuple):
    """What a step away from π_k gains in expected reward, when α was sampled; gain = scale · surrogate + lag.

    gain: [...] J(π) − J(π_k).
    surrogate: [...] L_α(π), which training maximises.
    scale: [...] σ, the standard deviation of the reward under α, smoothed.
    lag: [...] J(α) − J(π_k), how much worse the sampled policy is.
    bound: [...] the gain is at least this: L_α(π) − (|1 − σ|/σ) TV(π, α) − TV(π_k, α).
    paper_bound: [...] the same with twice each total variation, as the paper has it.
    """

    gain: jax.Array
    surrogate: jax.Array
    scale: jax.Array
    lag: jax.Array
    bound: jax.Array
    paper_bound: jax.Array


class UpdateAge(NamedTuple):
    """How old the samples of each update are.

    updates: [N] how many updates the trained policy is ahead of the one that was sampled.
    passes: [N] how many updates have used this very batch before.
    """

    updates: jax.Array
    passes: jax.Array


def off_policy_gain(
    log_policy: ArrayLike, log_old: ArrayLike, log_sampler: ArrayLike, rewards: ArrayLike, *, epsilon: ArrayLike
) -> OffPolicyGain:
    """The gain in expected reward of a step whose advantages come from another policy, exactly and by its lower bounds.

    Args:
      log_policy: [..., O] log-probabilities of π, after the step; 0 wherever α is 0.
      log_old: [..., O] of π_k, before it.
      log_sampler: [..., O] of α, which was sampled; α = π_k is on-policy.
      rewards: [..., O] in [0, 1], not only 0 or 1.
      epsilon: added to the variance, ≥ 0.

    Returns:
      The gain and its parts. Where all rewards that α draws are equal the surrogate is 0, and at ε = 0 the bounds are −∞.

    Source: arXiv 2505.22257, Thm 1 (``paper_bound``); the identity and the smaller constants are derived.

    >>> policy, old = jnp.log(jnp.array([0.4, 0.6])), jnp.log(jnp.array([0.3, 0.7]))
    >>> step = off_policy_gain(policy, old, jnp.log(jnp.array([0.2, 0.8])), jnp.array([1, 0]), epsilon=0.0)
    >>> [round(float(x), 3) for x in (step.gain, step.scale * step.surrogate + step.lag, step.bound, step.paper_bound)]
    [0.1, 0.1, 0.1, -0.3]
    """
    policy, old, sampler = (jnp.exp(jnp.asarray(x)) for x in (log_policy, log_old, log_sampler))
    rewards = jnp.asarray(rewards, policy.dtype)
    value, before, sampled = ((x * rewards).sum(-1) for x in (policy, old, sampler))
    spread = (sampler * jnp.square(rewards - sampled[..., None])).sum(-1)
    scale = jnp.sqrt(spread + jnp.asarray(epsilon, policy.dtype))
    flat = scale == 0
    safe = jnp.where(flat, 1.0, scale)
    surrogate = jnp.where(flat, 0.0, (value - sampled) / safe)
    stray = jnp.where(flat, jnp.inf, jnp.abs(1 - safe) / safe)
    moved, behind = total_variation(log_policy, log_sampler), total_variation(log_old, log_sampler)
    cost = jnp.where(moved > 0, stray * jnp.where(moved > 0, moved, 1.0), 0.0) + behind
    return OffPolicyGain(value - before, surrogate, scale, sampled - before, surrogate - cost, surrogate - 2 * cost)


def total_variation(log_policy: ArrayLike, log_other: ArrayLike) -> jax.Array:
    """The total variation ½ Σ_o |π(o) − π'(o)|: the most by which any event, success included, can differ in probability.

    Args:
      log_policy: [..., O] log-probabilities.
      log_other: [..., O] of the other policy.

    Returns:
      [...] in [0, 1].

    Source: definition.

    >>> round(float(total_variation(jnp.log(jnp.array([0.2, 0.8])), jnp.log(jnp.array([0.5, 0.5])))), 4)
    0.3
    """
    return jnp.abs(jnp.exp(jnp.asarray(log_policy)) - jnp.exp(jnp.asarray(log_other))).sum(-1) / 2


def update_staleness(num_updates: int, *, refresh: int = 1, updates_per_batch: int = 1) -> UpdateAge:
    """How many updates old the samples of each update are, under the two schedules of off-policy GRPO.

    The sampler gets new parameters every ``refresh`` batches, v, and each batch is used for ``updates_per_batch`` updates, i. So
    update n learns from the policy as it was n mod (v i) updates ago: (1, 1) is on-policy, v > 1 takes fresh samples from
    an old policy, i > 1 the same samples again. In age alone v and i are the same; in what they cost and in their noise
    they are not, because v > 1 averages over v batches.

    Args:
      num_updates: N.
      refresh: v ≥ 1, batches from one refresh of the sampler to the next.
      updates_per_batch: i ≥ 1.

    Returns:
      The ages, for `stale_iterate` among others.

    Raises:
      ValueError: ``refresh`` or ``updates_per_batch`` is below 1, or ``num_updates`` below 0.

    Source: the schedules are those of arXiv 2505.22257; the ages are counted here.

    >>> age = update_staleness(8, refresh=2, updates_per_batch=2)
    >>> age.updates.tolist(), age.passes.tolist()
    ([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 0, 1])
    """
    for name, value, least in (
        ("num_updates", num_updates, 0),
        ("refresh", refresh, 1),
        ("updates_per_batch", updates_per_batch, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value!r} must be at least {least}")
    update = jnp.arange(num_updates)
    return UpdateAge(update % (refresh * updates_per_batch), update % updates_per_batch)
