"""The share R² of the pull that a network's score features explain, from fits on separate parts of its samples.

GRPO pulls a completion of prompt i by y = Ω_i (r − p_i). A network moves log-probabilities along its scores alone, so that it
can follow the regression f* = S w* of y on the scores S, and R² = Var f*/Var y. With far more parameters than samples a fit
explains all of its own samples, and on others its noise hides what it knows. But the noise of separate fits is independent:
with fits f_a and f_b on parts a and b, and a third part to look at both,

    C = Cov(y, f_a),   V = Cov(f_a, f_b)

are unbiased for what the *mean* fit f̄ = E f_a has, Cov(y, f̄) and Var f̄, and noise is in neither. The mean fit is one
function of the scores, so that by the inequality of Cauchy and Schwarz

    R² ≥ C²/(V Var y),

with equality where fits shrink all parts of f* alike. They do not: what few samples or few steps do not find is left out. So
this is a bound from below, which rises with the samples.

The same covariances prompt by prompt, C_i, say which share ρ_i = (V/C)⁻¹ C_i/Var y_i of its own pull each follows. Few samples
leave noise in them, so they are shrunk towards R²: with C_ik of part k, whose spread over the parts is the noise σ²Var y_i, and
τ² what the ρ_i vary beyond it, ρ_i counts by τ²/(τ² + σ²/Var y_i) (James and Stein).
"""

from itertools import combinations
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Explained(NamedTuple):
    """How much of the pull the scores explain.

    r2, low, high: the bound C²/(V Var y) on R², and its interval from a jackknife over prompts; within [0, 1].
    shares: [Q] ρ_i of the mean fit at its best scale, of each prompt: the share of the pull on its log-odds that is followed,
      shrunk towards r2 by its noise; r2 for a prompt whose samples all failed or all succeeded. It may be negative, or above 1.
    naive: 1 − Var(y − f)/Var y of single fits on the other parts: the same without the correction.
    """

    r2: float
    low: float
    high: float
    shares: np.ndarray
    naive: float


def explained_share(pull: np.ndarray, fits: np.ndarray, confidence: float = 0.95) -> Explained:
    """The bound on R² from K ≥ 3 parts of the samples of Q ≥ 2 prompts.

    Args:
      pull: [K, Q, n] Ω_i (r − mean of r) of the samples of each part.
      fits: [K, K, Q, n] ``fits[a, k]`` is what the fit on part a says of part k; of a = k nothing is read.
      confidence: of the interval, in (0, 1).

    Returns:
      `Explained`; r2 is 0 where C or V is not positive: nothing was found.

    Raises:
      ValueError: too few parts, prompts or samples, shapes that do not fit, what is not finite, or a pull that is 0 everywhere.

    Source: derived in the head of this file; its coverage is measured by experiments/explained.py.

    >>> y = np.array([[[1.0, -1.0], [0.5, -0.5]]] * 3)
    >>> found = explained_share(y, np.stack([0.5 * y] * 3))  # each fit sees all of it, at half the size
    >>> found.r2, found.shares.tolist(), found.naive
    (1.0, [1.0, 1.0], 0.75)
    """
    pull, fits = (np.asarray(x, np.float64) for x in (pull, fits))
    K, Q = _checked(pull, fits)
    pairs = [(a, k) for a in range(K) for k in range(K) if a != k]
    triples = [(a, b, k) for a, b in combinations(range(K), 2) for k in range(K) if k not in (a, b)]
    by_part = [np.mean([_covariance(pull[k], fits[a, k]) for a in range(K) if a != k], axis=0) for k in range(K)]
    of_pulls = np.stack([_covariance(pull[k], pull[k]) for k in range(K)])  # [K, Q]
    of_pull, common = of_pulls.mean(0), np.mean(by_part, axis=0)  # [Q] Var y and C
    of_fit = np.mean([_covariance(fits[a, k], fits[b, k]) for a, b, k in triples], axis=0)  # V
    of_one = np.mean([_covariance(fits[a, k], fits[a, k]) for a, k in pairs], axis=0)
    if not of_pull.sum() > 0:
        raise ValueError("the pull is 0 everywhere: no prompt both succeeded and failed")

    sums = np.stack([common, of_fit, of_pull])  # [3, Q]
    r2 = _bound(sums.sum(-1))
    without_one = np.array([_bound(sums.sum(-1) - sums[:, i]) for i in range(Q)])
    spread = np.sqrt((Q - 1) / Q * np.square(without_one - without_one.mean()).sum())
    half_width = NormalDist().inv_cdf((1 + confidence) / 2) * spread
    scale = max(common.sum(), 0.0) / of_fit.sum() if of_fit.sum() > 0 else 0.0
    shares = _shrunk(scale * np.stack(by_part), of_pulls, max(r2, 0.0))
    naive = float((2 * common.sum() - of_one.sum()) / of_pull.sum())
    low, mean, high = np.clip([r2 - half_width, r2, r2 + half_width], 0.0, 1.0).tolist()
    return Explained(mean, low, high, shares, naive)


def samples_needed(found: Explained, samples: int) -> int:
    """About how many samples of each prompt would tell R² from 0, if ``samples`` of them left the interval of ``found``.

    The interval narrows like one over the root of their number. Four times as many where nothing was found, and at most a
    hundred times.

    >>> samples_needed(Explained(0.1, 0.0, 0.3, np.zeros(2), 0.0), 15)
    60
    """
    times = max(2.0, ((found.high - found.r2) / found.r2) ** 2) if found.r2 > 0.01 else 4.0
    return samples * min(100, int(np.ceil(times)))


def _shrunk(common: np.ndarray, of_pulls: np.ndarray, r2: float) -> np.ndarray:
    """ρ_i [Q] from the covariances C_ik and Var y_ik of each part [K, Q], shrunk towards r2; see the head of this file."""
    parts, of_pull = len(common), of_pulls.mean(0)
    seen = of_pull > 0
    size = np.where(seen, of_pull, 1.0)
    shares = np.where(seen, common.mean(0) / size, r2)
    noise = np.square(common - shares * of_pulls).sum() / (parts * (parts - 1)) / of_pull.sum()  # σ²
    spread = (of_pull * np.square(shares - r2)).sum() / of_pull.sum() - noise * seen.sum() / of_pull.sum()  # τ²
    counts = spread / (spread + noise / size) if spread > 0 else np.zeros(len(shares))
    return r2 + np.where(seen, counts, 0.0) * (shares - r2)


def _covariance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the samples of each prompt [..., n]."""
    return (_centred(x) * _centred(y)).sum(-1) / (x.shape[-1] - 1)


def _bound(sums: np.ndarray) -> float:
    common, of_fit, of_pull = sums
    return float(common**2 / (of_fit * of_pull)) if min(common, of_fit, of_pull) > 0 else 0.0


def _centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(-1, keepdims=True)


def _checked(pull: np.ndarray, fits: np.ndarray) -> tuple[int, int]:
    if pull.ndim != 3 or fits.shape != (len(pull), *pull.shape):
        raise ValueError(f"pull must be [K, Q, n] and fits [K, K, Q, n], got {pull.shape} and {fits.shape}")
    K, Q, n = pull.shape
    others = ~np.eye(K, dtype=bool)
    if not (np.isfinite(pull).all() and np.isfinite(fits[others]).all()):
        raise ValueError("pull and fits must be finite")
    if K < 3 or Q < 2 or n < 2:
        raise ValueError(f"{K} parts of {Q} prompts with {n} samples: at least 3, 2 and 2 are needed")
    return K, Q
