"""Group sampling: each prompt is run once, and its G completions are decoded together in one program.

Dimension key: see grpo_jax.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grpo_jax.rollout.compaction import Decoding, Stage, choose_stages, run_stages
from grpo_jax.rollout.policy import Policy
from grpo_jax.rollout.token_sampling import sample_tokens


class PromptBatch(NamedTuple):
    """A batch of prompts.

    Attributes:
      tokens: [P, S] int32, padded on either side.
      mask: [P, S] bool, True on tokens; at least one per row.
      index: [P] int32, row of the dataset; the random numbers of the prompt's completions depend on it.
      shared: [P, K] int32, the same in each row: tokens that come before those of ``tokens`` in all prompts. They are run once
        for all, and not once for each. None: there are none.
    """

    tokens: jax.Array
    mask: jax.Array
    index: jax.Array  # type: ignore[assignment]  # tuples have a method of this name
    shared: jax.Array | None = None

    def lengths(self) -> jax.Array:
        """[P] int32, tokens of each prompt."""
        return self.mask.sum(-1, dtype=jnp.int32) + jnp.int32(self.num_shared)

    @property
    def num_shared(self) -> int:
        """K, tokens that all prompts begin with and that are run once."""
        return 0 if self.shared is None else self.shared.shape[1]


class Rollout(NamedTuple):
    """Completions of a batch of prompts, in groups.

    Attributes:
      completions: [P, G, T] int32; pad_id after the end.
      mask: [P, G, T] bool, True on the completion's tokens; the stop token is one of them, since stopping is an action.
      logps: [P, G, T] float32, log-probability of each token under the sampler; 0 where the mask is False.
      truncated: [P, G] bool, True where the completion ran into T without a stop.
      useful: [] float32, tokens per row-step: the share of decoding steps that gave a token.
    """

    completions: jax.Array
    mask: jax.Array
    logps: jax.Array
    truncated: jax.Array
    useful: jax.Array


class Rows(NamedTuple):
    """What belongs to a row while it is decoded.

    Attributes:
      origin: [B] int32, p · G + g.
      prompt_length: [B] int32.
      uniform: [B, T] float32, the random number of each token.
      token: [B] int32, the last one.
      live: [B] bool, False once the completion has ended.
      stop_state: [B] int32, of the stop table.
      length: [B] int32, tokens of the completion so far.
      completions, logps: [B, T].
    """

    origin: jax.Array
    prompt_length: jax.Array
    uniform: jax.Array
    token: jax.Array
    live: jax.Array
    stop_state: jax.Array
    length: jax.Array
    completions: jax.Array
    logps: jax.Array


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
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    min_p: float | jax.Array | None = None,
    greedy: bool = False,
    first_sample: int | jax.Array = 0,
    stop_table: jax.Array | None = None,
    vmap_axis: str | tuple[str, ...] | None = None,
    stages: tuple[Stage, ...] | None = None,
) -> Rollout:
    """Samples ``group_size`` completions of every prompt.

    The prompt's keys and values are computed once and shared by its group. The completions are decoded together, without the
    rows that have ended (see compaction.py). A token is sampled by inverting the cumulative distribution at one uniform number,
    which is a function of (key, prompt index, sample index, position) alone. So neither the batch split, nor the padding, nor
    the stages, nor the number of devices changes the random numbers of a completion.

    Args:
      policy, params: the model.
      prompts: [P, S].
      key: of the iteration (a function of seed and iteration).
      group_size: G, samples ``first_sample … first_sample + G − 1`` of each prompt.
      max_completion: T.
      stop_ids: tokens that end a completion.
      pad_id: fills completions after their end; may equal a stop id, the mask tells them apart.
      temperature: of the sampling distribution.
      top_k, top_p, min_p: sample the most probable tokens alone, see `keep_likely`; ``logps`` are then those of the truncated
        distribution, while `score_groups` scores the whole one.
      greedy: take the most probable token instead (``logps`` are then still those of the distribution).
      first_sample: sample index of the group's first member, to sample more completions of the same prompts.
      stop_table: [states, V] integers; a row starts in state 0, a token takes it from state s to ``stop_table[s, token]``, and
        the last state ends the completion.
      vmap_axis: name of an axis of `jax.vmap` or `jax.shard_map` around this call, or several. Its members then make their steps
        together, until the last of them is done; without it, vmap would turn every step into a choice between the old and the
        new cache.
      stages: how the rows are decoded, which changes time and not the result; None chooses, see `choose_stages`.

    Returns:
      `Rollout`.

    Raises:
      ValueError: a top_k, top_p or min_p that is out of range, or stages that do not begin with all rows, do not shrink, or do
        not reach T − 1 slots.

    >>> eye = lambda params, tokens, *_, cache, **__: (jax.nn.one_hot(tokens, 5), cache)
    >>> policy = Policy(eye, lambda params, hidden: hidden @ params, lambda batch, length: jnp.zeros((batch, length)))
    >>> prompts = PromptBatch(jnp.array([[1], [3]]), jnp.ones((2, 1), bool), jnp.arange(2))
    >>> count_on = 100 * jnp.roll(jnp.eye(5), 1, axis=1)  # after token i comes i + 1
    >>> options = dict(group_size=1, max_completion=3, stop_ids=(4,))
    >>> rollout = sample_groups(policy, count_on, prompts, jax.random.key(0), **options)
    >>> rollout.completions[:, 0].tolist(), rollout.truncated[:, 0].tolist()
    ([[2, 3, 4], [4, 0, 0]], [False, False])
    """
    num_prompts = prompts.tokens.shape[0]
    num_rows = num_prompts * group_size
    if stages is None:
        stages = choose_stages(num_rows, max_completion, by_slots=not policy.in_place)
    _check_stages(stages, num_rows, max_completion)
    params = policy.prepare(params, prompts.num_shared + prompts.tokens.shape[1] + max_completion)
    stops = jnp.array(stop_ids, jnp.int32)
    table = None if stop_table is None else jnp.asarray(stop_table)
    sample = partial(sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, greedy=greedy)

    def append_token(rows: Rows, hidden: jax.Array, position: jax.Array) -> Rows:
        """Appends to each live row the token that its hidden state [n, D] predicts."""
        logits = policy.unembed(params, hidden)  # [n, V]
        uniform = lax.dynamic_index_in_dim(rows.uniform, position, 1, keepdims=False)  # [n]
        token, logp = sample(logits, uniform)  # [n] each
        token = jnp.where(rows.live, token, jnp.int32(pad_id))
        # A completion ends with a stop token, or where the stop table says so.
        ended, stop_state = (token[:, None] == stops[None, :]).any(-1), rows.stop_state  # [n] each
        if table is not None:
            stop_state = table[stop_state, token].astype(jnp.int32)
            ended |= stop_state == len(table) - 1
        logp = jnp.where(rows.live, logp, 0.0)
        return rows._replace(
            token=token,
            live=rows.live & ~ended,
            stop_state=stop_state,
            length=rows.length + rows.live.astype(jnp.int32),
            completions=lax.dynamic_update_slice_in_dim(rows.completions, token[:, None], position, 1),
            logps=lax.dynamic_update_slice_in_dim(rows.logps, logp[:, None], position, 1),
        )

    def decode_step(position: jax.Array, rows: Rows, cache: Any, prefix: Any, slots: int) -> tuple[Rows, Any]:
        """Runs the model on the last token of each row, and appends the next one."""
        slot = position - 1
        tokens = rows.token[:, None]  # [n, 1]
        positions = (rows.prompt_length + slot)[:, None]  # [n, 1]
        mask = rows.live[:, None]  # [n, 1]
        # After a compaction, rows are no longer in the order of the prompts.
        order = {"order": rows.origin} if policy.in_place and len(rows.origin) < num_rows else {}
        hidden, cache = policy.forward(
            params, tokens, positions, mask, cache=cache, start=slot, prefix=prefix, slots=slots, **order
        )  # [n, 1, D]
        return append_token(rows, hidden[:, 0], position), cache

    def max_over_members(count: jax.Array) -> jax.Array:
        """All members of a vmap make as many steps as the one that needs most."""
        return count if vmap_axis is None else lax.pmax(count, vmap_axis)

    # Run the prompts once, and let their last states predict the first token of each completion.
    hidden, prefix = prefill(policy, params, prompts)  # [P, D]
    rows = Rows(
        origin=jnp.arange(num_rows, dtype=jnp.int32),
        prompt_length=jnp.repeat(prompts.lengths(), group_size),
        uniform=uniform_numbers(key, prompts.index, first_sample, group_size, max_completion),
        token=jnp.zeros(num_rows, jnp.int32),
        live=jnp.ones(num_rows, bool),
        stop_state=jnp.zeros(num_rows, jnp.int32),
        length=jnp.zeros(num_rows, jnp.int32),
        completions=jnp.full((num_rows, max_completion), pad_id, jnp.int32),
        logps=jnp.zeros((num_rows, max_completion), jnp.float32),
    )
    rows = append_token(rows, jnp.repeat(hidden, group_size, axis=0), jnp.int32(0))

    # Decode until every completion has ended.
    live = max_over_members(rows.live.sum(dtype=jnp.int32))
    cache = policy.init_cache(num_rows, max_completion)
    state = Decoding(jnp.int32(1), live, jnp.int32(num_rows), rows, cache)
    state = run_stages(
        state,
        stages,
        decode_step,
        prefix,
        length=max_completion,
        group_size=None if policy.in_place else group_size,
        max_over_members=max_over_members,
    )

    # Bring the rows back into the order of prompts and groups.
    order = jnp.argsort(state.rows.origin)  # [B]
    rows = jax.tree.map(lambda x: x[order].reshape(num_prompts, group_size, *x.shape[1:]), state.rows)  # [P, G, ...]
    mask = jnp.arange(max_completion, dtype=jnp.int32)[None, None] < rows.length[..., None]  # [P, G, T]
    useful = rows.length.sum(dtype=jnp.float32) / state.work.astype(jnp.float32)
    # A row that is still live has run into T.
    return Rollout(rows.completions, mask, rows.logps, truncated=rows.live, useful=useful)


def uniform_numbers(
    key: jax.Array, index: jax.Array, first_sample: int | jax.Array, group_size: int, length: int
) -> jax.Array:
    """[B, T] float32 in [0, 1), each a function of the key, its prompt's index, sample and position, and of nothing else.

    All are made at once: making a key for each row at every step would cost more than the number itself.
    """
    samples = jnp.arange(group_size, dtype=jnp.int32) + jnp.asarray(first_sample, jnp.int32)

    def number(prompt: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        sample_key = jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
        return jax.random.uniform(jax.random.fold_in(sample_key, position))

    by_position = jax.vmap(number, (None, None, 0))
    by_sample = jax.vmap(by_position, (None, 0, None))
    numbers = jax.vmap(by_sample, (0, None, None))(index, samples, jnp.arange(length, dtype=jnp.int32))  # [P, G, T]
    return numbers.reshape(-1, length)


def prefill(policy: Policy, params: Any, prompts: PromptBatch) -> tuple[jax.Array, Any]:
    """Runs the prompts once: the state that predicts the first completion token [P, D], and the cache that the group shares."""
    # The shared beginning, as one row that all prompts then see.
    beginning: dict[str, Any] = {}
    if prompts.shared is not None:
        tokens = prompts.shared[:1]  # [1, K]
        numbers, cache = jnp.arange(prompts.num_shared, dtype=jnp.int32)[None], policy.init_cache(*tokens.shape)
        _, cache = policy.forward(params, tokens, numbers, jnp.ones(tokens.shape, bool), cache=cache, start=0)
        beginning = {"prefix": cache}

    # The prompts' own tokens.
    cache = policy.init_cache(*prompts.tokens.shape)
    positions = prompts.num_shared + prompt_positions(prompts.mask)  # [P, S]
    hidden, cache = policy.forward(
        params, prompts.tokens, positions, prompts.mask, cache=cache, start=0, **beginning
    )  # [P, S, D]
    if beginning:
        cache = jax.tree.map(_behind, beginning["prefix"], cache)
    width = prompts.mask.shape[1]
    last = width - 1 - jnp.argmax(prompts.mask[:, ::-1], axis=1)  # [P]
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


def _behind(beginning: jax.Array, own: jax.Array) -> jax.Array:
    """The slots of a cache's leaf [1, ..., K], for each row, and behind them those of [P, ..., S]."""
    rows = jnp.broadcast_to(beginning, (*own.shape[:-1], beginning.shape[-1]))
    return jnp.concatenate([rows, own], axis=-1)


def prompt_positions(mask: jax.Array) -> jax.Array:
    """[P, S] int32: each token's number in its prompt, from 0 on, whatever side is padded."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def _check_stages(stages: tuple[Stage, ...], rows: int, length: int) -> None:
    sizes = [stage.rows for stage in stages]
    shrinking = all(more > fewer > 0 for more, fewer in itertools.pairwise(sizes))
    if sizes[0] != rows or not shrinking or any(stage.slots[-1] < length - 1 for stage in stages):
        raise ValueError(
            f"stages {stages} must begin with all {rows} rows, have fewer each, and reach {length - 1} slots"
        )
