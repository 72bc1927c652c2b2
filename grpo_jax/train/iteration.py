"""One iteration of GRPO on one page: from prompts whose answers can be verified to a better policy.

    1  prompts      P of them, chosen by the caller
    2  sample       G completions of each prompt, by the policy as it is now, π_old
    3  verify       the reward of each completion, 0 or 1
    4  advantages   each reward against the rewards of its group
    5  log-probs    of the completions under the reference π_ref, and under π_old where several updates follow
    6  loss         log-probs under π; the loss: successes against failures, plus β·KL(π‖π_ref); its gradient
    7  update       one step of the optimizer, skipped where loss or gradient is not finite
    8  metrics      what was sampled and what was learned

6 and 7 repeat for each minibatch of each inner epoch.

`iteration` does 2 to 8 in one program, for a verifier that is a function of tokens; `iterations` does 1 to 8 many times without
the host. With a verifier on the host, the run calls two programs: ``recipe.sample`` is 2 and `learn` is 4 to 8; its worker
processes do 3 in between (`grpo_jax.runs.loop`). Both ways call the same functions.

All functions are pure, and know neither devices nor files: jit, donation and shardings are in compiled.py.
examples/plain.py is the same algorithm in about a hundred lines, without packing, with one step per rollout, and on one device.

Dimension key: see grpo_jax.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.objective import LossTerms, Objective, group_advantages, grpo_loss_terms
from grpo_jax.objective.checks import term_weight
from grpo_jax.rollout import Layout, Policy, PromptBatch, Rollout, score_packed
from grpo_jax.rollout.packing import pack
from grpo_jax.train.packed_gradient import packed_gradient
from grpo_jax.train.step import Batch, TrainState, apply_gradient

ROLES = {
    "rollout": 0,
    "minibatches": 1,
    "probe": 2,
    "warm_start": 3,
    "initialisation": 4,
    "attainable": 5,
    "adapters": 6,
    "held_out": 7,
}
"""What a random key is used for; `role_key` keeps the uses apart."""


class Recipe(NamedTuple):
    """What a program is compiled for. β and the learning rate are arguments, so that one program serves a whole sweep.

    Attributes:
      policy: the model, as pure functions of its parameters.
      objective: which loss.
      sample: (params, prompts, key) -> `Rollout`: `sample_groups` with the model and its options bound.
      optimizer: learning rate -> optax transformation, as ``optax.adamw`` is; its state must not depend on the rate.
      layout: how completions are packed, see `Layout`; changes time and memory, not the result.
      temperature: at which completions are sampled and scored.
      beta_mirror, entropy_bonus: weights of the terms of those names; see `grpo_loss_terms`.
      inner_epochs: passes over a rollout.
      minibatches: gradient steps per pass, on equal parts of the prompts.
      verify_tokens: (completions, mask, answers, answer_mask) -> bool [P, G]; None where the host verifies.
      join: (what is trained, ref_params) -> the policy's parameters, where only a part of them is trained; None: all are.
    """

    policy: Policy
    objective: Objective
    sample: Callable[..., Rollout]
    optimizer: Callable[[Any], optax.GradientTransformation]
    layout: Layout
    temperature: float = 1.0
    beta_mirror: float = 0.0
    entropy_bonus: float = 0.0
    inner_epochs: int = 1
    minibatches: int = 1
    verify_tokens: Callable[..., jax.Array] | None = None
    join: Callable[[Any, Any], Any] | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether the parameters of the reference are read in every iteration."""
        return self.objective.holds_to_reference or self.join is not None

    def params(self, trained: Any, ref_params: Any) -> Any:
        """The policy's parameters, from what is trained and those of the reference."""
        return trained if self.join is None else self.join(trained, ref_params)

    def of_trained(self, ref_params: Any) -> "Recipe":
        """The same with a policy whose functions take what is trained, at which gradients are taken, for the parameters."""
        if (join := self.join) is None:
            return self

        def joined(function: Callable[..., Any]) -> Any:
            return lambda trained, *arguments, **options: function(join(trained, ref_params), *arguments, **options)

        of_params = {name: getattr(self.policy, name) for name in ("forward", "unembed", "prepare")}
        return self._replace(policy=self.policy._replace(**{name: joined(f) for name, f in of_params.items()}))


def iteration(
    recipe: Recipe,
    state: TrainState,
    ref_params: Any,
    prompts: PromptBatch,
    answers: jax.Array,
    answer_mask: jax.Array,
    base_key: jax.Array,
    number: jax.Array,
    beta: jax.Array,
    learning_rate: float | jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """A whole iteration on the device.

    Args:
      recipe: with a verifier of tokens.
      state: see `TrainState`.
      ref_params: parameters of the reference policy; None where nothing reads them (`Recipe.needs_reference`).
      prompts, answers [P, T], answer_mask [P, T]: of this iteration; an answer is the tokens that the verifier compares with.
      base_key: of the run.
      number: of the iteration, int32.
      beta, learning_rate: traced.

    Returns:
      (state, metrics).
    """
    assert recipe.verify_tokens is not None
    # 2 Sample G completions of every prompt.
    params = recipe.params(state.params, ref_params)
    rollout = recipe.sample(params, prompts, role_key(base_key, "rollout", number))  # [P, G, T]
    # 3 Verify them.
    correct = recipe.verify_tokens(rollout.completions, rollout.mask, answers, answer_mask)  # [P, G]
    # 4 to 8 Learn from them.
    key = role_key(base_key, "minibatches", number)
    return learn(recipe, state, ref_params, prompts, rollout, correct.astype(jnp.float32), key, beta, learning_rate)


def learn(
    recipe: Recipe,
    state: TrainState,
    ref_params: Any,
    prompts: PromptBatch,
    rollout: Rollout,
    rewards: jax.Array,
    key: jax.Array,
    beta: jax.Array,
    learning_rate: float | jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The learning half of an iteration: from rewards to the policy after the gradient steps on one rollout.

    Args:
      recipe: of the run.
      state: see `TrainState`.
      ref_params: of the reference policy; may be None where nothing reads them (`Recipe.needs_reference`).
      prompts, rollout: of this iteration.
      rewards: [P, G] float32.
      key: shuffles minibatches.
      beta, learning_rate: traced.

    Returns:
      (state, metrics): scalars; those of gradient steps are averaged, but for ``rollout/…``, which are the first step's.

    Raises:
      ValueError: ref_params are needed and there are none.
    """
    objective = recipe.objective
    if recipe.needs_reference and ref_params is None:
        why = "the objective has a KL to the reference" if objective.holds_to_reference else "a part is trained"
        raise ValueError(f"{why}: learn needs ref_params")
    reference, recipe = recipe.policy, recipe.of_trained(ref_params)

    # 4 Advantages: each reward against the rewards of its group.
    advantages = group_advantages(rewards, **objective.normaliser())  # [P, G]
    if objective.overlong == "ignore":
        advantages = jnp.where(rollout.truncated, 0.0, advantages)

    # 5 Log-probabilities of the completions. Those of π_old are needed only for several gradient steps: before the first, π_old
    # is the current policy. Those of π_ref are needed only where a KL holds to it.
    num_steps = recipe.inner_epochs * recipe.minibatches

    def logps_under(policy: Policy, params: Any) -> jax.Array:
        completions, mask = rollout.completions, rollout.mask
        options: dict[str, Any] = {"layout": recipe.layout, "temperature": recipe.temperature}
        return score_packed(policy, params, prompts, completions, mask, **options)  # [P, G, T]

    batch = Batch(
        prompts=prompts,
        completions=rollout.completions,
        mask=rollout.mask,
        advantages=advantages,
        sampler_logps=rollout.logps,
        old_logps=logps_under(recipe.policy, state.params) if num_steps > 1 else None,
        ref_logps=logps_under(reference, ref_params) if objective.holds_to_reference else None,
    )

    # 6 and 7 One gradient step on the whole rollout, or several on parts of it.
    if num_steps == 1:
        state, metrics = train_step(recipe, state, batch, beta, learning_rate)
    else:

        def step_on_part(state: TrainState, rows: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
            return train_step(recipe, state, jax.tree.map(lambda x: x[rows], batch), beta, learning_rate)

        parts = minibatch_rows(key, len(rollout.mask), inner_epochs=recipe.inner_epochs, minibatches=recipe.minibatches)
        state, of_steps = jax.lax.scan(step_on_part, state, parts)
        # The sampler is compared with the trainer before the first step: only then are they the same policy.
        metrics = {name: m[0] if name.startswith("rollout/") else m.mean() for name, m in of_steps.items()}

    # 8 Metrics.
    return state, metrics | rollout_metrics(rollout, rewards)


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, beta: jax.Array, learning_rate: float | jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One GRPO gradient step on a batch of whole groups; the model is not run on the padding of completions.

    Args:
      recipe: of the run.
      state, batch: see `TrainState`, `Batch`.
      beta: weight of the KL term, traced.
      learning_rate: traced.

    Returns:
      (state, metrics): the state is unchanged but for ``skipped`` where loss or gradient is not finite.
    """
    group_size = batch.advantages.shape[1]

    def loss_terms(groups: Batch, logps: jax.Array, entropy: jax.Array) -> LossTerms:
        """The loss of some groups, as a sum and a weight; arrays [..., G, T] become [B, T]."""
        by_row: Any = lambda x: None if x is None else x.reshape(-1, logps.shape[-1])  # noqa: E731
        return grpo_loss_terms(
            by_row(logps),
            by_row(groups.old_logps),
            by_row(groups.ref_logps),
            groups.advantages.reshape(-1),
            by_row(groups.mask),
            beta=beta,
            beta_mirror=recipe.beta_mirror,
            objective=recipe.objective,
            group_size=group_size,
            entropy=by_row(entropy),
            entropy_bonus=recipe.entropy_bonus,
            sampler_logps=by_row(groups.sampler_logps),
        )

    # 6 The gradient, one micro-batch after the other.
    packing = pack(batch.mask, recipe.layout)
    gradient, logps, entropy = packed_gradient(
        loss_terms,
        recipe.policy,
        state.params,
        batch,
        packing,
        through_entropy=term_weight("entropy_bonus", recipe.entropy_bonus) is not None,
        temperature=recipe.temperature,
        chunk_size=recipe.layout.chunk_size,
    )
    # The loss itself, once more of all groups: the weight of a micro-batch would also count its empty groups.
    terms = loss_terms(batch, logps, entropy)

    # 7 The optimizer's step.
    state, metrics = apply_gradient(state, gradient, terms, recipe.optimizer(learning_rate))

    # 8 How far the sampler's log-probabilities are from the trainer's, and which share of the slots held a token.
    drift = jnp.where(batch.mask, batch.sampler_logps - logps, 0.0)  # [P, G, T]
    k3, count = (jnp.exp(-drift) - 1.0 + drift).sum(), batch.mask.sum(dtype=jnp.float32)
    slots = packing.used * packing.num_rows * packing.row_length * recipe.layout.shards + batch.prompts.mask.size
    tokens = packing.sizes.sum(dtype=jnp.float32) + batch.prompts.mask.sum(dtype=jnp.float32)
    return state, metrics | {
        "rollout/logp_k3": k3 / jnp.maximum(count, 1.0),
        "rollout/logp_difference": jnp.abs(drift).max(),
        "update/useful": tokens / slots.astype(jnp.float32),
    }


def iterations(
    recipe: Recipe,
    state: TrainState,
    ref_params: Any,
    table: tuple[PromptBatch, jax.Array, jax.Array],
    index: jax.Array,
    count: jax.Array,
    base_key: jax.Array,
    first: jax.Array,
    beta: jax.Array,
    learning_rate: float | jax.Array,
    *,
    spread: Callable[[Any], Any] = lambda rows: rows,
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
    """Up to n iterations, one after the other, without the host.

    Args:
      recipe, state, ref_params, base_key, beta, learning_rate: as of `iteration`.
      table: (prompts, answers, answer_mask) of the whole task on the device; arrays lead with the rows of the task.
      index: [n, P] int32, the rows of ``table`` that each iteration visits.
      count: how many of the n are run; traced, so that a last, shorter call does not compile a program of its own.
      first: number of the first iteration, int32.
      spread: lays the rows of an iteration over the devices.

    Returns:
      (state, metrics [n], skipped [n]): ``skipped`` is `TrainState.skipped` after each iteration; 0 for those not run.
    """

    def one(state: TrainState, i: jax.Array) -> tuple[TrainState, tuple[dict[str, jax.Array], jax.Array]]:
        # 1 The prompts of this iteration.
        prompts, answers, answer_mask = spread(jax.tree.map(lambda x: x[index[i]], table))
        state, metrics = iteration(
            recipe, state, ref_params, prompts, answers, answer_mask, base_key, first + i, beta, learning_rate
        )
        return state, (metrics, state.skipped)

    def one_more(i: jax.Array, carry: Any) -> Any:
        state, results = carry
        state, result = one(state, i)
        return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), results, result)

    # Zeros for the results of n iterations. Only shapes are computed here, so ``first`` stands for any i.
    _, shapes = jax.eval_shape(one, state, first)
    empty = jax.tree.map(lambda x: jnp.zeros((index.shape[0], *x.shape), x.dtype), shapes)
    state, (metrics, skipped) = jax.lax.fori_loop(jnp.int32(0), count, one_more, (state, empty))
    return state, metrics, skipped


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


def log_ratios(
    recipe: Recipe, params: Any, ref_params: Any, prompts: PromptBatch, rollout: Rollout
) -> tuple[jax.Array, jax.Array]:
    """log π/π_ref in nats, of completions [P, G], of which measurements of the KL are made, and of their tokens [P, G, T]."""
    options: dict[str, Any] = {"layout": recipe.layout, "temperature": recipe.temperature}
    logps, ref_logps = (
        score_packed(recipe.policy, p, prompts, rollout.completions, rollout.mask, **options)
        for p in (params, ref_params)
    )
    of_tokens = logps - ref_logps  # [P, G, T]; 0 outside of the mask
    return of_tokens.sum(-1), of_tokens


def role_key(base_key: jax.Array, role: str, iteration: int | jax.Array) -> jax.Array:
    """The key of one use in one iteration: a function of (seed, role, iteration), never of what was sampled before."""
    return jax.random.fold_in(jax.random.fold_in(base_key, ROLES[role]), iteration)
