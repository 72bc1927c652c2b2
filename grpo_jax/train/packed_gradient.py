"""The gradient of a loss of groups, one micro-batch of packed completions after the other: `jax.grad` in bounded memory.

Each token is run once, and differentiated once:

    the prompts      are run; completions attend to their cache, and first tokens are predicted from their last state
    each micro-batch is run; the loss of its groups gives the slopes of its log-probabilities, which are pulled back through the
                     model to the parameters and to the cache of the prompts, and summed over micro-batches
    the prompts      are not run again: the summed slopes of their cache are pulled back to the parameters, once for all

A slope is a cotangent: the gradient of the loss with respect to that array.

Dimension key: see grpo_jax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.objective import LossTerms
from grpo_jax.rollout import Policy
from grpo_jax.rollout.packing import (
    Packing,
    by_shard,
    over_microbatches,
    put_groups,
    take_groups,
    take_microbatch,
    to_slots,
)
from grpo_jax.rollout.scoring import align, score_first, score_microbatch, take_prefix
from grpo_jax.train.step import Batch


def packed_gradient(
    loss_terms: Callable[[Batch, jax.Array, jax.Array], LossTerms],
    policy: Policy,
    params: Any,
    batch: Batch,
    packing: Packing,
    *,
    through_entropy: bool,
    temperature: float,
    chunk_size: int | None,
) -> tuple[Any, jax.Array, jax.Array]:
    """The gradient of ``loss_terms(batch, logps, entropy).total`` with respect to ``params``.

    Args:
      loss_terms: (groups of the batch, logps, entropy), arrays [..., G, T] -> `LossTerms`, sums over groups.
      policy, params: the model.
      batch: of P prompts.
      packing: of the batch's mask.
      through_entropy: whether the loss has a gradient with respect to the entropy.
      temperature, chunk_size: as of `score_groups`.

    Returns:
      (gradient, logps [P, G, T], entropy [P, G, T]).
    """
    shards, width = packing.sizes.shape[0], batch.mask.shape[-1]
    scoring: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    entropy_of = (lambda x: x) if through_entropy else jax.lax.stop_gradient

    # Run the prompts; ``pull_prompts`` takes slopes of their results back to the parameters.
    def run_prompts(params: Any) -> tuple[Any, Any]:
        logps, entropy, prefix = score_first(policy, params, batch.prompts, batch.completions, **scoring)
        floats, others = _split_floats(prefix)
        return (logps, entropy_of(entropy), floats), others

    (*first, prefix), pull_prompts, others = jax.vjp(
        run_prompts, params, has_aux=True
    )  # first: logps and entropy [P, G]
    lengths = batch.prompts.lengths()  # [P]
    groups, first, lengths = jax.tree.map(partial(by_shard, shards=shards), (batch, first, lengths))  # [X, P, ...]

    def add_microbatch(number: int | jax.Array, sums: Any) -> Any:
        gradient, prefix_slopes, aligned = sums
        microbatch = take_microbatch(packing, number, width)
        own, own_first = jax.tree.map(lambda x: take_groups(x, microbatch.groups), (groups, first))  # [X, M, ...]
        row_prefix, row_others = take_prefix(prefix, microbatch), take_prefix(others, microbatch)  # [X · R, ...]

        # Run its rows.
        def run_rows(params: Any, row_prefix: Any) -> tuple[jax.Array, jax.Array]:
            cache = _join(row_prefix, row_others)
            logps, entropy = score_microbatch(policy, params, cache, own.completions, lengths, microbatch, **scoring)
            return logps, entropy_of(entropy)

        packed, pull_rows = jax.vjp(run_rows, params, row_prefix)  # packed: two of [X, R, C]
        scores = [align(x, y, microbatch) for x, y in zip(own_first, packed, strict=True)]  # two of [X, M, G, T]

        # The slopes of the loss of its groups, in log-probabilities and entropies.
        slopes = jax.grad(lambda *scores: loss_terms(own, *scores).total, (0, 1))(*scores)  # two of [X, M, G, T]

        # Pull them back through the rows. Token t + 1 is predicted in the slot of token t, so slopes move one to the left. That
        # of the first token goes round to the end, where there is no slot; it is pulled back with the prompts.
        in_slots = tuple(to_slots(jnp.roll(x, -1, axis=-1), microbatch.slot_tokens) for x in slopes)  # [X, R, C]
        increment, row_slopes = pull_rows(in_slots)
        values = (*scores, *(x[..., 0] for x in slopes))
        return (
            jax.tree.map(jnp.add, gradient, increment),
            jax.tree.map(lambda sum_, x: _add_rows(sum_, microbatch.row_prompts, x), prefix_slopes, row_slopes),
            [put_groups(x, microbatch.groups, y) for x, y in zip(aligned, values, strict=True)],
        )

    # What the micro-batches add to: the gradient; the slopes of the prompts' cache, in float32 whatever the cache's type; and,
    # not summed but put in their places, each group's log-probabilities, entropies, and the slopes of both at the first tokens.
    per_token = jnp.zeros((*groups.mask.shape[:-1], width), jnp.float32)  # [X, P, G, T]
    prefix_slopes = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), prefix)
    aligned = [per_token, per_token, per_token[..., 0], per_token[..., 0]]
    sums: Any = jax.tree.map(jnp.zeros_like, params), prefix_slopes, aligned
    gradient, prefix_slopes, aligned = over_microbatches(packing, add_microbatch, sums)
    logps, entropy, *first_slopes = (
        x.reshape(-1, *x.shape[2:]) for x in aligned
    )  # [P, G, T], [P, G, T], [P, G], [P, G]

    # Pull the slopes of the prompts' results back to the parameters.
    prefix_slopes = jax.tree.map(lambda x, y: x.astype(y.dtype), prefix_slopes, prefix)
    (increment,) = pull_prompts((*first_slopes, prefix_slopes))
    return jax.tree.map(jnp.add, gradient, increment), logps, entropy


def _split_floats(cache: Any) -> tuple[Any, Any]:
    """Splits a cache into its float leaves and the others: two trees, each with None where the other has a leaf."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    floats = jax.tree.map(lambda x: x if is_float(x) else None, cache)
    return floats, jax.tree.map(lambda x: None if is_float(x) else x, cache)


def _join(floats: Any, others: Any) -> Any:
    """The cache that `_split_floats` split."""
    return jax.tree.map(lambda x, y: y if x is None else x, floats, others, is_leaf=lambda x: x is None)


def _add_rows(total: jax.Array, row_prompts: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds rows [X · R, ...] to the total [X · P, ...]; ``row_prompts`` [X, R] says to which prompt."""
    shards = len(row_prompts)
    add = jax.vmap(lambda x, at, rows: x.at[at].add(rows))
    return add(by_shard(total, shards), row_prompts, by_shard(rows.astype(total.dtype), shards)).reshape(total.shape)
