"""Grouped-query attention over several blocks of keys, and rotary positions.

Dimension key: see grpo_jax. Here P are the rows of a block of keys, each seen by G = B / P rows of queries (P = B and G = 1
where every row has its own keys), S are its slots, and N / K query heads share a key head.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from grpo_jax.models import cpu_attention
from grpo_jax.models.tpu_attention import CachedLayer, attend_to_cache
from grpo_jax.products import product, sum_dtype

SCORES_ON_CHIP = 64 * 2**20  # bytes of scores that the compiler of a TPU keeps on the chip, which has twice as many


class KeyValues(NamedTuple):
    """A block of keys and values that queries attend to.

    Attributes:
      keys, values: [P, K, H, S], in the type of the queries.
      visible: [P, G or 1, L or 1, S] bool, which slots the queries may see.
      order: ([B] int32, rows): row b of the queries is row order[b] of so many, of which rows / P see each row of keys; no two
        are the same. None: row b of B.
    """

    keys: Array
    values: Array
    visible: Array
    order: tuple[Array, int] | None = None


def choose_query_block(platform: str, num_heads: int, tokens: int) -> int | None:
    """Of how many queries per row `attend` should have the scores at once, for calls of so many tokens; None: of all.

    Scores that fit on the chip of a TPU never reach its memory. GPUs would need a kernel of their own for that, and CPUs gain
    nothing.

    Args:
      platform: of the devices, as jax calls it.
      num_heads: N on each device.
      tokens: B·L on each device.

    >>> choose_query_block("tpu", 14, 32_768), choose_query_block("cpu", 14, 32_768)
    (32, None)
    """
    if platform != "tpu":
        return None
    most = SCORES_ON_CHIP // (4 * num_heads * tokens)  # as many keys as queries
    return max(16, 2 ** (most.bit_length() - 1)) if most else 16


def attend(
    query: Array,
    blocks: Sequence[KeyValues | CachedLayer],
    *,
    width: int | None = None,
    softcap: float | None = None,
    query_block: int | None = None,
) -> Array:
    """softmax(q·k / √width) v over the visible keys of all blocks together.

    Row b sees row b // G of a block, and query head n the key head n // (N / K): neither keys nor values are repeated in
    memory. Scores, softmax and sums are float32; a query that sees nothing gets zeros.

    Args:
      query: [B, L, N, H].
      blocks: the keys and values; P may differ between them, and divides B.
      width: H if None.
      softcap: scores x become softcap · tanh(x / softcap).
      query_block: of how many queries per row the scores exist at once; the backward pass then computes them again. None: of all.

    Returns:
      [B, L, N·H] float32.

    Source: arXiv 1706.03762 eq. 1 and arXiv 2305.13245; the sum over blocks is that of arXiv 2205.14135 §3.1; the cap
    is that of arXiv 2408.00118 §2.

    >>> keys, values = jnp.zeros((1, 1, 1, 3)), jnp.array([[[[1.0, 3.0, 100.0]]]])
    >>> attend(jnp.ones((2, 1, 1, 1)), [KeyValues(keys, values, jnp.array([[[[True, True, False]]]]))])[:, 0, 0]
    Array([2., 2.], dtype=float32)
    """
    scale = (query.shape[-1] if width is None else width) ** -0.5
    if query_block is None or query.shape[1] <= query_block:
        return _attend(query, blocks, scale, softcap)
    # With several queries per row, all keys are arrays of their own.
    return _attend_by_query_blocks(query, blocks, scale, softcap, query_block)  # type: ignore[arg-type]


def _attend_by_query_blocks(
    query: Array, blocks: list[KeyValues], scale: float, softcap: float | None, size: int
) -> Array:
    """`_attend`, ``size`` queries of each row after the other."""
    B, L, _, _ = query.shape
    count = -(-L // size)

    def split(x: Array, axis: int) -> Array:  # [..., L, ...] -> [count, ..., size, ...]
        x = jnp.pad(x, [(0, count * size - L if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def attend_part(keys_values: list[tuple[Array, Array]], query: Array, visible: list[Array]) -> Array:
        pairs = [(keys.astype(query.dtype), values.astype(query.dtype)) for keys, values in keys_values]
        parts = [KeyValues(*pair, seen) for pair, seen in zip(pairs, visible, strict=True)]
        return _attend(query, parts, scale, softcap)  # [B, size, N·H]

    # In the type of sums, since the gradients of the blocks are added up in it.
    sums = sum_dtype(query.dtype)
    keys_values = [(x.keys.astype(sums), x.values.astype(sums)) for x in blocks]

    def attend_next(part: tuple[Array, list[Array | None]]) -> Array:
        query, own_visible = part
        visible = [x.visible if own is None else own for x, own in zip(blocks, own_visible, strict=True)]
        return attend_part(keys_values, query, visible)

    own_visible = [split(x.visible, 2) if x.visible.shape[2] > 1 else None for x in blocks]
    attended = lax.map(attend_next, (split(query, 1), own_visible))  # [count, B, size, N·H]
    return jnp.moveaxis(attended, 0, 1).reshape(B, count * size, -1)[:, :L]  # [B, L, N·H]


def _attend(query: Array, blocks: Sequence[KeyValues | CachedLayer], scale: float, softcap: float | None) -> Array:
    parts = []
    for block in blocks:
        if isinstance(block, CachedLayer):
            parts.append(_attend_cached(query, block, scale, softcap))
        elif block.order is None:
            parts.append(_attend_block(query, block, scale, softcap))
        else:
            parts.append(_attend_in_order(query, block, scale, softcap))
    # Each block's softmax is relative to its own highest score; a factor makes them relative to the highest of all.
    top = functools.reduce(jnp.maximum, [block_top for block_top, _, _ in parts])  # [B, L, N]
    total, attended = jnp.zeros_like(top), jnp.zeros(query.shape, jnp.float32)  # [B, L, N], [B, L, N, H]
    for block_top, block_total, block_attended in parts:
        factor = jnp.exp(block_top - top)  # [B, L, N]
        total = total + factor * block_total
        attended = attended + factor[..., None] * block_attended
    attended = attended / jnp.maximum(total, 1e-30)[..., None]  # [B, L, N, H]
    return attended.reshape(*attended.shape[:2], -1)  # [B, L, N·H]


def _attend_in_order(query: Array, block: KeyValues, scale: float, softcap: float | None) -> tuple[Array, Array, Array]:
    """`_attend_block` of rows that are brought into the order of the keys, and back."""
    assert block.order is not None
    order, rows = block.order
    chosen = jax.nn.one_hot(order, rows, dtype=bool)  # [B, rows]
    parts = _attend_block(_bring(chosen.T, query), block, scale, softcap)
    top, total, attended = (_bring(chosen, x) for x in parts)
    return top, total, attended


def _bring(chosen: Array, x: Array) -> Array:
    """Row i of the result is the row j of x with chosen[i, j], at most one of them; zeros where there is none.

    By products with ones and zeros, which are exact: accelerators move rows one by one. As 0 · NaN is NaN, a row with a number
    that is not finite is left out of the products, and is NaN where it goes.
    """
    rows = x.reshape(len(x), -1)
    finite = jnp.isfinite(rows).all(-1, keepdims=True)  # [rows, 1]
    product = functools.partial(jnp.matmul, chosen.astype(x.dtype), precision=lax.Precision.HIGHEST)
    brought = jnp.where(product((~finite).astype(x.dtype)) > 0, jnp.nan, product(jnp.where(finite, rows, 0)))
    return brought.reshape(-1, *x.shape[1:])


def _attend_cached(
    query: Array, cached: CachedLayer, scale: float, softcap: float | None
) -> tuple[Array, Array, Array]:
    """`_attend_block`, by the kernel where there is one, and not under `jax.vmap`."""

    def plain(query: Array, cached: CachedLayer) -> tuple[Array, Array, Array]:
        block = KeyValues(*cached.slice(cached.keys.shape[2] // query.shape[-1]), cached.visible)
        return _attend_block(query, block, scale, softcap)

    @jax.custom_batching.custom_vmap
    def kernel(query: Array, cached: CachedLayer) -> tuple[Array, Array, Array]:
        top, total, attended = attend_to_cache(query[:, 0], cached, scale, softcap)
        return top[:, None], total[:, None], attended[:, None]

    @kernel.def_vmap
    def _(size: int, batched: Any, query: Array, cached: CachedLayer) -> tuple[tuple[Array, Array, Array], Any]:
        axes = jax.tree.map(lambda x: 0 if x else None, tuple(batched))
        return jax.vmap(plain, in_axes=axes, axis_size=size)(query, cached), (True, True, True)

    return lax.platform_dependent(query, cached, tpu=kernel, default=plain)


def _attend_block(query: Array, block: KeyValues, scale: float, softcap: float | None) -> tuple[Array, Array, Array]:
    """The highest score, the sum of exp(score - highest), both [B, L, N], and the values so weighted [B, L, N, H]."""
    keys, values, visible, _ = block
    (B, L, N, H), (P, K, _, S) = query.shape, keys.shape
    layout = P, K, B // P, N // K, L
    query = query.reshape(P, B // P, L, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)  # [P, K, G, N/K, L, H]
    query = query.reshape(P, K, -1, H)  # [P, K, G·N/K·L, H]
    # With one token per row, CPUs have the sums written out (cpu_attention.py), the products only where a row has its own keys.
    one_token, own_keys = L == 1, L == 1 and P == B

    scores = cpu_attention.query_key_scores(query, keys) if own_keys else product(query, keys, axis=-2)
    scores = scores.reshape(*layout, S) * scale  # [P, K, G, N/K, L, S]
    if softcap is not None:
        scores = soft_capped(scores, softcap)
    # A finite "minus infinity": a token that sees nothing must not give NaN, nor must its gradient; it gets zeros.
    scores = jnp.where(visible[:, None, :, None], scores, -1e30)  # [P, K, G, N/K, L, S]

    top = cpu_attention.highest(scores) if one_token else scores.max(-1)
    top = lax.stop_gradient(jnp.maximum(top, -1e29))  # [P, K, G, N/K, L]
    weights = jnp.exp(scores - top[..., None])  # [P, K, G, N/K, L, S], the softmax before it is divided by its sum
    total = cpu_attention.total(weights) if one_token else weights.sum(-1)  # [P, K, G, N/K, L]
    weights = weights.astype(values.dtype).reshape(P, K, -1, S)  # [P, K, G·N/K·L, S]
    weighted_values = cpu_attention.weighted_values if own_keys else product
    attended = weighted_values(weights, values)  # [P, K, G·N/K·L, H]

    def by_token(x: Array, *rest: int) -> Array:
        x = jnp.moveaxis(x.reshape(*layout, *rest), (2, 4), (1, 2))  # [P, G, L, K, N/K, *rest]
        return x.reshape(B, L, N, *rest)

    return by_token(top), by_token(total), by_token(attended, H)


def soft_capped(x: Array, cap: float) -> Array:
    """cap · tanh(x / cap): scores or logits held smoothly between ±cap, as Gemma 2 does (arXiv 2408.00118 §2).

    >>> soft_capped(jnp.array([-1e9, 0.0, 1e9]), 30.0)
    Array([-30.,   0.,  30.], dtype=float32)
    """
    return cap * jnp.tanh(x / cap)


def within_window(positions: Array, key_positions: Array, window: Array) -> Array:
    """Which keys lie fewer than ``window`` positions before a query: [P, G, L, S] bool, of [B, L] and [P, S].

    >>> within_window(jnp.array([[3], [9]]), jnp.array([[0, 1, 2, 3]]), jnp.int32(3))[0, :, 0].tolist()
    [[False, True, True, True], [False, False, False, False]]
    """
    positions = positions.reshape(key_positions.shape[0], -1, positions.shape[1])  # [P, G, L]
    return positions[:, :, :, None] - key_positions[:, None, None, :] < window


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


def rotations(positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, Array]:
    """cos and sin of position · θ^(-2i / H), [B, L, 1, H / 2] float32, for positions [B, L].

    Source: arXiv 2104.09864 eq. 15; `RopeScaling` is arXiv 2306.15595 eq. 4, and transformers' "llama3".

    >>> rotations(jnp.array([[0, 3]]), 2, 10000.0)[1][0, :, 0, 0]
    Array([0.     , 0.14112], dtype=float32)
    """
    frequencies = float(theta) ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [H / 2]
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]  # [B, L, 1, H / 2]
    return jnp.cos(angles), jnp.sin(angles)


def _scaled(frequencies: Array, scaling: RopeScaling) -> Array:
    factor, low, high, length = scaling
    if low is None or high is None or length is None:
        return frequencies / factor
    turns = length / (2 * math.pi) * frequencies
    unscaled = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # which share of a frequency stays as it is
    return unscaled * frequencies + (1 - unscaled) * frequencies / factor


def rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Rotates the pairs (feature i, feature i + H / 2) of x [B, L, N, H] float32, as Hugging Face pairs them.

    >>> rotate(jnp.array([[[[1.0, 0.0]]]]), rotations(jnp.array([[3]]), 2, 10000.0))[0, 0, 0]
    Array([-0.9899925,  0.14112  ], dtype=float32)
    """
    cos, sin = cos_sin
    first, second = jnp.split(x, 2, axis=-1)  # [B, L, N, H / 2] each
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
