"""The GRPO loss, from log-probabilities alone: usable inside any JAX trainer.

    loss = Σ (−surrogate(ρ, A) + β·KL(π‖π_ref) + β_mirror·KL(π‖π_old) − entropy_bonus·H) / weight

`grpo_loss_terms` computes it from left to right. The surrogates are in surrogate.py, the estimators of the KL in kl.py, and
which of them an objective takes is in objective.py.

Dimension key: see grpo_jax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.objective.checks import check_arrays, check_needs, check_scalars
from grpo_jax.objective.kl import sequence_kl, token_kl
from grpo_jax.objective.named import GRPO
from grpo_jax.objective.objective import Objective
from grpo_jax.objective.surrogate import Surrogate, bounded_exp, surrogate_terms

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class LossTerms(NamedTuple):
    """A loss before its one division: terms of micro-batches add up, and loss = total / weight.

    Attributes:
      total: sum of the losses of all tokens (or completions); scalar float32.
      weight: what it is divided by: completions, tokens for reduce="token_mean", or completions times the constant length;
        scalar float32, without gradient.
      metrics: name → (sum, weight), additive in the same way.
    """

    total: jax.Array
    weight: jax.Array
    metrics: Metrics


def grpo_loss(
    logps: jax.Array,
    old_logps: jax.Array | None,
    ref_logps: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    beta: float | jax.Array,
    beta_mirror: float | jax.Array = 0.0,
    objective: Objective = GRPO,
    group_size: int | None = None,
    clip_low: float | jax.Array | None = None,
    clip_high: float | jax.Array | None = None,
    entropy: jax.Array | None = None,
    entropy_bonus: float | jax.Array = 0.0,
    sampler_logps: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The GRPO loss, to be minimised, and its metrics.

        loss = Σ (−surrogate(ρ, A) + β·KL(π‖π_ref) + β_mirror·KL(π‖π_old) − entropy_bonus·H) / weight

    A completion's term is a sum over its tokens, or one number where the ratio or the KL is that of whole completions;
    ``objective.reduce`` says how completions are weighed. On-policy and for reduce="sequence_sum" the mean gradient is
    −Ω_G(p)∇p + β∇KL for binary rewards. With ``group_size`` the KL of whole completions has the mean of the group's other rows
    as its baseline. This removes noise around p*: at the fixed point β log π/π_ref = A + const, so the gradient of each *row*
    nearly vanishes, and not only their mean.

    Args:
      logps: [B, T] log π of the completion tokens, differentiated.
      old_logps: [B, T] of the policy that sampled them; None where π_old is the current policy (the ratio is then 1 in value).
      ref_logps: [B, T] of the reference; None where the objective has no KL to it, or beta is the number 0.
      advantages: [B], flat, of ``group_advantages(rewards, **objective.normaliser())``: the caller applies the objective's
        normaliser, and its ``overlong`` (zero for what was cut off); the loss reads neither.
      mask: [B, T] bool, True on the tokens of the completion (its EOS included). Values elsewhere change nothing.
      beta, beta_mirror: weights of the KL terms to the reference and to the previous policy, in units of advantage per nat;
        scalars, may be traced. beta is *not read* where the objective has no KL to the reference: DAPO, GSPO, CISPO, SAPO, GPG
        and the mirrors.
      objective: which terms; static.
      group_size: G where rows come in contiguous groups (whole groups, also in a micro-batch); None for no KL baseline.
      clip_low, clip_high: widths in place of the objective's; may be traced.
      entropy: [B, T] of the next-token distributions, differentiated, in nats; needed for the bonus.
      entropy_bonus: weight of Σ_t entropy_t; scalar, may be traced.
      sampler_logps: [B, T] as the sampler computed them, for ``objective.correction``.

    Returns:
      (loss, metrics), float32 scalars. Metrics, where their inputs are given: ``policy/ratio``; ``policy/clip_fraction`` and its
      two parts ``policy/clip_low``, ``policy/clip_high`` (of tokens, or of completions where the ratio is theirs);
      ``policy/entropy``; ``kl/sequence``, estimate of KL(π‖π_ref) per completion; ``kl/token``, mean of the token-wise term;
      ``kl/previous``, estimate of KL(π‖π_old) per completion; ``rollout/correction``, mean weight.

    Raises:
      ValueError: shapes that do not match, log-probs the objective needs and does not get, a weight that is negative or not
        scalar, clip widths for an objective without a clip, or a group_size that does not divide B.
      TypeError: a mask that is not bool, log-probs that are not real, or an integer weight.

    Source: arXiv 2503.06639, §2 and §5; the gradient of every KL term is derived, and checked by enumeration in tests/objective.

    >>> logps = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.25]]))
    >>> loss, metrics = grpo_loss(
    ...     logps, None, logps, jnp.array([1.0, -1.0]), jnp.ones((2, 2), bool), beta=1.0
    ... )
    >>> float(loss), float(metrics["kl/sequence"])
    (0.0, 0.0)
    """
    if beta is None:
        raise TypeError("beta is None: pass 0.0 for a loss without a KL to the reference")
    # Before jit, where a number can still be told from an array: a weight of zero drops its term from the program.
    scalars = check_scalars(objective, beta, beta_mirror, entropy_bonus, clip_low, clip_high)
    return _grpo_loss(
        logps,
        old_logps,
        ref_logps,
        advantages,
        mask,
        **scalars,
        objective=objective,
        group_size=group_size,
        entropy=entropy,
        sampler_logps=sampler_logps,
    )


def grpo_loss_terms(
    logps: jax.Array,
    old_logps: jax.Array | None,
    ref_logps: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    beta: float | jax.Array | None,
    beta_mirror: float | jax.Array | None = 0.0,
    objective: Objective = GRPO,
    group_size: int | None = None,
    clip_low: float | jax.Array | None = None,
    clip_high: float | jax.Array | None = None,
    entropy: jax.Array | None = None,
    entropy_bonus: float | jax.Array | None = 0.0,
    sampler_logps: jax.Array | None = None,
) -> LossTerms:
    """`grpo_loss` before its one division: terms of micro-batches add up, and loss = total / weight.

    Args, errors and source: those of `grpo_loss`. Micro-batches hold whole groups.

    Returns:
      `LossTerms`: scalars, and metrics as (sum, weight).

    >>> logps = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.25]]))
    >>> mask, advantages = jnp.ones((2, 2), bool), jnp.array([1.0, -1.0])
    >>> terms = grpo_loss_terms(logps, logps - 0.1, logps - 0.2, advantages, mask, beta=0.5, group_size=2)
    >>> float(terms.weight), round(float(terms.total / terms.weight), 3), sorted(terms.metrics)[0]
    (2.0, 0.255, 'kl/previous')
    """
    # Check all arguments, before anything is computed.
    scalars = check_scalars(objective, beta, beta_mirror, entropy_bonus, clip_low, clip_high)
    by_token = {"logps": logps, "old_logps": old_logps, "ref_logps": ref_logps}
    by_token |= {"entropy": entropy, "sampler_logps": sampler_logps}
    check_arrays(by_token, advantages, mask, group_size)
    check_needs(objective, by_token, scalars)

    def masked(x: jax.Array) -> jax.Array:
        """Zero outside the completions, so that a sum over T is the sum over a completion's tokens."""
        return jnp.where(mask, x.astype(jnp.float32), 0.0)

    # All in float32. Clip widths that the caller names take the place of the objective's.
    logps, advantages = masked(logps), advantages.astype(jnp.float32)  # [B, T], [B]
    beta, beta_mirror, entropy_bonus, clip_low, clip_high = (
        None if x is None else jnp.asarray(x, jnp.float32) for x in scalars.values()
    )
    clip_low = objective.clip_low if clip_low is None else clip_low
    clip_high = objective.clip_high if clip_high is None else clip_high

    # log ρ = log π/π_old
    old = jax.lax.stop_gradient(logps if old_logps is None else masked(old_logps))  # [B, T]
    lengths = mask.sum(-1).astype(jnp.float32)  # [B]
    num_rows, num_tokens = jnp.float32(mask.shape[0]), lengths.sum()
    log_ratio = logps - old  # [B, T]

    # −surrogate(ρ, A), of each token or of each completion as a whole.
    surrogate = surrogate_terms(
        logps, log_ratio, lengths, advantages, objective=objective, clip_low=clip_low, clip_high=clip_high
    )
    # Every term is weighed by the correction of the sampler's arithmetic.
    correction = jnp.ones((mask.shape[0], 1), jnp.float32)  # [B, 1], or [B, T] per token
    if sampler_logps is not None and objective.correction != "none":
        correction = _correction(objective, old - masked(sampler_logps), lengths)
    if objective.ratio in ("token", "none"):
        losses = -masked(surrogate.value * correction).sum(-1)  # [B]
        metrics = _surrogate_metrics(surrogate, masked, num_tokens)
    else:
        # GSPO counts the surrogate of a completion once for each of its tokens. Without tokens there is none.
        times = lengths if objective.ratio == "sequence" else jnp.minimum(lengths, 1.0)  # [B]
        losses = -(surrogate.value * correction)[:, 0] * times  # [B]
        metrics = _surrogate_metrics(surrogate, lambda x: x.astype(jnp.float32), num_rows)

    def kl_to(anchor: jax.Array) -> jax.Array:
        """[B] the objective's estimate of KL(π‖anchor), weighed by the correction too."""
        if objective.kl == "sequence_reverse":
            return sequence_kl(log_ratio.sum(-1), (logps - anchor).sum(-1), group_size) * correction[:, 0]
        return masked(token_kl(log_ratio, logps - anchor, objective.kl) * correction).sum(-1)

    # + β·KL(π‖π_ref)
    if ref_logps is not None:
        ref = jax.lax.stop_gradient(masked(ref_logps))  # [B, T]
        metrics["kl/sequence"] = (sequence_kl(log_ratio.sum(-1), (logps - ref).sum(-1), None).sum(), num_rows)
        if objective.holds_to_reference and beta is not None:
            kl = kl_to(ref)  # [B]
            losses = losses + beta * kl
            if objective.kl != "sequence_reverse":
                metrics["kl/token"] = (kl.sum(), num_tokens)
    # + β_mirror·KL(π‖π_old)
    if old_logps is not None:
        metrics["kl/previous"] = (sequence_kl(log_ratio.sum(-1), log_ratio.sum(-1), None).sum(), num_rows)
        if objective.holds_to_previous and beta_mirror is not None:
            losses = losses + beta_mirror * kl_to(old)
    # − entropy_bonus·H
    if entropy is not None:
        metrics["policy/entropy"] = (masked(entropy).sum(), num_tokens)
        if entropy_bonus is not None:
            losses = losses - entropy_bonus * masked(entropy * correction).sum(-1)
    if objective.correction != "none":
        metrics["rollout/correction"] = (masked(jnp.broadcast_to(correction, mask.shape)).sum(), num_tokens)

    # Σ over completions, and the weight that divides it.
    if objective.reduce == "sequence_mean":
        losses = losses / jnp.maximum(lengths, 1.0)
    weight = num_tokens if objective.reduce == "token_mean" else num_rows
    if objective.constant_length is not None:
        weight = weight * float(objective.constant_length)
    return LossTerms(losses.sum(), weight, jax.tree.map(jax.lax.stop_gradient, metrics))


@partial(jax.jit, static_argnames=("objective", "group_size"))
def _grpo_loss(*arrays: jax.Array | None, **options: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`grpo_loss_terms`, and the one division of each sum by its weight."""
    terms = grpo_loss_terms(*arrays, **options)  # type: ignore[arg-type]
    metrics = {name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in terms.metrics.items()}
    return terms.total / jnp.maximum(terms.weight, 1.0), metrics


def _correction(objective: Objective, log_ratio: jax.Array, lengths: jax.Array) -> jax.Array:
    """min(π_old/π_sampler, cap) without gradient, from its logarithm [B, T]: [B, T] of tokens or [B, 1] of completions."""
    if objective.correction == "sequence":
        log_ratio = log_ratio.sum(-1, keepdims=True) / jnp.maximum(lengths, 1.0)[:, None]  # [B, 1]
    return jax.lax.stop_gradient(jnp.clip(bounded_exp(log_ratio), max=objective.correction_cap))


def _surrogate_metrics(surrogate: Surrogate, counted: Callable[[jax.Array], jax.Array], count: jax.Array) -> Metrics:
    """Mean ratio, and the shares that the clip decides.

    ``counted`` turns an array into the numbers to sum; ``count`` is how many tokens or completions there are.
    """
    below, above = counted(surrogate.below).sum(), counted(surrogate.above).sum()
    return {
        "policy/ratio": (counted(surrogate.ratio).sum(), count),
        "policy/clip_fraction": (below + above, count),
        "policy/clip_low": (below, count),
        "policy/clip_high": (above, count),
    }
