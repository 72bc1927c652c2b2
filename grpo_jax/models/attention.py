"""Grouped-query attention over several blocks of keys, and rotary positions.

Dimension key: B rows, L tokens of this call, C rows of a block (C divides B), S its slots, N query heads, K key/value
heads, H head dim.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from grpo_jax.products import product

Block = tuple[Array, Array, Array]  # keys [C, K, H, S], values [C, K, H, S], visible [C, B // C or 1, L or 1, S] bool

SLICES, VECTOR = 8, 16  # partial sums, and how many numbers a processor adds at once


class RopeScaling(NamedTuple):
    """Slower rotations, for more positions than a model was first trained on.

    With a factor alone, every frequency is divided by it ("linear"). With the other three ("llama3"), a pair that turns
    ``high`` times or more in ``length`` positions keeps its frequency, one that turns ``low`` times or less has it
    divided, and between them the frequency is interpolated linearly in the number of turns.
    """

    factor: float
    low: float | None = None
    high: float | None = None
    length: int | None = None


def attend(query: Array, blocks: list[Block], *, width: int | None = None, softcap: float | None = None) -> Array:
    """softmax(q·k / √width) v over the visible keys of all blocks together.

    Row b sees row b // (B // C) of a block of C rows, and query head n the key head n // (N // K): neither keys nor
    values are repeated in memory. Scores, softmax and sums are float32; a query that sees nothing gets zeros.

    Args:
      query: [B, L, N, H].
      blocks: keys [C, K, H, S] and values [C, K, H, S] of the query's type, visible [C, B // C or 1, L or 1, S].
      width: None for H.
      softcap: scores x become softcap · tanh(x / softcap).

    Returns:
      [B, L, N·H] float32.

    Source: arXiv 1706.03762 eq. 1 and arXiv 2305.13245; the sum over blocks is that of arXiv 2205.14135 §3.1; the cap
    is that of arXiv 2408.00118 §2.

    >>> value = jnp.array([[[[1.0, 3.0, 100.0]]]])
    >>> attend(jnp.ones((2, 1, 1, 1)), [(jnp.zeros((1, 1, 1, 3)), value, jnp.array([[[[True, True, False]]]]))])[:, 0, 0]
    Array([2., 2.], dtype=float32)
    """
    scale = (query.shape[-1] if width is None else width) ** -0.5
    parts = [_attend_block(query, *block, scale, softcap) for block in blocks]
    top = functools.reduce(jnp.maximum, [block_top for block_top, _, _ in parts])
    total, attended = jnp.zeros_like(top), jnp.zeros(query.shape, jnp.float32)
    for block_top, block_total, block_attended in parts:
        share = jnp.exp(block_top - top)
        total = total + share * block_total
        attended = attended + share[..., None] * block_attended
    attended = attended / jnp.maximum(total, 1e-30)[..., None]
    return attended.reshape(*attended.shape[:2], -1)


def capped(x: Array, cap: float) -> Array:
    """cap · tanh(x / cap).

    >>> capped(jnp.array([-1e9, 0.0, 1e9]), 30.0)
    Array([-30.,   0.,  30.], dtype=float32)
    """
    return cap * jnp.tanh(x / cap)


def within(positions: Array, key_positions: Array, window: Array) -> Array:
    """Which keys lie fewer than ``window`` positions before a query: [C, B // C, L, S] bool, of [B, L] and [C, S].

    >>> within(jnp.array([[3], [9]]), jnp.array([[0, 1, 2, 3]]), jnp.int32(3))[0, :, 0].tolist()
    [[False, True, True, True], [False, False, False, False]]
    """
    grouped = positions.reshape(key_positions.shape[0], -1, positions.shape[1])
    return grouped[:, :, :, None] - key_positions[:, None, None, :] < window


def rotations(positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, Array]:
    """cos and sin of position · θ^(-2i / H), [B, L, 1, H / 2] float32, for positions [B, L].

    Source: arXiv 2104.09864 eq. 15; `RopeScaling` is arXiv 2306.15595 eq. 4, and transformers' "llama3".

    >>> rotations(jnp.array([[0, 3]]), 2, 10000.0)[1][0, :, 0, 0]
    Array([0.     , 0.14112], dtype=float32)
    """
    frequencies = float(theta) ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Rotates the pairs (feature i, feature i + H / 2) of x [B, L, N, H] float32, as Hugging Face pairs them.

    >>> rotate(jnp.array([[[[1.0, 0.0]]]]), rotations(jnp.array([[3]]), 2, 10000.0))[0, 0, 0]
    Array([-0.9899925,  0.14112  ], dtype=float32)
    """
    cos, sin = cos_sin
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _scaled(frequencies: Array, scaling: RopeScaling) -> Array:
    factor, low, high, length = scaling
    if low is None or high is None or length is None:
        return frequencies / factor
    turns = length / (2 * math.pi) * frequencies
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _attend_block(
    query: Array, key: Array, value: Array, visible: Array, scale: float, softcap: float | None
) -> tuple[Array, Array, Array]:
    """The highest score, the sum of exp(score - highest), both [B, L, N], and the values so weighted [B, L, N, H]."""
    rows, length, heads, width = query.shape
    shared, kv_heads, _, slots = key.shape
    query = query.reshape(shared, rows // shared, length, kv_heads, heads // kv_heads, width).transpose(
        0, 3, 1, 4, 2, 5
    )
    layout, query = query.shape[:5], query.reshape(shared, kv_heads, -1, width)
    alone = length == 1 and shared == rows  # of each row one token, and keys that no other row sees
    score: Callable[[Array, Array], Array] = _scores if alone else functools.partial(product, axis=-2)
    weigh: Callable[[Array, Array], Array] = _weighted if alone else product
    scores = score(query, key).reshape(*layout, slots) * scale
    if softcap is not None:
        scores = capped(scores, softcap)
    # A finite "minus infinity": a token that sees nothing must not give NaN, nor must its gradient; it gets zeros.
    scores = jnp.where(visible[:, None, :, None], scores, -1e30)
    top = lax.stop_gradient(jnp.maximum(_highest(scores) if length == 1 else scores.max(-1), -1e29))
    weights = jnp.exp(scores - top[..., None])
    total = _total(weights) if length == 1 else weights.sum(-1)
    attended = weigh(weights.astype(value.dtype).reshape(shared, kv_heads, -1, slots), value)

    def by_token(x: Array, *rest: int) -> Array:
        return jnp.moveaxis(x.reshape(*layout, *rest), (2, 4), (1, 2)).reshape(rows, length, heads, *rest)

    return by_token(top), by_token(total), by_token(attended, width)


# For one token of each row both products are written as multiplications and additions. Keys and values may then be part of an
# array and are read where they lie; a product of matrices would copy them first. XLA's CPU backend waits for each addition of a
# sum, and writes down the terms of a long one; so several partial sums of whole vectors are added up, and at last each other.


def _scores(query: Array, key: Array) -> Array:
    """Σ_h query[c, k, r, h] key[c, k, h, s] -> [C, K, R, S] float32."""

    def products(place: slice) -> Array:
        return query[..., place, None].astype(jnp.float32) * key[:, :, None, place].astype(jnp.float32)

    whole, rest = _slices(key.shape[2], max(key.shape[2] // SLICES, 1))
    return functools.reduce(jnp.add, map(products, whole)).sum(-2) + products(rest).sum(-2)


def _weighted(weights: Array, value: Array) -> Array:
    """Σ_s weights[c, k, r, s] value[c, k, h, s] -> [C, K, R, H] float32."""

    def products(place: slice) -> Array:
        return weights[..., None, place].astype(jnp.float32) * value[:, :, None, :, place].astype(jnp.float32)

    return _fold(jnp.add, jnp.sum, products, value.shape[3])


def _total(x: Array) -> Array:
    return _fold(jnp.add, jnp.sum, lambda place: x[..., place], x.shape[-1])


def _highest(x: Array) -> Array:
    return _fold(jnp.maximum, jnp.max, lambda place: x[..., place], x.shape[-1])


def _fold(
    pair: Callable[..., Array], many: Callable[..., Array], terms: Callable[[slice], Array], length: int
) -> Array:
    """The sum, or maximum, of two and of many, over the last axis of terms(places) [..., places] for all ``length`` places."""

    def vectors() -> Array:
        width = VECTOR
        while 2 * SLICES * width <= length:
            width *= 2
        whole, rest = _slices(length, width)
        parts = [many(terms(rest), axis=-1)] if rest.start < length else []
        if whole:
            folded = functools.reduce(pair, map(terms, whole))
            while folded.shape[-1] > 1:
                folded = pair(*jnp.split(folded, 2, axis=-1))
            parts.append(folded[..., 0])
        return functools.reduce(pair, parts)

    return lax.platform_dependent(cpu=vectors, default=lambda: many(terms(slice(None)), axis=-1))


def _slices(length: int, width: int) -> tuple[list[slice], slice]:
    """Slices of one width, and the rest.

    >>> _slices(7, 3)
    ([slice(0, 3, None), slice(3, 6, None)], slice(6, None, None))
    """
    ends = range(width, length + 1, width)
    return [slice(end - width, end) for end in ends], slice(length - length % width, None)
