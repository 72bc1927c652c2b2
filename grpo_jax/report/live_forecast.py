"""Where the curve of a run goes, from what the run has measured so far: its end, its speed, and ρ, with intervals.

The flow of the theory is given three unknowns. Prompt i, with log-odds L_i, v_i = p_i(1 − p_i) and s the iterations done, each
weighed by its learning rate over the peak's, follows

    dL_i/ds = κ (4 v_i)^a [ρ Ω(p_i) − β (L_i − L_ref,i)].

κ is the speed per iteration at the peak learning rate, where p = 1/2 or a = 0; a says how the speed depends on p (Adam: near 0,
plain gradients: near 1); ρ is the share of the pull Ω/β that the network lets through: 1 ends at p*, less below it. With the
forward KL the pull back is β (p_i − p_ref,i)/v_i, and without a KL there is none, and no ρ that could be told from κ.

What is observed are means: of the rewards of an iteration, and of the probes. The mean of a batch is m + v̄ δ + ε, with m and v̄
the means of p_i and v_i along the flow over the prompts of the batch, ε the noise of sampling, v̄/n for n completions, and δ the
process noise, a common shift of log-odds that relaxes as the flow does. L_ref has the posterior of the reference's counts,
under a beta distribution over the prompts that is fitted to them.

The posterior of (κ, ρ, a, size of δ, …) is a set of weighted points, by importance sampling in a few rounds from fixed
quasi-random numbers: a function of the rows so far and of nothing else, so that a resumed run says the same, bit for bit.
"""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaln, ndtr, ndtri
from scipy.stats import beta as beta_distribution

from grpo_jax import theory
from grpo_jax.objective import Objective
from grpo_jax.report.forecast import group_weights, interval_dict

ORIGINS = (0.1, 0.3, 0.5)  # shares of a run at which result.json holds what was forecast
LIMITED = 0.9  # the upper end of ρ below which it is said that the run will not reach p*
GAIN = 0.95  # share of the gain that counts as arrived

# The grids of the flow: log-odds of the reference, ρ, a, and τ = κs.
NODES = np.linspace(-8.0, 8.0, 65)
RHOS = np.linspace(-0.5, 2.0, 51)
EXPONENTS = np.linspace(0.0, 1.0, 4)
TIMES = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 97)])
_FINE = np.linspace(-40.0, 40.0, 4001)  # log-odds at which Ω is tabulated

_QUANTILES = 9  # of the posterior of a prompt's p_ref that stand for it
_POINTS, _ROUNDS = 1024, 15
_UNKNOWNS = 4
_COUNTED = 0.25  # a round is good if the weights count as many as this share of the points
_SLOWEST = 0.3  # process noise relaxes at κ max(β, this)


class Flow(NamedTuple):
    """The flow of the theory from every log-odds of the reference, for every ρ and a.

    moments: [R, A, S, N, 2] p and p(1 − p) at ``RHOS``, ``EXPONENTS``, ``TIMES`` and ``NODES``.
    beta: weight of the KL to the reference, 0 without one.
    """

    moments: np.ndarray
    beta: float


def make_flow(weights: theory.Weights, *, beta: float, kl: str) -> Flow:
    """The flow dL/dτ = (4v)^a [ρ Ω(p) − β (L − L_ref)] from L = L_ref, where τ = κs.

    Args:
      weights: the normaliser, Ω.
      beta: weight of the KL; not read without one.
      kl: "reverse", "forward" or "none".

    Source: derived; many small steps ascend Φ(p) − β kl(p‖p_ref) with Φ' = Ω. Checked against an integrator of scipy.

    >>> flow = make_flow(theory.MeanOnly(), beta=2.0, kl="reverse")  # ρ = 1, a = 0, from p = 1/2: L = (1 − exp(−2τ))/2
    >>> round(float(flow.moments[30, 0, -1, 32, 0]), 4)
    0.6225
    """
    with jax.enable_x64(True):
        pull = np.asarray(theory.omega(jnp.asarray(_FINE), weights, logits=True))
    slope = np.gradient(pull, _FINE)
    beta = 0.0 if kl == "none" else beta
    rho, exponent, reference = np.meshgrid(RHOS, EXPONENTS, NODES, indexing="ij")  # each [R, A, N]
    shape = reference.shape
    logit, path = reference.copy(), [reference]
    p_ref = 1 / (1 + np.exp(-reference))

    def rate(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = 1 / (1 + np.exp(-x))
        v = p * (1 - p)
        total, rise = (np.interp(x.ravel(), _FINE, y).reshape(shape) for y in (pull, slope))
        if kl == "forward":
            back, back_slope = beta * (p - p_ref) / v, beta * (1 - (p - p_ref) * (1 - 2 * p) / v)
        else:
            back, back_slope = beta * (x - reference), beta
        force, force_slope = rho * total - back, rho * rise - back_slope
        speed = (4 * v) ** exponent
        return speed * force, speed * (force_slope + exponent * (1 - 2 * p) * force)

    for step in np.diff(TIMES):
        # Exponential steps, exact where the flow is linear, so that late steps may be long.
        f, jacobian = rate(logit)
        z = np.clip(jacobian * step, -700.0, 1.0)
        logit = logit + step * f * np.where(np.abs(z) < 1e-8, 1.0, np.expm1(z) / np.where(z == 0, 1.0, z))
        logit = np.clip(logit, -30.0, 30.0)
        path.append(logit)
    success = 1 / (1 + np.exp(-np.stack(path, axis=2)))  # [R, A, S, N]
    return Flow(np.stack([success, success * (1 - success)], axis=-1), beta)


class Course(NamedTuple):
    """What is known of a run before its first iteration.

    flow: see `Flow`.
    pace: [n + 1] iterations at the peak learning rate that 0 … n iterations are worth.
    batches: [n, N] shares of ``NODES`` among the prompts of each iteration.
    measured: [N] likewise among the prompts that are measured.
    completions: of an iteration.
    spread: 1/P where the prompts of an iteration are a sample like those that are measured; 0 where they are known.
    probe, final: completions of a probe and of the last measurement.
    error: standard error of the mean p_ref.
    """

    flow: Flow
    pace: np.ndarray
    batches: np.ndarray
    measured: np.ndarray
    completions: int
    spread: float
    probe: int
    final: int
    error: float


def refusal(successes: np.ndarray, trials: int, *, objective: Objective, entropy_bonus: float) -> str | None:
    """Why there is no forecast, or None.

    >>> refusal(np.array([0, 0]), 8, objective=Objective(), entropy_bonus=0.0)
    'no completion of the reference succeeded, so the rewards have nothing to teach'
    """
    reasons = [
        (not objective.is_predicted, f"the theory does not know the objective ({objective.fixed_point})"),
        (bool(entropy_bonus), "the theory leaves out the entropy bonus"),
        (not successes.any(), "no completion of the reference succeeded, so the rewards have nothing to teach"),
        (bool((successes == trials).all()), "every completion of the reference succeeded, so there is nothing to gain"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def make_course(
    successes: np.ndarray,
    trials: int,
    *,
    objective: Objective,
    beta: float,
    group_size: int,
    pace: np.ndarray,
    visits: np.ndarray | None,
    prompts_per_iteration: int,
    samples: int,
    final_samples: int,
) -> Course:
    """What a forecast needs besides the rows of metrics.jsonl.

    Args:
      successes: [Q] of ``trials`` samples of each measured prompt under the reference.
      objective, beta, group_size: of the run; `refusal` has no reason against them.
      pace: see `Course`.
      visits: [n, P] places in ``successes`` of the prompts of each iteration; None where not all of them are measured.
      prompts_per_iteration: P.
      samples, final_samples: of each measured prompt, at a probe and at the end.
    """
    weights = group_weights(objective, group_size)
    assert weights is not None  # refusal
    shares, variances = _reference(successes, trials)
    measured = shares.mean(0)
    if visits is None:
        batches = np.broadcast_to(measured, (len(pace) - 1, len(measured)))
    else:
        batches = np.stack([shares[rows].mean(0) for rows in visits])
    return Course(
        flow=make_flow(weights, beta=beta, kl=objective.kl_direction),
        pace=pace,
        batches=batches,
        measured=measured,
        completions=prompts_per_iteration * group_size,
        spread=1 / prompts_per_iteration if visits is None else 0.0,
        probe=len(successes) * samples,
        final=len(successes) * final_samples,
        error=math.sqrt(variances.sum()) / len(successes),
    )


class Posterior(NamedTuple):
    """Weighted points of the unknowns after some rows.

    iteration: of the last row.
    weights: [M], their sum is 1.
    kappa, rho, exponent, noise: [M] κ, ρ, a and the standard deviation of δ at rest.
    mean, variance: [M] of δ now.
    effective: how many equally weighted points the weights are worth.
    """

    iteration: int
    weights: np.ndarray
    kappa: np.ndarray
    rho: np.ndarray
    exponent: np.ndarray
    noise: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    effective: float


def fit(course: Course, rows: list[dict[str, Any]], *, exponent: float | None = None) -> Posterior:
    """The posterior after the rows of metrics.jsonl so far, at least one of them of an iteration.

    Adaptive importance sampling: each round draws from a normal distribution fitted to the weighted points of the round before,
    whose weights are flattened as far as needed to be worth a share of the points; the last round needs no flattening.

    Args:
      course: of the run.
      rows: dicts with "phase", "iteration", and "reward/mean" or "success/mean".
      exponent: a, if it is given.
    """
    seen = _observations(course, rows)
    shares = seen.shares[:1] if (seen.shares == seen.shares[0]).all() else seen.shares
    tables = _mean_over(course.flow, shares)  # [K or 1, R, A, S, 2]
    normal = _normal_points(_UNKNOWNS)
    center: np.ndarray = np.zeros(_UNKNOWNS)
    root: np.ndarray = 1.3 * np.eye(_UNKNOWNS)
    for number in range(_ROUNDS):
        u = center + normal @ root.T
        kappa, rho, a, noise = _unknowns(u, fixed_rho=course.flow.beta == 0, exponent=exponent)
        likelihood, mean, variance = _filter(course, seen, tables, kappa, rho, a, noise)
        log_weights = (
            likelihood - (u**2).sum(-1) / 2 + (normal**2).sum(-1) / 2
        )  # prior over proposal, but for a constant
        weights, power = _flattened(log_weights)
        if power == 1.0:
            break
        if number < _ROUNDS - 1:
            center = weights @ u
            covariance = (weights[:, None] * (u - center)).T @ (u - center)
            root = 1.25 * np.linalg.cholesky(covariance + 1e-6 * np.eye(_UNKNOWNS))
    iteration = max(row["iteration"] for row in rows if row["phase"] == "train")
    effective = float(1 / (weights**2).sum())
    return Posterior(iteration, weights, kappa, rho, a, noise, mean, variance, effective)


def ahead(course: Course, posterior: Posterior, iterations: np.ndarray, confidence: float) -> dict[str, np.ndarray]:
    """{"mean", "low", "high"}: the median and the interval of what measurements after later ``iterations`` [n] will show.

    A measurement has the samples of the last one.
    """
    later, now = course.pace[iterations], course.pace[posterior.iteration]
    kappa = posterior.kappa[:, None]
    m, v = _at(_mean_over(course.flow, course.measured[None]), posterior.rho, posterior.exponent, kappa * later)
    m, v = np.clip(m, 1e-6, 1 - 1e-6), np.maximum(v, 1e-6)
    keep = np.exp(-kappa * max(course.flow.beta, _SLOWEST) * (later - now))
    full = posterior.noise[:, None] ** 2
    shift, variance = keep * posterior.mean[:, None], full + keep**2 * (posterior.variance[:, None] - full)
    # In log-odds of the mean, which stays below 1: a common shift δ moves them by δ v̄/m(1 − m).
    scale = v / (m * (1 - m))
    v_ref = float(course.flow.moments[0, 0, 0, :, 1] @ course.measured)
    variance = scale**2 * (variance + (course.error / max(v_ref, 1e-4)) ** 2) + scale / (m * (1 - m)) / course.final
    place = np.log(m) - np.log1p(-m) + scale * shift
    levels = {"mean": 0.5, "low": (1 - confidence) / 2, "high": (1 + confidence) / 2}
    return {
        name: 1 / (1 + np.exp(-_mixture_quantile(place, np.sqrt(variance), posterior.weights, level)))
        for name, level in levels.items()
    }


def probe_metrics(course: Course, rows: list[dict[str, Any]], confidence: float) -> dict[str, float]:
    """The forecast after ``rows``, as a probe's row of metrics.jsonl holds it: the end, ρ and κ.

    forecast/mean, low, high: of the last measurement. forecast/rho, rho_low, rho_high: without a KL absent.
    """
    found = _summary(course, fit(course, rows), confidence)
    metrics = {f"forecast/{end}": x for end, x in found["end"].items()}
    if found["rho"] is not None:
        metrics |= {f"forecast/rho{'' if end == 'mean' else '_' + end}": x for end, x in found["rho"].items()}
    return metrics | {"forecast/kappa": found["kappa"]["mean"]}


def words(row: dict[str, Any]) -> str:
    """The forecast of a probe's row, for the line of progress.

    >>> words({"forecast/mean": 0.7712, "forecast/low": 0.757, "forecast/high": 0.784})
    'forecast 0.771 [0.757, 0.784]'
    """
    return "forecast {forecast/mean:.3f} [{forecast/low:.3f}, {forecast/high:.3f}]".format(**row)


def warning(course: Course, rows: list[dict[str, Any]]) -> str | None:
    """The early warning, at the first probe that establishes that the run will not reach p*; else None."""
    if course.flow.beta == 0:
        return None
    established = [row for row in rows if row["phase"] == "probe" and row.get("forecast/rho_high", 2.0) < LIMITED]
    if len(established) != 1 or established[0] is not rows[-1]:
        return None
    row = rows[-1]
    return (
        "this run will not reach p*: rewards rise as if ρ = {forecast/rho:.2f} [{forecast/rho_low:.2f}, "
        "{forecast/rho_high:.2f}] of the pull got through; its forecast is {forecast/mean:.3f}".format(**row)
    )


def record(course: Course, rows: list[dict[str, Any]], confidence: float) -> dict[str, Any]:
    """What result.json holds: "forecasts" as they were at shares of the run, and "speed" after all of it.

    Each forecast was made from the rows up to its iteration. kappa of the speed is κ for a = 0, per iteration at the peak
    learning rate: then all log-odds approach their ends at the one rate κβ; iterations_to_go are at the peak learning rate, and
    None where the flow has arrived, or κ is not known within a factor of 10.
    """
    last = len(course.pace) - 1
    forecasts = []
    for iteration in sorted({max(1, round(share * last)) for share in ORIGINS}):
        posterior = fit(course, [row for row in rows if row["iteration"] <= iteration])
        steps = np.unique(np.linspace(iteration, last, 25).round().astype(int))
        path = ahead(course, posterior, steps, confidence)
        path = {"iteration": steps.tolist()} | {end: values.tolist() for end, values in path.items()}
        forecasts.append(_summary(course, posterior, confidence) | {"path": path})
    whole, simple = fit(course, rows), fit(course, rows, exponent=0.0)
    speed = {
        "kappa": _interval(simple.kappa, simple.weights, confidence),
        "rho": None if course.flow.beta == 0 else _interval(whole.rho, whole.weights, confidence),
        "exponent": float(whole.weights @ whole.exponent),
        "noise": float(whole.weights @ whole.noise),
        "iterations_to_go": _iterations_to_go(course, whole),
    }
    return {"forecasts": forecasts, "speed": speed}


def _summary(course: Course, posterior: Posterior, confidence: float) -> dict[str, Any]:
    end = ahead(course, posterior, np.array([len(course.pace) - 1]), confidence)
    interval = partial(_interval, weights=posterior.weights, confidence=confidence)
    return {
        "iteration": posterior.iteration,
        "end": interval_dict(**{name: values[0] for name, values in end.items()}),
        "rho": None if course.flow.beta == 0 else interval(posterior.rho),
        "kappa": interval(posterior.kappa),
    }


def _iterations_to_go(course: Course, posterior: Posterior) -> float | None:
    """At the peak learning rate, until a share of the whole gain is reached, for the mean of the unknowns."""
    w = posterior.weights
    kappa = _interval(posterior.kappa, w, 0.95)
    if kappa["high"] > 10 * kappa["low"]:
        return None
    rho, exponent = (np.array([w @ x]) for x in (posterior.rho, posterior.exponent))
    table = _mean_over(course.flow, course.measured[None])
    path = _at(table, rho, exponent, TIMES[None])[0][0]  # [S]
    now = kappa["mean"] * course.pace[posterior.iteration]
    near = np.abs(path[-1] - path) <= (1 - GAIN) * abs(path[-1] - path[0])
    arrival = TIMES[np.argmax(near)]
    return None if arrival <= now else float((arrival - now) / kappa["mean"])


class _Observations(NamedTuple):
    """Means that were measured, in the order of time; [K] each.

    time: s of the policy that was measured.
    shares: [K, N] of ``NODES`` among its prompts.
    mean: success.
    completions: how many.
    spread: 1/number of prompts where they are a sample, else 0.
    """

    time: np.ndarray
    shares: np.ndarray
    mean: np.ndarray
    completions: np.ndarray
    spread: np.ndarray


def _observations(course: Course, rows: list[dict[str, Any]]) -> _Observations:
    """Probes, and rewards in blocks of iterations that grow with time."""
    rewards = np.array([row["reward/mean"] for row in rows if row["phase"] == "train"])
    found: list[tuple[Any, ...]] = []
    first = 0
    while first < len(rewards):
        size = min(1 + first // 8, len(rewards) - first)
        block = slice(first, first + size)  # row n is of completions by the policy before its update
        prompts = course.batches[block].mean(0)
        found.append(
            (course.pace[block].mean(), prompts, rewards[block].mean(), size * course.completions, course.spread / size)
        )
        first += size
    for row in rows:
        if row["phase"] == "probe" and row["iteration"] > 0:
            completions = course.final if row["iteration"] == len(course.pace) - 1 else course.probe
            found.append((course.pace[row["iteration"]], course.measured, row["success/mean"], completions, 0.0))
    found.sort(key=lambda x: x[0])
    return _Observations(*(np.array(x) for x in zip(*found, strict=True)))


def _unknowns(u: np.ndarray, *, fixed_rho: bool, exponent: float | None) -> tuple[np.ndarray, ...]:
    """The prior: κ, ρ, a and the noise [M] as functions of standard normal u [M, 4].

    ρ has most of its mass near 1 and wide tails: [0.88, 1.12] holds 68 %, [0.4, 1.6] holds 95 %.
    """
    return (
        0.03 * np.exp(2.5 * u[:, 0]),
        np.ones(len(u)) if fixed_rho else 1 + 0.05 * np.sinh(1.6 * u[:, 1]),
        ndtr(u[:, 2] - 0.7) if exponent is None else np.full(len(u), exponent),
        0.05 * np.exp(0.8 * u[:, 3]),
    )


def _filter(
    course: Course,
    seen: _Observations,
    tables: np.ndarray,
    kappa: np.ndarray,
    rho: np.ndarray,
    exponent: np.ndarray,
    noise: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Kalman filter of δ, an Ornstein-Uhlenbeck process: log-likelihood (but for a constant), mean and variance now, [M]."""
    m, v = _at(tables, rho, exponent, kappa[:, None] * seen.time)  # [M, K] each
    v = np.maximum(v, 1e-4)
    sampling = v / seen.completions + seen.spread * np.maximum(m * (1 - m) - v, 0.0)
    rate, full = kappa * max(course.flow.beta, _SLOWEST), noise**2
    mean, variance, total, last = np.zeros(len(m)), np.zeros(len(m)), np.zeros(len(m)), 0.0
    for k, time in enumerate(seen.time):
        keep = np.exp(-rate * (time - last))
        mean, variance, last = keep * mean, full + keep**2 * (variance - full), time
        expected = v[:, k] ** 2 * variance + sampling[:, k]
        gap = seen.mean[k] - m[:, k] - v[:, k] * mean
        total -= (gap**2 / expected + np.log(expected)) / 2
        gain = v[:, k] * variance / expected
        mean, variance = mean + gain * gap, variance * (1 - gain * v[:, k])
    return total, mean, variance


def _mean_over(flow: Flow, shares: np.ndarray) -> np.ndarray:
    """[K, R, A, S, 2] means of p and p(1 − p) over prompts with shares [K, N] of the nodes."""
    return np.einsum("rasnm,kn->krasm", flow.moments, shares, optimize=True)


def _at(tables: np.ndarray, rho: np.ndarray, exponent: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tables [K or 1, R, A, S, 2] at rho, exponent [M] and time [M, K], linearly in ρ, a and log τ: two [M, K]."""
    late = 1 + np.log(np.maximum(time, TIMES[1]) / TIMES[1]) / math.log(TIMES[2] / TIMES[1])
    places = (
        (rho[:, None] - RHOS[0]) / (RHOS[1] - RHOS[0]),
        exponent[:, None] * (len(EXPONENTS) - 1),
        np.where(time < TIMES[1], time / TIMES[1], late),
    )
    sides = []
    for place, size in zip(places, tables.shape[1:4], strict=True):
        place = np.clip(place, 0, size - 1)
        low = np.minimum(place.astype(int), size - 2)
        sides.append(((low, low + 1 - place), (low + 1, place - low)))
    prompts = np.arange(len(tables))
    total = np.zeros((*time.shape, 2))
    for i, share_i in sides[0]:
        for j, share_j in sides[1]:
            for s, share_s in sides[2]:
                total += (share_i * share_j * share_s)[..., None] * tables[prompts, i, j, s]
    return total[..., 0], total[..., 1]


def _reference(successes: np.ndarray, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """[Q, N] posterior of each prompt's log-odds, as shares of ``NODES``, and [Q] variance of its p_ref."""
    counts, where, number = np.unique(successes, return_inverse=True, return_counts=True)
    a, b = _fit_beta(counts, number, trials)
    posterior = beta_distribution(counts + a, trials - counts + b)
    levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    p = np.clip(posterior.ppf(levels[:, None]), 1e-300, 1 - 1e-16)  # [quantiles, counts]
    place = np.interp(np.log(p) - np.log1p(-p), NODES, np.arange(len(NODES)))
    low = np.minimum(place.astype(int), len(NODES) - 2)
    shares = np.zeros((len(counts), len(NODES)))
    rows = np.broadcast_to(np.arange(len(counts)), place.shape)
    np.add.at(shares, (rows, low), (low + 1 - place) / _QUANTILES)
    np.add.at(shares, (rows, low + 1), (place - low) / _QUANTILES)
    return shares[where], posterior.var()[where]


def _fit_beta(counts: np.ndarray, number: np.ndarray, trials: int) -> tuple[float, float]:
    """The beta distribution over prompts under which the counts, each found ``number`` times, are likeliest, on a grid."""
    mean = 1 / (1 + np.exp(-np.linspace(-7.0, 7.0, 141)))[:, None]
    concentration = np.geomspace(0.1, 100.0, 61)[None]
    a, b = mean * concentration, (1 - mean) * concentration
    likelihood = sum(n * (betaln(k + a, trials - k + b) - betaln(a, b)) for k, n in zip(counts, number, strict=True))
    best = np.unravel_index(np.argmax(likelihood), a.shape)
    return float(a[best]), float(b[best])


@cache
def _normal_points(dimensions: int) -> np.ndarray:
    """[M, d] standard normal numbers of low discrepancy: the additive recurrence of the generalised golden ratio."""
    root = 1.5
    for _ in range(50):
        root = (1 + root) ** (1 / (dimensions + 1))
    index = np.arange(1, _POINTS + 1)[:, None]
    return ndtri((0.5 + index * root ** -np.arange(1.0, dimensions + 1)) % 1.0)


def _flattened(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights to the largest power up to 1 at which they are worth a share of the points; and that power."""

    def to_power(power: float) -> np.ndarray:
        weights = np.exp(power * (log_weights - log_weights.max()))
        return weights / weights.sum()

    def is_enough(power: float) -> bool:
        return bool(1 / (to_power(power) ** 2).sum() >= _COUNTED * len(log_weights))

    if is_enough(1.0):
        return to_power(1.0), 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return to_power(low), low


def _interval(values: np.ndarray, weights: np.ndarray, confidence: float) -> dict[str, float]:
    """The mean and the interval of weighted points."""
    order = np.argsort(values)
    below = np.cumsum(weights[order]) - weights[order] / 2
    ends = np.interp([(1 - confidence) / 2, (1 + confidence) / 2], below, values[order])
    return interval_dict(weights @ values, *ends)


def _mixture_quantile(mean: np.ndarray, deviation: np.ndarray, weights: np.ndarray, level: float) -> np.ndarray:
    """[n] quantiles of mixtures [M, n] of normal distributions, by bisection."""
    low, high = (mean - 9 * deviation).min(0), (mean + 9 * deviation).max(0)
    for _ in range(50):
        middle = (low + high) / 2
        below = weights @ ndtr((middle - mean) / deviation) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2
