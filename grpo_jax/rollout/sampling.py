"""Group sampling: each prompt is prefilled once, and its G completions are decoded together in one jitted loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.rollout.policy import Policy


class PromptBatch(NamedTuple):
    """Prompts of one iteration.

    Attributes:
      tokens: [P, S] int32, padded on either side.
      mask: [P, S] bool, True on tokens; at least one per row.
      index: [P] int32, row of the dataset; addresses the randomness of the prompt's completions.
    """

    tokens: jax.Array
    mask: jax.Array
    index: jax.Array  # type: ignore[assignment] # a field, and not the method of tuples


class Rollout(NamedTuple):
    """Completions of one iteration, in groups.

    Attributes:
      completions: [P, G, T] int32; pad_id after the end.
      mask: [P, G, T] bool, True on the completion's tokens; the stop token is one of them, since stopping is an action.
      logps: [P, G, T] float32, log-probability of each token under the sampler; 0 where the mask is False.
      truncated: [P, G] bool, True where the completion ran into T without a stop token.
    """

    completions: jax.Array
    mask: jax.Array
    logps: jax.Array
    truncated: jax.Array


def sample_groups(
    policy: Policy,
    params: Any,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    group_size: int,
    max_completion: int,
    stop_ids: tuple[int, ...],
    pad_id: int = 0,
    temperature: float | jax.Array = 1.0,
    greedy: bool = False,
    first_sample: int | jax.Array = 0,
) -> Rollout:
    """Samples ``group_size`` completions of every prompt.

    The prompt's keys and values are computed once and shared by its group without a copy; decoding is one ``while_loop`` that
    ends when every row has stopped. A token is drawn by inverting the cumulative distribution at one uniform number whose key
    is a function of (key, prompt index, sample index, position) alone, so neither the batch split, nor the padding, nor the
    number of devices changes the random numbers that a completion sees.

    Args:
      policy, params: the model.
      prompts: [P, S].
      key: of the iteration (a function of seed and iteration).
      group_size: G, samples ``first_sample … first_sample + G − 1`` of each prompt.
      max_completion: T.
      stop_ids: tokens that end a completion.
      pad_id: what stands after the end; may equal a stop id, the mask tells them apart.
      temperature: of the sampling distribution; ``logps`` are of that distribution.
      greedy: take the most probable token instead (``logps`` are then still those of the distribution).
      first_sample: sample index of the group's first member, to draw further samples of the same prompts.

    Returns:
      `Rollout`.
    """
    num_prompts = prompts.tokens.shape[0]
    rows = num_prompts * group_size
    samples = jnp.arange(group_size, dtype=jnp.int32) + jnp.asarray(first_sample, jnp.int32)
    row_keys = jax.vmap(lambda i: jax.vmap(lambda g: jax.random.fold_in(jax.random.fold_in(key, i), g))(samples))(
        prompts.index
    ).reshape(rows)
    stops = jnp.array(stop_ids, jnp.int32)

    def draw(hidden: jax.Array, position: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Token, its log-probability, and whether the row has ended, from hidden states [B, D]."""
        log_probs = jax.nn.log_softmax(policy.unembed(params, hidden) / temperature)
        if greedy:
            token = jnp.argmax(log_probs, -1).astype(jnp.int32)
        else:
            uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, position)))(row_keys)
            token = invert_cdf(jnp.exp(log_probs), uniform)
        logp = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        token = jnp.where(done, jnp.int32(pad_id), token)
        return token, jnp.where(done, 0.0, logp), done | (token[:, None] == stops[None, :]).any(-1)

    hidden, prefix = prefill(policy, params, prompts)
    lengths = jnp.repeat(prompts.mask.sum(-1).astype(jnp.int32), group_size)
    live = jnp.ones(rows, bool)
    token, logp, done = draw(jnp.repeat(hidden, group_size, axis=0), jnp.int32(0), ~live)
    completions = jnp.full((rows, max_completion), pad_id, jnp.int32).at[:, 0].set(token)
    logps = jnp.zeros((rows, max_completion), jnp.float32).at[:, 0].set(logp)
    mask = jnp.zeros((rows, max_completion), bool).at[:, 0].set(live)
    cache = policy.init_cache(rows, max_completion)

    def unfinished(carry: tuple) -> jax.Array:
        position, done = carry[0], carry[1]
        return (position < max_completion) & ~done.all()

    def decode(carry: tuple) -> tuple:
        position, done, token, cache, completions, logps, mask = carry
        slot = position - 1
        hidden, cache = policy.forward(
            params,
            token[:, None],
            (lengths + slot)[:, None],
            jax.lax.dynamic_slice_in_dim(mask, slot, 1, axis=1),
            cache=cache,
            start=slot,
            prefix=prefix,
        )
        token, logp, now_done = draw(hidden[:, 0], position, done)
        at = (jnp.int32(0), position)
        return (
            position + 1,
            now_done,
            token,
            cache,
            jax.lax.dynamic_update_slice(completions, token[:, None], at),
            jax.lax.dynamic_update_slice(logps, logp[:, None], at),
            jax.lax.dynamic_update_slice(mask, ~done[:, None], at),
        )

    carry = (jnp.int32(1), done, token, cache, completions, logps, mask)
    _, done, _, _, completions, logps, mask = jax.lax.while_loop(unfinished, decode, carry)
    grouped = lambda x: x.reshape(num_prompts, group_size, *x.shape[1:])  # noqa: E731
    return Rollout(grouped(completions), grouped(mask), grouped(logps), grouped(~done))


def prefill(policy: Policy, params: Any, prompts: PromptBatch) -> tuple[jax.Array, Any]:
    """Runs the prompts once: the state that predicts the first completion token [P, D], and the cache that the group shares."""
    cache = policy.init_cache(*prompts.tokens.shape)
    hidden, cache = policy.forward(
        params, prompts.tokens, prompt_positions(prompts.mask), prompts.mask, cache=cache, start=0
    )
    width = prompts.mask.shape[1]
    last = width - 1 - jnp.argmax(prompts.mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


def prompt_positions(mask: jax.Array) -> jax.Array:
    """[P, S] int32: 0 at each row's first token, counting tokens only, whatever side is padded."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def invert_cdf(probs: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index drawn from each row of probs [B, V] by its number uniform [B] in [0, 1): the first whose cumulative sum exceeds it.

    A token of probability 0 is never drawn: the threshold stays below the total, and a zero adds nothing to the sum.

    >>> invert_cdf(jnp.array([[0.0, 0.5, 0.5, 0.0]] * 3), jnp.array([0.0, 0.5, 0.9999999]))
    Array([1, 2, 2], dtype=int32)
    """
    cumulative = jnp.cumsum(probs, axis=-1)
    total = cumulative[:, -1]
    threshold = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return (cumulative <= threshold[:, None]).sum(-1, dtype=jnp.int32)
