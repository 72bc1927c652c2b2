"""All O completions of a tiny language, so that expectations over a policy are sums and not samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

LETTERS, EOS, LENGTH = 2, 2, 3
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(LETTERS), repeat=n)]


def completions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [O, T], mask [O, T], prefix id [O, T]) of every completion: EOS ends it, or T does."""
    rows = [(*p, EOS) for p in PREFIXES] + list(itertools.product(range(LETTERS), repeat=LENGTH))
    tokens, mask, prefix = (np.zeros((len(rows), LENGTH), int) for _ in range(3))
    for i, row in enumerate(rows):
        for t, token in enumerate(row):
            tokens[i, t], mask[i, t], prefix[i, t] = token, 1, PREFIXES.index(row[:t])
    return tokens, mask.astype(bool), prefix


TOKENS, MASK, PREFIX = completions()
NUM = len(TOKENS)


def random_policy(seed: int, scale: float = 1.0) -> jax.Array:
    """Logits [prefix, LETTERS + 1] of a tabular policy."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(len(PREFIXES), LETTERS + 1)) * scale, jnp.float32)


def logps(table: jax.Array) -> jax.Array:
    """[O, T] log-probability of every token of every completion (arbitrary where masked)."""
    return jax.nn.log_softmax(table)[PREFIX, TOKENS]


def probabilities(table: jax.Array) -> jax.Array:
    """[O] probabilities of the completions; their sum is one."""
    return jnp.exp(jnp.where(MASK, logps(table), 0.0).sum(-1))
