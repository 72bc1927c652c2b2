"""From counted successes of the reference policy to where training will end, with intervals."""

from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import bernoulli_kl, log_odds_slope
from grpo_jax.theory.forward_kl import forward_kl_multiplier
from grpo_jax.theory.limits import flow_point, forward_kl_fixed_point
from grpo_jax.theory.roots import fold_between
from grpo_jax.theory.weights import Weights, log_odds

SATURATED = 0.99


class Prediction(NamedTuple):
    """What training at one β will do to Q prompts.

    p_ref, p_ref_low, p_ref_high: [Q] measured success probabilities and their Wilson intervals.
    p_star, p_star_low, p_star_high: [Q] predicted ones, and where the ends of the interval of p_ref are sent.
    saturates: [Q] bool, p_star > 0.99.
    stable: [Q] bool, p_star also attracts exactly solved iterations: its multiplier is between −1 and 1.
    fold: [Q] bool, p_star jumps within the interval of p_ref: p_star_low and p_star_high are values on two branches,
      and some of what lies between them is the end of no p_ref.
    mean_p_ref, mean_p_ref_low, mean_p_ref_high: over the prompts.
    mean_p_star, mean_p_star_low, mean_p_star_high: over the prompts.
    mean_kl: KL(π*‖π_ref) in nats per sequence, over the prompts.
    """

    p_ref: jax.Array
    p_ref_low: jax.Array
    p_ref_high: jax.Array
    p_star: jax.Array
    p_star_low: jax.Array
    p_star_high: jax.Array
    saturates: jax.Array
    stable: jax.Array
    fold: jax.Array
    mean_p_ref: float
    mean_p_ref_low: float
    mean_p_ref_high: float
    mean_p_star: float
    mean_p_star_low: float
    mean_p_star_high: float
    mean_kl: float


def predict(
    successes: ArrayLike,
    trials: ArrayLike,
    *,
    beta: float,
    weights: Weights,
    confidence: float = 0.95,
    kl: str = "reverse",
) -> Prediction:
    """Predicted success probabilities of Q prompts from the successes that the reference policy had on them.

    p_ref = successes/trials is mapped through `flow_point` (or `forward_kl_fixed_point`), and so are the ends of its
    Wilson interval, which is right because p* rises with p_ref. The intervals of the means add the one-sided errors
    in quadrature. A prompt with no success is predicted to stay at 0; its interval says how little that means.
    Computed in double precision on the host.

    Args:
      successes: [Q] counts of correct completions.
      trials: [Q] or scalar, counts of completions.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      confidence: of every interval, in (0, 1).
      kl: which KL the gradient descends: "reverse" KL(π‖π_ref), or "forward" KL(π_ref‖π), which k3 in the loss does.

    Returns:
      A `Prediction`.

    Raises:
      ValueError: names the argument that is not a count, not in range, or of the wrong shape.

    Source: derived from arXiv 2503.06639, Thm 2; intervals as in `wilson_interval` and `mean_interval`.

    >>> from grpo_jax.theory import Group
    >>> result = predict([0, 20, 50], 100, beta=1.0, weights=Group(8))
    >>> [round(float(p), 4) for p in result.p_star]
    [0.0, 0.6249, 0.9142]
    >>> round(result.mean_p_star, 4), result.saturates.tolist()
    (0.513, [False, False, False])
    """
    if isinstance(beta, jax.Array) and beta.ndim:
        raise ValueError(f"beta must be one number, got shape {beta.shape}")
    if not 0 < float(beta) < float("inf"):
        raise ValueError(f"beta={beta!r} must be positive and finite")
    if kl not in ("reverse", "forward"):
        raise ValueError(f"kl={kl!r} is not one of 'reverse', 'forward'")
    dtype = jnp.zeros(()).dtype
    with jax.enable_x64(True):
        k, n = _counts(successes, trials)
        if k.ndim != 1:
            raise ValueError(f"successes must have one axis, over the prompts, got shape {k.shape}")
        # Each prompt's estimate and the two ends of its interval, [3, Q], and where training takes all three.
        measured = jnp.stack([k / n, *wilson_interval(k, n, confidence)])
        reference = log_odds(measured)
        solve = flow_point if kl == "reverse" else forward_kl_fixed_point
        star = solve(reference, beta=float(beta), weights=weights, logits=True)
        reached = jax.nn.sigmoid(star)
        if kl == "reverse":
            scale = jnp.asarray(float(beta))
            stable = jnp.abs(log_odds_slope(star[0], weights)) < scale
            fold = fold_between(star[1], star[2], scale, weights)
        else:
            multiplier = forward_kl_multiplier(star[0], beta=float(beta), weights=weights, logits=True)
            stable, fold = jnp.abs(multiplier) < 1, jnp.zeros_like(star[0], bool)
        mean_p_ref, mean_p_star = ((rows[0].mean(), *mean_interval(*rows)) for rows in (measured, reached))
        mean_kl = bernoulli_kl(star[0], reference[0], logits=True).mean()
        means = map(float, (*mean_p_ref, *mean_p_star, mean_kl))
        saturates = reached[0] > SATURATED
        return Prediction._make([*measured.astype(dtype), *reached.astype(dtype), saturates, stable, fold, *means])


def wilson_interval(successes: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> tuple[jax.Array, jax.Array]:
    """Wilson's interval for a success probability: all p with |p̂ − p| ≤ z √(p(1 − p)/n).

    (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n), which is exactly 0 below no success and 1 above no failure.

    Args:
      successes: [...] counts of successes.
      trials: [...] or scalar, counts of trials.
      confidence: in (0, 1).

    Returns:
      (low, high), each [...].

    Raises:
      ValueError: names the argument that is not a count, not in range, or of the wrong shape.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209.

    >>> [round(float(end), 4) for end in wilson_interval(2, 10)]
    [0.0567, 0.5098]
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must be between 0 and 1")
    k, n = _counts(successes, trials)
    z = NormalDist().inv_cdf((1 + confidence) / 2)

    def low(k: jax.Array) -> jax.Array:
        # The smaller root k²/n over the larger, (…+…): the difference would cancel for few successes.
        return 2 * k * (k / n) / (2 * k + z**2 + z * jnp.sqrt(4 * k * (1 - k / n) + z**2))

    return low(k), 1 - low(n - k)


def mean_interval(estimates: jax.Array, lows: jax.Array, highs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An interval for the mean of independent quantities from the interval of each (the MOVER of Zou and Donner).

    (mean − √Σ(x̂ − l)²/Q, mean + √Σ(u − x̂)²/Q).

    Args:
      estimates: [Q] x̂.
      lows: [Q] lower ends l.
      highs: [Q] upper ends u, of the same confidence.

    Returns:
      (low, high), scalars.

    Raises:
      ValueError: the three differ in shape, or there is nothing to average.

    Source: G. Y. Zou and A. Donner, Statistics in Medicine 27 (2008), 1693.

    >>> [round(float(x), 4) for x in mean_interval(jnp.array([.2, .6]), jnp.array([.17, .56]), jnp.array([.26, .68]))]
    [0.375, 0.45]
    """
    if not estimates.shape == lows.shape == highs.shape or estimates.ndim != 1 or not estimates.size:
        raise ValueError(
            f"estimates, lows and highs must be one [Q], got {estimates.shape}, {lows.shape}, {highs.shape}"
        )
    mean, count = estimates.mean(), estimates.size
    down = jnp.sqrt(jnp.square(estimates - lows).sum()) / count
    up = jnp.sqrt(jnp.square(highs - estimates).sum()) / count
    return mean - down, mean + up


def _counts(successes: ArrayLike, trials: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both as float arrays of one shape, checked."""
    k, n = (jnp.asarray(x).astype(float) for x in (successes, trials))
    if n.ndim and n.shape != k.shape:
        raise ValueError(f"trials must be a scalar or of the shape {k.shape} of successes, got {n.shape}")
    if not k.size:
        raise ValueError(f"successes must not be empty, got shape {k.shape}")
    n = jnp.broadcast_to(n, k.shape)
    for name, counts in (("successes", k), ("trials", n)):
        if bool(((counts != jnp.floor(counts)) | ~jnp.isfinite(counts)).any()):
            raise ValueError(f"{name} must be whole numbers")
    if bool((n < 1).any()):
        raise ValueError(f"trials must be at least 1, got {int(n.min())}")
    if bool((k < 0).any()):
        raise ValueError(f"successes must not be negative, got {int(k.min())}")
    if bool((k > n).any()):
        raise ValueError("successes must not exceed trials")
    return k, n
