"""Choosing a token: the inverse of the cumulative distribution at one uniform number, in few passes over the vocabulary.

Dimension key: B rows, V vocabulary. The vocabulary comes first, as in `unembed`: sums over it are then sums of vectors.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # tokens whose masses are cumulated once their sum is known to hold the threshold


def draw_tokens(
    logits: jax.Array,
    uniform: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    min_p: float | jax.Array | None = None,
    greedy: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Draws a token of each row, and its log-probability: the first token i with Σ_{j ≤ i} p_j > u.

    p is the softmax of logits / temperature over the tokens that `keep_likely` keeps. The sums are float32; a token whose
    float32 probability is 0 is never drawn, whatever u is.

    Args:
      logits: [B, V] float32.
      uniform: [B] float32 in [0, 1).
      temperature: positive.
      top_k, top_p, min_p: see `keep_likely`; None keeps every token and costs nothing.
      greedy: take the most probable token, the first of equals, whatever ``uniform`` is.

    Returns:
      (token [B] int32, logp [B] float32).

    >>> logits = jnp.log(jnp.array([[0.0, 0.5, 0.25, 0.25, 0.0]] * 3))
    >>> token, logp = draw_tokens(logits, jnp.array([0.0, 0.6, 0.9999999]))
    >>> token, jnp.exp(logp)
    (Array([1, 2, 3], dtype=int32), Array([0.5 , 0.25, 0.25], dtype=float32))
    """
    vocabulary, rows = logits.shape[::-1]
    scaled = keep_likely(logits.T / temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scaled = jnp.pad(scaled, ((0, -vocabulary % BLOCK), (0, 0)), constant_values=-jnp.inf)
    top = scaled.max(0, keepdims=True)
    blocks = scaled.reshape(-1, BLOCK, rows)
    sums = jnp.exp(blocks - top[None]).sum(1)
    ends = jnp.cumsum(sums, axis=0)
    total = ends[-1]
    if greedy:
        token = jnp.where(scaled == top, jnp.arange(len(scaled), dtype=jnp.int32)[:, None], vocabulary).min(0)
        return token, -jnp.log(total)
    threshold = uniform * total
    block = first_above(ends, sums, threshold)
    chosen = at(blocks, block)
    masses = jnp.exp(chosen - top)
    inside = first_above(jnp.cumsum(masses, axis=0), masses, threshold - (at(ends, block) - at(sums, block)))
    return block * BLOCK + inside, at(chosen, inside) - top[0] - jnp.log(total)


def keep_likely(
    logits: jax.Array,
    *,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    min_p: float | jax.Array | None = None,
) -> jax.Array:
    """−∞ in place of the logits of unlikely tokens: one rule after the other, each on what the one before has left.

    Equal logits are kept or dropped together. Nothing is sorted: the lowest logit to keep is found bit by bit, in 32 passes.

    Args:
      logits: [V, B] float32, after division by the temperature.
      top_k: keep the k largest.
      top_p: keep the fewest of the largest whose probabilities sum to this or more.
      min_p: keep those at least this times as probable as the most probable one.

    Raises:
      ValueError: where top_k is below 1, or a top_p or min_p that is a Python number is out of its range.

    Source: arXiv 1805.04833 §5.1 (top-k), 1904.09751 §3.1 (top-p), 2407.01082 §3 (min-p); the order is that of transformers'
    ``generate``.

    >>> keep_likely(jnp.log(jnp.array([[0.5], [0.2], [0.2], [0.1]])), top_k=2)[:, 0] > -jnp.inf
    Array([ True,  True,  True, False], dtype=bool)
    >>> keep_likely(jnp.log(jnp.array([[0.5], [0.3], [0.15], [0.05]])), top_p=0.75)[:, 0] > -jnp.inf
    Array([ True,  True, False, False], dtype=bool)
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be 1 or more")
    if isinstance(top_p, int | float) and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if isinstance(min_p, int | float) and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must lie in [0, 1]")
    if top_k is not None:
        kept = jnp.ones_like(logits)
        logits = jnp.where(largest(logits, kept, jnp.full(logits.shape[1], top_k, jnp.float32)), logits, -jnp.inf)
    if top_p is None and min_p is None:
        return logits
    masses = jnp.exp(logits - logits.max(0, keepdims=True))
    if top_p is not None:
        # Where 1 is asked for, rounding must not drop what is too unlikely to change the sum.
        kept = largest(logits, masses, top_p * masses.sum(0)) | (top_p >= 1)
        logits, masses = jnp.where(kept, logits, -jnp.inf), jnp.where(kept, masses, 0.0)
    return logits if min_p is None else jnp.where(masses >= min_p, logits, -jnp.inf)


def largest(x: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """[V, B] bool: the fewest of the largest x of each row whose weights sum to the target or more, with all their equals."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    ordered = bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))  # as x is

    def settle(i: jax.Array, bound: jax.Array) -> jax.Array:
        higher = bound | (jnp.uint32(0x80000000) >> i.astype(jnp.uint32))
        enough = jnp.where(ordered >= higher[None], weights, 0.0).sum(0) >= target
        return jnp.where(enough, higher, bound)

    return ordered >= lax.fori_loop(0, 32, settle, jnp.zeros(x.shape[1], jnp.uint32))[None]


def first_above(cumulative: jax.Array, masses: jax.Array, threshold: jax.Array) -> jax.Array:
    """First place of each row with a mass whose cumulative sum exceeds the threshold; the last with a mass where none does."""
    places, none = jnp.arange(len(masses), dtype=jnp.int32)[:, None], len(masses)
    first = jnp.where((masses > 0) & (cumulative > threshold[None]), places, none).min(0)
    return jnp.clip(jnp.where(masses > 0, places, 0).max(0), 0, first)


def at(x: jax.Array, place: jax.Array) -> jax.Array:
    """x[place[b], ..., b] for each row b."""
    return jnp.take_along_axis(x, place.reshape(*[1] * (x.ndim - 1), -1), axis=0)[0]
