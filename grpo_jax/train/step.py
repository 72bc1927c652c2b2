"""A gradient step: what it changes, what it sees, and the rule that skips a step whose loss or gradient is not finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.objective import LossTerms
from grpo_jax.rollout import PromptBatch


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
    """What one GRPO step sees; arrays of P prompts with G completions of T tokens.

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


def gradient_step(
    state: TrainState,
    batch: Any,
    loss_terms: Callable[[Any, Any], LossTerms],
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """A step on any loss, without packing: for the warm start, and for losses of your own.

    Args:
      state: see `TrainState`.
      batch: what ``loss_terms`` reads.
      loss_terms: (params, batch) -> `LossTerms`.
      optimizer: an optax transformation.

    Returns:
      (state, metrics), as `apply_gradient`.
    """

    def total(params: Any) -> tuple[jax.Array, LossTerms]:
        terms = loss_terms(params, batch)
        return terms.total, terms

    gradient, terms = jax.grad(total, has_aux=True)(state.params)
    return apply_gradient(state, gradient, terms, optimizer)


def apply_gradient(
    state: TrainState, gradient: Any, terms: LossTerms, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Divides the summed gradient by the weight, and takes the optimizer's step if loss and gradient are finite.

    Args:
      state: see `TrainState`.
      gradient: of ``terms.total``, like the parameters.
      terms: of the loss.
      optimizer: an optax transformation.

    Returns:
      (state, metrics): the metrics of the terms, ``loss/total``, ``loss/grad_norm`` and ``loss/skipped``. Where something is
      not finite, the state is unchanged but for ``skipped``.
    """
    weight = jnp.maximum(terms.weight, 1.0)
    gradient = jax.tree.map(lambda g: g / weight.astype(g.dtype), gradient)
    loss, norm = terms.total / weight, optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    stepped = TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1, jnp.int32(0))
    unchanged = state._replace(skipped=state.skipped + 1)
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, unchanged)
    metrics = {name: value / jnp.maximum(count, 1.0) for name, (value, count) in terms.metrics.items()}
    metrics |= {"loss/total": loss, "loss/grad_norm": norm, "loss/skipped": 1.0 - finite.astype(jnp.float32)}
    return new_state, metrics
