"""What counts say of the success probabilities behind them, before and after a map is applied to each of them.

The success probabilities of the prompts are taken as draws from one Beta(a, b), and so k successes in n leave
Beta(k + a, n − k + b). What is not known of (a, b) is averaged over as well. A map such as p* is curved, and jumps at
folds, so that its mean over what p may be is not its value at k/n. Everything is a sum over fixed nodes in log-odds: the
same counts give the same bits, and prompts with the same counts cost nothing. On the host, with NumPy, in double precision.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

NODES = 33  # of each Beta distribution
FINE = 2049  # nodes where quantiles of one distribution are wanted
DROP = 14.0  # nodes reach to where the density in log-odds has fallen by e^-DROP; what lies beyond is put on the last
FAR = 30.0  # log-odds beyond which a success probability is as good as 0 or 1
LEAST = 0.05  # the smallest a and b
MEAN_REACH = 10.0  # the largest |ln a/b|
SPREAD = (0.05, 1e4)  # the range of a + b
MOST_TRIALS = 1e6  # beyond this many trials more of them say nothing further of (a, b)
ROUNDS, GRID, WIDTH = 7, 5, 2.2  # the grid of (a, b) is narrowed ROUNDS times, to WIDTH standard deviations each way
POINTS = 512  # log-odds at which a map of all prompts is computed; it is straight between them
LIGHT = 1e-3  # pairs (a, b) less likely than this share of the likeliest are left out


class Posterior(NamedTuple):
    """What D different counts, of so many prompts each, say of their success probabilities.

    times: [D] how many prompts have these counts.
    row: [Q] which of the D a prompt has.
    shares: [H] how likely each of H pairs (a, b) is; they sum to 1.
    logits: [H, D, N] nodes, log-odds of a success probability, ascending.
    weights: [H, D, N] of the nodes; they sum to 1 over N.
    points: [512] log-odds, ascending, as dense as the nodes: where to compute a map that is to be averaged.
    """

    times: np.ndarray
    row: np.ndarray
    shares: np.ndarray
    logits: np.ndarray
    weights: np.ndarray
    points: np.ndarray


class Mean(NamedTuple):
    """The mean of something over the prompts: its expectation, and the ends of its interval."""

    mean: float
    low: float
    high: float


def posterior_of(successes: np.ndarray, trials: np.ndarray) -> Posterior:
    """The success probabilities that counts allow.

    p_i ~ Beta(a, b), k_i ~ Binomial(n_i, p_i). The prior of (a, b): the mean a/(a + b) has Jeffreys' Beta(½, ½), and a + b
    is uniform in ln(a + b) between 0.05 and 10⁴; neither a nor b is below 0.05. It decides where the counts do not: with one
    prompt, with counts that are all 0 or all n (the mean then stays off 0 and 1), or with no more spread than sampling
    makes (a + b then goes up to its limit and the prompts are taken to be alike). (a, b) is summed over a grid.

    Args:
      successes: [Q] whole numbers k.
      trials: [Q] whole numbers n ≥ k, n ≥ 1.

    Returns:
      A `Posterior`.

    Source: J. G. Skellam, J. R. Stat. Soc. B 10 (1948), 257 (the beta-binomial); Gelman et al., Bayesian Data Analysis, §5.3.

    >>> found = posterior_of(np.array([1, 4, 4]), np.array([8, 8, 8]))
    >>> found.row.tolist(), found.times.tolist(), found.logits.shape[1:]
    ([0, 1, 1], [1.0, 2.0], (2, 33))
    """
    (k, of_k), (n, of_n) = (np.unique(x, return_inverse=True) for x in (successes, trials))
    pairs, row, times = np.unique(of_k * len(n) + of_n, return_inverse=True, return_counts=True)
    k, n = (x.astype(float) for x in (k[pairs // len(n)], n[pairs % len(n)]))
    a, b, shares = _hyperparameters(k, n, times.astype(float))
    logits, weights = beta_nodes(k + a[:, None], n - k + b[:, None], NODES)
    logits = np.clip(logits, -FAR, FAR)
    nodes = np.sort(logits, axis=None)
    spare = max(POINTS - nodes.size, 0)
    chosen = np.linspace(0, nodes.size - 1, POINTS - spare).astype(int)
    points = np.sort(np.concatenate([nodes[chosen], np.linspace(-MEAN_REACH, MEAN_REACH, spare)]))
    return Posterior(times.astype(float), row.reshape(-1), shares, logits, weights, points)


def beta_nodes(a: np.ndarray, b: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights that integrate over Beta(a, b), in log-odds.

    With p₀ = a/(a + b) and L = logit p₀ + d the density of L falls from its top by
    a d − (a + b) ln(1 + p₀(e^d − 1)), which is quadratic near it and linear, of slopes a and −b, far away.

    Args:
      a, b: [...] positive.
      count: number N of nodes, odd.

    Returns:
      (log-odds [..., N], ascending; weights [..., N], whose sum over N is 1).

    Source: the trapezoidal rule.

    >>> logits, weights = beta_nodes(np.array(2.0), np.array(5.0), 33)
    >>> p = 1 / (1 + np.exp(-logits))
    >>> round(float(weights @ p), 3), round(float(weights @ p**2), 3)  # 2/7 and (2·3)/(7·8)
    (0.286, 0.107)
    """
    a, b = (np.asarray(x, float)[..., None] for x in (a, b))
    share = (a / (a + b), b / (a + b))
    t = np.linspace(0.0, 1.0, count // 2 + 1)
    sides = []
    for slope, p, q in ((a, *share), (b, *share[::-1])):  # how far down, and how far up

        def fall(d: np.ndarray, slope: np.ndarray = slope, p: np.ndarray = p) -> np.ndarray:
            return -slope * d - (a + b) * np.log1p(p * np.expm1(-d))

        near, far = np.zeros_like(slope), (DROP - (a + b) * np.log(q)) / slope
        for _ in range(60):
            middle = (near + far) / 2
            beyond = fall(middle) < -DROP
            near, far = np.where(beyond, near, middle), np.where(beyond, middle, far)
        # Evenly spread over a normal density, and as dense near the top of one with a long tail.
        width = np.sqrt(2 * DROP / ((a + b) * p * q))
        even = np.minimum(1.0, np.minimum(width, np.sqrt(2 * DROP)) / far)
        d = far * (even * t + (1 - even) * t**4)
        height = np.exp(fall(d))
        # A tail e^(−slope·d) beyond the last node has the area height/slope.
        last = np.exp(-d[..., -1:])
        tail = height[..., -1] / (slope - (a + b) * p * last / (p * last + q))[..., 0]
        sides.append((d, height, tail))
    (down, low, low_tail), (up, high, high_tail) = sides
    d = np.concatenate([-down[..., :0:-1], up], axis=-1)
    height = np.concatenate([low[..., :0:-1], high], axis=-1)
    gaps = np.diff(d)
    weights = np.zeros_like(d)
    weights[..., 1:] += height[..., 1:] * gaps / 2
    weights[..., :-1] += height[..., :-1] * gaps / 2
    weights[..., 0] += low_tail
    weights[..., -1] += high_tail
    return np.log(a) - np.log(b) + d, weights / weights.sum(-1, keepdims=True)


def quantiles(posterior: Posterior, levels: Sequence[float]) -> np.ndarray:
    """[levels, D] quantiles of the log-odds of the success probability behind each of the different counts.

    >>> middle = quantiles(posterior_of(np.array([50]), np.array([100])), [0.5])
    >>> bool(abs(middle[0, 0]) < 1e-6)
    True
    """
    logits = np.moveaxis(posterior.logits, 1, 0).reshape(len(posterior.times), -1)
    weights = np.moveaxis(posterior.weights * posterior.shares[:, None, None], 1, 0).reshape(logits.shape)
    return np.stack([_quantiles(*pair, levels) for pair in zip(logits, weights, strict=True)], axis=1)


def mixture(posterior: Posterior, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The success probabilities of all prompts together as at most so many, each standing for as many prompts.

    Args:
      posterior: of the prompts.
      size: the largest number M of them.

    Returns:
      (log-odds [M], ascending; prompts that each stands for [M]).

    >>> logits, times = mixture(posterior_of(np.array([3, 4]), np.array([8, 8])), 100)
    >>> bool(abs(times.sum() - 2) < 1e-9), bool(abs(times @ (1 / (1 + np.exp(-logits))) / 2 - 7 / 16) < 0.02)
    (True, True)
    """
    weights = (posterior.weights * posterior.shares[:, None, None] * posterior.times[:, None]).reshape(-1)
    order = np.argsort(posterior.logits, axis=None, kind="stable")
    logits, weights = posterior.logits.reshape(-1)[order], weights[order]
    cell = ((np.cumsum(weights) - weights / 2) * (size / weights.sum())).astype(int)
    times, sums = (np.bincount(cell, x) for x in (weights, weights * logits))
    kept = times > 0
    return sums[kept] / times[kept], times[kept]


class Jumps(NamedTuple):
    """A function of log-odds: straight between points, and jumping at one place.

    at: [M] log-odds, ascending.
    values: [..., M] of the function; those above the jump are less by its height.
    jump: log-odds at which it jumps; −∞ if it does not.
    height: [...] of the jump.
    """

    at: np.ndarray
    values: np.ndarray
    jump: float
    height: np.ndarray

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """[..., *logits.shape] its values."""
        smooth = np.stack([np.interp(logits, self.at, row) for row in self.values])
        return smooth + np.multiply.outer(self.height, logits > self.jump)


def expectations(posterior: Posterior, function: Jumps) -> np.ndarray:
    """[H, D, values] expectation of a function of the log-odds of each prompt, for each pair (a, b).

    The jump counts by the probability to lie above it, which moves smoothly with its place.

    >>> step = Jumps(np.array([-9.0, 9.0]), np.zeros((1, 2)), 0.0, np.ones(1))
    >>> found = posterior_of(np.array([50]), np.array([100]))
    >>> round(float(found.shares @ expectations(found, step)[:, 0, 0]), 6)
    0.5
    """
    smooth = [(np.interp(posterior.logits, function.at, row) * posterior.weights).sum(-1) for row in function.values]
    above = _above(posterior, function.jump) if function.jump > -np.inf else np.zeros(posterior.logits.shape[:2])
    return np.stack(smooth, axis=-1) + np.multiply.outer(above, function.height)


def mean_of(posterior: Posterior, first: np.ndarray, second: np.ndarray, confidence: float) -> Mean:
    """The mean over the prompts of something in [0, 1], from its expectations.

    Given (a, b) prompts are independent, so that the variance of the mean is E[Σ_i Var_i]/Q² + Var[mean] over (a, b). The
    interval is that of the Beta distribution with this mean and this variance.

    Args:
      posterior: of the prompts.
      first: [H, D] expectations of the thing.
      second: [H, D] expectations of its square.
      confidence: of the interval, in (0, 1).

    Returns:
      A `Mean`.

    >>> found = posterior_of(np.array([40, 60]), np.array([100, 100]))
    >>> logits = np.linspace(-9.0, 9.0, 2001)
    >>> p = 1 / (1 + np.exp(-logits))
    >>> of_p = expectations(found, Jumps(logits, np.stack([p, p**2]), -np.inf, np.zeros(2)))
    >>> [round(x, 2) for x in mean_of(found, of_p[..., 0], of_p[..., 1], 0.95)]
    [0.5, 0.43, 0.57]
    """
    prompts = posterior.times.sum()
    means = first @ posterior.times / prompts  # [H]
    within = np.maximum(second - first**2, 0.0) @ posterior.times / prompts**2  # [H]
    mean = float(posterior.shares @ means)
    variance = float(posterior.shares @ (within + (means - mean) ** 2))
    most = mean * (1 - mean)
    if not 0 < variance < most:
        return Mean(mean, mean, mean)
    size = most / variance - 1
    if size > 1e12:  # narrower than the nodes of a Beta distribution can tell
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * variance**0.5
        return Mean(mean, mean - reach, mean + reach)
    nodes = beta_nodes(np.array(mean * size), np.array((1 - mean) * size), FINE)
    low, high = 1 / (1 + np.exp(-_quantiles(*nodes, [(1 - confidence) / 2, (1 + confidence) / 2])))
    return Mean(mean, min(float(low), mean), max(float(high), mean))


def _hyperparameters(k: np.ndarray, n: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a [H], b [H], how likely each pair is [H]) on a grid over ln a/b and ln(a + b), around where they are likely."""
    n, k = np.minimum(n, MOST_TRIALS), k * np.minimum(1.0, MOST_TRIALS / n)
    limits = np.array([(-MEAN_REACH, MEAN_REACH), np.log(SPREAD)])
    low, high = limits.T
    for _ in range(ROUNDS):
        axes = [np.linspace(*ends, GRID) for ends in zip(low, high, strict=True)]
        points = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(2, -1)
        mean, spread = 1 / (1 + np.exp(-points[0])), np.exp(points[1])
        a, b = np.maximum(mean * spread, LEAST), np.maximum((1 - mean) * spread, LEAST)
        log = np.log(mean * (1 - mean)) / 2  # Jeffreys' prior of the mean, in log-odds
        log += (_log_beta(k + a[:, None], n - k + b[:, None]) - _log_beta(a, b)[:, None]) @ times
        shares = np.exp(log - log.max())
        shares /= shares.sum()
        centre = points @ shares
        deviation = np.sqrt(np.square(points - centre[:, None]) @ shares)
        steps = np.array([axis[1] - axis[0] for axis in axes])
        reach = np.maximum(WIDTH * deviation, steps)
        low, high = np.maximum(centre - reach, limits[:, 0]), np.minimum(centre + reach, limits[:, 1])
    kept = shares > LIGHT * shares.max()
    return a[kept], b[kept], shares[kept] / shares[kept].sum()


def _above(posterior: Posterior, place: float) -> np.ndarray:
    """[H, D] the probability that the log-odds exceed a place, straight between the middles of the nodes."""
    logits, weights = posterior.logits, posterior.weights
    below = np.cumsum(weights, axis=-1) - weights / 2  # at the nodes
    cell = np.clip((logits <= place).sum(-1, keepdims=True) - 1, 0, logits.shape[-1] - 2)
    (x0, x1), (f0, f1) = ([np.take_along_axis(z, cell + i, -1)[..., 0] for i in (0, 1)] for z in (logits, below))
    inside = f0 + (f1 - f0) * (place - x0) / np.where(x1 > x0, x1 - x0, 1.0)
    return 1 - np.where(place <= logits[..., 0], 0.0, np.where(place >= logits[..., -1], 1.0, inside))


def _quantiles(values: np.ndarray, weights: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    return np.interp(np.asarray(levels), np.cumsum(weights) - weights / 2, values)


def _log_beta(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _log_gamma(a) + _log_gamma(b) - _log_gamma(a + b)


def _log_gamma(x: np.ndarray) -> np.ndarray:
    """ln Γ of positive x by Stirling's series at x + 8, to 1e-9."""
    shift = np.log(np.prod([x + j for j in range(8)], axis=0))
    z = x + 8
    series = 1 / (12 * z) - 1 / (360 * z**3) + 1 / (1260 * z**5)
    return (z - 0.5) * np.log(z) - z + np.log(2 * np.pi) / 2 + series - shift
