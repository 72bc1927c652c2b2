"""Where exact iterations end, for whole arrays of prompts at once: a fixed point, a cycle, or chaos.

It is read off the orbit itself, which is iterated and then watched until it returns; no path is stored.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import success_map
from grpo_jax.theory.weights import Weights, log_odds

LONGEST_CYCLE = 64


class OrbitEnd(NamedTuple):
    """The last cycle of orbits; of those without one, their last `LONGEST_CYCLE` iterations.

    low: [...] the lowest success probability in it.
    high: [...] the highest.
    period: [...] how many iterations until the orbit returns; 0: no cycle up to `LONGEST_CYCLE` was found.
    lyapunov: [...] mean of ln|dL_n/dL_{n−1}|: positive is chaos, −∞ the fastest convergence.
    """

    low: jax.Array
    high: jax.Array
    period: jax.Array
    lyapunov: jax.Array


@partial(jax.jit, static_argnames=("num_iterations", "logits"))
def orbit_end(
    p_ref: ArrayLike,
    *,
    beta: ArrayLike,
    weights: Weights,
    alpha: ArrayLike = 1.0,
    p_0: ArrayLike | None = None,
    num_iterations: int = 2000,
    logits: bool = False,
) -> OrbitEnd:
    """The cycle on which exactly solved iterations end, its period, and whether nearby orbits flee each other.

    L_n = α L_ref + (1 − α) L_{n−1} + Ω(p_{n−1})/β is iterated ``num_iterations`` times. The mean logarithm of its slope
    1 − α + Ω'_L/β over the second half is the Lyapunov exponent. The orbit has period k where it comes back after k more
    iterations (to ε^⅔ of the float type, in log-odds) and does not repel: its slopes over the cycle multiply to at most 1.

    Args:
      p_ref: [...] success probability of the reference policy; 0 and 1 are returned unchanged.
      beta: [...] weight of the sequence-level KL, > 0.
      weights: the normaliser.
      alpha: [...] share of the KL that goes to the reference, in [0, 1]; at 0 (mirror) orbits end at 1 if Ω > 0.
      p_0: [...] where to start; None: at ``p_ref``.
      num_iterations: how many before the orbit is watched for a cycle; static.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      The ends, in the broadcast shape of the arguments. Period 0 with a negative exponent: still converging.

    Source: derived from arXiv 2503.06639, Thms 2, 4 and 9; checked against stored orbits in tests/theory.

    >>> from grpo_jax.theory import Whitened
    >>> end = orbit_end(jnp.array([1e-3, 0.2]), beta=3.0, weights=Whitened(1e-5))
    >>> end.period.tolist(), [round(float(p), 4) for p in end.low], [round(float(p), 4) for p in end.high]
    ([2, 1], [0.002, 0.3361], [0.633, 0.3361])
    """
    reference = log_odds(p_ref, logits=logits)
    start = reference if p_0 is None else log_odds(p_0, logits=logits).astype(reference.dtype)
    beta, alpha = jnp.asarray(beta, reference.dtype), jnp.asarray(alpha, reference.dtype)
    shape = jnp.broadcast_shapes(reference.shape, start.shape, beta.shape, alpha.shape)
    reference, start, beta = (jnp.broadcast_to(x, shape) for x in (reference, start, beta))
    alpha = alpha if alpha.ndim == 0 else jnp.broadcast_to(alpha, shape)

    def step(logit: jax.Array) -> jax.Array:
        return success_map(logit, reference, beta=beta, weights=weights, alpha=alpha, logits=True)

    logit, lyapunov = follow(step, start, num_iterations)
    # Ω has one sign everywhere. Without a pull to the reference (α = 0) the orbit never stops: it ends infinitely far that way.
    pull = weights.omega(start)
    far = jnp.where(jnp.isinf(start) | (pull == 0), start, jnp.copysign(jnp.inf, pull))
    logit = jnp.where(alpha == 0, far, logit)
    logit = jnp.where(jnp.isinf(reference), reference, logit)
    # Slopes overflow on the way to infinite log-odds, where Ω is flat and the slope is 1 − α.
    lyapunov = jnp.where(jnp.isinf(logit), jnp.log(1 - alpha), lyapunov)
    lyapunov = jnp.where(jnp.isinf(reference), -jnp.inf, lyapunov)
    low, high, period = last_cycle(step, logit)
    if not logits:
        low, high = jax.nn.sigmoid(low), jax.nn.sigmoid(high)
    return OrbitEnd(low, high, period, lyapunov)


def follow(
    step: Callable[[jax.Array], jax.Array], start: jax.Array, num_iterations: int
) -> tuple[jax.Array, jax.Array]:
    """Iterates an elementwise map, and measures over the second half how nearby orbits separate.

    Args:
      step: the map, [...] -> [...].
      start: [...].
      num_iterations: how many.

    Returns:
      (the last iterate [...], the Lyapunov exponent [...]).

    >>> round(float(follow(lambda x: 4 * x * (1 - x), jnp.float32(0.3), 20000)[1]), 2)  # ln 2
    0.69
    """

    def climb(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mapped, log_slope = _with_log_slope(step, state[0])
        return mapped, state[1] + log_slope

    measured = num_iterations - num_iterations // 2
    end = jax.lax.fori_loop(0, num_iterations // 2, lambda _, x: step(x), start)
    end, total = jax.lax.fori_loop(0, measured, climb, (end, jnp.zeros_like(start)))
    return end, total / measured


def last_cycle(step: Callable[[jax.Array], jax.Array], start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cycle of an elementwise map through the points of ``start``.

    Args:
      step: the map, [...] -> [...].
      start: [...] where an orbit has come to after long.

    Returns:
      (lowest value, highest value, period), each [...]; period 0 where there is no cycle up to `LONGEST_CYCLE`.

    >>> [round(float(x), 4) for x in last_cycle(lambda x: 3.2 * x * (1 - x), jnp.float32(0.51304))]
    [0.513, 0.7995, 2.0]
    """
    tolerance = jnp.finfo(start.dtype).eps ** (2 / 3) * (1 + jnp.abs(start))

    def watch(k: jax.Array, state: _Watch) -> _Watch:
        logit, log_slope = _with_log_slope(step, state.logit)
        total = state.total + log_slope
        # A chaotic orbit also comes close to where it was, but nearby orbits flee each other: its total is positive.
        returned = (logit == start) | ((jnp.abs(logit - start) <= tolerance) & (total <= 0))
        on = state.period == 0
        return _Watch(
            logit,
            jnp.where(on, jnp.minimum(state.low, logit), state.low),
            jnp.where(on, jnp.maximum(state.high, logit), state.high),
            jnp.where(on & returned, k, state.period),
            total,
        )

    begin = _Watch(start, start, start, jnp.zeros(start.shape, jnp.int32), jnp.zeros_like(start))
    end = jax.lax.fori_loop(jnp.int32(1), jnp.int32(LONGEST_CYCLE + 1), watch, begin)
    return end.low, end.high, end.period


class _Watch(NamedTuple):
    """The state of `last_cycle`: where the orbit is, its cycle so far, and the summed logarithms of its slopes."""

    logit: jax.Array
    low: jax.Array
    high: jax.Array
    period: jax.Array
    total: jax.Array


def _with_log_slope(step: Callable[[jax.Array], jax.Array], logit: jax.Array) -> tuple[jax.Array, jax.Array]:
    mapped, slope = jax.jvp(step, (logit,), (jnp.ones_like(logit),))  # value and slope in one pass
    return mapped, jnp.log(jnp.abs(slope))
