"""Where the curve of a run goes, from what the run has measured so far: its end, its speed, and ρ, with intervals.

The flow of the theory is given unknowns. Prompt i, with log-odds L_i and v_i = p_i(1 − p_i), follows

    dL_i/ds = κ (4 v_i)^a [ρ Ω(p_i) − β (L_i − L_ref,i)],   ds/dn = 1 − w + w r_n,

where n iterations are done and r_n is the learning rate over its peak.

    κ   the speed per iteration at the peak learning rate, where p = 1/2 or a = 0
    a   how the speed depends on p: near 0 for Adam, near 1 for plain gradients
    w   the share of the speed that follows the learning rate: one that is too high moves the policy no faster than a lower one
    ρ   the share of the pull Ω/β that the network lets through: 1 ends at p*, less below it

With the forward KL the pull back is β (p_i − p_ref,i)/v_i. Without a KL there is none, and no ρ that could be told from κ.

What is observed are means: of the rewards of an iteration, and of the probes. The mean of a batch is m + v̄ δ + ε, with m and v̄
the means of p_i and v_i along the flow over the prompts of the batch, ε the noise of sampling, v̄/n for n completions, and δ the
process noise, a common shift of log-odds that relaxes as the flow does (an Ornstein-Uhlenbeck process). L_ref has the posterior
of the reference's counts, under a beta distribution over the prompts that is fitted to them.

The posterior of (κ, ρ, a, w, size of δ) is a set of points, by sequential Monte Carlo with fixed random numbers: a function of
the rows so far and of nothing else, so that a resumed run says the same, bit for bit.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaln, ndtr
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
_POINTS, _UNKNOWNS = 512, 5
_MOVES, _LAST_MOVES = 2, 8  # of every point, at each step of the likelihood and at the last
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
    pace: [n + 1] iterations at the peak learning rate that 0 … n iterations are worth: s where w = 1.
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
    """Equally likely points of the unknowns after some rows.

    iteration: of the last row.
    kappa, rho, exponent, noise, follows: [M] κ, ρ, a, the standard deviation of δ at rest, and w.
    mean, variance: [M] of δ now.
    """

    iteration: int
    kappa: np.ndarray
    rho: np.ndarray
    exponent: np.ndarray
    noise: np.ndarray
    follows: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def fit(course: Course, rows: list[dict[str, Any]], *, exponent: float | None = None) -> Posterior:
    """The posterior after the rows of metrics.jsonl so far, at least one of them of an iteration.

    Sequential Monte Carlo: points of the prior; the likelihood is raised in steps, at each of which the points are drawn again by
    their weights, and moved by differences of other points (differential evolution, a Metropolis method that needs no scale).

    Args:
      course: of the run.
      rows: dicts with "phase", "iteration", and "reward/mean" or "success/mean".
      exponent: a, if it is given.

    Source: Del Moral et al., J. R. Stat. Soc. B 68 (2006), 411; ter Braak, Stat. Comput. 16 (2006), 239.
    """
    seen = _observations(course, rows)
    shares = seen.shares[:1] if (seen.shares == seen.shares[0]).all() else seen.shares
    tables = _mean_over(course.flow, shares)  # [K or 1, R, A, S, 2]

    def evaluate(u: np.ndarray) -> np.ndarray:
        """[M, 8] what `Posterior` holds of points u [M, 5], and before it the log-likelihood."""
        unknowns = _unknowns(u, fixed_rho=course.flow.beta == 0, exponent=exponent)
        likelihood, mean, variance = _filter(course, seen, tables, *unknowns)
        return np.stack([likelihood, *unknowns, mean, variance], axis=1)

    generator = np.random.default_rng(0)
    u = generator.normal(size=(_POINTS, _UNKNOWNS))
    values, power = evaluate(u), 0.0
    while power < 1.0:
        step = _largest_step(values[:, 0], 1.0 - power)
        power = 1.0 if step == 1.0 - power else power + step
        weights = np.exp(step * (values[:, 0] - values[:, 0].max()))
        places = (generator.random() + np.arange(_POINTS)) / _POINTS * weights.sum()
        chosen = np.minimum(np.searchsorted(np.cumsum(weights), places), _POINTS - 1)
        # In a random order, so that each half is moved by differences of the other.
        chosen = generator.permutation(chosen)
        u, values = u[chosen], values[chosen]
        for _ in range(_MOVES if power < 1.0 else _LAST_MOVES):
            for half in (slice(0, _POINTS // 2), slice(_POINTS // 2, _POINTS)):
                others = u[_POINTS // 2 :] if half.start == 0 else u[: _POINTS // 2]
                first, second = generator.integers(len(others), size=(2, len(others)))
                scale = np.where(generator.random(len(others)) < 0.2, 1.0, generator.uniform(0.3, 0.9, len(others)))
                jump = scale[:, None] * (others[first] - others[second])
                moved = u[half] + jump + 1e-4 * generator.normal(size=jump.shape)
                new = evaluate(moved)
                gain = power * (new[:, 0] - values[half, 0]) - ((moved**2).sum(-1) - (u[half] ** 2).sum(-1)) / 2
                accepted = np.log(generator.random(len(others))) < gain
                u[half] = np.where(accepted[:, None], moved, u[half])
                values[half] = np.where(accepted[:, None], new, values[half])
    iteration = max(row["iteration"] for row in rows if row["phase"] == "train")
    return Posterior(iteration, *values[:, 1:].T)


def ahead(course: Course, posterior: Posterior, iterations: np.ndarray, confidence: float) -> dict[str, np.ndarray]:
    """{"mean", "low", "high"}: the median and the interval of what measurements after later ``iterations`` [n] will show.

    A measurement has the samples of the last one.
    """
    now, later = (_clock(posterior.follows, _times(course, n)) for n in (np.array([posterior.iteration]), iterations))
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
        name: 1 / (1 + np.exp(-_mixture_quantile(place, np.sqrt(variance), level))) for name, level in levels.items()
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


def warning(rows: list[dict[str, Any]]) -> str | None:
    """The early warning, once: at the first two probes in a row whose interval of ρ lies clearly below 1; else None.

    >>> low = {"phase": "probe", "forecast/rho": 0.5, "forecast/rho_low": 0.4, "forecast/rho_high": 0.6, "forecast/mean": 0.7}
    >>> warning([low, low])
    'as it goes, this run will not reach p*: ρ = 0.50 [0.40, 0.60] of the pull gets through, and it will end near 0.700'
    >>> warning([low]), warning([low, low, low])
    (None, None)
    """
    if rows[-1]["phase"] != "probe" or "forecast/rho" not in rows[-1]:
        return None
    limited = [row.get("forecast/rho_high", 1.0) < LIMITED for row in rows if row["phase"] == "probe"]
    pairs = [first and second for first, second in itertools.pairwise(limited)]
    if not pairs or not pairs[-1] or any(pairs[:-1]):
        return None
    return (
        "as it goes, this run will not reach p*: ρ = {forecast/rho:.2f} [{forecast/rho_low:.2f}, {forecast/rho_high:.2f}] "
        "of the pull gets through, and it will end near {forecast/mean:.3f}".format(**rows[-1])
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
        "kappa": _interval(simple.kappa, confidence),
        "rho": None if course.flow.beta == 0 else _interval(whole.rho, confidence),
        "exponent": float(whole.exponent.mean()),
        "noise": float(whole.noise.mean()),
        "iterations_to_go": _iterations_to_go(course, whole),
    }
    return {"forecasts": forecasts, "speed": speed}


def _summary(course: Course, posterior: Posterior, confidence: float) -> dict[str, Any]:
    end = ahead(course, posterior, np.array([len(course.pace) - 1]), confidence)
    return {
        "iteration": posterior.iteration,
        "end": interval_dict(**{name: values[0] for name, values in end.items()}),
        "rho": None if course.flow.beta == 0 else _interval(posterior.rho, confidence),
        "kappa": _interval(posterior.kappa, confidence),
    }


def _iterations_to_go(course: Course, posterior: Posterior) -> float | None:
    """At the peak learning rate, until a share of the whole gain is reached, for the mean of the unknowns."""
    kappa = _interval(posterior.kappa, 0.95)
    if kappa["high"] > 10 * kappa["low"]:
        return None
    rho, exponent = (np.array([x.mean()]) for x in (posterior.rho, posterior.exponent))
    table = _mean_over(course.flow, course.measured[None])
    path = _at(table, rho, exponent, TIMES[None])[0][0]  # [S]
    n = posterior.iteration
    now = kappa["mean"] * (n + posterior.follows.mean() * (course.pace[n] - n))
    near = np.abs(path[-1] - path) <= (1 - GAIN) * abs(path[-1] - path[0])
    arrival = TIMES[np.argmax(near)]
    return None if arrival <= now else float((arrival - now) / kappa["mean"])


class _Observations(NamedTuple):
    """Means that were measured, in the order of time; [K] each.

    time: [K, 2] of the policy that was measured: iterations done, and what they are worth at the peak learning rate.
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
        prompts, number, spread = course.batches[block].mean(0), size * course.completions, course.spread / size
        found.append((first + (size - 1) / 2, prompts, rewards[block].mean(), number, spread))
        first += size
    for row in rows:
        if row["phase"] == "probe" and row["iteration"] > 0:
            number = course.final if row["iteration"] == len(course.pace) - 1 else course.probe
            found.append((row["iteration"], course.measured, row["success/mean"], number, 0.0))
    found.sort(key=lambda x: x[0])
    iterations, *others = (np.array(x) for x in zip(*found, strict=True))
    return _Observations(_times(course, iterations), *others)


def _times(course: Course, iterations: np.ndarray) -> np.ndarray:
    """[K, 2] iterations done, which may lie between two, and what they are worth at the peak learning rate."""
    return np.stack([iterations, np.interp(iterations, np.arange(len(course.pace)), course.pace)], axis=1)


def _clock(follows: np.ndarray, time: np.ndarray) -> np.ndarray:
    """[M, K] s at times [K, 2], for w [M]."""
    return (1 - follows)[:, None] * time[:, 0] + follows[:, None] * time[:, 1]


def _unknowns(u: np.ndarray, *, fixed_rho: bool, exponent: float | None) -> tuple[np.ndarray, ...]:
    """The prior: κ, ρ, a, noise and w [M] as functions of standard normal u [M, 5].

    ρ has most of its mass near 1 and wide tails: [0.88, 1.12] holds 68 %, [0.4, 1.6] holds 95 %.
    """
    rho = np.clip(1 + 0.05 * np.sinh(1.6 * u[:, 1]), RHOS[0], RHOS[-1])
    return (
        0.03 * np.exp(2.5 * u[:, 0]),
        np.ones(len(u)) if fixed_rho else rho,
        ndtr(u[:, 2] - 0.7) if exponent is None else np.full(len(u), exponent),
        0.1 * np.exp(0.8 * u[:, 3]),
        ndtr(u[:, 4] + 1.0),
    )


def _filter(
    course: Course,
    seen: _Observations,
    tables: np.ndarray,
    kappa: np.ndarray,
    rho: np.ndarray,
    exponent: np.ndarray,
    noise: np.ndarray,
    follows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Kalman filter of δ: log-likelihood (but for a constant), mean and variance now, [M] each."""
    clock = _clock(follows, seen.time)  # [M, K]
    m, v = _at(tables, rho, exponent, kappa[:, None] * clock)  # [M, K] each
    v = np.maximum(v, 1e-4)
    sampling = v / seen.completions + seen.spread * np.maximum(m * (1 - m) - v, 0.0)
    rate, full = kappa * max(course.flow.beta, _SLOWEST), noise**2
    mean, variance, total, last = np.zeros((4, len(m)))
    for k in range(len(seen.mean)):
        keep = np.exp(-rate * (clock[:, k] - last))
        mean, variance = keep * mean, full + keep**2 * (variance - full)
        last = clock[:, k]
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


def _largest_step(likelihood: np.ndarray, most: float) -> float:
    """The power of the likelihoods [M] up to ``most`` at which they are worth half of the points, as weights."""

    def is_enough(power: float) -> bool:
        weights = np.exp(power * (likelihood - likelihood.max()))
        return bool(weights.sum() ** 2 >= len(weights) / 2 * (weights**2).sum())

    if is_enough(most):
        return most
    low, high = 0.0, most
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return max(low, 1e-6)


def _interval(values: np.ndarray, confidence: float) -> dict[str, float]:
    """The mean and the interval of equally likely points."""
    ends = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return interval_dict(values.mean(), *ends)


def _mixture_quantile(mean: np.ndarray, deviation: np.ndarray, level: float) -> np.ndarray:
    """[n] quantiles of equal mixtures [M, n] of normal distributions, by bisection."""
    low, high = (mean - 9 * deviation).min(0), (mean + 9 * deviation).max(0)
    for _ in range(50):
        middle = (low + high) / 2
        below = ndtr((middle - mean) / deviation).mean(0) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2
