"""What finite groups waste: a group whose rewards are all equal teaches nothing."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.weights import as_float, log_odds


def dead_fraction(p: ArrayLike, group_size: int, *, logits: bool = False) -> jax.Array:
    """The fraction p^G + (1 − p)^G of groups whose rewards are all equal and which teach nothing.

    Args:
      p: [...] success probability.
      group_size: G.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] the fraction.

    Source: derived; two terms of the binomial distribution.

    >>> round(float(dead_fraction(0.1, 8)), 6)
    0.430467
    """
    logit = log_odds(p, logits=logits)
    return jnp.exp(group_size * jax.nn.log_sigmoid(logit)) + jnp.exp(group_size * jax.nn.log_sigmoid(-logit))


def dead_fraction_of_counts(successes: ArrayLike, trials: ArrayLike, group_size: int) -> jax.Array:
    """The fraction of dead groups from the counts of a measurement: C(n − c, G)/C(n, G) + C(c, G)/C(n, G).

    Its expectation is p^G + (1 − p)^G; that of `dead_fraction` at c/n is more. With fewer trials than G nothing has, and it is
    `dead_fraction` at c/n.

    Args:
      successes, trials: [...] c and n.
      group_size: G.

    Returns:
      [...] the fraction.

    Source: derived; the chance that G of the n trials, drawn without replacement, are equal.

    >>> dead_fraction_of_counts([0, 1, 1], [2, 2, 1], 2).tolist()
    [1.0, 0.0, 1.0]
    """
    successes, trials = jnp.broadcast_arrays(as_float(successes), as_float(trials))

    def with_one_more(i: jax.Array, chances: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left = jnp.maximum(trials - i, 1)
        right, wrong = (jnp.maximum(count - i, 0) / left for count in (successes, trials - successes))
        return chances[0] * right, chances[1] * wrong

    start = jnp.ones_like(trials), jnp.ones_like(trials)
    right, wrong = jax.lax.fori_loop(0, group_size, with_one_more, start)
    return jnp.where(trials >= group_size, right + wrong, dead_fraction(successes / trials, group_size))


def mean_dead_fraction(a: ArrayLike, b: ArrayLike, group_size: int) -> jax.Array:
    """The fraction of dead groups over prompts whose success probabilities are spread as Beta(a, b).

    E[p^G + (1 − p)^G] = Π_{i<G} (a + i)/(a + b + i) + Π_{i<G} (b + i)/(a + b + i); for uniform p, 2/(G + 1).

    Args:
      a, b: [...] parameters of the Beta distribution, > 0.
      group_size: G.

    Returns:
      [...] the fraction.

    Source: derived; moments of the Beta distribution.

    >>> round(float(mean_dead_fraction(0.5, 0.5, 8)), 6)
    0.392761
    """
    a, b = jnp.broadcast_arrays(as_float(a), as_float(b))
    steps = jnp.arange(group_size, dtype=a.dtype).reshape((-1,) + (1,) * a.ndim)
    total = a[None] + b[None] + steps
    return ((a[None] + steps) / total).prod(0) + ((b[None] + steps) / total).prod(0)


def groups_per_live_group(p: ArrayLike, group_size: int, *, logits: bool = False) -> jax.Array:
    """How many groups dynamic sampling draws for each one that teaches: 1 / (1 − p^G − (1 − p)^G).

    Args:
      p: [...] success probability.
      group_size: G.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] the number, at least 1; infinite at p ∈ {0, 1}.

    Source: derived; the mean of a geometric distribution.

    >>> round(float(groups_per_live_group(0.01, 8)), 1)
    12.9
    """
    # 1 − p^G − (1−p)^G is computed as (1 − (1−p)^G) − p^G, which loses digits only where p^G is near 1. It is symmetric, so the
    # smaller of p and 1 − p takes the place of p.
    small = -jnp.abs(log_odds(p, logits=logits))
    live = -jnp.expm1(group_size * jax.nn.log_sigmoid(-small)) - jnp.exp(group_size * jax.nn.log_sigmoid(small))
    return 1 / live
