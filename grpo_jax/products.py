"""Products of matrices that multiply in one dtype in both directions and add in float32.

Dimension key: see grpo_jax.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def matmul(x: jax.Array, matrix: jax.Array, dtype: Any = None) -> jax.Array:
    """[..., d] · [d, f] -> [..., f] float32.

    Rows and tokens are one axis here: XLA's CPU backend takes 2.5 times as long for the gradient of a contraction over two.

    Args:
      x: [..., d].
      matrix: [d, f].
      dtype: both factors are rounded to it, forwards and for the gradients, which are not rounded themselves; None for x's.

    Returns:
      sums in float32 (float64 where dtype is).

    >>> matmul(jnp.full((1, 2, 3), 0.1), jnp.ones((3, 1)), "bfloat16")[0, :, 0]  # 0.1 has 8 bits here
    Array([0.30029297, 0.30029297], dtype=float32)
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype or x.dtype)  # [..., d] -> [rows, d]
    return product(rows, matrix, axis=-2).reshape(*x.shape[:-1], matrix.shape[-1])


def unembed(hidden: jax.Array, embedding: jax.Array, dtype: Any = None) -> jax.Array:
    """Logits [..., V] of hidden states [..., D] and an embedding [V, D], as `matmul` with its transpose.

    The vocabulary is the first axis of the product, which then takes XLA's CPU backend 0.2 to 0.5 of the time. All our readers
    transpose the logits back, and their sums over the vocabulary are then sums of whole vectors.

    >>> unembed(jnp.ones((1, 2, 3)), jnp.eye(3)[:2]).tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    """
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(dtype or hidden.dtype)  # [..., D] -> [rows, D]
    logits = product(embedding, rows, dtype=rows.dtype).T  # [V, rows] -> [rows, V]
    return logits.reshape(*hidden.shape[:-1], embedding.shape[0])


@jax.custom_vjp
def transposed(unembedding: jax.Array) -> jax.Array:
    """[D, V] -> [V, D], as `unembed` takes it. Its gradient is computed as [V, D] and transposed last, which is faster."""
    return unembedding.T


transposed.defvjp(lambda matrix: (matrix.T, None), lambda _, slope: (lax.optimization_barrier(slope).T,))


def product(x: jax.Array, y: jax.Array, *, axis: int = -1, dtype: Any = None) -> jax.Array:
    """Σ_d x[..., n, d] y[..., m, d] -> [..., n, m]; with ``axis=-2``, y is [..., d, m]. ``dtype`` and sums as of `matmul`.

    What a gradient needs are x and y as they are: in a scan over layers, weights that are passed unchanged are not kept twice.

    >>> product(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0]]))
    Array([[11., 17.]], dtype=float32)
    """
    # In jax.shard_map, a custom gradient must vary over devices as its input does: so both vary as either of them.
    axes = varying_axes(x) | varying_axes(y)
    return _product(mark_varying(x, axes), mark_varying(y, axes), axis, jnp.dtype(dtype or x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, y: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
    return _contract(x, y, (-1, axis), dtype)


def _forward(x: jax.Array, y: jax.Array, axis: int, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, y, axis, dtype), (x, y)


def _backward(
    axis: int, dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Autodiff's own transpose would multiply float32 slopes with bfloat16 inputs, which no accelerator does at full speed.
    x, y = saved
    to_x = _contract(slope, y, (-1, -3 - axis), dtype)  # [..., n, d]
    to_y = _contract(*((slope, x) if axis == -1 else (x, slope)), (-2, -2), dtype)  # as y: [..., m, d] or [..., d, m]
    return to_x.astype(x.dtype), to_y.astype(y.dtype)


_product.defvjp(_forward, _backward)


def _contract(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """The sum over one axis of each, of the last two; those before them are batch axes."""
    (i, j), batch = (x.ndim + axis for axis in axes), tuple(range(x.ndim - 2))
    numbers = ((i,), (j,)), (batch, batch)
    return lax.dot_general(x.astype(dtype), y.astype(dtype), numbers, preferred_element_type=sum_dtype(dtype))


def sum_dtype(dtype: Any) -> Any:
    """The type that sums are computed in: float64 for float64, and float32 for all others."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which x varies inside jax.shard_map."""
    return jax.typeof(x).mat.varying


def mark_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """x with unchanged values, marked for jax.shard_map as varying over these mesh axes too."""
    missing = tuple(axes - varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x
