"""Decoding without work for rows that have ended: loops over fewer and fewer rows, and over no more slots than are filled.

All rows start at once and stay in step: with enough memory for all of them, no order of decoding takes fewer steps. When
enough rows have ended, those that live and stand behind take the places of those that ended in front, and only the front is
decoded on. Shapes are static: every pair of a number of rows and a number of slots is a loop of its own, compiled once, and a
loop that is not needed makes no step.
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
      live: [] int32, rows that have not ended; with ``vmap_axis``, of the member of the axis that has most.
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

    Rows fall by a quarter and by a third in turn, to 8 and at most sixfold: below, a step costs as much as reading the weights
    does. Slots come in at most four parts for all rows, in fewer for fewer rows, which are seldom early in the cache. Short
    completions are not worth the compilation.

    >>> [(stage.rows, stage.slots) for stage in choose_stages(64, 128)]
    [(64, (64, 128)), (48, (128,)), (32, (128,)), (24, (128,)), (16, (128,)), (12, (128,)), (8, (128,))]
    >>> choose_stages(800, 8)
    (Stage(rows=800, slots=(8,)),)
    """
    sizes = [rows]
    while sizes[-1] > 8 and len(sizes) < min(7, 1 + length // 16):
        sizes.append(-(-3 * sizes[-1] // 4) if len(sizes) % 2 else -(-2 * sizes[-1] // 3))
    parts = [max(1, min(4, length // 64) >> i) for i in range(len(sizes))]
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
    most: Callable[[jax.Array], jax.Array],
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
      most: of a number, the largest among the members that decode in step.

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
                live = most(rows.live.sum(dtype=jnp.int32))
                return Decoding(state.position + 1, live, state.work + stage.rows, rows, cache)

            end = min(slots + 1, length)  # the token of a position is written when the next one is drawn
            state = lax.while_loop(partial(_more, end=end, fewer=fewer), advance, state)
        rows = jax.tree.map(lambda front, back: jnp.concatenate([front, back]), state.rows, rest)
        return state._replace(rows=rows)

    def compact(state: Decoding, size: int) -> tuple[Decoding, Any]:
        """The live rows first; and the prefix of each row that goes on, so that rows and prompts need no common order."""
        holes, movers, count = _moves(state.rows.live, size)
        order = jnp.arange(len(state.rows.live), dtype=jnp.int32)
        order = order.at[holes].set(movers).at[movers].set(holes)
        rows = jax.tree.map(lambda x: x[order], state.rows)
        # Row by row, and only those that move: a gather of all of them takes ten times as long on a CPU.
        cache = lax.fori_loop(0, most(count), partial(_move, holes, movers), state.cache)
        own_prefix = lax.map(lambda prompt: jax.tree.map(lambda x: x[prompt], prefix), rows.origin[:size] // group_size)
        return state._replace(rows=rows, cache=cache), own_prefix

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


def _moves(live: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ended rows among the first ``size`` of B, the live ones behind them that take their places, and how many of both count.

    Both have length min(size, B - size); where there are no more, each names a hole that stays where it is.

    >>> holes, movers, count = _moves(jnp.array([True, False, False, False, True, False]), 3)
    >>> holes.tolist(), movers.tolist(), int(count)
    ([1, 2, 0], [4, 2, 0], 1)
    """
    most = min(size, len(live) - size)
    holes = jnp.argsort(live[:size], stable=True)[:most].astype(jnp.int32)
    movers = size + jnp.argsort(~live[size:], stable=True)[:most].astype(jnp.int32)
    count = live[size:].sum(dtype=jnp.int32)
    return holes, jnp.where(jnp.arange(most) < count, movers, holes), count


def _move(holes: jax.Array, movers: jax.Array, number: int | jax.Array, cache: Any) -> Any:
    def move(x: jax.Array) -> jax.Array:
        row = lax.dynamic_index_in_dim(x, movers[number], keepdims=True)
        return lax.dynamic_update_index_in_dim(x, row, holes[number], 0)

    return jax.tree.map(move, cache)
