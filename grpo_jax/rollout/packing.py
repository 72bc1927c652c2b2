"""Packing completions into rows and groups into blocks, so that padding costs nothing; pure functions of fixed shapes.

A row holds completions of one prompt behind each other, told apart by segments. A block holds whole groups in a fixed
number of rows. How many blocks are in use is data: one compiled program serves all lengths.

Dimension key: X shards, P prompts of a shard, G completions of a prompt, T completion length, N rows of a block, R places
of a row, Q groups of a block at most. A completion of n tokens takes n − 1 places: nothing follows its last token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Blocks as small as this share of the worst case cost little where all completions are long, and save where they are
# short; below this many places they cost. Round numbers: experiments/benchmarks/update.py shows what they give.
PARTS, PLACES = 8, 1024


class Packing(NamedTuple):
    """Where every token of a batch is run.

    Attributes:
      rows, length, groups, blocks: Python ints: N, R, Q, and the most blocks that may be needed.
      sizes: [X, P, G] int32, places that a completion takes.
      places: [X, P, G] int32, its first place in its block: row · R + column.
      order: [X, P] int32, the prompts, block by block.
      ends: [X, blocks + 1] int32, how many prompts lie before each block.
      used: int32, blocks in use; the most of any shard.
    """

    rows: int
    length: int
    groups: int
    blocks: int
    sizes: jax.Array
    places: jax.Array
    order: jax.Array
    ends: jax.Array
    used: jax.Array


class Block(NamedTuple):
    """What one block holds.

    Attributes:
      groups: [X, Q] int32, prompts of its groups; P where there is none.
      prompts: [X, N] int32, the prompt of each row.
      sources: [X, N, R] int32, the token at each place, counted over [Q, G, T]; −1 at empty places.
      places: [X, Q, G, T − 1] int32, where the tokens are run, counted over [N, R]; N · R for those that are not.
    """

    groups: jax.Array
    prompts: jax.Array
    sources: jax.Array
    places: jax.Array


def first_fit(sizes: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """First-fit decreasing: the largest first, equal ones in order, each into the first bin with room for it.

    Args:
      sizes: [n] int32, from 0 to capacity.
      capacity: of every bin.

    Returns:
      (bin, start) [n] int32: the bin of each, and what lies before it there.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973; checked against a loop in tests/rollout/test_packing.py.

    >>> first_fit(jnp.array([2, 3, 1, 2]), 4)
    (Array([1, 0, 0, 1], dtype=int32), Array([0, 0, 3, 2], dtype=int32))
    """

    def put(room: jax.Array, size: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        place = jnp.argmax(room >= size).astype(jnp.int32)
        return room.at[place].add(-size), (place, capacity - room[place])

    order = jnp.argsort(-sizes, stable=True)
    _, found = lax.scan(put, jnp.full(sizes.shape, capacity, jnp.int32), sizes[order].astype(jnp.int32))
    place, start = (jnp.zeros_like(x).at[order].set(x) for x in found)
    return place, start


def pack(
    mask: jax.Array,
    *,
    microbatch_tokens: int,
    row_length: int | None = None,
    shards: int = 1,
    in_step: str | None = None,
) -> Packing:
    """Packs the completions of a batch.

    Args:
      mask: [X · P, G, T] bool, True on the first tokens of each completion.
      microbatch_tokens: places of a block, per shard; at least a group's.
      row_length: R, places of a row, at least T − 1; None chooses.
      shards: X, equal consecutive parts of the prompts, packed apart: no token leaves its shard.
      in_step: name of a vmapped axis along which ``used`` is made equal, so that a loop over blocks stays a loop.

    Returns:
      `Packing`.

    Raises:
      ValueError: prompts that the shards do not divide, or rows too short for a completion.

    >>> packing = pack(jnp.arange(4)[None, None] < jnp.array([[[4], [2], [3]]]), microbatch_tokens=1, row_length=3)
    >>> packing.sizes.tolist(), packing.places.tolist(), packing.rows, int(packing.used)
    ([[[3, 1, 2]]], [[[0, 5, 3]]], 3, 1)
    """
    prompts, group_size, width = mask.shape
    longest = max(width - 1, 1)
    if prompts % shards:
        raise ValueError(f"{prompts} prompts are not divisible by {shards} shards")
    length = max(width, min(group_size * longest, 32)) if row_length is None else row_length
    if length < longest:
        raise ValueError(f"row_length={length} is too short for completions of up to {width} tokens")
    prompts //= shards
    # First fit opens a bin only where no other has room, so every bin but the last holds capacity // largest at least.
    group_rows = -(-group_size // (length // longest))
    rows = min(microbatch_tokens // length, max(prompts * group_rows // PARTS, PLACES // length))
    rows = min(max(rows, group_rows), prompts * group_rows)
    blocks = -(-prompts // (rows // group_rows))

    sizes = jnp.maximum(mask.sum(-1, dtype=jnp.int32) - 1, 0).reshape(shards, prompts, group_size)
    row, column = jax.vmap(jax.vmap(lambda x: first_fit(x, length)))(sizes)
    block, first_row = jax.vmap(lambda x: first_fit(x, rows))(row.max(-1) + 1)
    number = jnp.arange(blocks + 1, dtype=jnp.int32)
    used = block.max() + 1
    return Packing(
        rows=rows,
        length=length,
        groups=min(rows, prompts),
        blocks=blocks,
        sizes=sizes,
        places=(first_row[:, :, None] + row) * length + column,
        order=jnp.argsort(block * rows + first_row, axis=-1),
        ends=(block[:, None, :] < number[None, :, None]).sum(-1, dtype=jnp.int32),
        used=used if in_step is None else lax.pmax(used, in_step),
    )


def take_block(packing: Packing, number: int | jax.Array, width: int) -> Block:
    """Block ``number`` of completions of T = ``width`` tokens.

    >>> packing = pack(jnp.arange(4)[None, None] < jnp.array([[[4], [2], [3]]]), microbatch_tokens=1, row_length=3)
    >>> take_block(packing, 0, 4).sources[0].tolist()
    [[0, 1, 2], [8, 9, 4], [-1, -1, -1]]
    """
    prompts, group_size = packing.sizes.shape[1:]
    size = packing.rows * packing.length
    inside = jnp.arange(width - 1, dtype=jnp.int32)[None, None]
    tokens = jnp.arange(packing.groups * group_size * width, dtype=jnp.int32).reshape(-1, group_size, width)

    def of_shard(sizes: jax.Array, places: jax.Array, order: jax.Array, ends: jax.Array) -> Block:
        at = ends[number] + jnp.arange(packing.groups, dtype=jnp.int32)
        groups = jnp.where(at < ends[number + 1], order.at[at].get(mode="clip"), prompts)
        sizes, places = (x.at[groups].get(mode="fill", fill_value=0)[:, :, None] for x in (sizes, places))
        places = jnp.where(inside < sizes, places + inside, size)
        sources = jnp.full(size, -1, jnp.int32).at[places].set(tokens[:, :, :-1], mode="drop")
        sources = sources.reshape(packing.rows, packing.length)
        owners = jnp.maximum(sources[:, 0], 0) // (group_size * width)
        return Block(groups, jnp.minimum(groups[owners], prompts - 1), sources, places)

    return jax.vmap(of_shard)(packing.sizes, packing.places, packing.order, packing.ends)


def take_groups(x: jax.Array, groups: jax.Array) -> jax.Array:
    """[X, P, ...] and [X, Q] -> [X, Q, ...]; zeros (False) where there is no group."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(x, groups)


def put_groups(x: jax.Array, groups: jax.Array, values: jax.Array) -> jax.Array:
    """[X, P, ...] with the groups [X, Q] replaced by values [X, Q, ...]."""
    return jax.vmap(lambda x, at, values: x.at[at].set(values, mode="drop"))(x, groups, values)


def to_places(values: jax.Array, sources: jax.Array) -> jax.Array:
    """[X, Q, G, T] -> [X, N, R]: what belongs to the token at each place; zero at empty places."""
    flat = values.reshape(values.shape[0], -1)
    return jax.vmap(lambda x, at: jnp.where(at < 0, 0, x.at[jnp.maximum(at, 0)].get(mode="clip")))(flat, sources)


def from_places(values: jax.Array, places: jax.Array) -> jax.Array:
    """[X, N, R] -> [X, Q, G, T − 1]: what the place of each token holds; zero for tokens that have none."""
    flat = values.reshape(values.shape[0], -1)
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(flat, places)
