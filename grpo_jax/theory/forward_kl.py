"""Exact iterations whose KL is KL(π_ref‖π), what k3 in the loss descends: another map, with cycles of its own.

The penalty β kl(p_ref‖p) has the slope β(p − p_ref)/(p(1 − p)) in p, so one exact iteration solves β(p − p_ref) = p(1 − p) Ω.
Its only fixed point is `forward_kl_fixed_point`, which small steps always reach. Exact iterations need not: as in
thresholds.py, 2-cycles are pairs of equal ψ, here ψ(p) = (p − p_ref)Ω/v, and they exist at some β exactly where a fixed point
flips.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import log_odds_slope
from grpo_jax.theory.orbits import OrbitEnd, follow, last_cycle
from grpo_jax.theory.roots import POINTS, REACH, sign_changes
from grpo_jax.theory.weights import Weights, log_odds


def forward_kl_success_map(
    p: ArrayLike, p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False
) -> jax.Array:
    """The success probability after one exactly solved iteration with KL(π_ref‖π), advantages measured at p.

    The new p solves β(p − p_ref) = p(1 − p) Ω(old p), a quadratic in its odds.

    Args:
      p: [...] success probability of the policy that was sampled.
      p_ref: [...] of the reference policy; 0 and 1 are returned unchanged.
      beta: weight of the KL, > 0.
      weights: the normaliser.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [...] the new success probability.

    Source: derived; checked by maximising the objective in tests/theory.

    >>> from grpo_jax.theory import Whitened
    >>> round(float(forward_kl_success_map(0.44868, 0.2, beta=2.0, weights=Whitened(0.0))), 4)  # its fixed point
    0.4487
    """
    old, reference = log_odds(p, logits=logits), log_odds(p_ref, logits=logits)
    at_end = jnp.isinf(reference)
    inside = jnp.where(at_end, 0.0, reference)
    right, wrong = jax.nn.sigmoid(inside), jax.nn.sigmoid(-inside)
    # wrong · odds² − b · odds − right = 0, by the form of its solution in which nothing cancels.
    b = weights.omega(old) / jnp.asarray(beta, old.dtype) - (wrong - right)
    root = jnp.sqrt(jnp.square(b) + 4 * right * wrong)
    mapped = jnp.where(b > 0, jnp.log((b + root) / (2 * wrong)), jnp.log(2 * right / (root - jnp.minimum(b, 0.0))))
    mapped = jnp.where(at_end, reference, mapped)
    return mapped if logits else jax.nn.sigmoid(mapped)


def forward_kl_multiplier(p_star: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False) -> jax.Array:
    """The factor by which an error at the fixed point shrinks per exact iteration with KL(π_ref‖π).

    m = (Ω'_L/β) / (1 − (1 − 2p*) Ω/β), with Ω'_L the slope of Ω in log-odds.

    Args:
      p_star: [...] the fixed point, from `forward_kl_fixed_point`.
      beta: weight of the KL, > 0.
      weights: the normaliser.
      logits: ``p_star`` is given as log-odds.

    Returns:
      [...] m.

    Source: derived; the map of `forward_kl_success_map`, differentiated.

    >>> from grpo_jax.theory import MeanOnly
    >>> float(forward_kl_multiplier(0.4, beta=2.0, weights=MeanOnly()))
    0.0
    """
    star = log_odds(p_star, logits=logits)
    beta = jnp.asarray(beta, star.dtype)
    return log_odds_slope(star, weights) / beta / (1 + jnp.tanh(star / 2) * weights.omega(star) / beta)


@partial(jax.jit, static_argnames=("num_iterations", "logits"))
def forward_kl_orbit_end(
    p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, num_iterations: int = 2000, logits: bool = False
) -> OrbitEnd:
    """Where exactly solved iterations with KL(π_ref‖π) from the reference end: `orbit_end` for the other KL.

    Args:
      p_ref: [...] success probability of the reference policy; 0 and 1 are returned unchanged.
      beta: [...] weight of the KL, > 0.
      weights: the normaliser.
      num_iterations: how many before the orbit is watched for a cycle; static.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      The ends, in the broadcast shape of the arguments.

    Source: derived; see `forward_kl_flip_limit`.

    >>> from grpo_jax.theory import Whitened
    >>> end = forward_kl_orbit_end(1e-3, beta=3.0, weights=Whitened(1e-6))
    >>> int(end.period), round(float(end.low), 3), round(float(end.high), 3)
    (2, 0.005, 0.785)
    """
    reference = log_odds(p_ref, logits=logits)
    beta = jnp.asarray(beta, reference.dtype)
    reference, beta = jnp.broadcast_arrays(reference, beta)

    def step(logit: jax.Array) -> jax.Array:
        return forward_kl_success_map(logit, reference, beta=beta, weights=weights, logits=True)

    logit, lyapunov = follow(step, reference, num_iterations)
    lyapunov = jnp.where(jnp.isinf(logit), -jnp.inf, lyapunov)
    low, high, period = last_cycle(step, logit)
    if not logits:
        low, high = jax.nn.sigmoid(low), jax.nn.sigmoid(high)
    return OrbitEnd(low, high, period, lyapunov)


def forward_kl_flip_limit(weights: Weights) -> float | None:
    """The largest p_ref whose exactly solved iterations with KL(π_ref‖π) oscillate at some β; see `flip_limit`.

    The largest p − v/D with D = 1 − 2p − (ln Ω)'(L) > 0, because (p − p_ref)Ω/v falls where p_ref is below that.
    Population whitening with ε = 0: (3 − 2√2)/6 = 2.86 %. Small steps never oscillate.

    Args:
      weights: the normaliser.

    Returns:
      p_ref, or None where no reference oscillates. Computed in double precision on the host.

    Source: derived, as for `flip_limit`.

    >>> from grpo_jax.theory import Whitened
    >>> round(forward_kl_flip_limit(Whitened(0.0)), 7)
    0.0285955
    """
    with jax.enable_x64(True):
        limit = float(_largest_flip(weights))
        return limit if limit > 1e-15 else None  # anything smaller is rounding error


@jax.jit
def _largest_flip(weights: Weights) -> jax.Array:
    def reference(logit: jax.Array) -> jax.Array:
        """p − v/D as p (D − (1 − p))/D; −1 where D ≤ 0."""
        right, wrong = jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
        d = wrong - right - log_odds_slope(logit, weights) / weights.omega(logit)
        return jnp.where(d > 0, right * (d - wrong) / jnp.where(d > 0, d, 1.0), -1.0)

    grid = jnp.linspace(-REACH, REACH, POINTS, dtype=jnp.zeros(()).dtype)
    tops = sign_changes(lambda x: jax.jvp(reference, (x,), (jnp.ones_like(x),))[1], grid)
    return jnp.nanmax(reference(jnp.append(tops, grid)))
