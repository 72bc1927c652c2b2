"""The pure gradient step: accumulate terms over micro-batches, divide once, update, and never let a NaN in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.objective import LossTerms, Objective, grpo_loss_terms
from grpo_jax.rollout import Policy, PromptBatch, score_groups


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
      params: of the policy, float32.
      opt_state: of the optimizer.
      updates: int32, gradient steps applied.
      skipped: int32, gradient steps skipped in a row because loss or gradient was not finite.
    """

    params: Any
    opt_state: Any
    updates: jax.Array
    skipped: jax.Array


class Batch(NamedTuple):
    """What one gradient step sees; arrays of P prompts with G completions of T tokens.

    Attributes:
      prompts: `PromptBatch` of P prompts.
      completions: [P, G, T] int32.  mask: [P, G, T] bool.
      advantages: [P, G] float32.
      sampler_logps: [P, G, T] as the sampler reported them.
      old_logps: [P, G, T] under the policy that sampled, or None where that is the current policy.
      ref_logps: [P, G, T] under the reference, or None where the objective has no KL to it.
    """

    prompts: PromptBatch
    completions: jax.Array
    mask: jax.Array
    advantages: jax.Array
    sampler_logps: jax.Array
    old_logps: jax.Array | None
    ref_logps: jax.Array | None


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0))


def train_step(
    state: TrainState,
    batch: Batch,
    beta: jax.Array,
    *,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    beta_mirror: float = 0.0,
    entropy_bonus: float = 0.0,
    temperature: float = 1.0,
    microbatches: int = 1,
    chunk_size: int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One GRPO gradient step on a batch of whole groups.

    Args:
      state, batch: see `TrainState`, `Batch`.
      beta: weight of the KL term, traced.
      policy, optimizer, objective: static.
      beta_mirror, entropy_bonus: weights of the terms of those names; see `grpo_loss_terms`.
      temperature: the sampler's.
      microbatches: gradients are accumulated over this many equal parts of the P prompts; the result does not depend on it.
      chunk_size: positions whose logits exist at a time; None chooses, see `completion_logps`.

    Returns:
      (state, metrics): the state is unchanged but for ``skipped`` where loss or gradient is not finite.
    """

    def loss_terms(params: Any, part: Batch) -> tuple[LossTerms, dict[str, jax.Array]]:
        logps, entropy = score_groups(
            policy,
            params,
            part.prompts,
            part.completions,
            part.mask,
            temperature=temperature,
            chunk_size=chunk_size,
        )
        mask, sampler_logps = part.mask.reshape(logps.shape), part.sampler_logps.reshape(logps.shape)
        terms = grpo_loss_terms(
            logps,
            None if part.old_logps is None else part.old_logps.reshape(logps.shape),
            None if part.ref_logps is None else part.ref_logps.reshape(logps.shape),
            part.advantages.reshape(-1),
            mask,
            beta=beta,
            beta_mirror=beta_mirror,
            objective=objective,
            group_size=part.advantages.shape[1],
            entropy=entropy,
            entropy_bonus=entropy_bonus,
            sampler_logps=sampler_logps,
        )
        drift = jax.lax.stop_gradient(jnp.where(mask, sampler_logps - logps, 0.0))
        terms.metrics["rollout/logp_k3"] = ((jnp.exp(-drift) - 1.0 + drift).sum(), mask.sum().astype(jnp.float32))
        return terms, {"rollout/logp_difference": jnp.abs(drift).max()}

    return gradient_step(state, batch, loss_terms, optimizer=optimizer, microbatches=microbatches)


def gradient_step(
    state: TrainState,
    batch: Any,
    loss_terms: Callable[[Any, Any], tuple[LossTerms, dict[str, jax.Array]]],
    *,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies the gradient of Σ total / Σ weight over micro-batches, unless it is not finite.

    Args:
      state: see `TrainState`.
      batch: pytree whose leaves all have the leading axis P.
      loss_terms: (params, part of the batch) -> (`LossTerms`, maxima); maxima are metrics combined by their maximum.
      optimizer: an optax transformation.
      microbatches: number of parts; divides P.

    Returns:
      (state, metrics) with ``loss/total``, ``loss/grad_norm``, ``loss/skipped`` and the metrics of the terms.
    """

    def total(params: Any, part: Any) -> tuple[jax.Array, tuple[LossTerms, dict[str, jax.Array]]]:
        terms, maxima = loss_terms(params, part)
        return terms.total, (terms, maxima)

    differentiate = jax.grad(total, has_aux=True)
    if microbatches == 1:
        gradient, (terms, maxima) = differentiate(state.params, batch)
    else:
        # Part m takes rows m, m + M, …: each device keeps an equal share of every part.
        parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

        def accumulate(gradient: Any, part: Any) -> tuple[Any, Any]:
            more, aux = differentiate(state.params, part)
            return jax.tree.map(jnp.add, gradient, more), aux

        gradient, (terms, maxima) = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.params), parts)
        terms, maxima = jax.tree.map(lambda x: x.sum(0), terms), jax.tree.map(lambda x: x.max(0), maxima)

    weight = jnp.maximum(terms.weight, 1.0)
    gradient = jax.tree.map(lambda g: g / weight.astype(g.dtype), gradient)
    loss, norm = terms.total / weight, optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    stepped = TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1, jnp.int32(0))
    kept = state._replace(skipped=state.skipped + 1)
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, kept)
    metrics = {name: value / jnp.maximum(count, 1.0) for name, (value, count) in terms.metrics.items()}
    metrics |= maxima | {"loss/total": loss, "loss/grad_norm": norm, "loss/skipped": 1.0 - finite.astype(jnp.float32)}
    return new_state, metrics
