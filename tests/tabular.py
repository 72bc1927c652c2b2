"""GRPO solved exactly on explicit policies over O outcomes: the whole distribution moves, and nothing is assumed about it.

What the theory is tested against. Its recurrences follow the success probability alone, and rest on the claim that nothing else
moves. Here nothing rests on that claim. Where both can answer, they must agree; and some questions can be asked only here, such
as a start whose answers differ from the reference's in more than p, or a verifier that errs on some answers more than on others.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.roots import bisect
from grpo_jax.theory.weights import NoisyVerifier, Weights, omega_minus, omega_plus


def maximise(
    advantages: ArrayLike,
    log_anchor: ArrayLike,
    *,
    beta: ArrayLike,
    log_old: ArrayLike | None = None,
    clip: ArrayLike | None = None,
    clip_high: ArrayLike | None = None,
    blame: ArrayLike | None = None,
) -> jax.Array:
    """The one policy, of all there are, that maximises E_old[min(ρA, clip(ρ, 1 − c, 1 + c_high)A)] − β KL(π‖anchor).

    Without a clip it is anchor · exp(A/β) / Z. With one, the gain of an outcome is concave in ρ_o and bends twice: blame, the
    negative part of A, begins at 1 − c, and praise, the positive part, ends at 1 + c_high. So ln π_o = ln anchor_o + slope/β − ν,
    or it stays at a bend, where the slope before it leads beyond it and the slope after it leads back. ν follows from Σ π = 1.

    Args:
      advantages: [..., O] A of each outcome, a mean over draws.
      log_anchor: [..., O] log-probabilities, up to a constant; −∞ stays −∞.
      beta: weight of the KL, a scalar > 0.
      log_old: [..., O] of the policy that was sampled; only a clip needs it.
      clip: c, a scalar in [0, 1]; None: no clipping.
      clip_high: c_high, a scalar; None: ``clip``.
      blame: [..., O] −E[min(A, 0)], where draws of one outcome differ in sign, which a clip tells apart; None: max(−A, 0).

    Returns:
      [..., O] log-probabilities, in the float type of ``log_anchor``. Differentiable, a clip included.

    Raises:
      ValueError: ``clip`` without ``log_old``, or ``clip_high`` without ``clip``.

    Source: arXiv 2503.06639, Thm 1; with the clip derived, its optimality checked in tests/theory.

    >>> log_anchor = jnp.log(jnp.array([0.2, 0.8]))
    >>> [round(float(x), 4) for x in jnp.exp(maximise(jnp.array([2.0, -0.5]), log_anchor, beta=1.0))]
    [0.7528, 0.2472]
    >>> clipped = maximise(jnp.array([2.0, -0.5]), log_anchor, beta=1.0, log_old=log_anchor, clip=0.2)
    >>> [round(float(x), 4) for x in jnp.exp(clipped)]
    [0.2919, 0.7081]
    """
    log_anchor = jnp.asarray(log_anchor)
    shape = jnp.broadcast_shapes(jnp.shape(advantages), log_anchor.shape)

    def full(x: ArrayLike) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(x, log_anchor.dtype), shape)

    pull = full(advantages) / jnp.asarray(beta, log_anchor.dtype)
    if clip is None:
        if clip_high is not None:
            raise ValueError("clip_high needs clip")
        # Relative to the largest pull: otherwise ln anchor is lost beside A/β when β is small.
        return jax.nn.log_softmax(full(log_anchor) + (pull - pull.max(-1, keepdims=True)), axis=-1)
    if log_old is None:
        raise ValueError("clip needs log_old: the ratio it limits is that to the sampled policy")
    push = jnp.maximum(-pull, 0.0) if blame is None else full(blame) / jnp.asarray(beta, log_anchor.dtype)
    first = full(log_old) + jnp.log1p(-jnp.asarray(clip, log_anchor.dtype))
    last = full(log_old) + jnp.log1p(jnp.asarray(clip if clip_high is None else clip_high, log_anchor.dtype))
    return _clipped(full(log_anchor), _Bends(pull + push, pull, -push, first, last))


def success_log_odds(log_policy: ArrayLike, rewards: ArrayLike) -> jax.Array:
    """The log-odds ln(Σ π r / Σ π (1 − r)) of a reward, which do not round as p does.

    Args:
      log_policy: [..., O] log-probabilities, up to a constant.
      rewards: [O] or [..., O] in {0, 1}; values between are the chance that a noisy verifier accepts the outcome.

    Returns:
      [...] log-odds, infinite at the ends.

    Source: definition.

    >>> round(float(jax.nn.sigmoid(success_log_odds(jnp.log(jnp.array([0.1, 0.2, 0.7])), [1, 1, 0]))), 6)
    0.3
    """
    log_policy = jnp.asarray(log_policy)
    rewards = jnp.broadcast_to(jnp.asarray(rewards, log_policy.dtype), log_policy.shape)
    right = jax.nn.logsumexp(log_policy + jnp.log(rewards), axis=-1)
    return right - jax.nn.logsumexp(log_policy + jnp.log1p(-rewards), axis=-1)


def outcome_advantages(log_policy: ArrayLike, rewards: ArrayLike, *, weights: Weights) -> jax.Array:
    """The expected advantage r ω⁺(p) − (1 − r) ω⁻(p) of each outcome when the policy itself is sampled.

    Args:
      log_policy: [..., O] log-probabilities, up to a constant.
      rewards: [O] or [..., O] in {0, 1}; values between are the chance that a noisy verifier accepts the outcome.
      weights: the normaliser.

    Returns:
      [..., O]; zero where ω is infinite or undefined (ε = 0 and rewards that are all equal), as in a group of equal rewards.

    Source: arXiv 2503.06639, §2.3; between 0 and 1 derived, a mean over verdicts.

    >>> from grpo_jax.theory import Whitened
    >>> log_policy = jnp.log(jnp.array([0.1, 0.1, 0.8]))
    >>> [round(float(a), 4) for a in outcome_advantages(log_policy, [1, 1, 0], weights=Whitened(0.0))]
    [2.0, 2.0, -0.5]
    """
    praise, blame = _praise_and_blame(jnp.asarray(log_policy), rewards, weights)
    return praise - blame


def enumerated_advantages(
    p: ArrayLike, group_size: int, group_advantages: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """ω⁺ and ω⁻ of any normaliser of groups: a mean over all 2^(G−1) reward vectors of the other members.

    Args:
      p: [...] success probability.
      group_size: G.
      group_advantages: [N, G] rewards in {0, 1} → [N, G] advantages, e.g. ``functools.partial(grpo_jax.group_advantages,
        epsilon=0.0)``.

    Returns:
      (E[A | success], −E[A | failure]), each [...].

    Source: definition of a conditional expectation.

    >>> plus, minus = enumerated_advantages(0.2, 3, lambda r: r - r.mean(-1, keepdims=True))
    >>> round(float(plus), 6), round(float(minus), 6)  # (1 − p)(G − 1)/G and p(G − 1)/G
    (0.533333, 0.133333)
    """
    p = jnp.asarray(p, float) if isinstance(p, (int, float)) else jnp.asarray(p)
    others = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=group_size - 1)), p.dtype)

    def of_the_first(reward: float) -> jax.Array:
        groups = jnp.concatenate([jnp.full_like(others[:, :1], reward), others], axis=1)
        return group_advantages(groups)[:, 0].astype(p.dtype)

    values = jnp.stack([of_the_first(1.0), -of_the_first(0.0)], axis=-1)

    def mean(p: jax.Array) -> jax.Array:
        chance = jnp.where(others == 1, p, 1 - p).prod(-1)
        return jnp.matmul(chance, values, precision="highest")

    both = jnp.vectorize(mean, signature="()->(k)")(p)
    return both[..., 0], both[..., 1]


@partial(jax.jit, static_argnames="num_iterations")
def exact_iterates(
    log_ref: ArrayLike,
    rewards: ArrayLike,
    num_iterations: int,
    *,
    beta: ArrayLike,
    weights: Weights,
    alpha: ArrayLike = 1.0,
    clip: ArrayLike | None = None,
    clip_high: ArrayLike | None = None,
    log_start: ArrayLike | None = None,
) -> jax.Array:
    """The policies π_0, π_1, … of iterations whose inner problem is solved exactly, over all policies.

    π_n maximises the surrogate with advantages measured at π_{n−1}, minus β[α KL(π‖π_ref) + (1 − α) KL(π‖π_{n−1})]; the two
    are, up to a constant, one KL to π_ref^α π_{n−1}^{1−α}.

    Args:
      log_ref: [..., O] log-probabilities of the reference policy, up to a constant.
      rewards: [O] or [..., O] in {0, 1}; values between are the chance that a noisy verifier accepts the outcome.
      num_iterations: N; static.
      beta: weight of the sequence-level KL, a scalar > 0.
      weights: the normaliser.
      alpha: share of the KL that goes to the reference, a scalar in [0, 1].
      clip, clip_high: clip widths of the ratio to π_{n−1}, see `maximise`.
      log_start: [..., O] π_0, up to a constant; None: the reference.

    Returns:
      [N + 1, ..., O] log-probabilities, the start included.

    Raises:
      ValueError: a clip with a `NoisyVerifier`, whose mean advantages hide the single verdicts; see ``rewards``.

    Source: arXiv 2503.06639, Thms 1, 4 and 9 (Lemma 2 for the anchor).

    >>> from grpo_jax.theory import MeanOnly
    >>> path = exact_iterates(jnp.log(jnp.array([0.05, 0.15, 0.8])), [1, 1, 0], 2, beta=2.0, weights=MeanOnly(), alpha=0.0)
    >>> [round(float(p), 4) for p in jax.nn.sigmoid(success_log_odds(path, [1, 1, 0]))]
    [0.2, 0.2919, 0.4046]
    """
    if clip is not None and isinstance(weights, NoisyVerifier):
        raise ValueError("a clip treats single verdicts: give the verifier's rates as rewards, not as weights")
    log_ref = jax.nn.log_softmax(jnp.asarray(log_ref), axis=-1)
    start = jnp.asarray(log_ref if log_start is None else log_start, log_ref.dtype)
    start = jax.nn.log_softmax(jnp.broadcast_to(start, log_ref.shape), axis=-1)
    alpha = jnp.asarray(alpha, log_ref.dtype)

    def step(log_policy: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        # A share of zero of an impossible outcome is zero, not 0·∞.
        log_anchor = alpha * jnp.where(alpha == 0, 0.0, log_ref) + (1 - alpha) * jnp.where(alpha == 1, 0.0, log_policy)
        praise, blame = _praise_and_blame(log_policy, rewards, weights)
        log_policy = maximise(
            praise - blame, log_anchor, beta=beta, log_old=log_policy, clip=clip, clip_high=clip_high, blame=blame
        )
        return log_policy, log_policy

    _, path = jax.lax.scan(step, start, None, length=num_iterations)
    return jnp.concatenate([start[None], path])


@partial(jax.jit, static_argnames=("num_steps", "kl"))
def flow_steps(
    log_ref: ArrayLike,
    rewards: ArrayLike,
    num_steps: int,
    *,
    step_size: ArrayLike,
    beta: ArrayLike,
    weights: Weights,
    kl: str = "reverse",
) -> jax.Array:
    """The policies of on-policy gradient ascent, by exact gradients, on the logits of a softmax, from the reference on.

    Each step ascends ∇[Σ_o π_o A_o − β KL], with A measured at the current policy and held fixed.

    Args:
      log_ref: [..., O] log-probabilities of the reference policy, up to a constant.
      rewards: [O] or [..., O] in {0, 1}; values between are the chance that a noisy verifier accepts the outcome.
      num_steps: N; static.
      step_size: of the ascent, a scalar; below about 2/β, or it diverges.
      beta: weight of the KL, a scalar.
      weights: the normaliser.
      kl: "reverse" for KL(π‖π_ref), the paper's, whose gradient the k2 estimator has; "forward" for KL(π_ref‖π), of k3.

    Returns:
      [N + 1, ..., O] log-probabilities, the start included.

    Raises:
      ValueError: an unknown ``kl``.

    Source: arXiv 2503.06639, §2, differentiated.

    >>> from grpo_jax.theory import MeanOnly
    >>> path = flow_steps(jnp.log(jnp.array([0.2, 0.8])), [1, 0], 400, step_size=0.2, beta=2.0, weights=MeanOnly())
    >>> round(float(jnp.exp(path[-1, 0])), 4)  # logit 0.2 + 1/β
    0.2919
    """
    if kl not in ("reverse", "forward"):
        raise ValueError(f"kl={kl!r} is not one of 'reverse', 'forward'")
    log_ref = jax.nn.log_softmax(jnp.asarray(log_ref), axis=-1)
    beta, step_size = (jnp.asarray(x, log_ref.dtype) for x in (beta, step_size))

    def objective(logits: jax.Array, advantages: jax.Array) -> jax.Array:
        log_policy = jax.nn.log_softmax(logits, axis=-1)
        gap = jnp.where(jnp.isneginf(log_ref), 0.0, log_policy - log_ref)
        cost = jnp.exp(log_policy) * gap if kl == "reverse" else -jnp.exp(log_ref) * gap
        return (jnp.exp(log_policy) * advantages - beta * cost).sum()

    def step(logits: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        slope = jax.grad(objective)(logits, outcome_advantages(logits, rewards, weights=weights))
        logits = logits + step_size * slope
        return logits, jax.nn.log_softmax(logits, axis=-1)

    _, path = jax.lax.scan(step, log_ref, None, length=num_steps)
    return jnp.concatenate([log_ref[None], path])


class _Bends(NamedTuple):
    """The slope of an outcome's gain, over β, below its first bend, between, and above its last; where they are, as ln π."""

    low: jax.Array
    middle: jax.Array
    high: jax.Array
    first: jax.Array
    last: jax.Array


def _praise_and_blame(log_policy: jax.Array, rewards: ArrayLike, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """r ω⁺ and (1 − r) ω⁻ of each outcome [..., O]; zero where ω is infinite or undefined."""
    rewards = jnp.broadcast_to(jnp.asarray(rewards, log_policy.dtype), log_policy.shape)
    logit = success_log_odds(log_policy, rewards)
    plus, minus = (f(logit, weights, logits=True)[..., None] for f in (omega_plus, omega_minus))
    both = rewards * plus, (1 - rewards) * minus
    praise, blame = (jnp.where(jnp.isfinite(x), x, 0.0) for x in both)
    return praise, blame


def _clipped(log_anchor: jax.Array, bends: _Bends) -> jax.Array:
    """The clipped maximiser [..., O]."""
    level = _level(*jax.lax.stop_gradient((log_anchor, bends)))
    near = _at_level(log_anchor, bends, level)
    # One Newton step on ln Σ π = 0 takes away the rounding of the level and gives it its derivatives.
    mass = jnp.exp(jax.lax.stop_gradient(near))
    free = jnp.where((near == bends.first) | (near == bends.last), 0.0, mass).sum(-1, keepdims=True)
    error = jax.nn.logsumexp(near, axis=-1, keepdims=True)
    nudge = jnp.where(free > 0, error / jnp.where(free > 0, free, 1.0), 0.0)
    return _at_level(log_anchor - nudge, bends, level)


def _at_level(log_anchor: jax.Array, bends: _Bends, level: jax.Array) -> jax.Array:
    """ln π [..., O] at the level ν [..., 1], which is taken from the slope first: both can be large, and cancel."""
    below, between, above = (log_anchor + (slope - level) for slope in bends[:3])
    return jnp.maximum(jnp.maximum(jnp.minimum(below, bends.first), jnp.minimum(between, bends.last)), above)


def _level(log_anchor: jax.Array, bends: _Bends) -> jax.Array:
    """The ν [..., 1] at which Σ π = 1: between those of all slopes least and of all slopes greatest, by bisection."""

    def total(log_policy: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(log_policy, axis=-1, keepdims=True)

    bracket = total(log_anchor + bends.high), total(log_anchor + bends.low)
    return bisect(lambda level: -total(_at_level(log_anchor, bends, level)), *bracket)
