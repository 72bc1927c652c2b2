"""From counted successes of the reference policy to where training will end, with intervals."""

from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grpo_jax.theory.attainable import attainable_point
from grpo_jax.theory.dynamics import bernoulli_kl, kl_budget, log_odds_slope
from grpo_jax.theory.forward_kl import forward_kl_multiplier
from grpo_jax.theory.limits import flow_point, forward_kl_fixed_point
from grpo_jax.theory.posteriors import Jumps, Mean, Posterior, expectations, mean_of, posterior_of, quantiles
from grpo_jax.theory.roots import POINTS, REACH, bisect
from grpo_jax.theory.weights import Weights, upward

KLS = ("reverse", "forward", "none")
SATURATED = 0.99
LEVELS = tuple((np.arange(16) + 0.5) / 16)  # of a posterior's quantiles that stand for it
BESIDE = 1e-9  # how near to a fold, on either side, it is


class Prediction(NamedTuple):
    """What training at one β will do to Q prompts.

    The success probability of a prompt under the reference is known up to a posterior (`posterior_of`), and so is its end.

    p_ref, p_ref_low, p_ref_high: [Q] measured success probabilities and their Wilson intervals.
    p_star, p_star_low, p_star_high: [Q] posterior mean of p*, and the central interval of its posterior. On a fold the mean
      lies between two branches, where no p_ref ends.
    saturates: [Q] bool, p* > 0.99 is more likely than not.
    stable: [Q] bool, the p* of the median p_ref also attracts exactly solved iterations: its multiplier is between −1 and 1.
    fold: [Q] bool, p* jumps within its interval: p_star_low and p_star_high are values on two branches.
    mean_p_ref, mean_p_ref_low, mean_p_ref_high: over the prompts, measured.
    mean_p_star, mean_p_star_low, mean_p_star_high: posterior mean and interval of the mean of p* over the prompts.
    mean_kl: posterior mean of KL(π*‖π_ref) in nats per sequence, over the prompts.
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


class Attainable(NamedTuple):
    """Where a network ends of which R² is known up to an interval.

    mean, low, high: of p† over the prompts. The interval is that of R² and that of p_ref together.
    prompts: [Q] posterior mean of p†, of each prompt.
    """

    mean: float
    low: float
    high: float
    prompts: np.ndarray


class Ends(NamedTuple):
    """What p_ref, known by counts, is sent to.

    p_star: the mean over the prompts, with its interval.
    kl: KL(π*‖π_ref) in nats, mean over the prompts.
    kl_budget: the most it can be, ln(1/p_ref), mean over the prompts.
    saturates: the share of prompts with p* > 0.99.
    prompts: [3, D] for each of the different counts the mean of p* and its interval, or more.
    median: [D] p* of the median p_ref.
    stable: [D] bool, that end attracts exactly solved iterations.
    fold: [D] bool, p* jumps within the interval.
    """

    p_star: Mean
    kl: float
    kl_budget: float
    saturates: float
    prompts: np.ndarray
    median: np.ndarray
    stable: np.ndarray
    fold: np.ndarray


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

    p* = `flow_point` (or `forward_kl_fixed_point`) of p_ref is averaged over the posterior of p_ref: p* is curved and jumps
    at folds, so that the p* of k/n is not its mean. The posterior knows all prompts (`posterior_of`): where few samples say
    little of one of them, the others do. A prompt with no success is not predicted to stay at 0, and one with no failure not
    at 1. Computed in double precision on the host, by sums over fixed nodes.

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

    Source: derived from arXiv 2503.06639, Thm 2; coverage measured by experiments/coverage.py.

    >>> from grpo_jax.theory import Group
    >>> result = predict([0, 20, 50], 100, beta=1.0, weights=Group(8))
    >>> [round(float(p), 3) for p in result.p_star]
    [0.028, 0.621, 0.91]
    >>> round(result.mean_p_star, 3), result.saturates.tolist()
    (0.52, [False, False, False])
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
        low, high = wilson_interval(k, n, confidence)
        measured = jnp.stack([k / n, low, high])
        mean_p_ref = (measured[0].mean(), *mean_interval(*measured))
        posterior = posterior_of(np.asarray(k), np.asarray(n))
        ends = ends_of(posterior, beta=float(beta), weights=weights, confidence=confidence, kl=kl)
        row = posterior.row
        reached = jnp.asarray(ends.prompts[:, row], dtype)
        flags = (jnp.asarray(flag[row]) for flag in (ends.median > SATURATED, ends.stable, ends.fold))
        means = [*map(float, mean_p_ref), *ends.p_star, ends.kl]
        return Prediction._make([*measured.astype(dtype), *reached, *flags, *means])


def predict_attainable(
    successes: ArrayLike,
    trials: ArrayLike,
    *,
    beta: float,
    weights: Weights,
    r2: Mean,
    shares: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Attainable:
    """The success probabilities at which a network ends that lets a share R² of the pull through, as `predict` has p*.

    p† = `attainable_point` of p_ref is averaged over the posterior of p_ref: the mean over prompts at one R² for all, and each
    prompt at its own ρ_i, if they are known.

    Args:
      successes, trials, beta, weights, confidence: as for `predict`.
      r2: R² with its interval, as `explained_share` finds it; where it is a bound from below, so is p†.
      shares: [Q] ρ_i of each prompt, likewise; cut to [0, 1].

    Returns:
      `Attainable`.

    Raises:
      ValueError: R² or an end of its interval lies outside [0, 1], or shares do not fit; counts as for `predict`.

    Source: derived in theory/attainable.py.

    >>> from grpo_jax.theory import Group
    >>> found = predict_attainable([20, 50], 100, beta=1.0, weights=Group(8), r2=Mean(0.5, 0.4, 0.6))
    >>> [round(float(p), 2) for p in found.prompts], round(found.low, 2), round(found.high, 2)
    ([0.45, 0.7], 0.5, 0.64)
    """
    if not all(0 <= share <= 1 for share in r2):
        raise ValueError(f"r2={tuple(r2)} must be in [0, 1]")
    with jax.enable_x64(True):
        k, n = (np.asarray(x) for x in _counts(successes, trials))
        posterior = posterior_of(k, n)
        found = attainable_of(posterior, beta=float(beta), weights=weights, r2=r2, confidence=confidence)
        if shares is None:
            return found
        if np.shape(shares) != k.shape or not np.isfinite(shares).all():
            raise ValueError(f"shares must be one finite number for each of {k.size} prompts, got {np.shape(shares)}")
        each = jnp.broadcast_to(jnp.clip(jnp.asarray(shares, float), 0.0, 1.0), (len(LEVELS), k.size))
        logits = jnp.asarray(quantiles(posterior, LEVELS)[:, posterior.row])
        ends = attainable_point(logits, beta=float(beta), weights=weights, r2=each, logits=True)
        return found._replace(prompts=np.asarray(jax.nn.sigmoid(ends)).mean(0))


def attainable_of(posterior: Posterior, *, beta: float, weights: Weights, r2: Mean, confidence: float) -> Attainable:
    """`predict_attainable` of prompts of which counts are known; arguments as there."""
    options: dict[str, Any] = {"beta": beta, "weights": weights, "confidence": confidence, "kl": "reverse"}
    at, *others = (ends_of(posterior, r2=share, **options) for share in r2)
    mean, low, high = at.p_star
    below, above = (abs(other.p_star.mean - mean) for other in others)
    low, high = mean - np.hypot(mean - low, below), mean + np.hypot(high - mean, above)
    return Attainable(mean, float(low), float(high), at.prompts[0][posterior.row])


def ends_of(
    posterior: Posterior, *, beta: float, weights: Weights, confidence: float, kl: str, r2: float | None = None
) -> Ends:
    """Where training takes prompts of which counts are known.

    Args:
      posterior: of the prompts.
      beta, weights, confidence: as for `predict`.
      kl: also "none", where every success probability but 0 runs to 1.
      r2: of a network; p* is then p†. None: of a table.

    Returns:
      `Ends`.

    >>> from grpo_jax.theory import MeanOnly
    >>> counts = posterior_of(np.array([50]), np.array([100]))
    >>> ends = ends_of(counts, beta=1.0, weights=MeanOnly(), confidence=0.95, kl="reverse")
    >>> round(ends.p_star.mean, 2), round(float(ends.median[0]), 3)  # 1/(1 + 1/e) = 0.731 at p_ref = ½
    (0.73, 0.731)
    """
    at, values, stable, jump, height = map(np.asarray, _solved(jnp.asarray(posterior.points), beta, weights, kl, r2))
    function = Jumps(at, values, float(jump), height)
    expected = expectations(posterior, function)  # [H, D, (p*, p*², KL, its budget, saturated)]
    tails = (1 - confidence) / 2
    references = quantiles(posterior, [tails, 0.5, 1 - tails])  # [3, D]
    low, median, high = function(references)[0]
    mean = posterior.shares @ expected[..., 0]  # [D]
    share = posterior.times / posterior.times.sum()
    return Ends(
        p_star=mean_of(posterior, expected[..., 0], expected[..., 1], confidence),
        kl=float(posterior.shares @ expected[..., 2] @ share),
        kl_budget=float(posterior.shares @ expected[..., 3] @ share),
        saturates=float(posterior.shares @ expected[..., 4] @ share),
        prompts=np.stack([mean, np.minimum(low, mean), np.maximum(high, mean)]),
        median=median,
        stable=stable[np.clip(np.searchsorted(at, references[1]), 0, len(at) - 1)],
        fold=(references[0] <= jump) & (jump < references[2]),
    )


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


@partial(jax.jit, static_argnames="kl")
def _solved(
    points: jax.Array, beta: ArrayLike, weights: Weights, kl: str, r2: ArrayLike | None = None
) -> tuple[jax.Array, ...]:
    """p*, p*², the KL, its budget and whether p* > 0.99, at log-odds [P] of p_ref and on both sides of the jump.

    Returns what `Jumps` takes, with the flags of stability third.
    """
    beta = jnp.asarray(beta, points.dtype)
    # A network's p† is taken to have no fold: where R² is near 1, one is smoothed over the points beside it.
    folds = kl == "reverse" and r2 is None
    jump = _fold(beta, weights, points.dtype) if folds else jnp.asarray(-jnp.inf, points.dtype)
    beside = BESIDE * jnp.maximum(1.0, jnp.abs(jump))
    edges = jnp.where(jump > -jnp.inf, jnp.stack([jump - beside, jump + beside]), points[:2])
    at = jnp.sort(jnp.concatenate([points, edges]))
    if kl == "none":
        star, multiplier = jnp.full_like(at, jnp.inf), jnp.zeros_like(at)
    elif kl == "forward":
        star = forward_kl_fixed_point(at, beta=beta, weights=weights, logits=True)
        multiplier = forward_kl_multiplier(star, beta=beta, weights=weights, logits=True)
    elif r2 is not None:
        star = attainable_point(at, beta=beta, weights=weights, r2=r2, logits=True)
        multiplier = log_odds_slope(star, weights) / beta
    else:
        star = flow_point(at, beta=beta, weights=weights, logits=True)
        multiplier = log_odds_slope(star, weights) / beta
    p = jax.nn.sigmoid(star)
    spent, most = bernoulli_kl(star, at, logits=True), kl_budget(at, logits=True)
    values = jnp.stack([p, p**2, spent, most, (p > SATURATED).astype(p.dtype)])
    above = jnp.searchsorted(at, jump, side="right")
    height = jnp.where(jump > -jnp.inf, values[:, above] - values[:, above - 1], 0.0)
    smooth = values - height[:, None] * (at > jump).astype(p.dtype)[None]
    return at, smooth, jnp.abs(multiplier) < 1, jump, height


def _fold(beta: jax.Array, weights: Weights, dtype: jnp.dtype) -> jax.Array:
    """The log-odds of p_ref at which `flow_point` jumps; −∞ where it does nowhere.

    The reference that ends at L is L − Ω/β. Where that falls with L it has passed a top, and the flow jumps from there.
    """
    sign, better = upward(weights)
    grid = jnp.linspace(-REACH, REACH, POINTS, dtype=dtype)
    reference = grid - better.omega(grid) / beta
    falls = reference < jax.lax.cummax(reference)
    cell = jnp.argmax(falls)
    top = bisect(lambda x: log_odds_slope(x, better) - beta, grid[jnp.maximum(cell - 2, 0)], grid[cell])
    return jnp.where(falls.any(), sign * (top - better.omega(top) / beta), -jnp.inf)
