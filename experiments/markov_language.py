"""A language of eight tokens spoken by Markov chains: whatever the length, divergences and their gradients are exact.

A chain is a table of logits [TOKENS + 1, TOKENS]: what follows a token, or the start (the last row). Where it may differ from
position to position it is ``steps`` [T, TOKENS + 1, TOKENS]. Divergences are in nats per completion.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOKENS = 8
START = TOKENS


class Language(NamedTuple):
    """Three chains over the same tokens, and which tokens go on: 0 for one that ends the completion, else 1; [TOKENS]."""

    policy: jax.Array
    reference: jax.Array
    old: jax.Array
    goes_on: jax.Array


class Completions(NamedTuple):
    """[..., G, T] tokens, the rows of the table they were drawn from, and True up to the end."""

    tokens: jax.Array
    rows: jax.Array
    mask: jax.Array


def language(length: int, *, kl: float, drift: float = 0.0, ends: bool = False, seed: int = 0) -> Language:
    """A random chain, with a reference and an old policy in random directions and at given distances.

    Args:
      length: T, the most tokens of a completion.
      kl: KL(π‖π_ref) in nats.
      drift: KL(π‖π_old) in nats.
      ends: whether the last token is an end; it is then one in T + 1.
      seed: of chain and directions.

    >>> spoken = language(10, kl=0.5)
    >>> round(float(sequence_kl(repeat(spoken.policy, 10), spoken.reference, spoken.goes_on)), 3)
    0.5
    """
    rng = np.random.default_rng(seed)
    policy, away, back = (jnp.asarray(rng.normal(size=(TOKENS + 1, TOKENS))) for _ in range(3))
    goes_on = jnp.ones_like(policy[0])
    if ends:
        others = jax.nn.logsumexp(policy[:, :-1], axis=-1)
        policy, goes_on = policy.at[:, -1].set(others - jnp.log(1.0 * length)), goes_on.at[-1].set(0.0)
    steps = repeat(policy, length)
    reference, old = (policy + distance(steps, x, kl=y, goes_on=goes_on) * x for x, y in ((away, kl), (back, drift)))
    return Language(policy, reference, old, goes_on)


def repeat(table: jax.Array, length: int) -> jax.Array:
    """Steps [T, TOKENS + 1, TOKENS] that are the same at every position."""
    return jnp.broadcast_to(table, (length, *table.shape))


def visits(steps: jax.Array, goes_on: jax.Array) -> jax.Array:
    """[T, TOKENS + 1]: probability that a token is drawn from this row at this position; differentiable."""

    def advance(now: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        after = (now @ jax.nn.softmax(logits)) * goes_on
        return jnp.append(after, jnp.zeros_like(after[:1])), now

    return jax.lax.scan(advance, jnp.eye(TOKENS + 1, dtype=steps.dtype)[START], steps)[1]


def row_kl(table: jax.Array, anchor: jax.Array) -> jax.Array:
    """[..., TOKENS + 1]: KL of the next token after each token."""
    logps = jax.nn.log_softmax(table)
    return (jnp.exp(logps) * (logps - jax.nn.log_softmax(anchor))).sum(-1)


def sequence_kl(steps: jax.Array, anchor: jax.Array, goes_on: jax.Array) -> jax.Array:
    """KL(steps‖anchor) of whole completions, exactly; differentiable. The anchor is a table or steps."""
    return (visits(steps, goes_on) * row_kl(steps, jnp.broadcast_to(anchor, steps.shape))).sum()


@jax.jit
def distance(steps: jax.Array, direction: jax.Array, *, kl: float | jax.Array, goes_on: jax.Array) -> jax.Array:
    """How far to go along a table's direction [TOKENS + 1, TOKENS] until KL(steps‖there) = kl, by bisection."""
    slope = jnp.broadcast_to(direction, steps.shape)

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = (bracket[0] + bracket[1]) / 2
        far = sequence_kl(steps, steps + middle * slope, goes_on) > kl
        return jnp.where(far, bracket[0], middle), jnp.where(far, middle, bracket[1])

    ends = jnp.zeros((), steps.dtype), jnp.full((), 10.0, steps.dtype)
    return jnp.where(kl > 0, jax.lax.fori_loop(0, 50, halve, ends)[0], 0.0)


def path_measure(kernel: jax.Array, last: jax.Array, length: int, goes_on: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chain whose completions have density ∏_t exp kernel(s_t, o_t) · exp last(o_T), normalised (Doob's transform).

    Args:
      kernel: [TOKENS + 1, TOKENS] log weights of a step.
      last: [TOKENS] log weight of a completion that reaches T with this token.
      length: T.
      goes_on: [TOKENS].

    Returns:
      Log-probabilities [T, TOKENS + 1, TOKENS] of each step, and the log of the normaliser.
    """

    def back(ahead: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        joint = kernel + jnp.where(goes_on > 0, ahead, 0.0)[None]
        total = jax.nn.logsumexp(joint, axis=-1)
        return total[:TOKENS], (joint - total[:, None], total[START])

    _, (steps, totals) = jax.lax.scan(back, last, length=length, reverse=True)
    return steps, totals[0]


@partial(jax.jit, static_argnames=("groups", "group_size"))
def sample(key: jax.Array, steps: jax.Array, goes_on: jax.Array, groups: int, group_size: int) -> Completions:
    """Completions [groups, G, T] of the chain."""
    uniform = jax.random.uniform(key, (len(steps), groups * group_size), steps.dtype)

    def step(state: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, Completions]:
        (row, alive), (cumulative, u) = state, inputs
        token = jnp.minimum((u[:, None] > cumulative[row]).sum(-1, dtype=jnp.int32), TOKENS - 1)
        return (token, alive & (goes_on[token] > 0)), Completions(token, row, alive)

    first = jnp.full(groups * group_size, START, jnp.int32), jnp.ones(groups * group_size, bool)
    completions = jax.lax.scan(step, first, (jnp.cumsum(jax.nn.softmax(steps), axis=-1), uniform))[1]
    return jax.tree.map(lambda x: x.T.reshape(groups, group_size, -1), completions)


def logps(table: jax.Array, completions: Completions) -> jax.Array:
    """[..., T] log-probabilities of the tokens under a table, or under steps."""
    return jax.nn.log_softmax(table)[(*at(table, completions.rows), completions.tokens)]


def at(table: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
    """The index of rows [..., T] in a table, or in steps."""
    return (rows,) if table.ndim == 2 else (jnp.arange(len(table)), rows)


def log_ratio(table: jax.Array, anchor: jax.Array, completions: Completions) -> jax.Array:
    """[...] log-ratio of two chains for whole completions."""
    return jnp.where(completions.mask, logps(table, completions) - logps(anchor, completions), 0.0).sum(-1)


def score_size(table: jax.Array, length: int, goes_on: jax.Array) -> jax.Array:
    """Root mean square length of ∇ log π of a completion, exactly: the scores of its tokens are uncorrelated."""
    squares = 1 - (jax.nn.softmax(table) ** 2).sum(-1)
    return jnp.sqrt((visits(repeat(table, length), goes_on) @ squares).sum())
