"""Decoding without work for rows that have ended: loops over fewer and fewer rows, and over no more slots than are filled.

All rows start at once and stay in step: with enough memory for all of them, no order of decoding takes fewer steps. When half
of the rows have ended, those that live move to the front, and only the front is decoded on. Shapes are static: every pair of
a number of rows and a number of slots is a loop of its own, compiled once, and a loop that is not needed makes no step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Stage(NamedTuple):
    """So many rows are decoded together, until no more live than the next stage has.

    Attributes:
      rows: how many.
      slots: how many of the cache's slots are read: the first number until its slots are filled, then the next one.
    """

    rows: int
    slots: tuple[int, ...]


class Decoding(NamedTuple):
    """What the loops carry.

    Attributes:
      position: [] int32, of the token to draw next.
      live: [] int32, rows that have not ended; with ``in_step``, of the member of the axis that has most.
      work: [] int32, rows times steps so far.
      rows: pytree of arrays [B, ...]: what belongs to a row, in the order of the cache's rows.
      cache: of the policy, B rows.
    """

    position: jax.Array
    live: jax.Array
    work: jax.Array
    rows: Any
    cache: Any


Step = Callable[[jax.Array, Any, Any, Any, int], tuple[Any, Any]]
"""(position, rows [n, ...], cache [B, ...], prefix, slots) -> (rows, cache)."""


def choose_stages(rows: int, length: int) -> tuple[Stage, ...]:
    """The stages for B rows and T tokens: more of them save steps and slots, and each pair compiles for about a second.

    Rows halve down to 8, at most three times: below, a step costs as much as reading the weights does. Slots come in
    quarters for all rows, in halves for half of them, and at once for fewer: late stages are seldom early in the cache.
    Short completions are not worth the compilation.

    >>> [(stage.rows, stage.slots) for stage in choose_stages(64, 128)]
    [(64, (32, 64, 96, 128)), (32, (64, 128)), (16, (128,)), (8, (128,))]
    >>> choose_stages(800, 8)
    (Stage(rows=800, slots=(8,)),)
    """
    sizes = [rows]
    while sizes[-1] > 8 and len(sizes) < min(4, 1 + length // 16):
        sizes.append(-(-sizes[-1] // 2))
    parts = [max(1, min(4, length // 16) >> i) for i in range(len(sizes))]
    slots = [tuple(-(-length * (j + 1) // n) for j in range(n)) for n in parts]
    return tuple(Stage(size, ends) for size, ends in zip(sizes, slots, strict=True))


def run_stages(
    state: Decoding,
    stages: tuple[Stage, ...],
    step: Step,
    prefix: Any,
    *,
    length: int,
    group_size: int,
    count_live: Callable[[Any], jax.Array],
) -> Decoding:
    """Decodes until every row has ended or holds ``length`` tokens.

    Args:
      state: after the first token; ``rows`` has fields ``origin`` [B] int32 (the row's number, 0 to B − 1 in this order) and
        ``live`` [B] bool.
      stages: the first has all rows and each fewer than the one before.
      step: draws one token of each row.
      prefix: of the prompts; row ``r`` of B has that of prompt r // group_size.
      length: T.
      group_size: G.
      count_live: rows -> [] int32, see `Decoding.live`.

    Returns:
      `Decoding`, its rows in any order.
    """

    def decode(state: Decoding, stage: Stage, fewer: int, prefix: Any) -> Decoding:
        here, rest = (
            jax.tree.map(lambda x, s=s: x[s], state.rows) for s in (slice(stage.rows), slice(stage.rows, None))
        )
        state = state._replace(rows=here)
        for slots in stage.slots:

            def advance(state: Decoding, slots: int = slots) -> Decoding:
                rows, cache = step(state.position, state.rows, state.cache, prefix, slots)
                return Decoding(state.position + 1, count_live(rows), state.work + stage.rows, rows, cache)

            end = min(slots + 1, length)  # the token of a position is written when the next one is drawn
            state = lax.while_loop(partial(_more, end=end, fewer=fewer), advance, state)
        rows = jax.tree.map(lambda front, back: jnp.concatenate([front, back]), state.rows, rest)
        return state._replace(rows=rows)

    def compact(state: Decoding, size: int) -> tuple[Decoding, Any]:
        """The live rows first; and the prefix of each row that goes on, so that rows and prompts need no common order."""
        order = jnp.argsort(~state.rows.live, stable=True)
        rows = jax.tree.map(lambda x: x[order], state.rows)
        cache = jax.tree.map(lambda x: lax.dynamic_update_slice_in_dim(x, x[order[:size]], 0, 0), state.cache)
        prompts = rows.origin[:size] // group_size
        return state._replace(rows=rows, cache=cache), jax.tree.map(lambda x: x[prompts], prefix)

    fewer = [stage.rows for stage in stages[1:]] + [0]
    state = decode(state, stages[0], fewer[0], prefix)
    for stage, least in zip(stages[1:], fewer[1:], strict=True):

        def enter(state: Decoding, stage: Stage = stage, least: int = least) -> Decoding:
            state, own_prefix = compact(state, stage.rows)
            return decode(state, stage, least, own_prefix)

        # A loop that runs at most once: unlike a branch it leaves the cache where it is, and costs nothing if it is not entered.
        state = lax.while_loop(partial(_more, end=length, fewer=least), enter, state)
    return state


def _more(state: Decoding, *, end: int, fewer: int) -> jax.Array:
    return (state.position < end) & (state.live > fewer)
