"""The GRPO loss, from log-probabilities alone: usable inside any JAX trainer."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.objective.kl import sequence_kl, token_kl
from grpo_jax.objective.objective import GRPO, Objective
from grpo_jax.objective.surrogate import bounded_exp, check_scalar, clipped_surrogate

Metrics = dict[str, tuple[jax.Array, jax.Array]]
Weight = float | jax.Array | None


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
    """The GRPO loss (to be minimised) and its metrics; see `grpo_loss_terms` for the mathematics and the arguments.

    Returns:
      (loss, metrics): float32 scalars.

    >>> logps = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.25]]))
    >>> loss, metrics = grpo_loss(
    ...     logps, None, logps, jnp.array([1.0, -1.0]), jnp.ones((2, 2), bool), beta=1.0
    ... )
    >>> float(loss), float(metrics["kl/sequence"])
    (0.0, 0.0)
    """
    # Before jit, where a number can still be told from an array: a weight of zero drops its term from the program.
    weights = {"beta": beta, "beta_mirror": beta_mirror, "entropy_bonus": entropy_bonus}
    check_scalar("clip_low", clip_low)
    check_scalar("clip_high", clip_high)
    return _grpo_loss(
        logps,
        old_logps,
        ref_logps,
        advantages,
        mask,
        **{name: _term_weight(name, weight) for name, weight in weights.items()},
        clip_low=clip_low,
        clip_high=clip_high,
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
    """−surrogate + β·KL(π‖π_ref) + β_mirror·KL(π‖π_old) − entropy bonus, summed and not yet divided.

    A completion's terms are sums over its tokens, or one number for ratio="sequence_product"; ``objective.reduce`` says how
    they are weighed. On-policy and for reduce="sequence_sum" the mean gradient is −Ω_G(p)∇p + β∇KL for binary rewards. With
    ``group_size`` the KL of whole completions has the mean of the group's other rows as its baseline. That matters: at the
    fixed point β log π/π_ref = A + const, so the gradient of each *row*, and not only of the mean, nearly vanishes, and the
    policy sits still at p* at any learning rate.

    Args:
      logps: [B, T] log π of the completion tokens, differentiated.
      old_logps: [B, T] of the policy that sampled them; None where π_old is the current policy (the ratio is then 1 in value).
      ref_logps: [B, T] of the reference; None where the objective has no KL to it, or beta is the number 0.
      advantages: [B].
      mask: [B, T] bool, True on the tokens of the completion (its EOS included). What stands elsewhere changes nothing.
      beta, beta_mirror: weights of the KL terms to the reference and to the previous policy, in units of advantage per nat;
        scalars, may be traced. beta is not read where the objective has no KL to the reference.
      objective: which terms; static.
      group_size: G where rows come in contiguous groups (whole groups, also in a micro-batch); None for no KL baseline.
      clip_low, clip_high: widths in place of the objective's; may be traced.
      entropy: [B, T] of the next-token distributions, differentiated, in nats; needed for the bonus.
      entropy_bonus: weight of Σ_t entropy_t; scalar, may be traced.
      sampler_logps: [B, T] as the sampler computed them, for ``objective.correction``.

    Returns:
      `LossTerms`; metrics, where their inputs are given: ``policy/ratio``; ``policy/clip_fraction`` and its two parts
      ``policy/clip_low``, ``policy/clip_high`` (of tokens, or of completions where the ratio is theirs); ``policy/entropy``;
      ``kl/sequence``, estimate of KL(π‖π_ref) per completion; ``kl/token``, mean of the token-wise term; ``kl/previous``,
      estimate of KL(π‖π_old) per completion; ``rollout/correction``, mean weight.

    Raises:
      ValueError: shapes that do not match, log-probs the objective needs and does not get, a weight that is negative or not
        scalar, clip widths for an objective without a clip, or a group_size that does not divide B.
      TypeError: a mask that is not bool, log-probs that are not real, or an integer weight.

    Source: arXiv 2503.06639, §2 and §5; the gradient of every KL term is derived, and checked by enumeration in tests/objective.

    >>> logps = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.25]]))
    >>> mask, advantages = jnp.ones((2, 2), bool), jnp.array([1.0, -1.0])
    >>> terms = grpo_loss_terms(logps, logps - 0.1, logps - 0.2, advantages, mask, beta=0.5, group_size=2)
    >>> float(terms.weight), round(float(terms.total / terms.weight), 3), sorted(terms.metrics)[0]
    (2.0, 0.255, 'kl/previous')
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, got {objective!r}; see NAMED")
    beta, beta_mirror = _term_weight("beta", beta), _term_weight("beta_mirror", beta_mirror)
    entropy_bonus = _term_weight("entropy_bonus", entropy_bonus)
    check_scalar("clip_low", clip_low)
    check_scalar("clip_high", clip_high)
    given = {
        "logps": logps,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "entropy": entropy,
        "sampler_logps": sampler_logps,
    }
    _check_arrays(given, advantages, mask, group_size)
    _check_needs(objective, given, beta, beta_mirror, entropy_bonus, clip_low, clip_high)
    clip_low = objective.clip_low if clip_low is None else clip_low
    clip_high = objective.clip_high if clip_high is None else clip_high

    def keep(x: jax.Array) -> jax.Array:
        return jnp.where(mask, x.astype(jnp.float32), 0.0)

    logps, advantages = keep(logps), advantages.astype(jnp.float32)
    beta, beta_mirror, entropy_bonus = (
        None if w is None else jnp.asarray(w, jnp.float32) for w in (beta, beta_mirror, entropy_bonus)
    )
    old = jax.lax.stop_gradient(logps if old_logps is None else keep(old_logps))
    lengths = mask.sum(-1).astype(jnp.float32)
    rows, tokens = jnp.float32(mask.shape[0]), lengths.sum()

    log_ratio = logps - old
    chosen = clipped_surrogate(
        logps, log_ratio, lengths, advantages, objective=objective, clip_low=clip_low, clip_high=clip_high
    )
    trust = _correction(objective, old, sampler_logps, lengths, keep)
    by_token = objective.ratio in ("token", "none")
    per_row = {"sequence": lengths, "sequence_product": jnp.minimum(lengths, 1.0)}  # an empty row has no terms
    terms = (
        -keep(chosen.value * trust).sum(-1) if by_token else -(chosen.value * trust)[:, 0] * per_row[objective.ratio]
    )
    metrics = _surrogate_metrics(
        chosen, keep if by_token else (lambda x: x.astype(jnp.float32)), tokens if by_token else rows
    )

    def kl_to(anchor: jax.Array) -> jax.Array:
        if objective.kl == "sequence_reverse":
            return sequence_kl(log_ratio.sum(-1), (logps - anchor).sum(-1), group_size) * trust[:, 0]
        return keep(token_kl(log_ratio, logps - anchor, objective.kl) * trust).sum(-1)

    if ref_logps is not None:
        ref = jax.lax.stop_gradient(keep(ref_logps))
        metrics["kl/sequence"] = (sequence_kl(log_ratio.sum(-1), (logps - ref).sum(-1), None).sum(), rows)
        if objective.holds_to_reference and beta is not None:
            penalty = kl_to(ref)
            terms = terms + beta * penalty
            if objective.kl != "sequence_reverse":
                metrics["kl/token"] = (penalty.sum(), tokens)
    if old_logps is not None:
        metrics["kl/previous"] = (sequence_kl(log_ratio.sum(-1), log_ratio.sum(-1), None).sum(), rows)
        if objective.holds_to_previous and beta_mirror is not None:
            terms = terms + beta_mirror * kl_to(old)
    if entropy is not None:
        metrics["policy/entropy"] = (keep(entropy).sum(), tokens)
        if entropy_bonus is not None:
            terms = terms - entropy_bonus * keep(entropy * trust).sum(-1)
    if objective.correction != "none":
        metrics["rollout/correction"] = (keep(jnp.broadcast_to(trust, mask.shape)).sum(), tokens)

    if objective.reduce == "sequence_mean":
        terms = terms / jnp.maximum(lengths, 1.0)
    weight = {"token_mean": tokens, "constant": rows * float(objective.constant_length or 1)}.get(
        objective.reduce, rows
    )
    return LossTerms(terms.sum(), weight, jax.tree.map(jax.lax.stop_gradient, metrics))


@partial(jax.jit, static_argnames=("objective", "group_size"))
def _grpo_loss(*arrays: jax.Array | None, **options: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    terms = grpo_loss_terms(*arrays, **options)  # type: ignore[arg-type]
    metrics = {name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in terms.metrics.items()}
    return terms.total / jnp.maximum(terms.weight, 1.0), metrics


def _correction(
    objective: Objective, old: jax.Array, sampler_logps: jax.Array | None, lengths: jax.Array, keep: Any
) -> jax.Array:
    """min(π_old/π_sampler, cap) without gradient: [B, T] per token, or [B, 1]."""
    if objective.correction == "none":
        return jnp.ones((old.shape[0], 1), jnp.float32)
    log_ratio = old - keep(sampler_logps)
    if objective.correction == "sequence":
        log_ratio = log_ratio.sum(-1, keepdims=True) / jnp.maximum(lengths, 1.0)[:, None]
    return jax.lax.stop_gradient(jnp.clip(bounded_exp(log_ratio), max=objective.correction_cap))


def _surrogate_metrics(chosen: Any, keep: Any, count: jax.Array) -> Metrics:
    below, above = keep(chosen.below).sum(), keep(chosen.above).sum()
    return {
        "policy/ratio": (keep(chosen.ratio).sum(), count),
        "policy/clip_fraction": (below + above, count),
        "policy/clip_low": (below, count),
        "policy/clip_high": (above, count),
    }


def _term_weight(name: str, weight: float | jax.Array | None) -> float | jax.Array | None:
    """The weight of a term, checked as far as it is known; None where it is the number zero."""
    check_scalar(name, weight)
    return (weight or None) if isinstance(weight, float) else weight


def _check_arrays(
    given: dict[str, jax.Array | None], advantages: jax.Array, mask: jax.Array, group_size: int | None
) -> None:
    needed = {"logps": given["logps"], "advantages": advantages, "mask": mask}
    for name, array in (given | needed).items():
        if not hasattr(array, "dtype") and (array is not None or name in needed):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    shape = needed["logps"].shape  # type: ignore[union-attr]
    if len(shape) != 2:
        raise ValueError(f"logps must be [B, T], got {shape}")
    for name, array in (given | {"mask": mask}).items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} must have the shape of logps {shape}, got {jnp.shape(array)}")
    for name, array in (given | {"advantages": advantages}).items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be real, got {array.dtype}")
    if jnp.shape(advantages) != shape[:1]:
        raise ValueError(f"advantages must be [B] = {shape[:1]} for logps {shape}, got {jnp.shape(advantages)}")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool (True counts), got {mask.dtype}")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 2 or shape[0] % group_size):
        raise ValueError(
            f"group_size={group_size!r} must be an integer, at least 2 and divide the {shape[0]} rows of logps {shape}"
        )


def _check_needs(
    objective: Objective,
    given: dict[str, jax.Array | None],
    beta: Weight,
    beta_mirror: Weight,
    entropy_bonus: Weight,
    clip_low: Weight,
    clip_high: Weight,
) -> None:
    """Refuses what the objective would need and is not given, and what is given and would not be read."""
    if objective.holds_to_reference and beta is not None and given["ref_logps"] is None:
        raise ValueError(f"ref_logps may be None only where nothing holds to the reference; here kl={objective.kl!r}")
    if objective.holds_to_previous and beta_mirror is not None and given["old_logps"] is None:
        raise ValueError(
            f"old_logps is needed for anchor={objective.anchor!r}: the KL to π_old has no value without it"
        )
    if objective.anchor == "previous" and beta_mirror is None:
        raise ValueError("beta_mirror=0 with anchor='previous': nothing would hold the policy; beta is not read there")
    if not objective.holds_to_previous and beta_mirror is not None:
        raise ValueError(
            "beta_mirror would do nothing: the objective has no KL to the previous policy; see TWO_KL_GRPO"
        )
    if entropy_bonus is not None and given["entropy"] is None:
        raise ValueError("entropy_bonus needs entropy, the second result of completion_logps")
    if objective.correction != "none" and given["sampler_logps"] is None:
        raise ValueError(f"sampler_logps is needed for correction={objective.correction!r}")
    clips = objective.surrogate == "clip" and objective.ratio != "none"
    for name, width, used in (
        ("clip_low", clip_low, clips or objective.surrogate == "cispo"),
        ("clip_high", clip_high, clips),
    ):
        if width is not None and not used:
            raise ValueError(f"{name} would do nothing: the objective does not clip there")
