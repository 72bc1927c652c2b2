"""The ledger of a run: how it spent its KL, what that bought, and where it stands; estimated from samples that are drawn anyway.

The theory is in `grpo_jax.theory.ledger`. Each prompt has k successes of n completions from π, the log-ratios ℓ = log π/π_ref of
these completions, and the counts of π_ref. A plug-in of k/n would be biased by some 1/n of a nat per prompt, as much as there is
to find in a probe of 32 samples. So logarithms are estimated with harmonic numbers H: with k ~ Binomial(n, p),

    E[H_n − H_k] = Σ_{m=1}^{n} (1 − p)^m / m        ≈ −ln p        to (1 − p)^n,
    E[(k/n)(H_{n−1} − H_{k−1})]                     ≈ −p ln p      likewise,

and other functions of k are corrected by leaving one completion out (the jackknife). Errors are of the samples of these prompts.

Dimension key: see grpo_jax.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import digamma

from grpo_jax import theory
from grpo_jax.objective import Objective
from grpo_jax.report.forecast import group_weights, interval_dict
from grpo_jax.theory.posteriors import mixture, posterior_of

POWERS = 4  # of the log-ratios that are summed: the variance of a variance needs the fourth
FEWEST = 3  # samples of a prompt from which its ledger can be estimated
POSTERIOR = 512  # success probabilities that stand for what the counts allow


class Tally(NamedTuple):
    """What is counted of n completions of each of Q prompts.

    Attributes:
      successes: [Q] k.  trials: n.
      log_ratio_sums: [Q, 2, 4] sums of ℓ, ℓ², ℓ³ and ℓ⁴, over failures and over successes.
    """

    successes: np.ndarray
    trials: int
    log_ratio_sums: np.ndarray


class Estimates(NamedTuple):
    """Per-prompt estimates and their standard errors, name -> [Q]; see `ledger_of_prompts`."""

    values: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]


def log_ratio_sums(rewards: np.ndarray, log_ratios: np.ndarray) -> np.ndarray:
    """[Q, 2, 4] power sums for `Tally` from rewards [Q, n] and log-ratios [Q, n]; they add up over batches.

    >>> log_ratio_sums(np.array([[1.0, 0.0, 1.0]]), np.array([[2.0, -1.0, 1.0]]))[0].tolist()
    [[-1.0, 1.0, -1.0, 1.0], [3.0, 5.0, 9.0, 17.0]]
    """
    powers = np.asarray(log_ratios, np.float64)[..., None] ** np.arange(1, POWERS + 1)  # [Q, n, 4]
    right = (np.asarray(rewards) > 0)[..., None]
    return np.stack([np.where(right, 0.0, powers).sum(1), np.where(right, powers, 0.0).sum(1)], axis=1)


def ledger_of_prompts(
    tally: Tally,
    ref_successes: np.ndarray,
    ref_trials: int,
    *,
    weights: theory.Group | None,
    beta: float | None,
) -> Estimates:
    """The ledger of each prompt.

    Args:
      tally: of the policy.
      ref_successes: [Q] of ``ref_trials`` samples of π_ref, drawn independently.
      weights: the normaliser of the objective; None where the theory does not know it.
      beta: weight of KL(π‖π_ref); None where another KL, or none, holds the policy.

    Returns:
      ``kl`` and its parts ``useful``, ``within_successes``, ``within_failures``, in nats. With ``weights`` and ``beta`` also:
      ``at_rest``: `theory.rest_excess` at this p.  ``beyond_rest``: X − at_rest, with X = kl − useful.
      ``objective``: `theory.objective_gain`.  ``slope``: Ω Cov(r, ℓ) − β Var(ℓ), the slope of the objective along the ray from
      the reference through the policy (exact for log-linear policies): positive before a rest point, negative beyond it.
      ``hold``: β Var(ℓ), so that the push Ω Cov(r, ℓ) is slope + hold.  ``followed``: has the mean Σ v(L − L_ref) / Σ v Ω/β over
      the prompts, the share of the pull that the policy has followed; absent where nothing pulls.
      Parts can come out negative by chance. Intervals hold where the reference solved most prompts five times and more; of
      prompts that it hardly ever solved, ``useful`` is a lower bound, and what it lacks stands in ``within_successes``.

    Raises:
      ValueError: fewer than three samples of a prompt.
    """
    n, m = tally.trials, ref_trials
    if min(n, m) < FEWEST:
        raise ValueError(
            f"a ledger needs {FEWEST} samples of each prompt, got {n} of the policy and {m} of the reference"
        )
    k, j = np.asarray(tally.successes, np.float64), np.asarray(ref_successes, np.float64)
    moments = _moments(k, n, np.asarray(tally.log_ratio_sums, np.float64))
    split = _split(k, n, j, m, moments)
    if weights is None or beta is None:
        return split
    balance = _balance(k, n, j, m, moments, split.values["useful"], weights, beta)
    return Estimates(split.values | balance.values, split.errors | balance.errors)


class _Moments(NamedTuple):
    """Of r and ℓ, each [Q]: E ℓ, E rℓ, E rℓ², Var r, Var ℓ, Cov(r, ℓ); m22, m31, m40: E (ℓ − E ℓ)^i (r − p)^j of these i, j."""

    mean: np.ndarray
    of_successes: np.ndarray
    square_of_successes: np.ndarray
    var_r: np.ndarray
    var: np.ndarray
    cov: np.ndarray
    m22: np.ndarray
    m31: np.ndarray
    m40: np.ndarray


def _moments(k: np.ndarray, n: int, sums: np.ndarray) -> _Moments:
    p, (failures, successes) = k / n, np.moveaxis(sums / n, 1, 0)  # [Q, 4] each
    mean = failures[:, 0] + successes[:, 0]

    def about_mean(raw: np.ndarray, share: np.ndarray | float) -> list[np.ndarray]:
        """share·E[(ℓ − E ℓ)^i] for i = 0 … 4, from share·E[ℓ^i]."""
        powers = [share * np.ones_like(mean), *raw.T]
        terms = lambda i: [math.comb(i, a) * powers[a] * (-mean) ** (i - a) for a in range(i + 1)]  # noqa: E731
        return [np.sum(terms(i), axis=0) for i in range(POWERS + 1)]

    whole, right = about_mean(failures + successes, 1.0), about_mean(successes, p)
    unbiased = n / (n - 1)
    return _Moments(
        mean=mean,
        of_successes=successes[:, 0],
        square_of_successes=successes[:, 1],
        var_r=p * (1 - p) * unbiased,
        var=whole[2] * unbiased,
        cov=right[1] * unbiased,
        m22=(1 - 2 * p) * right[2] + p**2 * whole[2],
        m31=right[3] - p * whole[3],
        m40=whole[4],
    )


def _split(k: np.ndarray, n: int, j: np.ndarray, m: int, moments: _Moments) -> Estimates:
    """KL and its three parts. The cost of a class is what its share alone costs, p ln(p/p_ref) or (1−p) ln((1−p)/(1−p_ref))."""

    def cost(k: np.ndarray, j: np.ndarray) -> np.ndarray:
        return k / n * (_log_share(np.maximum(k, 1) - 1, n - 1) - _log_share(j, m))

    def error(k: np.ndarray, j: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Of a class: a completion in it adds ℓ − ln(p/p_ref) − 1, one of the reference −p/p_ref."""
        p, p_ref = k / n, (j + 0.5) / (m + 1)
        shift = _log_share(k, n) - _log_share(j, m) + 1
        square = second - 2 * shift * first + shift**2 * p - (first - shift * p) ** 2
        return np.sqrt(np.maximum(square, 0) / n + p**2 * (1 - p_ref) / (p_ref * m))

    mean, first, second = moments.mean, moments.of_successes, moments.square_of_successes
    of_successes, of_failures = cost(k, j), cost(n - k, m - j)
    square = moments.var * (n - 1) / n + mean**2
    p, p_ref = k / n, (j + 0.5) / (m + 1)
    by_ref = (p_ref - p) ** 2 / (p_ref * (1 - p_ref) * m)
    values = {
        "kl": mean,
        "useful": of_successes + of_failures,
        "within_successes": first - of_successes,
        "within_failures": mean - first - of_failures,
    }
    errors = {
        "kl": np.sqrt(np.maximum(moments.var, 0) / n),
        "useful": np.sqrt(moments.var_r * (_logit(k, n) - _logit(j, m)) ** 2 / n + by_ref),
        "within_successes": error(k, j, first, second),
        "within_failures": error(n - k, m - j, mean - first, square - second),
    }
    return Estimates(values, errors)


def _balance(
    k: np.ndarray,
    n: int,
    j: np.ndarray,
    m: int,
    moments: _Moments,
    useful: np.ndarray,
    weights: theory.Group,
    beta: float,
) -> Estimates:
    """What was climbed, and whether the policy is before a rest point, at it, or beyond it."""
    # Ω and Φ at every count.
    with jax.enable_x64(True):
        omega = {of: np.asarray(theory.omega(np.arange(of + 1) / of, weights)) for of in (n, n - 1)}
        phi = {of: np.asarray(theory.potential(np.arange(of + 1) / of, weights)) for of in (n, n - 1, m, m - 1)}

    # Functions of the counts: climbed, v Δ, v Ω/β and ½ v Δ (Ω/β − Δ).
    def rise(k: np.ndarray, n: int, j: np.ndarray, m: int) -> np.ndarray:
        return phi[n][k.astype(int)] - phi[m][j.astype(int)]

    def gain(k: np.ndarray, n: int, j: np.ndarray, m: int) -> np.ndarray:
        return k * (n - k) / n**2 * (_logit(k, n) - _logit(j, m))

    def pull(k: np.ndarray, n: int, j: np.ndarray, m: int) -> np.ndarray:
        return k * (n - k) / n**2 * omega[n][k.astype(int)] / beta

    def rest(k: np.ndarray, n: int, j: np.ndarray, m: int) -> np.ndarray:
        delta = _logit(k, n) - _logit(j, m)
        return k * (n - k) / n**2 * delta * (omega[n][k.astype(int)] / beta - delta) / 2

    counted = {
        name: _jackknife(f, k, n, j, m)
        for name, f in (("rise", rise), ("gain", gain), ("pull", pull), ("at_rest", rest))
    }

    # Ω Cov(r, ℓ). Both factors depend on the sample, so this too leaves one completion out: a success or a failure of mean ℓ.
    def push(k: np.ndarray, n: int, first: np.ndarray, total: np.ndarray) -> np.ndarray:
        return omega[n][k.astype(int)] * (first - k / n * total) / (n - 1)

    first, total = n * moments.of_successes, n * moments.mean
    success, failure = first / np.maximum(k, 1), (total - first) / np.maximum(n - k, 1)  # their mean ℓ
    without_success = push(np.maximum(k - 1, 0), n - 1, first - success, total - success)
    without_failure = push(np.minimum(k, n - 1), n - 1, first, total - failure)
    pushed = n * push(k, n, first, total) - (n - 1) * (k * without_success + (n - k) * without_failure) / n

    values = {name: value for name, (value, _, _) in counted.items()}
    gained, pulled = values.pop("gain"), values.pop("pull")
    share = gained.sum() / pulled.sum() if pulled.sum() > 0 else None
    values["beyond_rest"] = moments.mean - useful - values["at_rest"]
    values["objective"] = values.pop("rise") - beta * moments.mean
    values["hold"] = beta * moments.var
    values["slope"] = pushed - values["hold"]

    # Errors: a completion adds a (r − p) + b (ℓ − E ℓ) to an estimate, one of the reference c (r − p_ref).
    p, p_ref = k / n, (j + 0.5) / (m + 1)
    delta = _logit(k, n) - _logit(j, m)

    def error(name: str, a: np.ndarray | float = 0.0, b: float = 0.0, c: np.ndarray | float = 0.0) -> np.ndarray:
        _, by_p, by_ref = counted[name]
        sign = -1.0 if name == "at_rest" and b else 1.0  # beyond_rest has it with a minus
        a, c = sign * by_p + a, sign * by_ref + c
        square = a**2 * moments.var_r + b**2 * moments.var + 2 * a * b * moments.cov
        return np.sqrt(np.maximum(square, 0) / n + c**2 * p_ref * (1 - p_ref) / m)

    at = omega[n][k.astype(int)]
    of_slope = at**2 * moments.m22 - 2 * beta * at * moments.m31 + beta**2 * moments.m40 - values["slope"] ** 2
    errors = {
        "at_rest": error("at_rest"),
        "beyond_rest": error("at_rest", -delta, 1.0, (p - p_ref) / (p_ref * (1 - p_ref))),
        "objective": error("rise", 0.0, -beta),
        "slope": np.sqrt(np.maximum(of_slope, 0) / n),
        "hold": beta * np.sqrt(np.maximum(moments.m40 - moments.var**2, 0) / n),
    }
    # The ratio of two sums, as a mean of values whose errors add up as those of a mean do.
    if share is not None:
        values["followed"] = share + (gained - share * pulled) / pulled.mean()
        by_p = counted["gain"][1] - share * counted["pull"][1]
        variance = by_p**2 * moments.var_r / n + counted["gain"][2] ** 2 * p_ref * (1 - p_ref) / m
        errors["followed"] = np.sqrt(np.maximum(variance, 0)) / pulled.mean()
    return Estimates(values, errors)


def mean_over_prompts(estimates: Estimates, confidence: float) -> dict[str, dict[str, float]]:
    """name -> mean over the prompts with its interval; only the samples are random, not the prompts."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    means = {}
    for name, values in estimates.values.items():
        mean, half = values.mean(), z * math.sqrt(np.square(estimates.errors[name]).sum()) / len(values)
        means[name] = interval_dict(mean, mean - half, mean + half)
    return means


class Ledger(NamedTuple):
    """The ledger of a measured policy.

    Attributes:
      means: name -> mean over the prompts with its interval, of the quantities of `ledger_of_prompts`, and
        ``objective_optimum``, a number: the objective at p*, where small steps of a table end.
      prompts: name -> [Q].
    """

    means: dict[str, Any]
    prompts: dict[str, np.ndarray]

    def row(self) -> dict[str, float]:
        """The means, for the metrics row of a probe."""
        shown = ("useful", "within_successes", "within_failures", "at_rest", "beyond_rest", "objective", "slope")
        return {f"ledger/{name}": self.means[name]["mean"] for name in shown if name in self.means}


def ledger_of_run(
    config: Any,
    objective: Objective,
    before: dict[str, Any],
    tally: Tally | None,
    *,
    group_size: int | None = None,
    optimum: bool = True,
) -> Ledger | None:
    """The ledger of a policy of a run.

    Args:
      config, objective: of the run. Where not KL(π‖π_ref) alone decides where training ends, the ledger is the split of the KL.
      before: counts of the reference: "successes", "trials".
      tally: of the policy; None where no log-ratios were measured.
      group_size: G with which it was trained; that of the config by default.
      optimum: compute ``objective_optimum`` too, which is the same at every probe of a run and not shown there.

    Returns:
      The ledger; None without log-ratios, where they are not finite, or with too few samples of a prompt.
    """
    if tally is None or min(tally.trials, before["trials"]) < FEWEST or not np.isfinite(tally.log_ratio_sums).all():
        return None
    weights = group_weights(objective, group_size or config.rollout.group_size)
    setting: dict[str, Any] = {"weights": weights, "beta": config.objective.beta}
    if objective.kl_direction != "reverse" or weights is None or config.objective.entropy_bonus:
        setting = {"weights": None, "beta": None}
    counts = np.array(before["successes"])
    estimates = ledger_of_prompts(tally, counts, before["trials"], **setting)
    means: dict[str, Any] = mean_over_prompts(estimates, config.evaluate.confidence)
    if optimum and setting["weights"] is not None:
        means["objective_optimum"] = _objective_at_star(counts, before["trials"], **setting)
    return Ledger(means, estimates.values)


def _objective_at_star(successes: np.ndarray, trials: int, *, weights: theory.Group, beta: float) -> float:
    """The mean of J at p* over the prompts, averaged over what their counts allow, as `theory.predict` averages p*."""
    logits, times = mixture(posterior_of(successes, np.full(successes.shape, trials)), size=POSTERIOR)
    setting: dict[str, Any] = {"beta": beta, "weights": weights, "logits": True}
    with jax.enable_x64(True):
        star = theory.flow_point(logits, **setting)
        gain = theory.objective_gain(star, logits, theory.bernoulli_kl(star, logits, logits=True), **setting)
        return float(np.asarray(gain) @ times / times.sum())


def _log_share(count: np.ndarray, of: int) -> np.ndarray:
    """H_count − H_of, the estimate of ln(count/of) that is unbiased but for the last terms of a series; finite at 0.

    >>> round(float(_log_share(np.array(50.0), 100)), 4), round(math.log(0.5), 4)
    (-0.6882, -0.6931)
    """
    return digamma(count + 1) - digamma(of + 1)


def _logit(count: np.ndarray, of: int) -> np.ndarray:
    """Likewise of ln(p/(1 − p))."""
    return _log_share(count, of) - _log_share(of - count, of)


def _jackknife(
    f: Callable[..., np.ndarray], k: np.ndarray, n: int, j: np.ndarray, m: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f(k, n, j, m) without its bias of order 1/n and 1/m, and its slopes in k/n and j/m.

    A completion that is left out is a success with probability k/n: two values, and no need to sample them.
    """
    whole = f(k, n, j, m)
    less_k = f(np.maximum(k - 1, 0), n - 1, j, m), f(np.minimum(k, n - 1), n - 1, j, m)  # without a success, a failure
    less_j = f(k, n, np.maximum(j - 1, 0), m - 1), f(k, n, np.minimum(j, m - 1), m - 1)
    bias = (n - 1) * (k / n * less_k[0] + (1 - k / n) * less_k[1] - whole)
    bias += (m - 1) * (j / m * less_j[0] + (1 - j / m) * less_j[1] - whole)
    slopes = ((n - 1) * (less_k[1] - less_k[0]), (m - 1) * (less_j[1] - less_j[0]))
    return whole - bias, *slopes
