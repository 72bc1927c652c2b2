"""Where training ends: fixed points of the exact iteration, the limit of its orbit, the end of many small steps.

A fixed point solves L − L_ref = Ω(p)/β in log-odds. There is one, or three, of which the middle one is unstable: proven for
whitening, checked for groups with a baseline, and not known otherwise (thresholds.py).
Which is reached depends on the dynamics: exact iterations can jump past a fixed point, or cycle, or be chaotic
(`limit_point`); many small on-policy steps climb from p_ref and stop at the first (`flow_point`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import iterate, log_odds_slope
from grpo_jax.theory.orbits import LONGEST_CYCLE, orbit_end
from grpo_jax.theory.roots import all_roots, flow_root, forward_root
from grpo_jax.theory.weights import Weights, log_odds, upward

ROUNDS = 32  # of iterations that `limit_point` waits for an orbit to settle


class FixedPoint(NamedTuple):
    """One solution of p = h(p).

    p: the success probability.
    logit: its log-odds, which do not round to 1.
    multiplier: h'(p), the factor by which an error shrinks per exact iteration.
    stable: whether |multiplier| < 1.
    """

    p: float
    logit: float
    multiplier: float
    stable: bool


class LimitPoint(NamedTuple):
    """Where exact iterations end.

    kind: "fixed", "cycle" or "chaos".
    p: the limit; for a cycle its points, ascending; for chaos the lowest and the highest value visited.
    period: 1 for a fixed point, the number of points of a cycle, 0 for chaos.
    """

    kind: str
    p: float | tuple[float, ...]
    period: int


def beta_for_target(p_star: ArrayLike, p_ref: ArrayLike, *, weights: Weights, logits: bool = False) -> jax.Array:
    """The one β at which p_star is a fixed point: β = Ω(p*) / (logit p* − logit p_ref).

    Between the folds (`bistable_window`) it may be the fixed point that repels, and `flow_point` another.

    Args:
      p_star: [...] the success probability wanted, above ``p_ref`` (below, if a verifier worse than chance pushes down).
      p_ref: [...] of the reference policy.
      weights: the normaliser.
      logits: probabilities are given as log-odds.

    Returns:
      [...] β; nan where ``p_star`` is not above ``p_ref``, which no β reaches.

    Source: arXiv 2503.06639, Thm 2, solved for β.

    >>> from grpo_jax.theory import MeanOnly
    >>> round(float(beta_for_target(0.5, 0.2, weights=MeanOnly())), 5)  # 1/ln 4
    0.72135
    """
    target = log_odds(p_star, logits=logits)
    gain, pull = target - log_odds(p_ref, logits=logits), weights.omega(target)
    reached = gain * jnp.sign(pull) > 0
    return jnp.where(reached, pull / jnp.where(reached, gain, 1.0), jnp.nan)


@partial(jax.jit, static_argnames="logits")
def flow_point(p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False) -> jax.Array:
    """The success probability at which many small on-policy steps from the reference end, with KL(π‖π_ref).

    Small steps follow dL/dt ∝ L_ref + Ω(p)/β − L upwards from L_ref and cannot pass a root, so the end is the smallest
    one. Just below a fold it vanishes and the end jumps up.

    Args:
      p_ref: [...] success probability of the reference policy; 0 and 1 are returned unchanged, with zero gradient.
      beta: weight of the sequence-level KL, > 0; a scalar, or of the shape of ``p_ref``.
      weights: the normaliser.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [...] p*; 1 where there is no root (ε = 0 below the fold). Differentiable in p_ref, β and ε to any order.

    Source: derived from arXiv 2503.06639, Thm 2; checked by integrating the flow in tests/theory.

    >>> from grpo_jax.theory import Whitened
    >>> [round(float(p), 4) for p in flow_point(jnp.array([0.2, 0.5]), beta=5.0, weights=Whitened(1e-5))]
    [0.2807, 0.6007]
    """
    return _end_point(p_ref, beta, weights, logits, root=flow_root)


@partial(jax.jit, static_argnames="logits")
def forward_kl_fixed_point(p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, logits: bool = False) -> jax.Array:
    """The success probability at which training ends when the loss contains k3, whose gradient is that of KL(π_ref‖π).

    p* − p_ref = p*(1 − p*) Ω(p*)/β: one solution and no fold, which small steps always reach (exactly solved iterations
    need not; see forward_kl.py). With population whitening and ε = 0 it is
    p* = [2 p_ref β² + 1 + √(1 + 4 β² p_ref(1 − p_ref))] / (2(1 + β²)).

    Args:
      p_ref: [...] success probability of the reference policy; 0 and 1 are returned unchanged, with zero gradient.
      beta: weight of the KL, > 0; a scalar, or of the shape of ``p_ref``.
      weights: the normaliser.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [...] p*. Differentiable in p_ref, β and ε to any order.

    Source: derived; d kl(p_ref‖p)/dp = (p − p_ref)/(p(1 − p)) set against Ω(p)/β.

    >>> from grpo_jax.theory import Whitened
    >>> round(float(forward_kl_fixed_point(0.2, beta=2.0, weights=Whitened(0.0))), 5)
    0.44868
    """
    return _end_point(p_ref, beta, weights, logits, root=forward_root)


def fixed_points(p_ref: float, *, beta: float, weights: Weights, logits: bool = False) -> list[FixedPoint]:
    """All fixed points of the exact iteration, ascending; computed in double precision on the host.

    Args:
      p_ref: success probability of the reference policy, a number in [0, 1].
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      logits: ``p_ref`` is given as log-odds.

    Returns:
      The fixed points. None where p runs away to 1 (ε = 0 below the fold).

    Raises:
      ValueError: ``beta`` is not positive, or ``p_ref`` is not a probability.

    Source: arXiv 2503.06639, Thms 3 and 6.

    >>> from grpo_jax.theory import Whitened
    >>> [(round(f.p, 4), round(f.multiplier, 3), f.stable) for f in fixed_points(0.2, beta=1.0, weights=Whitened(1e-5))]
    [(0.6813, 0.389, True), (0.9347, 1.759, False), (1.0, 0.0, True)]
    """
    with jax.enable_x64(True):
        reference, scale = _scalar_inputs(p_ref, beta, logits)
        if math.isinf(reference):
            return [FixedPoint(float(reference > 0), float(reference), 0.0, True)]
        sign, better = upward(weights)
        roots = sign * all_roots(sign * reference, jnp.asarray(scale), better)
        roots = jnp.sort(roots[~jnp.isnan(roots)])
        multipliers = (log_odds_slope(roots, weights) / scale).tolist()
        points = zip(jax.nn.sigmoid(roots).tolist(), roots.tolist(), multipliers, strict=True)
        return [FixedPoint(p, logit, multiplier, abs(multiplier) < 1) for p, logit, multiplier in points]


def limit_point(
    p_ref: float,
    *,
    beta: float,
    weights: Weights,
    alpha: float = 1.0,
    p_0: float | None = None,
    logits: bool = False,
) -> LimitPoint:
    """Where exact iterations from p_0 end, found by iterating; computed in double precision on the host.

    Args:
      p_ref: success probability of the reference policy, a number in [0, 1]; 0 and 1 are their own limit.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      alpha: share of the KL that goes to the reference; at 0 (mirror) every limit is 1.
      p_0: where to start; None: at ``p_ref``.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      The limit. Cycles longer than 64 with a positive Lyapunov exponent count as chaos.

    Raises:
      ValueError: ``beta`` is not positive, ``alpha`` is not in [0, 1], or a probability is not in [0, 1].

    Source: arXiv 2503.06639, Thms 5, 6 and 9; the orbit itself decides.

    >>> from grpo_jax.theory import Whitened
    >>> cycle = limit_point(1e-3, beta=3.0, weights=Whitened(1e-5))
    >>> cycle.kind, cycle.period, [round(p, 5) for p in cycle.p]
    ('cycle', 2, [0.00199, 0.63301])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be in [0, 1]")
    with jax.enable_x64(True):
        reference, scale = _scalar_inputs(p_ref, beta, logits)
        start = reference if p_0 is None else _scalar_inputs(p_0, beta, logits)[0]
        show = float if logits else lambda logit: float(jax.nn.sigmoid(logit))
        options = {"beta": scale, "weights": weights, "alpha": float(alpha), "logits": True}
        for _ in range(ROUNDS):
            end = orbit_end(reference, p_0=start, num_iterations=1024, **options)
            start = float(end.high)
            if end.period > 0:
                break
        if math.isinf(start):
            return LimitPoint("fixed", show(start), 1)
        path = iterate(reference, 1024, p_0=start, **options)
        if end.period == 0 and end.lyapunov > 0:
            return LimitPoint("chaos", (show(path.min()), show(path.max())), 0)
        # An orbit that has still not settled is next to a bifurcation: its closest return gives the period.
        period = int(end.period) or 1 + int(jnp.abs(path[-2 : -2 - LONGEST_CYCLE : -1] - path[-1]).argmin())
        if period > 1:
            return LimitPoint("cycle", tuple(show(point) for point in sorted(path[-period:].tolist())), period)
        # One Newton step removes the error that slow convergence leaves. Two-KL has the fixed points of αβ.
        point, pull = path[-1], alpha * scale
        left = point - reference - weights.omega(point) / pull
        return LimitPoint("fixed", show(point - left / (1 - log_odds_slope(point, weights) / pull)), 1)


def _end_point(
    p_ref: ArrayLike, beta: ArrayLike, weights: Weights, logits: bool, *, root: Callable[..., jax.Array]
) -> jax.Array:
    reference = log_odds(p_ref, logits=logits)
    beta = jnp.broadcast_to(jnp.asarray(beta, reference.dtype), reference.shape)
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, reference.dtype), weights)
    at_end = jnp.isinf(reference)
    sign, better = upward(weights)
    logit = sign * root(sign * jnp.where(at_end, 0.0, reference), beta, better)
    logit = jnp.where(at_end, reference, logit)
    return logit if logits else jax.nn.sigmoid(logit)


def _scalar_inputs(p: float, beta: float, logits: bool) -> tuple[float, float]:
    """Log-odds and β as Python floats, checked."""
    logit, beta = float(log_odds(float(p), logits=logits)), float(beta)
    if math.isnan(logit):
        raise ValueError(f"p={p!r} is not a probability")
    if not beta > 0:
        raise ValueError(f"beta={beta!r} must be positive")
    return logit, beta
