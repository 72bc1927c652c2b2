"""Log-probabilities of given completions under a policy: the trainer's view of what the sampler sampled.

`score_groups` is the plain form. `score_packed` runs real tokens alone: the same numbers for less work where completions are
shorter than T. Its two parts, `score_first` and `score_microbatch`, are what the packed gradient differentiates.

Dimension key: see grpo_jax.
"""

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.objective import completion_logps
from grpo_jax.rollout.packing import (
    Layout,
    Microbatch,
    by_shard,
    from_slots,
    over_microbatches,
    pack,
    put_groups,
    take_groups,
    take_microbatch,
    to_slots,
)
from grpo_jax.rollout.policy import Policy
from grpo_jax.rollout.sampling import PromptBatch, prefill


def score_groups(
    policy: Policy,
    params: Any,
    prompts: PromptBatch,
    completions: jax.Array,
    mask: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log π(o_t | q, o_<t) and entropy of completions in groups, differentiable in ``params``.

    As in sampling, a prompt is run once and its group attends to its keys and values. Everything is shifted by one: the last
    state of the prompt predicts token 0, and the state at token t − 1 predicts token t.

    Args:
      policy, params: the model.
      prompts: [P, S].
      completions: [P, G, T] int32.
      mask: [P, G, T] bool, True on the completion's tokens.
      temperature: the sampler's, so that the scored distribution is the sampled one.
      chunk_size: positions whose logits exist at a time; None chooses, see `completion_logps`.

    Returns:
      (logps [B, T], entropy [B, T]) float32, B = P·G; meaningless where the mask is False.
    """
    num_prompts, group_size, length = completions.shape
    rows = num_prompts * group_size
    after_prompt, prefix = prefill(policy, params, prompts)  # [P, D]
    tokens, mask = completions.reshape(rows, length), mask.reshape(rows, length)  # [B, T]
    lengths = jnp.repeat(prompts.lengths(), group_size)  # [B]
    positions = lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]  # [B, T]
    hidden, _ = policy.forward(params, tokens, positions, mask, prefix=prefix)  # [B, T, D]
    after_prompt = jnp.repeat(after_prompt, group_size, axis=0)[:, None]  # [B, 1, D]
    predicting = jnp.concatenate([after_prompt, hidden[:, :-1]], axis=1)  # [B, T, D]
    return token_logps(policy, params, predicting, tokens, temperature=temperature, chunk_size=chunk_size)


def score_packed(
    policy: Policy,
    params: Any,
    prompts: PromptBatch,
    completions: jax.Array,
    mask: jax.Array,
    *,
    layout: Layout,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """log π(o_t | q, o_<t) of completions in groups, in micro-batches of real tokens alone; not to be differentiated.

    Args:
      policy, params, prompts, completions, temperature: as of `score_groups`.
      mask: [P, G, T] bool, True on the first tokens of each completion.
      layout: how they are packed, see `Layout`; changes time and memory, not the result.

    Returns:
      [P, G, T] float32; 0 where the mask is False.
    """
    packing = pack(mask, layout)
    scoring: dict[str, Any] = {"temperature": temperature, "chunk_size": layout.chunk_size}
    first, _, prefix = score_first(policy, params, prompts, completions, **scoring)
    lengths = prompts.lengths()
    tokens, lengths, first = (by_shard(x, layout.shards) for x in (completions, lengths, first))  # [X, P, ...]

    def add(number: int | jax.Array, logps: jax.Array) -> jax.Array:
        microbatch = take_microbatch(packing, number, tokens.shape[-1])
        row_prefix = take_prefix(prefix, microbatch)
        own_tokens, own_first = (take_groups(x, microbatch.groups) for x in (tokens, first))  # [X, M, G, ...]
        packed, _ = score_microbatch(
            policy, params, row_prefix, own_tokens, lengths, microbatch, **scoring
        )  # [X, R, C]
        return put_groups(logps, microbatch.groups, align(own_first, packed, microbatch))

    logps = over_microbatches(packing, add, jnp.zeros(tokens.shape, jnp.float32))  # [X, P, G, T]
    return jnp.where(mask, logps.reshape(mask.shape), 0.0)


def score_first(
    policy: Policy,
    params: Any,
    prompts: PromptBatch,
    completions: jax.Array,
    *,
    temperature: float | jax.Array,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Log-probabilities and entropies [P, G] of the first tokens, which follow the prompts alone; and the prompts' cache."""
    after_prompt, prefix = prefill(policy, params, prompts)  # [P, D]
    hidden = jnp.broadcast_to(after_prompt[:, None], (*completions.shape[:2], after_prompt.shape[-1]))  # [P, G, D]
    scoring: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    logps, entropy = token_logps(policy, params, hidden, completions[:, :, 0], **scoring)
    return logps, entropy, prefix


def score_microbatch(
    policy: Policy,
    params: Any,
    prefix: Any,
    completions: jax.Array,
    lengths: jax.Array,
    microbatch: Microbatch,
    *,
    temperature: float | jax.Array,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [X, R, C] of the token that follows the one in each slot of a micro-batch.

    Args:
      policy, params, temperature, chunk_size: as of `score_groups`.
      prefix: the prompts' cache, repeated for each row, see `take_prefix`.
      completions: [X, M, G, T] of the micro-batch's groups.
      lengths: [X, P] tokens of the prompts.
      microbatch: of `take_microbatch`.
    """
    slot_tokens, shape = microbatch.slot_tokens, microbatch.slot_tokens.shape
    group_size, width = completions.shape[2:]
    tokens = to_slots(completions, slot_tokens)  # [X, R, C]
    targets = to_slots(jnp.roll(completions, -1, axis=-1), slot_tokens)  # [X, R, C]
    starts = jax.vmap(lambda x, at: x[at])(lengths, microbatch.row_prompts)  # [X, R]
    # In empty slots (token −1), positions and segments mean nothing; the mask hides them.
    positions = starts[:, :, None] + slot_tokens % width  # [X, R, C]
    segments = slot_tokens // width % group_size  # [X, R, C], the completion in its group
    tokens, targets, positions, segments, slot_tokens = (
        x.reshape(-1, shape[-1]) for x in (tokens, targets, positions, segments, slot_tokens)
    )  # [X · R, C]
    hidden, _ = policy.forward(params, tokens, positions, slot_tokens >= 0, prefix=prefix, segments=segments)
    logps, entropy = token_logps(policy, params, hidden, targets, temperature=temperature, chunk_size=chunk_size)
    return logps.reshape(shape), entropy.reshape(shape)


def token_logps(
    policy: Policy, params: Any, hidden: jax.Array, tokens: jax.Array, **scoring: Any
) -> tuple[jax.Array, jax.Array]:
    """(log π, entropy) [..., L] of tokens [..., L], each predicted by its hidden state [..., L, D]; see `completion_logps`."""
    logps, entropy = completion_logps(hidden, lambda h: policy.unembed(params, h), tokens, **scoring)
    return logps, entropy


def take_prefix(prefix: Any, microbatch: Microbatch) -> Any:
    """The cache [X · P, ...] of the prompts as [X · R, ...], the prompt of each row of the micro-batch."""
    shards, rows = microbatch.row_prompts.shape

    def take(x: jax.Array) -> jax.Array:
        taken = jax.vmap(lambda x, at: x[at])(by_shard(x, shards), microbatch.row_prompts)
        return taken.reshape(shards * rows, *x.shape[1:])

    return jax.tree.map(take, prefix)


def align(first: jax.Array, packed: jax.Array, microbatch: Microbatch) -> jax.Array:
    """[X, M, G] of first tokens, and [X, R, C] of the token after each slot -> [X, M, G, T]."""
    return jnp.concatenate([first[..., None], from_slots(packed, microbatch.token_slots)], axis=-1)
