"""Products of matrices that multiply in one dtype in both directions and add in float32."""

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
      dtype: of what is multiplied, both forwards and for the gradients, which are not rounded to it; None for that of x.

    Returns:
      sums in float32 (float64 where dtype is).

    >>> matmul(jnp.full((1, 2, 3), 0.1), jnp.ones((3, 1)), "bfloat16")[0, :, 0]  # 0.1 has 8 bits here
    Array([0.30029297, 0.30029297], dtype=float32)
    """
    rows = x.reshape(-1, x.shape[-1])
    return product(rows, matrix.T, dtype).reshape(*x.shape[:-1], matrix.shape[-1])


def unembed(hidden: jax.Array, embedding: jax.Array, dtype: Any = None) -> jax.Array:
    """Logits [..., V] of hidden states [..., D] and an embedding [V, D], as `matmul` with its transpose.

    The vocabulary is the first axis of the product. So XLA's CPU backend takes 0.2 to 0.5 of the time, and with the logits
    turned back, as all our readers do, sums over the vocabulary are sums of vectors.

    >>> unembed(jnp.ones((1, 2, 3)), jnp.eye(3)[:2]).tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    return product(embedding, rows, rows.dtype if dtype is None else dtype).T.reshape(*hidden.shape[:-1], -1)


@jax.custom_vjp
def turned(matrix: jax.Array) -> jax.Array:
    """[D, V] -> [V, D], an embedding for `unembed`; its gradient is made as such and then turned back, which is faster."""
    return matrix.T


turned.defvjp(lambda matrix: (matrix.T, None), lambda _, slope: (lax.optimization_barrier(slope).T,))


def product(x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """x · yᵀ [..., n, m] of x [..., n, d] and y [..., m, d]; ``dtype`` and sums as of `matmul`.

    >>> product(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0]]))
    Array([[11., 17.]], dtype=float32)
    """
    # In jax.shard_map, a custom gradient must vary over devices as its input does: so both vary as either of them.
    axes = varying(x) | varying(y)
    return _product(spread(x, axes), spread(y, axes), jnp.dtype(x.dtype if dtype is None else dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _contract(x, y, (-1, -1), dtype)


def _forward(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, y, dtype), (x, y)


def _backward(dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Autodiff's own transpose would multiply float32 slopes with bfloat16 inputs, which no accelerator does at full speed.
    x, y = saved
    return _contract(slope, y, (-1, -2), dtype).astype(x.dtype), _contract(slope, x, (-2, -2), dtype).astype(y.dtype)


_product.defvjp(_forward, _backward)


def _contract(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    (i, j), batch = (x.ndim + axis for axis in axes), tuple(range(x.ndim - 2))
    numbers = ((i,), (j,)), (batch, batch)
    return lax.dot_general(x.astype(dtype), y.astype(dtype), numbers, preferred_element_type=wide)


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which x varies inside jax.shard_map."""
    return jax.typeof(x).mat.varying


def spread(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """x as it is, marked as varying over the axes."""
    missing = tuple(axes - varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x
