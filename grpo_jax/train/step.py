"""The pure gradient step: accumulate terms over micro-batches, divide once, update, and never let a NaN in."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.objective import LossTerms, Objective, grpo_loss_terms
from grpo_jax.objective.checks import term_weight
from grpo_jax.rollout import Policy, PromptBatch
from grpo_jax.rollout.packing import Packing, pack, put_groups, take_block, take_groups, to_places
from grpo_jax.rollout.scoring import align, by_shard, score_block, score_first, take_prefix


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
    microbatch_tokens: int,
    beta_mirror: float = 0.0,
    entropy_bonus: float = 0.0,
    temperature: float = 1.0,
    row_length: int | None = None,
    shards: int = 1,
    in_step: str | None = None,
    chunk_size: int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One GRPO gradient step on a batch of whole groups, of which real tokens alone are run.

    Args:
      state, batch: see `TrainState`, `Batch`.
      beta: weight of the KL term, traced.
      policy, optimizer, objective: static.
      microbatch_tokens, row_length, shards, in_step: how completions are packed into micro-batches, see `pack`; the result does
        not depend on it.
      beta_mirror, entropy_bonus: weights of the terms of those names; see `grpo_loss_terms`.
      temperature: the sampler's.
      chunk_size: positions whose logits exist at a time; None chooses, see `completion_logps`.

    Returns:
      (state, metrics): the state is unchanged but for ``skipped`` where loss or gradient is not finite.
    """

    def terms(part: Batch, logps: jax.Array, entropy: jax.Array) -> LossTerms:
        flat: Any = lambda x: None if x is None else x.reshape(-1, logps.shape[-1])  # noqa: E731
        return grpo_loss_terms(
            flat(logps),
            flat(part.old_logps),
            flat(part.ref_logps),
            part.advantages.reshape(-1),
            flat(part.mask),
            beta=beta,
            beta_mirror=beta_mirror,
            objective=objective,
            group_size=batch.advantages.shape[1],
            entropy=flat(entropy),
            entropy_bonus=entropy_bonus,
            sampler_logps=flat(part.sampler_logps),
        )

    packing = pack(
        batch.mask, microbatch_tokens=microbatch_tokens, row_length=row_length, shards=shards, in_step=in_step
    )
    gradient, logps, entropy = packed_gradient(
        policy,
        state.params,
        batch,
        lambda part, logps, entropy: terms(part, logps, entropy).total,
        packing,
        through_entropy=term_weight("entropy_bonus", entropy_bonus) is not None,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    # Of all groups at once: a block has empty places for groups, which would count as completions.
    whole = terms(batch, logps, entropy)
    drift = jnp.where(batch.mask, batch.sampler_logps - logps, 0.0)
    count = batch.mask.sum(dtype=jnp.float32)
    whole.metrics["rollout/logp_k3"] = ((jnp.exp(-drift) - 1.0 + drift).sum(), count)
    places = (packing.used * packing.rows * packing.length * shards + batch.prompts.mask.size).astype(jnp.float32)
    run = packing.sizes.sum(dtype=jnp.float32) + batch.prompts.mask.sum(dtype=jnp.float32)
    also = {"rollout/logp_difference": jnp.abs(drift).max(), "update/useful": run / places}
    return _apply(state, gradient, whole, also, optimizer)


def packed_gradient(
    policy: Policy,
    params: Any,
    batch: Batch,
    total: Callable[[Batch, jax.Array, jax.Array], jax.Array],
    packing: Packing,
    *,
    through_entropy: bool,
    temperature: float,
    chunk_size: int | None,
) -> tuple[Any, jax.Array, jax.Array]:
    """The gradient of a sum over groups, block by block; prompts are run, and differentiated, once.

    Args:
      policy, params: the model.
      batch: P prompts; what ``total`` reads of it.
      total: (groups of the batch, logps, entropy), arrays [..., G, T] -> scalar, a sum over groups.
      packing: of the batch's mask.
      through_entropy: whether ``total`` has a gradient with respect to the entropy.
      temperature, chunk_size: as of `score_groups`.

    Returns:
      (gradient, logps [P, G, T], entropy [P, G, T]).
    """
    shards, width = packing.sizes.shape[0], batch.mask.shape[-1]
    score: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    entropy_of = (lambda x: x) if through_entropy else jax.lax.stop_gradient

    def run_prompts(params: Any) -> tuple[Any, Any]:
        logps, entropy, prefix = score_first(policy, params, batch.prompts, batch.completions, **score)
        real, rest = _split(prefix)
        return (logps, entropy_of(entropy), real), rest

    (*first, prefix), pull_prompts, rest = jax.vjp(run_prompts, params, has_aux=True)
    given = batch, first, batch.prompts.mask.sum(-1, dtype=jnp.int32)
    arrays, first, lengths = jax.tree.map(partial(by_shard, shards=shards), given)

    def of_block(number: int | jax.Array, sums: Any) -> Any:
        gradient, to_prefix, aligned = sums
        block = take_block(packing, number, width)
        part, begin = jax.tree.map(lambda x: take_groups(x, block.groups), (arrays, first))
        rows, others = take_prefix(prefix, block), take_prefix(rest, block)

        def run_rows(params: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
            logps, entropy = score_block(
                policy, params, _merge(rows, others), part.completions, lengths, block, **score
            )
            return logps, entropy_of(entropy)

        packed, pull_rows = jax.vjp(run_rows, params, rows)
        found = [align(x, y, block) for x, y in zip(begin, packed, strict=True)]
        slopes = jax.grad(partial(total, part), (0, 1))(*found)
        # The place of a token is where the next one is predicted.
        more, to_rows = pull_rows(tuple(to_places(jnp.roll(x, -1, axis=-1), block.sources) for x in slopes))
        values = (*found, *(x[..., 0] for x in slopes))
        return (
            jax.tree.map(jnp.add, gradient, more),
            jax.tree.map(lambda sum_, x: _add_rows(sum_, block.prompts, x), to_prefix, to_rows),
            [put_groups(x, block.groups, y) for x, y in zip(aligned, values, strict=True)],
        )

    zeros = jnp.zeros((*arrays.mask.shape[:-1], width), jnp.float32)
    to_prefix = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), prefix)
    sums: Any = jax.tree.map(jnp.zeros_like, params), to_prefix, [zeros, zeros, zeros[..., 0], zeros[..., 0]]
    sums = of_block(0, sums) if packing.blocks == 1 else jax.lax.fori_loop(0, packing.used, of_block, sums)
    gradient, to_prefix, aligned = sums
    logps, entropy, *to_first = (x.reshape(-1, *x.shape[2:]) for x in aligned)
    (more,) = pull_prompts((*to_first, jax.tree.map(lambda x, y: x.astype(y.dtype), to_prefix, prefix)))
    return jax.tree.map(jnp.add, gradient, more), logps, entropy


def gradient_step(
    state: TrainState,
    batch: Any,
    loss_terms: Callable[[Any, Any], LossTerms],
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies the gradient of total / weight of a loss of any form, unless it is not finite.

    Args:
      state: see `TrainState`.
      batch: what ``loss_terms`` reads.
      loss_terms: (params, batch) -> `LossTerms`.
      optimizer: an optax transformation.

    Returns:
      (state, metrics) with ``loss/total``, ``loss/grad_norm``, ``loss/skipped`` and the metrics of the terms.
    """

    def total(params: Any) -> tuple[jax.Array, LossTerms]:
        terms = loss_terms(params, batch)
        return terms.total, terms

    gradient, terms = jax.grad(total, has_aux=True)(state.params)
    return _apply(state, gradient, terms, {}, optimizer)


def _apply(
    state: TrainState,
    gradient: Any,
    terms: LossTerms,
    also: dict[str, jax.Array],
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The one division, and the optimizer's step where loss and gradient are finite."""
    weight = jnp.maximum(terms.weight, 1.0)
    gradient = jax.tree.map(lambda g: g / weight.astype(g.dtype), gradient)
    loss, norm = terms.total / weight, optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    stepped = TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1, jnp.int32(0))
    kept = state._replace(skipped=state.skipped + 1)
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, kept)
    metrics = {name: value / jnp.maximum(count, 1.0) for name, (value, count) in terms.metrics.items()}
    metrics |= also | {"loss/total": loss, "loss/grad_norm": norm, "loss/skipped": 1.0 - finite.astype(jnp.float32)}
    return new_state, metrics


def _split(prefix: Any) -> tuple[Any, Any]:
    """The leaves of a cache that have gradients, and the others; None in the place of the rest."""
    is_real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    real = jax.tree.map(lambda x: x if is_real(x) else None, prefix)
    return real, jax.tree.map(lambda x: None if is_real(x) else x, prefix)


def _merge(real: Any, rest: Any) -> Any:
    return jax.tree.map(lambda x, y: y if x is None else x, real, rest, is_leaf=lambda x: x is None)


def _add_rows(total: jax.Array, prompts: jax.Array, rows: jax.Array) -> jax.Array:
    """[X · P, ...] float32 plus rows [X · N, ...] of the prompts [X, N]."""
    shards = len(prompts)
    add = jax.vmap(lambda x, at, rows: x.at[at].add(rows))
    return add(by_shard(total, shards), prompts, by_shard(rows.astype(total.dtype), shards)).reshape(total.shape)
