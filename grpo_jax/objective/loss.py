"""The GRPO loss, from log-probabilities alone: usable inside any JAX trainer."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.objective.objective import GRPO, Objective

Metrics = dict[str, tuple[jax.Array, jax.Array]]

_LARGEST_LOG_RATIO = 20.0  # e²⁰: a ratio beyond it has left the trust region for good, and must not become infinite


class LossTerms(NamedTuple):
    """A loss before its one division: terms of micro-batches add up, and loss = total / weight.

    Attributes:
      total: sum of the per-token (or per-completion) losses; scalar float32.
      weight: what it is divided by: completions, or tokens for reduce="token_mean"; scalar float32, without gradient.
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
    arrays = (logps, old_logps, ref_logps, advantages, mask)
    mirror = None if _is_zero(beta_mirror) else beta_mirror  # a traced zero would still compute the term
    _check(*arrays, beta, objective, group_size)
    return _grpo_loss(*arrays, beta=beta, beta_mirror=mirror, objective=objective, group_size=group_size)


def grpo_loss_terms(
    logps: jax.Array,
    old_logps: jax.Array | None,
    ref_logps: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    beta: float | jax.Array,
    beta_mirror: float | jax.Array | None = 0.0,
    objective: Objective = GRPO,
    group_size: int | None = None,
) -> LossTerms:
    """Surrogate plus β·KL(π‖π_ref) plus β_mirror·KL(π‖π_old), summed and not yet divided.

    With ρ = π/π_old (of a completion, or of a token) the surrogate is −min(ρA, clip(ρ, 1 − c_low, 1 + c_high)A). The KL to an
    anchor a of whole completions is E_old[ρ ℓ], ℓ = Σ_t log π/a, and its gradient E_old[∇ρ (ℓ − b)] for any b that does not
    depend on the row's own completion. With ``group_size``, b is the mean ℓ of the group's other rows. That matters: at the
    fixed point βℓ = A + const, so the gradient of each *row*, and not only of the mean, nearly vanishes, and the policy sits
    still at p* at any learning rate.

    Args:
      logps: [B, T] log π of the completion tokens, differentiated.
      old_logps: [B, T] of the policy that sampled them; None where π_old is the current policy (the ratio is then 1 in value).
      ref_logps: [B, T] of the reference; None only where ``objective.kl`` is "none".
      advantages: [B].
      mask: [B, T] bool, True on the tokens of the completion (its EOS included). What stands elsewhere changes nothing.
      beta, beta_mirror: weights of the KL terms; may be traced.
      objective: which terms; static.
      group_size: G where rows come in contiguous groups (whole groups, also in a micro-batch); None for no KL baseline.

    Returns:
      `LossTerms`; metrics ``kl/sequence`` (estimate of KL(π‖π_ref) per completion, in nats; where there is a reference),
      ``policy/clip_fraction``, ``policy/ratio``.

    Raises:
      ValueError: shapes that do not match, missing ref_logps, or a group_size that does not divide B.
      TypeError: a mask that is not bool, or an integer beta.

    Source: arXiv 2503.06639, §2; the gradient of the KL term is derived, and checked by enumeration in tests/objective.
    """
    _check(logps, old_logps, ref_logps, advantages, mask, beta, objective, group_size)

    def keep(x: jax.Array) -> jax.Array:
        return jnp.where(mask, x, jnp.zeros_like(x))

    logps = keep(logps.astype(jnp.float32))
    old = jax.lax.stop_gradient(logps if old_logps is None else keep(old_logps.astype(jnp.float32)))
    lengths = mask.sum(-1).astype(jnp.float32)
    rows = jnp.float32(mask.shape[0])
    row_weights = 1.0 / jnp.maximum(lengths, 1.0) if objective.reduce == "sequence_mean" else jnp.ones_like(lengths)
    weight = lengths.sum() if objective.reduce == "token_mean" else rows

    sequence_ratio = _bounded_exp((logps - old).sum(-1))
    if objective.ratio == "sequence_product":
        surrogate, clipped = _clipped_surrogate(sequence_ratio, advantages, objective)
        terms = -surrogate * row_weights
        metrics: Metrics = {
            "policy/clip_fraction": (clipped.sum(), rows),
            "policy/ratio": (sequence_ratio.sum(), rows),
        }
    else:
        ratio = _bounded_exp(logps - old)
        surrogate, clipped = _clipped_surrogate(ratio, advantages[:, None], objective)
        terms = -keep(surrogate).sum(-1) * row_weights
        metrics = {
            "policy/clip_fraction": (keep(clipped).sum(), lengths.sum()),
            "policy/ratio": (keep(ratio).sum(), lengths.sum()),
        }

    if ref_logps is not None:
        ref = jax.lax.stop_gradient(keep(ref_logps.astype(jnp.float32)))
        sequence_kl = _sequence_kl(logps, ref, sequence_ratio, group_size)
        metrics["kl/sequence"] = (sequence_kl.sum(), rows)
        if objective.kl == "sequence_reverse":
            terms = terms + beta * row_weights * sequence_kl
        elif objective.kl != "none":
            token_kl = keep(_token_kl(logps - ref, objective.kl))
            terms = terms + beta * row_weights * token_kl.sum(-1)
    if beta_mirror is not None and not _is_zero(beta_mirror):
        terms = terms + beta_mirror * row_weights * _sequence_kl(logps, old, sequence_ratio, group_size)
    return LossTerms(terms.sum(), weight, jax.tree.map(jax.lax.stop_gradient, metrics))


@partial(jax.jit, static_argnames=("objective", "group_size"))
def _grpo_loss(*arrays: jax.Array | None, **options: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    terms = grpo_loss_terms(*arrays, **options)  # type: ignore[arg-type]
    return terms.total / terms.weight, {name: total / weight for name, (total, weight) in terms.metrics.items()}


def _is_zero(beta: float | jax.Array) -> bool:
    return isinstance(beta, float) and beta == 0.0


def _bounded_exp(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(log_ratio, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))


def _clipped_surrogate(ratio: jax.Array, advantages: jax.Array, objective: Objective) -> tuple[jax.Array, jax.Array]:
    low = None if objective.clip_low is None else 1.0 - objective.clip_low
    high = None if objective.clip_high is None else 1.0 + objective.clip_high
    free = ratio * advantages
    bound = jnp.clip(ratio, low, high) * advantages
    return jnp.minimum(free, bound), (bound < free).astype(jnp.float32)


def _sequence_kl(logps: jax.Array, anchor: jax.Array, ratio: jax.Array, group_size: int | None) -> jax.Array:
    """[B] with value ρℓ and gradient ∇ρ(ℓ − b): summed over completions drawn from π_old, KL(π‖anchor) and its gradient."""
    log_ratio = jax.lax.stop_gradient((logps - anchor).sum(-1))
    if group_size is None:
        baseline = jnp.zeros_like(log_ratio)
    else:
        groups = log_ratio.reshape(-1, group_size)
        baseline = ((groups.sum(-1, keepdims=True) - groups) / (group_size - 1)).reshape(-1)
    return ratio * (log_ratio - baseline) + jax.lax.stop_gradient(ratio * baseline)


def _token_kl(log_ratio: jax.Array, kl: str) -> jax.Array:
    """[B, T] k2 = ½ log² (gradient: reverse KL) or k3 = π_ref/π − 1 + log π/π_ref (gradient: forward KL), per token."""
    if kl == "token_reverse":
        return 0.5 * jnp.square(log_ratio)
    return _bounded_exp(-log_ratio) + log_ratio - 1.0


def _check(
    logps: jax.Array,
    old_logps: jax.Array | None,
    ref_logps: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    beta: float | jax.Array,
    objective: Objective,
    group_size: int | None,
) -> None:
    if logps.ndim != 2:
        raise ValueError(f"logps must be [B, T], got {logps.shape}")
    for name, array in (("old_logps", old_logps), ("ref_logps", ref_logps), ("mask", mask)):
        if array is not None and array.shape != logps.shape:
            raise ValueError(f"{name} must have the shape of logps {logps.shape}, got {array.shape}")
    if advantages.shape != logps.shape[:1]:
        raise ValueError(f"advantages must be [B] = {logps.shape[:1]}, got {advantages.shape}")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool (True counts), got {mask.dtype}")
    if isinstance(beta, int) or (hasattr(beta, "dtype") and not jnp.issubdtype(beta.dtype, jnp.floating)):
        raise TypeError("beta must be a float: an integer cannot be differentiated, and recompiles")
    if objective.kl != "none" and ref_logps is None:
        raise ValueError(f"ref_logps may be None only with kl='none', and this objective has kl={objective.kl!r}")
    if group_size is not None and (group_size < 2 or logps.shape[0] % group_size):
        raise ValueError(f"group_size={group_size} must be at least 2 and divide the {logps.shape[0]} rows")
