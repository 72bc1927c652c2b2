"""Log-probabilities of given completions under a policy: the trainer's view of what the sampler drew.

`score_groups` is the plain form. `score_packed` runs real tokens only: the same numbers, for less work where completions are
shorter than the longest; its two parts, `score_first` and `score_block`, are what the packed gradient differentiates.

Dimension key: B rows, P prompts, G completions of each, S prompt length, T completion length; packed, as in packing.py: X shards,
Q groups and N rows of R places in a block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grpo_jax.objective import completion_logps
from grpo_jax.rollout.packing import Block, from_places, pack, put_groups, take_block, take_groups, to_places
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
    """log π(o_t | q, o_<t) of completions in groups, differentiable in ``params``.

    As in sampling, a prompt is run once and its group attends to its keys and values. The shift by one: the prompt's last state
    predicts token 0, the state of token t − 1 predicts token t.

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
    first, prefix = prefill(policy, params, prompts)
    tokens, mask = completions.reshape(rows, length), mask.reshape(rows, length)
    lengths = jnp.repeat(prompts.mask.sum(-1).astype(jnp.int32), group_size)
    positions = lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    hidden, _ = policy.forward(params, tokens, positions, mask, prefix=prefix)
    predicting = jnp.concatenate([jnp.repeat(first, group_size, axis=0)[:, None], hidden[:, :-1]], axis=1)
    unembed = lambda h: policy.unembed(params, h)  # noqa: E731
    logps, entropy = completion_logps(predicting, unembed, tokens, temperature=temperature, chunk_size=chunk_size)
    return logps, entropy


def score_packed(
    policy: Policy,
    params: Any,
    prompts: PromptBatch,
    completions: jax.Array,
    mask: jax.Array,
    *,
    microbatch_tokens: int,
    temperature: float | jax.Array = 1.0,
    row_length: int | None = None,
    shards: int = 1,
    in_step: str | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """log π(o_t | q, o_<t) of completions in groups, in blocks of real tokens alone; not to be differentiated.

    Args:
      policy, params, prompts, completions, temperature, chunk_size: as of `score_groups`.
      mask: [P, G, T] bool, True on the first tokens of each completion.
      microbatch_tokens, row_length, shards, in_step: how they are packed, see `pack`; changes time and memory, not the result.

    Returns:
      [P, G, T] float32; 0 where the mask is False.
    """
    packing = pack(mask, microbatch_tokens=microbatch_tokens, row_length=row_length, shards=shards, in_step=in_step)
    scoring: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    first, _, prefix = score_first(policy, params, prompts, completions, **scoring)
    tokens, lengths, first = (by_shard(x, shards) for x in (completions, prompts.mask.sum(-1, dtype=jnp.int32), first))

    def run(number: int | jax.Array, logps: jax.Array) -> jax.Array:
        block = take_block(packing, number, tokens.shape[-1])
        rows = take_prefix(prefix, block)
        packed, _ = score_block(policy, params, rows, take_groups(tokens, block.groups), lengths, block, **scoring)
        return put_groups(logps, block.groups, align(take_groups(first, block.groups), packed, block))

    logps = jnp.zeros(tokens.shape, jnp.float32)
    logps = run(0, logps) if packing.blocks == 1 else lax.fori_loop(0, packing.used, run, logps)
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
    first, prefix = prefill(policy, params, prompts)
    hidden = jnp.broadcast_to(first[:, None], (*completions.shape[:2], first.shape[-1]))
    unembed = lambda h: policy.unembed(params, h)  # noqa: E731
    logps, entropy = completion_logps(
        hidden, unembed, completions[:, :, 0], temperature=temperature, chunk_size=chunk_size
    )
    return logps, entropy, prefix


def score_block(
    policy: Policy,
    params: Any,
    prefix: Any,
    completions: jax.Array,
    lengths: jax.Array,
    block: Block,
    *,
    temperature: float | jax.Array,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [X, N, R] of the token that follows each place of a block.

    Args:
      policy, params, temperature, chunk_size: as of `score_groups`.
      prefix: the prompts' cache, repeated for each row, see `take_prefix`.
      completions: [X, Q, G, T] of the block's groups.
      lengths: [X, P] tokens of the prompts.
      block: of `take_block`.
    """
    shape = block.sources.shape
    group_size, width = completions.shape[2:]
    tokens = to_places(completions, block.sources)
    targets = to_places(jnp.roll(completions, -1, axis=-1), block.sources)
    starts = jax.vmap(lambda x, at: x[at])(lengths, block.prompts)
    positions = starts[:, :, None] + block.sources % width
    segments = block.sources // width % group_size
    tokens, targets, positions, segments, sources = (
        x.reshape(-1, shape[-1]) for x in (tokens, targets, positions, segments, block.sources)
    )
    hidden, _ = policy.forward(params, tokens, positions, sources >= 0, prefix=prefix, segments=segments)
    unembed = lambda h: policy.unembed(params, h)  # noqa: E731
    logps, entropy = completion_logps(hidden, unembed, targets, temperature=temperature, chunk_size=chunk_size)
    return logps.reshape(shape), entropy.reshape(shape)


def take_prefix(prefix: Any, block: Block) -> Any:
    """The cache [X · P, ...] of the prompts as [X · N, ...], the prompt of each row of the block."""
    shards, rows = block.prompts.shape

    def take(x: jax.Array) -> jax.Array:
        taken = jax.vmap(lambda x, at: x[at])(by_shard(x, shards), block.prompts)
        return taken.reshape(shards * rows, *x.shape[1:])

    return jax.tree.map(take, prefix)


def align(first: jax.Array, packed: jax.Array, block: Block) -> jax.Array:
    """[X, Q, G] of first tokens and [X, N, R] of what follows each place -> [X, Q, G, T]."""
    return jnp.concatenate([first[..., None], from_places(packed, block.places)], axis=-1)


def by_shard(x: jax.Array, shards: int) -> jax.Array:
    """[X · P, ...] -> [X, P, ...]."""
    return x.reshape(shards, -1, *x.shape[1:])
