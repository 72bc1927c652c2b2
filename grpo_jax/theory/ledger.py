"""How a policy spends its KL: the objective that small steps climb, and the nats that bought success and those that did not.

Small on-policy steps climb J = Σ_i [Φ(p_i) − Φ(p_ref,i) − β KL_i] over the prompts i, with Φ' = Ω. For any policy

    KL(π‖π_ref) = kl(p‖p_ref) + p KL(π_S‖π_ref,S) + (1 − p) KL(π_F‖π_ref,F),

where π_S and π_F are the policy among successes and among failures. The first part is what a success probability of p costs at
least. The other two buy no success; those among successes are diversity that was lost among right answers. The optimal policies
of the theory spend nothing on them; a network that cannot move one prompt alone does, and so does one that is shaken by noise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import bernoulli_kl
from grpo_jax.theory.weights import Weights, as_float, log_odds, variance


class KLSplit(NamedTuple):
    """The three parts of KL(π‖π_ref), in nats per completion, each [...].

    useful: kl(p‖p_ref).
    within_successes: p KL(π_S‖π_ref,S).
    within_failures: (1 − p) KL(π_F‖π_ref,F).
    """

    useful: jax.Array
    within_successes: jax.Array
    within_failures: jax.Array


def potential(p: ArrayLike, weights: Weights, *, logits: bool = False) -> jax.Array:
    """Φ(p) = ∫ Ω dp from ½ to p: what on-policy GRPO climbs where it has no KL.

    Whitened without ε it is 2 arcsin √p − π/2, mean-only p − ½; Φ(½) = 0 always. Callers subtract Φ at the reference.

    Args:
      p: [...] success probability, in [0, 1].
      weights: the normaliser.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] Φ, in units of advantage; infinite only at the ends, with dynamic sampling.

    Source: derived; the whitened form is also that of arXiv 2510.13651. Checked against quadrature in tests/theory.

    >>> from grpo_jax.theory import Group, Whitened
    >>> round(float(potential(1.0, Whitened(0.0))), 6), round(float(potential(0.8, Group(8))), 6)
    (1.570796, 0.581072)
    """
    return weights.potential(log_odds(p, logits=logits))


def objective_gain(
    p: ArrayLike, p_ref: ArrayLike, kl: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False
) -> jax.Array:
    """J = Φ(p) − Φ(p_ref) − β KL(π‖π_ref): how far a policy has climbed on the objective of small on-policy steps.

    At the reference it is 0. Among all policies it is largest at one that spends kl(p‖p_ref) only and whose p is a fixed point.

    Args:
      p, p_ref: [...] success probabilities of the policy and of the reference.
      kl: [...] KL(π‖π_ref) of completions, nats.
      beta: weight of the KL.
      weights: the normaliser.
      logits: probabilities are given as log-odds.

    Returns:
      [...] J of each prompt, in units of advantage; a prompt at an end of [0, 1] that stays there gains 0 − β KL.

    Source: derived; its gradient is the expected on-policy gradient, checked by enumeration in tests/theory.

    >>> from grpo_jax.theory import MeanOnly
    >>> round(float(objective_gain(0.5, 0.2, 0.3, beta=0.5, weights=MeanOnly())), 6)
    0.15
    """
    logit, reference = jnp.broadcast_arrays(log_odds(p, logits=logits), log_odds(p_ref, logits=logits))
    stays = jnp.isinf(logit) & (logit == reference)  # at an end, where Φ may be infinite
    logit, reference = (jnp.where(stays, 0.0, x) for x in (logit, reference))
    rise = weights.potential(logit) - weights.potential(reference)
    return rise - jnp.asarray(beta, rise.dtype) * as_float(kl).astype(rise.dtype)


def split_kl(
    p: ArrayLike,
    p_ref: ArrayLike,
    success_log_ratio: ArrayLike,
    failure_log_ratio: ArrayLike,
    *,
    logits: bool = False,
) -> KLSplit:
    """Where the nats of a policy went: into success, among successes, and among failures.

    KL(π_S‖π_ref,S) = E[ℓ | success] − ln(p/p_ref), with ℓ = ln π/π_ref of a completion from π; failures likewise.

    Args:
      p, p_ref: [...] success probabilities of the policy and of the reference.
      success_log_ratio: [...] E[ℓ | success] under π, nats; not read where p = 0.
      failure_log_ratio: [...] E[ℓ | failure]; not read where p = 1.
      logits: probabilities are given as log-odds.

    Returns:
      `KLSplit`; its sum is KL(π‖π_ref). Where the reference never succeeds (or fails) and π does, ``useful`` is infinite, and the
      part within is 0, as there is nothing to compare with.

    Source: the chain rule of the KL divergence; checked on explicit policies in tests/theory.

    >>> parts = split_kl(0.5, 0.2, 1.0, -0.25)  # ln(.5/.2) = .916, ln(.5/.8) = −.470
    >>> [round(float(x), 4) for x in parts], round(float(sum(parts)), 4)
    ([0.2231, 0.0419, 0.11], 0.375)
    """
    logit, reference = log_odds(p, logits=logits), log_odds(p_ref, logits=logits)

    def within(log_ratio: ArrayLike, logit: jax.Array, reference: jax.Array) -> jax.Array:
        share = jax.nn.sigmoid(logit)
        least = jax.nn.log_sigmoid(logit) - jax.nn.log_sigmoid(reference)  # what this share costs without any KL inside
        absent = (share == 0) | jnp.isinf(least)  # nothing of this class under π, or none under the reference
        excess = as_float(log_ratio).astype(logit.dtype) - jnp.where(absent, 0.0, least)
        return jnp.where(absent, 0.0, share * jnp.where(absent, 0.0, excess))

    return KLSplit(
        bernoulli_kl(logit, reference, logits=True),
        within(success_log_ratio, logit, reference),
        within(failure_log_ratio, -logit, -reference),
    )


def rest_excess(
    p: ArrayLike, p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False
) -> jax.Array:
    """X = KL − kl(p‖p_ref) that a policy at rest with this p spends, to second order: ½ v Δ (Ω(p)/β − Δ), Δ = L − L_ref.

    At rest, J has no slope along the ray from the reference to the policy. For log-linear policies that says exactly
    Σ_i Ω_i Cov_i(r, ℓ) = β Σ_i Var_i(ℓ), and where ℓ is nearly Gaussian, with one variance in successes and in failures, ΣX_i is
    the sum of these. It is a statement about the sum over prompts that share parameters. Spending clearly more suggests noise,
    clearly less that the policy has not arrived; with few outcomes and small β it is no guide. At p = p* it is 0.

    Args:
      p, p_ref: [...] success probabilities of the policy and of the reference.
      beta: weight of the KL, > 0; else the result is nan.
      weights: the normaliser.
      logits: probabilities are given as log-odds.

    Returns:
      [...] nats per completion; negative above p*. 0 where p or p_ref is 0 or 1.

    Source: derived (a virial identity); measured on policies with shared features in experiments/networks.py.

    >>> from grpo_jax.theory import MeanOnly
    >>> round(float(rest_excess(0.5, 0.2, beta=0.5, weights=MeanOnly())), 5)  # ½ · ¼ · ln 4 · (2 − ln 4)
    0.10635
    """
    logit, reference = jnp.broadcast_arrays(log_odds(p, logits=logits), log_odds(p_ref, logits=logits))
    at_end = jnp.isinf(logit) | jnp.isinf(reference)
    logit, reference = (jnp.where(at_end, 0.0, x) for x in (logit, reference))
    gain = logit - reference
    beta = jnp.asarray(beta, logit.dtype)
    full = weights.omega(logit) / jnp.where(beta > 0, beta, jnp.nan)
    return jnp.where(at_end, 0.0, variance(logit) * gain * (full - gain) / 2)
