"""Sampling a token: the inverse of the cumulative distribution at one uniform number, in few passes over the vocabulary.

The vocabulary is the first axis, as in `unembed`: sums over it are then sums of vectors.

Dimension key: see grpo_jax.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # tokens; the vocabulary is searched block by block, and then inside one block


def sample_tokens(
    logits: jax.Array,
    uniform: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    min_p: float | jax.Array | None = None,
    greedy: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Samples a token for each row, and gives its log-probability: the first token i with Σ_{j ≤ i} p_j > u.

    p is the softmax of logits / temperature over the tokens that `keep_likely` keeps. The sums are float32. A token whose
    float32 probability is 0 is never sampled, whatever u is.

    Args:
      logits: [B, V] float32.
      uniform: [B] float32 in [0, 1).
      temperature: positive.
      top_k, top_p, min_p: see `keep_likely`; None keeps every token and costs nothing.
      greedy: take the most probable token, the first of equals, whatever ``uniform`` is.

    Returns:
      (token [B] int32, logp [B] float32).

    >>> logits = jnp.log(jnp.array([[0.0, 0.5, 0.25, 0.25, 0.0]] * 3))
    >>> token, logp = sample_tokens(logits, jnp.array([0.0, 0.6, 0.9999999]))
    >>> token, jnp.exp(logp)
    (Array([1, 2, 3], dtype=int32), Array([0.5 , 0.25, 0.25], dtype=float32))
    """
    rows, vocabulary = logits.shape
    scaled = keep_likely(logits.T / temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scaled = jnp.pad(scaled, ((0, -vocabulary % BLOCK), (0, 0)), constant_values=-jnp.inf)  # [V', B], whole blocks
    # Masses are unnormalised probabilities, exp(z − max z); their sum is ``total``.
    top = scaled.max(0, keepdims=True)  # [1, B]
    blocks = scaled.reshape(-1, BLOCK, rows)
    block_masses = jnp.exp(blocks - top[None]).sum(1)  # [V'/BLOCK, B]
    block_ends = jnp.cumsum(block_masses, axis=0)  # [V'/BLOCK, B]
    total = block_ends[-1]  # [B]
    if greedy:
        token = jnp.where(scaled == top, jnp.arange(len(scaled), dtype=jnp.int32)[:, None], vocabulary).min(0)
        return token, -jnp.log(total)
    # The block in which the cumulative sum passes the threshold, and then the token in that block.
    threshold = uniform * total  # [B]
    block = first_above(block_ends, block_masses, threshold)  # [B]
    inside = take_at(blocks, block)  # [BLOCK, B]
    masses = jnp.exp(inside - top)
    ends = jnp.cumsum(masses, axis=0)  # [BLOCK, B]
    before = take_at(block_ends, block) - take_at(block_masses, block)  # [B], the mass of all earlier blocks
    offset = first_above(ends, masses, threshold - before)  # [B]
    return block * BLOCK + offset, take_at(inside, offset) - top[0] - jnp.log(total)


def keep_likely(
    logits: jax.Array,
    *,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    min_p: float | jax.Array | None = None,
) -> jax.Array:
    """Replaces the logits of unlikely tokens by −∞. The rules act in turn, each on the tokens that the one before has kept.

    Equal logits are kept or dropped together. Nothing is sorted: the lowest logit to keep is searched bit by bit, in 32 passes.

    Args:
      logits: [V, B] float32, after division by the temperature.
      top_k: keep the k largest.
      top_p: keep the fewest of the largest whose probabilities sum to this or more.
      min_p: keep those whose probability is at least this share of the highest one.

    Returns:
      [V, B] float32.

    Raises:
      ValueError: a top_k below 1, or a Python number for top_p or min_p that is out of range.

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
        counts, wanted = jnp.ones_like(logits), jnp.full(logits.shape[1], top_k, jnp.float32)
        logits = jnp.where(mark_largest(logits, counts, wanted), logits, -jnp.inf)
    if top_p is None and min_p is None:
        return logits
    masses = jnp.exp(logits - logits.max(0, keepdims=True))  # [V, B], relative to the most probable token
    if top_p is not None:
        # top_p = 1 keeps every token: rounding must not drop those that are too unlikely to change the sum.
        likely = mark_largest(logits, masses, top_p * masses.sum(0)) | (top_p >= 1)
        logits, masses = jnp.where(likely, logits, -jnp.inf), jnp.where(likely, masses, 0.0)
    return logits if min_p is None else jnp.where(masses >= min_p, logits, -jnp.inf)


def mark_largest(x: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """[V, B] bool: True on the fewest largest x of each row whose weights sum to the target or more, and on all their equals."""
    # Unsigned integers in the order of the floats: negative numbers have all bits flipped, others only the sign bit.
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    ordered = bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))  # [V, B]

    def set_bit(i: jax.Array, bound: jax.Array) -> jax.Array:
        """Sets bit i, from the highest on, where enough weight is left above the bound."""
        higher = bound | (jnp.uint32(0x80000000) >> i.astype(jnp.uint32))  # [B]
        enough = jnp.where(ordered >= higher[None], weights, 0.0).sum(0) >= target
        return jnp.where(enough, higher, bound)

    return ordered >= lax.fori_loop(0, 32, set_bit, jnp.zeros(x.shape[1], jnp.uint32))[None]


def first_above(cumulative: jax.Array, masses: jax.Array, threshold: jax.Array) -> jax.Array:
    """[B] int32: the first index of each row with a mass and a cumulative sum above the threshold; else the last with a mass."""
    indices = jnp.arange(len(masses), dtype=jnp.int32)[:, None]  # [n, 1]
    first = jnp.where((masses > 0) & (cumulative > threshold[None]), indices, len(masses)).min(0)
    return jnp.clip(jnp.where(masses > 0, indices, 0).max(0), 0, first)


def take_at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index[b], ..., b] for each row b."""
    index = index.reshape(*[1] * (x.ndim - 1), -1)  # [1, ..., B]

    def searched() -> jax.Array:
        numbers = jnp.arange(len(x), dtype=index.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(numbers == index, x, -jnp.inf).max(0)

    # Accelerators would write x down once more to gather from it; a search only reads it. A CPU gathers where it lies.
    return lax.platform_dependent(cpu=lambda: jnp.take_along_axis(x, index, axis=0)[0], default=searched)
