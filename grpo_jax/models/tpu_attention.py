"""Attention of one token per row to its own keys, in a cache of all layers: a kernel for TPUs.

XLA reads a part of an array by copying it: a loop over layers would copy the keys of each layer for every token, and reading the
filled slots alone takes a program for every number of slots. The kernel is told the layer and the number of filled slots when it
runs, and brings only those to the chip, `SLOTS` at a time. So all layers are one body of a loop, compiled once.

A vector of a TPU has 128 numbers, the features of one slot: those of as many heads as fit. A product for all of them at once, of
queries that are zero in the features of other heads, is then a product of whole vectors. Two heads of 64 features, a and b:

    query of a   [ a1 … a64    0 …  0  ]      key of a slot  [ a1 … a64   b1 … b64 ]  ->  the score of each head
    query of b   [  0 …  0    b1 … b64 ]

Dimension key: see grpo_jax. Here S are the slots of the cache, R = N / K query heads share a key head, and g key heads share
vectors: M = K / g such sets of heads.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from grpo_jax.products import sum_dtype

LANES = 128  # numbers of a vector
SLOTS = 64  # that are brought to the chip together: fewer would be computed more slowly than brought
ON_CHIP = 8 * 2**20  # bytes on the chip at once: half of what a kernel has there by default


class CachedLayer(NamedTuple):
    """One layer of a cache of all layers.

    Attributes:
      keys, values: [rows, layers, K·H, slots], of which the first B rows and S slots may be read. In the memory of a TPU, the
        features come last.
      layer: [] int32.
      filled: [] int32, how many of these slots hold anything, at least 1.
      visible: [B, 1, 1, S] bool, which of them the queries may see.
    """

    keys: Array
    values: Array
    layer: Array
    filled: Array
    visible: Array

    def slice(self, num_heads: int) -> tuple[Array, Array]:
        """Its keys and values [B, K, H, S], copied."""
        B, S = self.visible.shape[0], self.visible.shape[-1]

        def of_layer(x: Array) -> Array:
            x = lax.dynamic_index_in_dim(x, self.layer, 1, keepdims=False)[:B, :, :S]  # [B, K·H, S]
            return x.reshape(B, num_heads, -1, S)

        return of_layer(self.keys), of_layer(self.values)


def slots_read(filled: int, slots: int) -> int:
    """How many slots are read where so many are filled.

    >>> slots_read(1, 1024), slots_read(129, 1024), slots_read(90, 100)
    (64, 192, 100)
    """
    return min(-(-filled // SLOTS) * SLOTS, slots)


def heads_of_vectors(num_heads: int, head_dim: int) -> int:
    """g, how many of K heads share vectors; all of them where nothing less fills vectors.

    >>> heads_of_vectors(4, 128), heads_of_vectors(4, 64), heads_of_vectors(3, 80)
    (1, 2, 3)
    """
    return next((g for g in range(1, num_heads) if num_heads % g == 0 and g * head_dim % LANES == 0), num_heads)


def attend_to_cache(
    query: Array, cached: CachedLayer, scale: float, softcap: float | None, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """The highest score, the sum of exp(score − highest), both [B, N], and the values so weighted [B, N, H].

    Inside `jax.shard_map`, heads are spread over the axes that are left to the compiler, which cannot divide a kernel itself.

    Args:
      query: [B, N, H].
      cached: the keys and values.
      scale, softcap: scores are q·k · scale, x then softcap · tanh(x / softcap).
      interpret: run it without a TPU, for tests.

    >>> keys = jnp.array([[[[1.0, 3.0, 50.0]]]])  # one row, layer, head and feature; 3 slots, of which 2 are filled
    >>> cached = CachedLayer(keys, keys, jnp.int32(0), jnp.int32(2), jnp.ones((1, 1, 1, 3), bool))
    >>> top, total, attended = attend_to_cache(jnp.zeros((1, 1, 1)), cached, 1.0, None, interpret=True)
    >>> top.item(), total.item(), attended.item()
    (0.0, 2.0, 4.0)
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.auto_axes if mesh.shape[axis] > 1)
    on_device = partial(_attend_on_device, scale=scale, softcap=softcap, interpret=interpret)
    if not axes:
        return on_device(query, cached)
    heads, features = PartitionSpec(None, axes), PartitionSpec(None, None, axes)
    of_cache: Any = CachedLayer(features, features, *[PartitionSpec()] * 3)  # type: ignore[arg-type]
    spread = partial(jax.shard_map, axis_names=set(axes), check_vma=False)
    return spread(on_device, in_specs=(heads, of_cache), out_specs=heads)(query, cached)


def _attend_on_device(
    query: Array, cached: CachedLayer, *, scale: float, softcap: float | None, interpret: bool
) -> tuple[Array, Array, Array]:
    (B, N, H), S, features = query.shape, cached.visible.shape[-1], cached.keys.shape[2]
    K, item = features // H, cached.keys.dtype.itemsize
    g = heads_of_vectors(K, H)
    M, R = K // g, N // K
    own = jnp.eye(g, dtype=query.dtype).reshape(1, 1, g, 1, g, 1)
    query = (query.reshape(B, M, g, R, 1, H) * own).reshape(B, M, g * R, g * H)
    keys, values = (x.swapaxes(2, 3) for x in (cached.keys, cached.values))  # [rows, layers, slots, K·H], in place

    slots = min(SLOTS, cached.keys.shape[3])
    # Of a row: keys and values, the query, what is seen, and the three results, each with the next ones on their way; and sums.
    vectors = M * _whole(g * R, 8) * _whole(g * H, LANES)
    of_row = 2 * (2 * _whole(slots, 16) * _whole(features, LANES) * item + vectors * (item + 4))
    of_row += 2 * 4 * (8 * _whole(slots, LANES) + 2 * M * _whole(g * R, 8) * LANES)
    of_row += 4 * 4 * _whole(g * R, 8) * _whole(slots, LANES)
    rows = min(B, max(1, ON_CHIP // of_row))

    def part(number: Array, scalars: Any) -> Array:
        """Behind the last filled slots, these again, which then need not be brought."""
        return jnp.minimum(number, lax.div(scalars[1] - 1, jnp.int32(slots)))

    def of_rows(*dims: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, *dims), lambda i, j, scalars: (i, *[0] * len(dims)))

    of_cache = pl.BlockSpec((rows, 1, slots, features), lambda i, j, scalars: (i, scalars[0], part(j, scalars), 0))
    of_visible = pl.BlockSpec((1, rows, 1, slots), lambda i, j, scalars: (part(j, scalars), i, 0, 0))
    visible = jnp.pad(cached.visible[:, 0].astype(jnp.int32), ((0, 0), (0, 0), (0, -S % slots)))
    visible = jnp.moveaxis(visible.reshape(B, 1, -1, slots), 2, 0)  # [S/slots, B, 1, slots]
    sums_of = lambda *dims: jax.ShapeDtypeStruct((B, *dims), sum_dtype(query.dtype))  # noqa: E731
    with jax.named_scope(f"kernel_of_{_bytes_read(cached)}_bytes"):
        top, total, attended = pl.pallas_call(
            partial(_kernel, scale=scale, softcap=softcap),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(pl.cdiv(B, rows), pl.cdiv(S, slots)),
                in_specs=[of_rows(M, g * R, g * H), of_cache, of_cache, of_visible],
                out_specs=[of_rows(M, g * R, 1), of_rows(M, g * R, 1), of_rows(M, g * R, g * H)],
            ),
            out_shape=[sums_of(M, g * R, 1), sums_of(M, g * R, 1), sums_of(M, g * R, g * H)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(4 * B * N * g * H * S, B * N * S, _bytes_read(cached)),
            interpret=interpret,
            name="attend_to_cache",
        )(
            jnp.stack([cached.layer, cached.filled]).astype(jnp.int32),
            query,
            keys,
            values,
            visible,
        )
    attended = (attended.reshape(B, M, g, R, g, H) * own.astype(attended.dtype)).sum(
        4
    )  # of each head, its own features
    return top.reshape(B, N), total.reshape(B, N), attended.reshape(B, N, H)


def _whole(number: int, unit: int) -> int:
    """As many as whole units hold: arrays on the chip are made of tiles."""
    return -(-number // unit) * unit


def _bytes_read(cached: CachedLayer) -> int:
    """Of a call with full slots: what a compiler cannot know, for profiles and compiled programs."""
    B, S, (_, _, features, _) = cached.visible.shape[0], cached.visible.shape[-1], cached.keys.shape
    return B * S * (2 * features * cached.keys.dtype.itemsize + 4)


def _kernel(
    scalars: Any,
    query: Any,
    keys: Any,
    values: Any,
    visible: Any,
    top: Any,
    total: Any,
    attended: Any,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """A block of rows and of slots: query [rows, M, g·R, g·H], keys and values [rows, 1, slots, K·H], visible [rows, 1, slots].

    What it adds to, top and total [rows, M, g·R, 1] and attended [rows, M, g·R, g·H], stays on the chip for all blocks of slots.
    """
    number, filled, slots = pl.program_id(1), scalars[1], keys.shape[2]

    @pl.when(number == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, -1e29, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        attended[...] = jnp.zeros(attended.shape, attended.dtype)

    @pl.when(number * slots < filled)
    def _() -> None:
        def multiply(x: Array, y: Array, axis: int) -> Array:
            return lax.dot_general(x, y, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=top.dtype)

        def is_filled(shape: tuple[int, ...], axis: int) -> Array:
            return number * slots + lax.broadcasted_iota(jnp.int32, shape, axis) < filled

        seen = (visible[0] > 0) & is_filled(visible.shape[1:], 2)  # [rows, 1, slots]
        _, M, _, width = query.shape
        for m in range(M):
            features = slice(m * width, (m + 1) * width)
            scores = scale * multiply(query[:, m], keys[:, 0, :, features], 2)  # [rows, g·R, slots]
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            scores = jnp.where(seen, scores, -1e30)
            before = top[:, m]
            highest = jnp.maximum(before, scores.max(-1, keepdims=True))  # [rows, g·R, 1]
            weights = jnp.exp(scores - highest)  # [rows, g·R, slots]
            factor = jnp.exp(before - highest)
            value = values[:, 0, :, features]  # [rows, slots, g·H]
            # Behind the filled slots there may be anything, even what no product with 0 makes 0.
            value = jnp.where(is_filled(value.shape, 1), value, jnp.zeros_like(value))
            weighted = multiply(weights.astype(value.dtype), value, 1)  # [rows, g·R, g·H]
            top[:, m] = highest
            total[:, m] = total[:, m] * factor + weights.sum(-1, keepdims=True)
            attended[:, m] = attended[:, m] * factor + weighted
