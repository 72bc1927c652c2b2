"""Compaction: decoding with a batch that shrinks, so that completions that have ended cost nothing.

All completions start together, one row each, and take their steps together: with enough memory for all of them, no other order
takes fewer steps. When enough rows have ended, live rows from the back move into ended rows at the front, and from then on
only the front is decoded. Two prompts, G = 3 completions each, T = 5, and stages of 6, 3 and 1 rows:

    tokens of each completion      a 4    b 2    c 3    d 5    e 1    f 2

                  row              0   1   2   3   4   5
    6 rows        position 0       a0  b0  c0  d0  e0  f0      predicted from the prompts; e ends
                  position 1       a1  b1  c1  d1  .   f1      b and f end: 3 rows live, and the next stage has 3
    compaction                     a   d   c | b   e   f       d moves from row 3 into row 1, where b has ended
    3 rows        position 2       a2  d2  c2                  c ends
                  position 3       a3  d3  .                   a ends: 1 row lives, and the next stage has 1
    compaction                     d | a   c   b   e   f       d moves from row 1 into row 0
    1 row         position 4       d4                          d ends

These are 6 + 6 + 3 + 3 + 1 = 19 steps of a row for 17 tokens; without compaction there are 5 · 6 = 30.

A stage also leaves out slots of the cache that are still empty, block by block. Shapes are static: every pair of a number of
rows and a number of slots is a loop of its own, compiled once. A loop that is not needed makes no step.

Dimension key: see grpo_jax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Stage(NamedTuple):
    """How many rows are decoded together, until the live ones fit into the next stage.

    Attributes:
      rows: their number.
      slots: how many slots of the cache are read: the first number until that many are filled, then the next.
    """

    rows: int
    slots: tuple[int, ...]


class Decoding(NamedTuple):
    """What the loops carry.

    Attributes:
      position: [] int32, of the token to sample next.
      live: [] int32, rows that have not ended; with ``vmap_axis``, the largest such count of all members.
      work: [] int32, row-steps so far: the rows of every step, summed.
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


def choose_stages(rows: int, length: int, *, by_slots: bool = True) -> tuple[Stage, ...]:
    """The stages for B rows and T tokens. More stages save steps and slots, but each loop compiles for about a second.

    The rows fall by a quarter and by a third in turn, at most six times and until 8 or fewer are left: a step of fewer rows costs
    no less, since it must read the weights. With ``by_slots`` the slots come in at most four parts, and in fewer for later
    stages, where few slots are still empty. Short completions are not worth the compilation.

    >>> [(stage.rows, stage.slots) for stage in choose_stages(64, 128)]
    [(64, (64, 128)), (48, (128,)), (32, (128,)), (24, (128,)), (16, (128,)), (12, (128,)), (8, (128,))]
    >>> choose_stages(800, 8)
    (Stage(rows=800, slots=(8,)),)
    """
    sizes = [rows]
    while sizes[-1] > 8 and len(sizes) < min(7, 1 + length // 16):
        sizes.append(-(-3 * sizes[-1] // 4) if len(sizes) % 2 else -(-2 * sizes[-1] // 3))
    # Each stage has half as many parts as the one before it.
    parts = [max(1, min(4 if by_slots else 1, length // 64) >> number) for number in range(len(sizes))]
    slots = [tuple(-(-length * (part + 1) // count) for part in range(count)) for count in parts]
    return tuple(map(Stage, sizes, slots))


def run_stages(
    state: Decoding,
    stages: tuple[Stage, ...],
    step: Step,
    prefix: Any,
    *,
    length: int,
    group_size: int | None,
    max_over_members: Callable[[jax.Array], jax.Array],
) -> Decoding:
    """Decodes until every row has ended or holds ``length`` tokens.

    Args:
      state: after the first token; ``rows`` has fields ``origin`` [B] int32 (the row's number, 0 to B − 1 in this order) and
        ``live`` [B] bool.
      stages: the first has all rows, and each has fewer than the one before it.
      step: samples one token of each row.
      prefix: the prompts' cache; row ``r`` of B sees that of prompt r // group_size.
      length: T.
      group_size: G; None where ``step`` finds the prefix of a row by its origin. Else each row is given its own.
      max_over_members: number -> the largest among the members of a `jax.vmap` that make their steps together.

    Returns:
      `Decoding`, its rows in any order.
    """

    def decode(state: Decoding, stage: Stage, next_rows: int, prefix: Any) -> Decoding:
        """Steps of the rows in front, until no more than ``next_rows`` are live."""
        front = jax.tree.map(lambda x: x[: stage.rows], state.rows)  # [n, ...]
        behind = jax.tree.map(lambda x: x[stage.rows :], state.rows)  # [B − n, ...]
        state = state._replace(rows=front)
        for slots in stage.slots:

            def advance(state: Decoding, slots: int = slots) -> Decoding:
                rows, cache = step(state.position, state.rows, state.cache, prefix, slots)
                live = max_over_members(rows.live.sum(dtype=jnp.int32))
                return Decoding(state.position + 1, live, state.work + stage.rows, rows, cache)

            # A token enters the cache when the next one is sampled, so n filled slots are enough for position n.
            end = min(slots + 1, length)
            with jax.named_scope(f"decode_{stage.rows}_rows_{slots}_slots"):  # for profiles and compiled programs
                state = lax.while_loop(partial(_goes_on, end=end, next_rows=next_rows), advance, state)
        return state._replace(rows=jax.tree.map(lambda *parts: jnp.concatenate(parts), state.rows, behind))

    def compact(state: Decoding, size: int) -> tuple[Decoding, Any]:
        """Moves live rows to the front.

        Also returns the prefix of each of the first ``size`` rows, which are no longer in the order of the prompts.
        """
        holes, movers, count = _plan_moves(state.rows.live, size)
        # Rows are swapped, because the completion of an ended row must not be lost.
        order = jnp.arange(len(state.rows.live), dtype=jnp.int32)  # [B]
        order = order.at[holes].set(movers).at[movers].set(holes)
        rows = jax.tree.map(lambda x: x[order], state.rows)  # [B, ...]
        # In the cache, only live rows move, one by one: a gather of all rows takes ten times as long on a CPU.
        cache = lax.fori_loop(0, max_over_members(count), partial(_move_in_cache, holes, movers), state.cache)
        state = state._replace(rows=rows, cache=cache)
        if group_size is None:
            return state, prefix
        prompts = rows.origin[:size] // group_size  # [n]
        return state, lax.map(lambda p: jax.tree.map(lambda x: x[p], prefix), prompts)

    # Each stage ends when its live rows fit into the next one; the last, when none is live.
    next_rows = [stage.rows for stage in stages[1:]] + [0]
    state = decode(state, stages[0], next_rows[0], prefix)
    for stage, fewer in zip(stages[1:], next_rows[1:], strict=True):

        def enter(state: Decoding, stage: Stage = stage, fewer: int = fewer) -> Decoding:
            state, row_prefix = compact(state, stage.rows)
            return decode(state, stage, fewer, row_prefix)

        # A loop that runs at most once. Unlike lax.cond it does not copy the cache, and it costs nothing if it is not entered.
        state = lax.while_loop(partial(_goes_on, end=length, next_rows=fewer), enter, state)
    return state


def _goes_on(state: Decoding, *, end: int, next_rows: int) -> jax.Array:
    return (state.position < end) & (state.live > next_rows)


def _plan_moves(live: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(holes, movers, count): ended rows among the first ``size`` of B, and the live rows behind that move into them.

    ``holes`` and ``movers`` have the length min(size, B − size), of which the first ``count`` are moves. In the rest
    a row is its own mover, so nothing moves.

    >>> live = jnp.array([True, False, True, True, False, False])  # a b c d e f of the head of this file, before position 2
    >>> holes, movers, count = _plan_moves(live, 3)
    >>> holes.tolist(), movers.tolist(), int(count)
    ([1, 0, 2], [3, 0, 2], 1)
    """
    longest = min(size, len(live) - size)
    holes = jnp.argsort(live[:size], stable=True)[:longest].astype(jnp.int32)
    movers = size + jnp.argsort(~live[size:], stable=True)[:longest].astype(jnp.int32)
    count = live[size:].sum(dtype=jnp.int32)
    return holes, jnp.where(jnp.arange(longest) < count, movers, holes), count


def _move_in_cache(holes: jax.Array, movers: jax.Array, number: int | jax.Array, cache: Any) -> Any:
    def move(x: jax.Array) -> jax.Array:
        row = lax.dynamic_index_in_dim(x, movers[number], keepdims=True)
        return lax.dynamic_update_index_in_dim(x, row, holes[number], 0)

    return jax.tree.map(move, cache)
