"""The sums of attention where a call has one token of each row, written out so that CPUs compute them fast.

On other platforms they are plain products and reductions, which their compilers fuse with the slice of the cache that is read.

Both products are multiplications and additions here. Keys and values may then be part of a larger array and are read where
they lie; a product of matrices would copy them first. XLA's CPU backend adds up a sum one term after the other, each addition
waiting for the one before, and writes the terms of a long sum to memory. So several partial sums of whole vectors are formed,
and then added to each other.

Dimension key: see grpo_jax. P and S as in attention.py; R queries share a key head.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from grpo_jax.products import product

PARTIAL_SUMS = 8
VECTOR = 16  # how many numbers a processor adds at once


def query_key_scores(query: Array, keys: Array) -> Array:
    """Σ_h query[p, k, r, h] keys[p, k, h, s] -> [P, K, R, S] float32.

    >>> query_key_scores(jnp.ones((1, 1, 1, 2)), jnp.array([[[[1.0, 2.0], [10.0, 20.0]]]]))[0, 0, 0]
    Array([11., 22.], dtype=float32)
    """

    def terms(features: slice) -> Array:  # [P, K, R, features, S]
        return query[..., features, None].astype(jnp.float32) * keys[:, :, None, features].astype(jnp.float32)

    def by_features() -> Array:
        head_size = keys.shape[2]
        parts, rest = _slices(head_size, max(head_size // PARTIAL_SUMS, 1))
        return functools.reduce(jnp.add, map(terms, parts)).sum(-2) + terms(rest).sum(-2)

    return lax.platform_dependent(cpu=by_features, default=lambda: product(query, keys, axis=-2))


def weighted_values(weights: Array, values: Array) -> Array:
    """Σ_s weights[p, k, r, s] values[p, k, h, s] -> [P, K, R, H] float32.

    >>> weighted_values(jnp.array([[[[1.0, 2.0]]]]), jnp.array([[[[1.0, 10.0], [2.0, 20.0]]]]))[0, 0, 0]
    Array([21., 42.], dtype=float32)
    """

    def terms(slots: slice) -> Array:  # [P, K, R, H, slots]
        return weights[..., None, slots].astype(jnp.float32) * values[:, :, None, :, slots].astype(jnp.float32)

    by_vectors = functools.partial(_reduce_last, jnp.add, jnp.sum, terms, values.shape[3])
    return lax.platform_dependent(cpu=by_vectors, default=lambda: product(weights, values))


def total(x: Array) -> Array:
    """The sum over the last axis.

    >>> total(jnp.arange(600.0))
    Array(179700., dtype=float32)
    """
    by_vectors = functools.partial(_reduce_last, jnp.add, jnp.sum, lambda slots: x[..., slots], x.shape[-1])
    return lax.platform_dependent(cpu=by_vectors, default=lambda: x.sum(-1))


def highest(x: Array) -> Array:
    """The maximum over the last axis.

    >>> highest(jnp.arange(600.0))
    Array(599., dtype=float32)
    """
    by_vectors = functools.partial(_reduce_last, jnp.maximum, jnp.max, lambda slots: x[..., slots], x.shape[-1])
    return lax.platform_dependent(cpu=by_vectors, default=lambda: x.max(-1))


def _reduce_last(
    pairwise: Callable[..., Array], reduce: Callable[..., Array], terms: Callable[[slice], Array], length: int
) -> Array:
    """The sum, or maximum, of terms over all ``length`` slots; ``terms(s)`` gives the terms of slice s, on the last axis."""
    # Parts as wide as can be, so that about PARTIAL_SUMS of them cover the axis; what is left over is reduced as it is.
    width = VECTOR
    while 2 * PARTIAL_SUMS * width <= length:
        width *= 2
    parts, rest = _slices(length, width)
    reduced = [reduce(terms(rest), axis=-1)] if rest.start < length else []
    if parts:
        vector = functools.reduce(pairwise, map(terms, parts))  # [..., width]
        while vector.shape[-1] > 1:
            vector = pairwise(*jnp.split(vector, 2, axis=-1))
        reduced.append(vector[..., 0])
    return functools.reduce(pairwise, reduced)


def _slices(length: int, width: int) -> tuple[list[slice], slice]:
    """Slices of one width, and the rest.

    >>> _slices(7, 3)
    ([slice(0, 3, None), slice(3, 6, None)], slice(6, None, None))
    """
    ends = range(width, length + 1, width)
    return [slice(end - width, end) for end in ends], slice(length - length % width, None)
