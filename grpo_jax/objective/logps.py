"""Log-probabilities of completions, without the logits of all tokens at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def completion_logps(
    hidden: jax.Array,
    unembedding: jax.Array | Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk_size: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token and entropy of the distribution it was drawn from.

    log π(o_t | q, o_<t) = z_t − log Σ_v exp z_v with z = hidden · unembedding / temperature, in float32. Logits exist for
    ``chunk_size`` positions at a time, in the forward and in the backward pass, which recomputes them: the peak is
    B·chunk_size·V numbers and not B·T·V.

    Args:
      hidden: [B, T, D]; position t holds the state that predicts target t (the shift by one is already done).
      unembedding: [D, V], or a function from hidden [..., D] to logits [..., V].
      targets: [B, T] integer token ids.
      temperature: of the sampling distribution; the scored distribution is the sampled one.
      chunk_size: positions of T per chunk.

    Returns:
      (logps [B, T] float32, entropy [B, T] float32, in nats).

    Raises:
      ValueError: shapes that do not belong together, or a chunk_size below 1.

    >>> logps, entropy = completion_logps(jnp.zeros((1, 3, 2)), jnp.zeros((2, 4)), jnp.zeros((1, 3), jnp.int32))
    >>> bool(jnp.allclose(logps, -jnp.log(4.0))), bool(jnp.allclose(entropy, jnp.log(4.0)))
    (True, True)
    """
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2]:
        raise ValueError(f"hidden must be [B, T, D] and targets [B, T], got {hidden.shape} and {targets.shape}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    to_logits = (
        unembedding if callable(unembedding) else lambda h: jnp.dot(h, unembedding, preferred_element_type=jnp.float32)
    )
    batch, length, width = hidden.shape
    chunk_size = min(chunk_size, max(length, 1))
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length

    @jax.checkpoint
    def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, tokens = chunk
        logits = to_logits(states).astype(jnp.float32) / temperature
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        probs = jnp.exp(log_probs)
        # A token of probability 0 adds 0, and not 0·(−inf), to the entropy and to its gradient.
        entropy = -(probs * jnp.where(probs > 0, log_probs, 0.0)).sum(-1)
        return chosen, entropy

    if num_chunks == 1:
        return score((hidden, targets))
    # Chunks run along T, so that a batch axis split over devices stays where it is.
    states = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, num_chunks, chunk_size, width)
    tokens = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, num_chunks, chunk_size)
    logps, entropy = jax.lax.map(score, (states.swapaxes(0, 1), tokens.swapaxes(0, 1)))
    restore = lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length]  # noqa: E731
    return restore(logps), restore(entropy)
