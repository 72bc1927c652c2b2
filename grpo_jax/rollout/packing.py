"""Packing: completions of many lengths laid behind each other in rows, so that the model is run on real tokens alone.

Two prompts, G = 3 completions each, T = 5, rows of C = 4 slots:

    tokens of each completion              packed rows
    prompt 0:   a 4    b 2    c 3          row 0   a0 a1 a2 b0    of prompt 0
    prompt 1:   d 5    e 1    f 2          row 1   c0 c1  .  .    of prompt 0
                                           row 2   d0 d1 d2 d3    of prompt 1
                                           row 3   f0  .  .  .    of prompt 1

In the slot of token a1 the model reads a1 and predicts a2. So the last token of a completion needs no slot: a completion of n
tokens takes n − 1 slots, and e takes none, for its one token is predicted from the prompt. The completions of a row
belong to one prompt, whose keys and values they all see; they do not see each other.

Rows are run in micro-batches of a fixed number of rows, which bounds the memory. The completions of one prompt stay in one
micro-batch, because the loss compares them. How many micro-batches are used depends on the lengths, and is a number that the
program computes: one compiled program serves all lengths.

Dimension key: see grpo_jax. Here P counts the prompts of one shard.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

# Unless memory forces less, a micro-batch has 1/8 of the rows that completions of full length would need, so that short ones
# use few micro-batches. With less than 1,024 slots a micro-batch costs more than it saves. Measured by
# experiments/benchmarks/update.py.
SHARES, LEAST_SLOTS = 8, 1024


Carry = TypeVar("Carry")


class Layout(NamedTuple):
    """How completions are laid out when they are scored. It changes time and memory, not the result.

    Attributes:
      microbatch_tokens: most slots of a micro-batch, per shard; more only where a single group needs more.
      row_length: C, slots of a packed row, at least T − 1; None chooses.
      shards: X, equal consecutive parts of the prompts that lie on different devices; no token leaves its shard.
      vmap_axis: name of a `jax.vmap` axis around the call, or several. Its members then run the same number of micro-batches,
        without which vmap would select between the old and the new sums at every step.
      chunk_size: positions whose logits exist at a time; None chooses, see `completion_logps`.
    """

    microbatch_tokens: int
    row_length: int | None = None
    shards: int = 1
    vmap_axis: str | tuple[str, ...] | None = None
    chunk_size: int | None = None


class Packing(NamedTuple):
    """Where every token of a batch is run. It has Python ints for shapes, and so stays inside one jitted function.

    Attributes:
      num_rows, row_length, num_groups: R, C, M.
      num_microbatches: the most micro-batches that may be needed.
      sizes: [X, P, G] int32, slots that a completion takes.
      first_slots: [X, P, G] int32, its first slot in its micro-batch: row · C + column.
      order: [X, P] int32, the prompts, micro-batch by micro-batch.
      starts: [X, num_microbatches + 1] int32, how many prompts lie before each micro-batch.
      used: [] int32, micro-batches in use; the most of any shard.
    """

    num_rows: int
    row_length: int
    num_groups: int
    num_microbatches: int
    sizes: jax.Array
    first_slots: jax.Array
    order: jax.Array
    starts: jax.Array
    used: jax.Array


class Microbatch(NamedTuple):
    """What one micro-batch holds.

    Attributes:
      groups: [X, M] int32, the prompts of its groups; P where there is none.
      row_prompts: [X, R] int32, the prompt of each row.
      slot_tokens: [X, R, C] int32, the token in each slot, as a flat index into [M, G, T]; −1 in empty slots.
      token_slots: [X, M, G, T − 1] int32, the slot of each token, as a flat index into [R, C]; R · C for tokens without a slot.
    """

    groups: jax.Array
    row_prompts: jax.Array
    slot_tokens: jax.Array
    token_slots: jax.Array


def first_fit(sizes: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """First-fit decreasing: the largest first, equal ones in order, each into the first bin with room for it.

    Args:
      sizes: [n] int32, from 0 to capacity.
      capacity: of every bin.

    Returns:
      (bin, start) [n] int32: the bin of each, and how much of the bin was taken before it.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973; checked against a loop in tests/rollout/test_packing.py.

    >>> first_fit(jnp.array([2, 3, 1, 2]), 4)
    (Array([1, 0, 0, 1], dtype=int32), Array([0, 0, 3, 2], dtype=int32))
    """

    def put(room: jax.Array, size: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        chosen = jnp.argmax(room >= size).astype(jnp.int32)
        return room.at[chosen].add(-size), (chosen, capacity - room[chosen])

    largest_first = jnp.argsort(-sizes, stable=True)
    _, placed = lax.scan(put, jnp.full(sizes.shape, capacity, jnp.int32), sizes[largest_first].astype(jnp.int32))
    chosen, start = (jnp.zeros_like(x).at[largest_first].set(x) for x in placed)
    return chosen, start


def pack(mask: jax.Array, layout: Layout) -> Packing:
    """Packs the completions of a batch.

    Args:
      mask: [X · P, G, T] bool, True on the first tokens of each completion.
      layout: see `Layout`.

    Returns:
      `Packing`.

    Raises:
      ValueError: prompts that the shards do not divide, or rows too short for a completion.

    >>> lengths = jnp.array([[4, 2, 3], [5, 1, 2]])  # a b c and d e f of the head of this file
    >>> packing = pack(jnp.arange(5)[None, None] < lengths[..., None], Layout(microbatch_tokens=16, row_length=4))
    >>> packing.sizes.tolist(), packing.first_slots.tolist()
    ([[[3, 1, 2], [4, 0, 1]]], [[[0, 3, 4], [8, 12, 12]]])
    >>> packing.num_rows, int(packing.used)
    (4, 1)
    """
    prompts, group_size, width = mask.shape
    longest = max(width - 1, 1)
    if prompts % layout.shards:
        raise ValueError(f"{prompts} prompts are not divisible by {layout.shards} shards")
    row_length = max(width, min(group_size * longest, 32)) if layout.row_length is None else layout.row_length
    if row_length < longest:
        raise ValueError(f"row_length={row_length} is too short for completions of up to {width} tokens")
    prompts //= layout.shards

    # The shapes, from the worst case that every completion has the full length. First fit puts at least row_length // longest
    # completions into every row of a group but the last, which bounds the rows of a group; likewise the groups of a micro-batch.
    group_rows = -(-group_size // (row_length // longest))
    num_rows = min(
        layout.microbatch_tokens // row_length, max(prompts * group_rows // SHARES, LEAST_SLOTS // row_length)
    )
    num_rows = min(max(num_rows, group_rows), prompts * group_rows)
    num_microbatches = -(-prompts // (num_rows // group_rows))

    # Completions into the rows of their group, then groups into micro-batches.
    sizes = jnp.maximum(mask.sum(-1, dtype=jnp.int32) - 1, 0).reshape(layout.shards, prompts, group_size)  # [X, P, G]
    row, column = jax.vmap(jax.vmap(lambda x: first_fit(x, row_length)))(sizes)  # [X, P, G] each
    microbatch, first_row = jax.vmap(lambda x: first_fit(x, num_rows))(row.max(-1) + 1)  # [X, P] each
    number = jnp.arange(num_microbatches + 1, dtype=jnp.int32)
    used = microbatch.max() + 1
    return Packing(
        num_rows=num_rows,
        row_length=row_length,
        num_groups=min(num_rows, prompts),  # a group has one row at least
        num_microbatches=num_microbatches,
        sizes=sizes,
        first_slots=(first_row[:, :, None] + row) * row_length + column,  # [X, P, G]
        order=jnp.argsort(microbatch * num_rows + first_row, axis=-1),  # [X, P]
        starts=(microbatch[:, None, :] < number[None, :, None]).sum(-1, dtype=jnp.int32),  # [X, num_microbatches + 1]
        used=used if layout.vmap_axis is None else lax.pmax(used, layout.vmap_axis),
    )


def take_microbatch(packing: Packing, number: int | jax.Array, width: int) -> Microbatch:
    """Micro-batch ``number`` of completions of T = ``width`` tokens.

    >>> lengths = jnp.array([[4, 2, 3], [5, 1, 2]])  # the tokens of a are 0 to 4, of b 5 to 9, … of f 25 to 29
    >>> packing = pack(jnp.arange(5)[None, None] < lengths[..., None], Layout(microbatch_tokens=16, row_length=4))
    >>> take_microbatch(packing, 0, 5).slot_tokens[0].tolist()
    [[0, 1, 2, 5], [10, 11, -1, -1], [15, 16, 17, 18], [25, -1, -1, -1]]
    """
    prompts, group_size = packing.sizes.shape[1:]
    num_slots = packing.num_rows * packing.row_length
    inside = jnp.arange(width - 1, dtype=jnp.int32)[None, None]  # [1, 1, T − 1]
    tokens = jnp.arange(packing.num_groups * group_size * width, dtype=jnp.int32).reshape(-1, group_size, width)

    def of_shard(sizes: jax.Array, first_slots: jax.Array, order: jax.Array, starts: jax.Array) -> Microbatch:
        # Its prompts: a range of ``order``, filled up with P, which stands for none.
        at = starts[number] + jnp.arange(packing.num_groups, dtype=jnp.int32)
        groups = jnp.where(at < starts[number + 1], order.at[at].get(mode="clip"), prompts)  # [M]
        # The slot of each token, and with it the token of each slot.
        sizes, first_slots = (
            x.at[groups].get(mode="fill", fill_value=0)[:, :, None] for x in (sizes, first_slots)
        )  # [M, G, 1]
        token_slots = jnp.where(inside < sizes, first_slots + inside, num_slots)  # [M, G, T − 1]
        slot_tokens = jnp.full(num_slots, -1, jnp.int32).at[token_slots].set(tokens[:, :, :-1], mode="drop")
        slot_tokens = slot_tokens.reshape(packing.num_rows, packing.row_length)  # [R, C]
        # A row belongs to the group of its first token; empty rows are given to the first group.
        row_groups = jnp.maximum(slot_tokens[:, 0], 0) // (group_size * width)  # [R]
        return Microbatch(groups, jnp.minimum(groups[row_groups], prompts - 1), slot_tokens, token_slots)

    return jax.vmap(of_shard)(packing.sizes, packing.first_slots, packing.order, packing.starts)


def take_groups(x: jax.Array, groups: jax.Array) -> jax.Array:
    """[X, P, ...] and [X, M] -> [X, M, ...]; zeros (False) where there is no group."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(x, groups)


def put_groups(x: jax.Array, groups: jax.Array, values: jax.Array) -> jax.Array:
    """[X, P, ...] with the groups [X, M] replaced by values [X, M, ...]."""
    return jax.vmap(lambda x, at, values: x.at[at].set(values, mode="drop"))(x, groups, values)


def to_slots(values: jax.Array, slot_tokens: jax.Array) -> jax.Array:
    """[X, M, G, T] -> [X, R, C]: the value of the token in each slot; zero in empty slots."""
    flat = values.reshape(values.shape[0], -1)
    return jax.vmap(lambda x, at: jnp.where(at < 0, 0, x.at[jnp.maximum(at, 0)].get(mode="clip")))(flat, slot_tokens)


def from_slots(values: jax.Array, token_slots: jax.Array) -> jax.Array:
    """[X, R, C] -> [X, M, G, T − 1]: what the slot of each token holds; zero for tokens without a slot."""
    flat = values.reshape(values.shape[0], -1)
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(flat, token_slots)


def over_microbatches(packing: Packing, add: Callable[[int | jax.Array, Carry], Carry], carry: Carry) -> Carry:
    """``carry = add(number, carry)`` for each micro-batch in use; without a loop where there can be only one."""
    return add(0, carry) if packing.num_microbatches == 1 else lax.fori_loop(0, packing.used, add, carry)


def by_shard(x: jax.Array, shards: int) -> jax.Array:
    """[X · P, ...] -> [X, P, ...]."""
    return x.reshape(shards, -1, *x.shape[1:])
