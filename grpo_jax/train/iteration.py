"""One GRPO iteration: sample groups, verify, score, and take the gradient steps; all of it pure functions.

With a verifier on the device the whole iteration is one jitted function, and scans; with a verifier on the host the same two
halves, `sample_groups` and `update`, are jitted apart and the verdicts pass between them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.objective import Objective, group_advantages
from grpo_jax.rollout import Policy, PromptBatch, Rollout
from grpo_jax.rollout.scoring import score_packed
from grpo_jax.train.step import Batch, TrainState, train_step

ROLES = {"rollout": 0, "minibatches": 1, "probe": 2, "warm_start": 3, "initialisation": 4}
"""What a key is used for; `role_key` keeps the uses apart."""


def role_key(base_key: jax.Array, role: str, iteration: int | jax.Array) -> jax.Array:
    """The key of one use in one iteration: a function of (seed, role, iteration), never of what was drawn before."""
    return jax.random.fold_in(jax.random.fold_in(base_key, ROLES[role]), iteration)


def iteration(
    state: TrainState,
    ref_params: Any,
    prompts: PromptBatch,
    answers: jax.Array,
    answer_mask: jax.Array,
    base_key: jax.Array,
    number: jax.Array,
    beta: jax.Array,
    *,
    verify_tokens: Callable[..., jax.Array],
    sample: Callable[..., Rollout],
    improve: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """A whole iteration on the device, for a verifier that is a function of tokens.

    Args:
      state: see `TrainState`.
      ref_params: parameters of the reference policy.
      prompts, answers [P, T], answer_mask [P, T]: of this iteration.
      base_key: of the run.
      number: of the iteration, int32.
      beta: traced.
      verify_tokens: (completions, mask, answers, answer_mask) -> bool [P, G].
      sample: `sample_groups` with policy and options bound: (params, prompts, key) -> Rollout.
      improve: `update` with policy and options bound.

    Returns:
      (state, metrics).
    """
    rollout = sample(state.params, prompts, role_key(base_key, "rollout", number))
    rewards = verify_tokens(rollout.completions, rollout.mask, answers, answer_mask).astype(jnp.float32)
    return improve(state, ref_params, prompts, rollout, rewards, role_key(base_key, "minibatches", number), beta)


def update(
    state: TrainState,
    ref_params: Any,
    prompts: PromptBatch,
    rollout: Rollout,
    rewards: jax.Array,
    key: jax.Array,
    beta: jax.Array,
    *,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    microbatch_tokens: int,
    beta_mirror: float = 0.0,
    entropy_bonus: float = 0.0,
    temperature: float = 1.0,
    inner_epochs: int = 1,
    minibatches: int = 1,
    row_length: int | None = None,
    shards: int = 1,
    in_step: str | None = None,
    chunk_size: int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The learning half of an iteration: advantages from rewards, then the gradient steps on one rollout.

    The log-probabilities of the sampling policy are computed, by the trainer, only where there is more than one gradient step;
    those of the reference only where the objective has a KL to it.

    Args:
      state, prompts, rollout: of this iteration.
      ref_params: of the reference policy; not read, and may be None, where the objective has no KL to it.
      rewards: [P, G] float32.
      key: shuffles minibatches.
      beta: traced.
      policy, optimizer, objective: static.
      microbatch_tokens, row_length, shards, in_step: how completions are packed into micro-batches, see `pack`; changes time and
        memory, not the result.
      beta_mirror, entropy_bonus: weights of the terms of those names; see `grpo_loss_terms`.
      temperature: the sampler's.
      inner_epochs: passes over the rollout.
      minibatches: gradient steps per pass, on equal parts of the prompts.
      chunk_size: positions whose logits exist at a time; None chooses, see `completion_logps`.

    Returns:
      (state, metrics): scalars, averaged over the gradient steps.
    """
    if objective.holds_to_reference and ref_params is None:
        raise ValueError("the objective has a KL to the reference: update needs ref_params")
    packed: dict[str, Any] = {
        "microbatch_tokens": microbatch_tokens,
        "row_length": row_length,
        "shards": shards,
        "in_step": in_step,
        "temperature": temperature,
        "chunk_size": chunk_size,
    }
    steps = inner_epochs * minibatches

    def logps(params: Any) -> jax.Array:
        return score_packed(policy, params, prompts, rollout.completions, rollout.mask, **packed)

    advantages = group_advantages(rewards, **objective.normaliser())
    if objective.overlong == "ignore":
        advantages = jnp.where(rollout.truncated, 0.0, advantages)
    batch = Batch(
        prompts=prompts,
        completions=rollout.completions,
        mask=rollout.mask,
        advantages=advantages,
        sampler_logps=rollout.logps,
        old_logps=logps(state.params) if steps > 1 else None,
        ref_logps=logps(ref_params) if objective.holds_to_reference else None,
    )
    take_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]] = partial(
        train_step,
        policy=policy,
        optimizer=optimizer,
        objective=objective,
        beta_mirror=beta_mirror,
        entropy_bonus=entropy_bonus,
        **packed,
    )
    if steps == 1:
        state, metrics = take_step(state, batch, beta)
    else:

        def take_part(state: TrainState, rows: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
            return take_step(state, jax.tree.map(lambda x: x[rows], batch), beta)

        parts = minibatch_rows(key, len(rollout.mask), inner_epochs=inner_epochs, minibatches=minibatches)
        state, stacked = jax.lax.scan(take_part, state, parts)
        # Only before the first step is the trainer's policy the sampler's.
        metrics = {name: m[0] if name.startswith("rollout/") else m.mean() for name, m in stacked.items()}
    return state, metrics | rollout_metrics(rollout, rewards)


def minibatch_rows(key: jax.Array, num_prompts: int, *, inner_epochs: int, minibatches: int) -> jax.Array:
    """[inner_epochs·minibatches, P / minibatches] int32: the prompts of each gradient step, a new permutation per epoch."""
    epochs = jnp.arange(inner_epochs, dtype=jnp.int32)
    permute = lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), num_prompts)  # noqa: E731
    return jax.vmap(permute)(epochs).reshape(inner_epochs * minibatches, -1)


def rollout_metrics(rollout: Rollout, rewards: jax.Array) -> dict[str, jax.Array]:
    """Scalars that describe what was sampled: success, dead groups (all right or all wrong), length, truncation."""
    return {
        "reward/mean": rewards.mean(),
        "reward/all_correct_groups": (rewards.min(-1) == 1.0).mean(dtype=jnp.float32),
        "reward/all_wrong_groups": (rewards.max(-1) == 0.0).mean(dtype=jnp.float32),
        "rollout/length": rollout.mask.sum(-1).astype(jnp.float32).mean(),
        "rollout/useful": rollout.useful,
        "rollout/truncated": rollout.truncated.mean(dtype=jnp.float32),
    }
