"""The optimal policies in closed form, as distributions over outcomes, and what holds of all of them.

Every exact iterate from the reference is π_n(o) = π_ref(o) p_n/p_ref on correct outcomes and π_ref(o) (1 − p_n)/(1 − p_ref)
on wrong ones: a line with the one coordinate p_n. Hence KL(π_n‖π_m) = `bernoulli_kl`(p_n, p_m), the total variation is
|p_n − p_m|, and diversity among correct outcomes never changes.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.weights import Weights, log_odds, omega_minus, omega_plus


def optimal_log_policy(
    log_ref: ArrayLike,
    rewards: ArrayLike,
    *,
    p_old: ArrayLike,
    beta: ArrayLike,
    weights: Weights,
    alpha: ArrayLike = 1.0,
    log_old: ArrayLike | None = None,
) -> jax.Array:
    """The policy that maximises E_π[A] − β [α KL(π‖π_ref) + (1 − α) KL(π‖π_old)], with advantages measured at π_old.

    π(o) ∝ π_ref(o)^α π_old(o)^{1−α} exp(A(o)/β), with A = ω⁺(p_old) on correct outcomes and −ω⁻(p_old) on wrong ones.

    Args:
      log_ref: [..., O] log-probabilities of the reference policy over O outcomes.
      rewards: [..., O] 0 or 1.
      p_old: [...] success probability of π_old.
      beta: weight of the KL, > 0.
      weights: the normaliser.
      alpha: share of the KL that goes to the reference: 1 is GRPO, 0 mirror GRPO.
      log_old: [..., O] log-probabilities of π_old; None: the iterate of the reference that has ``p_old``.

    Returns:
      [..., O] log-probabilities.

    Source: arXiv 2503.06639, Thms 1 (α = 1), 4 (α = 0) and 8.

    >>> from grpo_jax.theory import MeanOnly
    >>> ref = jnp.log(jnp.array([0.1, 0.1, 0.8]))
    >>> policy = optimal_log_policy(ref, jnp.array([1, 1, 0]), p_old=0.2, beta=2.0, weights=MeanOnly())
    >>> [round(float(p), 4) for p in jnp.exp(policy)]
    [0.1459, 0.1459, 0.7081]
    """
    log_ref, right = jnp.asarray(log_ref), is_correct(rewards)
    previous = log_ref if log_old is None else jnp.asarray(log_old, log_ref.dtype)
    outcomes = jnp.broadcast_shapes(log_ref.shape, right.shape, previous.shape)
    (p_old, beta, alpha), batch = _columns(log_ref.dtype, p_old, beta, alpha, shape=outcomes[:-1])
    log_ref, previous, right = (jnp.broadcast_to(x, (*batch, outcomes[-1])) for x in (log_ref, previous, right))
    # The masses of correct and of wrong outcomes under π_ref.
    of_right, of_wrong = (
        jax.nn.logsumexp(jnp.where(kind, log_ref, -jnp.inf), axis=-1, keepdims=True) for kind in (right, ~right)
    )
    one_kind = jnp.isneginf(of_right) | jnp.isneginf(of_wrong)  # nothing to contrast: π_ref stays
    almost = p_old <= 1 + 8 * jnp.finfo(p_old.dtype).eps  # a sum of probabilities rounds to a little more than 1
    p_old = jnp.where(one_kind, 0.5, jnp.where(almost, jnp.minimum(p_old, 1.0), p_old))
    if log_old is None:  # π_old is π_ref with its two masses changed to those of p_old
        reference = jnp.where(one_kind, 0.0, of_right - of_wrong)
        previous = log_ref + jnp.where(one_kind, 0.0, log_policy_ratio(right, log_odds(p_old), reference, logits=True))
    tilt = jnp.where(right, omega_plus(p_old, weights), -omega_minus(p_old, weights)) / beta
    mixed = _share(alpha, log_ref) + _share(1 - alpha, previous)
    return jax.nn.log_softmax(mixed + jnp.where(one_kind, 0.0, tilt), axis=-1)


def log_policy_ratio(rewards: ArrayLike, p: ArrayLike, p_ref: ArrayLike, *, logits: bool = False) -> jax.Array:
    """ln π(o)/π_ref(o) of the iterate with success probability p: ln p/p_ref on correct outcomes, ln (1−p)/(1−p_ref) else.

    Args:
      rewards: [...] 0 or 1 of the outcome.
      p: [...] success probability of the iterate.
      p_ref: [...] of the reference policy.
      logits: both are given as log-odds.

    Returns:
      [...] nats; 0 where both probabilities are 0.

    Source: derived from arXiv 2503.06639, Thm 1.

    >>> round(float(log_policy_ratio(1, 0.5, 0.25)), 4)  # ln 2
    0.6931
    """
    sign = jnp.where(is_correct(rewards), 1, -1)
    a, b = log_odds(p, logits=logits), log_odds(p_ref, logits=logits)
    new, old = (jax.nn.log_sigmoid(sign.astype(x.dtype) * x) for x in (a, b))
    same = jnp.isneginf(new) & jnp.isneginf(old)
    return jnp.where(same, 0.0, jnp.where(same, 0.0, new) - jnp.where(same, 0.0, old))


def log_partition(
    p_anchor: ArrayLike, p_old: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False
) -> jax.Array:
    """ln Z of the optimal policy, Z = p_a e^{ω⁺/β} + (1 − p_a) e^{−ω⁻/β}: β ln Z is the value of the optimum.

    Args:
      p_anchor: [...] success probability of the policy the KL is taken to.
      p_old: [...] of the policy that was sampled, where ω± are taken.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      logits: probabilities are given as log-odds.

    Returns:
      [...] ln Z.

    Source: arXiv 2503.06639, Thm 1.

    >>> from grpo_jax.theory import Whitened
    >>> round(float(jnp.exp(log_partition(0.2, 0.2, beta=1.0, weights=Whitened(1e-5)))), 4)
    1.963
    """
    anchor, old = log_odds(p_anchor, logits=logits), log_odds(p_old, logits=logits)
    beta = jnp.asarray(beta, anchor.dtype)
    right = jax.nn.log_sigmoid(anchor) + omega_plus(old, weights, logits=True) / beta
    wrong = jax.nn.log_sigmoid(-anchor) - omega_minus(old, weights, logits=True) / beta
    return jnp.logaddexp(right, wrong)


def optimality_gap(log_policy: ArrayLike, log_optimal: ArrayLike, *, beta: ArrayLike) -> jax.Array:
    """How far below its optimum a policy leaves the objective: β KL(π‖π_optimal), exactly.

    Args:
      log_policy: [..., O] log-probabilities.
      log_optimal: [..., O] those of `optimal_log_policy`.
      beta: [...] weight of the KL.

    Returns:
      [...] in units of the reward.

    Source: derived; the objective is β ln Z − β KL(π‖π_optimal).

    >>> round(float(optimality_gap(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2])), beta=2.0)), 4)
    0.4463
    """
    log_policy, log_optimal = jnp.asarray(log_policy), jnp.asarray(log_optimal)
    absent = jnp.isneginf(log_policy)
    gap = jnp.where(absent, 0.0, log_policy) - jnp.where(absent, 0.0, log_optimal)
    return jnp.asarray(beta, gap.dtype) * jnp.where(absent, 0.0, jnp.exp(log_policy) * gap).sum(-1)


def policy_entropy(
    p: ArrayLike, entropy_correct: ArrayLike, entropy_wrong: ArrayLike, *, logits: bool = False
) -> jax.Array:
    """The entropy H_b(p) + p H_S + (1 − p) H_F of an iterate: its two conditional entropies are the reference's, for ever.

    Args:
      p: [...] success probability of the iterate.
      entropy_correct: [...] H_S in nats, of the reference's distribution among correct outcomes.
      entropy_wrong: [...] H_F in nats, among wrong ones.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] nats.

    Source: derived from arXiv 2503.06639, Thm 1.

    >>> round(float(policy_entropy(0.5, 0.0, 0.0)), 4)
    0.6931
    """
    logit = log_odds(p, logits=logits)

    def side(logit: jax.Array, inner: ArrayLike) -> jax.Array:
        mass = jax.nn.sigmoid(logit)
        surprise = -jnp.where(mass == 0, 0.0, jax.nn.log_sigmoid(logit))
        return mass * (surprise + jnp.asarray(inner, logit.dtype))

    return side(logit, entropy_correct) + side(-logit, entropy_wrong)


def renyi_correction(log_ref: ArrayLike, log_old: ArrayLike, rewards: ArrayLike, *, alpha: ArrayLike) -> jax.Array:
    """The term Δ_R of the two-KL recursion: what π_old's conditionals add to the log-odds, 0 if they are the reference's.

    Δ_R = (1 − α) [D_α(ref_F‖old_F) − D_α(ref_S‖old_S)] with Rényi divergences D_α between the distributions among wrong (F)
    and among correct (S) outcomes, computed as ln Σ_S ref^α old^{1−α} − ln Σ_F ref^α old^{1−α}. The paper carries Δ_R along
    and assumes its sign; every exact iterate that started at the reference has the reference's conditionals, and Δ_R = 0.

    Args:
      log_ref: [..., O] log-probabilities of the reference policy; both classes must occur.
      log_old: [..., O] of π_old.
      rewards: [..., O] 0 or 1.
      alpha: share of the KL that goes to the reference.

    Returns:
      [...] Δ_R.

    Source: arXiv 2503.06639, Thm 9; that it vanishes is derived.

    >>> ref, tilted = jnp.log(jnp.array([0.1, 0.3, 0.6])), jnp.log(jnp.array([0.2, 0.6, 0.2]))
    >>> abs(float(renyi_correction(ref, tilted, jnp.array([1, 1, 0]), alpha=0.3))) < 1e-6
    True
    """
    log_ref, right = jnp.asarray(log_ref), is_correct(rewards)
    log_old = jnp.asarray(log_old, log_ref.dtype)
    outcomes = jnp.broadcast_shapes(log_ref.shape, right.shape, log_old.shape)
    (share,), batch = _columns(log_ref.dtype, alpha, shape=outcomes[:-1])
    log_ref, log_old, right = (jnp.broadcast_to(x, (*batch, outcomes[-1])) for x in (log_ref, log_old, right))

    def overlap(inside: jax.Array) -> jax.Array:
        ref, old = (jax.nn.log_softmax(jnp.where(inside, x, -jnp.inf), axis=-1) for x in (log_ref, log_old))
        both = inside & jnp.isfinite(ref) & jnp.isfinite(old)
        mixed = share * jnp.where(both, ref, 0.0) + (1 - share) * jnp.where(both, old, 0.0)
        return jax.nn.logsumexp(jnp.where(both, mixed, -jnp.inf), axis=-1)

    return overlap(right) - overlap(~right)


def is_correct(rewards: ArrayLike) -> jax.Array:
    """Rewards [...], 0 or 1 of any type, as booleans.

    >>> is_correct([0.0, 1.0]).tolist(), is_correct([True]).tolist()
    ([False, True], [True])
    """
    rewards = jnp.asarray(rewards)
    return rewards if rewards.dtype == bool else rewards > 0


def _share(share: jax.Array, log_policy: jax.Array) -> jax.Array:
    """share · ln π, where a share of zero of −∞ is zero."""
    never = jnp.isneginf(log_policy)
    return jnp.where(never, jnp.where(share == 0, 0.0, -jnp.inf), share * jnp.where(never, 0.0, log_policy))


def _columns(dtype: jnp.dtype, *values: ArrayLike, shape: tuple[int, ...]) -> tuple[list[jax.Array], tuple[int, ...]]:
    """Values [...] as columns [..., 1] to set against outcomes, and the shape [...] that they and ``shape`` broadcast to."""
    arrays = [jnp.asarray(value, dtype) for value in values]
    batch = jnp.broadcast_shapes(shape, *(array.shape for array in arrays))
    return [jnp.broadcast_to(array, batch)[..., None] for array in arrays], batch
