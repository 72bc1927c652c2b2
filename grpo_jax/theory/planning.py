"""Planning before spending compute: what each β would do to prompts whose p_ref has been measured, and which to sweep.

Of counts the whole posterior of each p_ref is planned for (`ends_of`), and not its estimate. Prompts with the same counts
have the same future, so that a million rows with a hundred trials each cost what a hundred do. Computed in double precision
on the host.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grpo_jax.theory.attainable import attainable_point
from grpo_jax.theory.dynamics import bernoulli_kl, kl_budget, success_map
from grpo_jax.theory.forward_kl import forward_kl_flip_limit, forward_kl_orbit_end, forward_kl_success_map
from grpo_jax.theory.groups import dead_fraction, dead_fraction_of_counts
from grpo_jax.theory.limits import flow_point, forward_kl_fixed_point
from grpo_jax.theory.mirror import mirror_step_kl, mirror_steps
from grpo_jax.theory.orbits import orbit_end
from grpo_jax.theory.posteriors import Mean, Posterior, mixture, posterior_of
from grpo_jax.theory.prediction import KLS, SATURATED, attainable_of, ends_of, mean_interval, wilson_interval
from grpo_jax.theory.thresholds import flip_limit
from grpo_jax.theory.weights import Group, Weights, log_odds, variance

Counts: TypeAlias = ArrayLike | Sequence[float]

DEAD = 0.99  # a prompt hardly ever teaches if a larger share than this of its groups has no success
GAIN = 0.95  # share of the gain that counts as arrived
ITERATIONS, TAIL = 256, 64  # exact iterations followed, and how many of the last ones their end is averaged over
SWEEP = (0.9, 0.1)  # shares of the reachable gain at the ends of the recommended range
LARGEST_BLOCK = 256
MIXTURE = (
    512  # success probabilities that stand for those that counts allow, for all columns but p*, KL and their shares
)
# Small steps are followed in units of the relaxation time 1/(κβ), the first of them more closely, to where all have relaxed.
CLOCK = np.concatenate([np.geomspace(1e-5, 0.05, 100), np.arange(0.1, 50.0, 0.05)])
SWING = 1e-4  # the least difference in p that counts as an oscillation
CLOSE = 1e-10  # a mean p* this near to its target has reached it
FAR = 700.0  # log-odds beyond which p is 0 or 1
JUMP = 1e-6  # if a mean p* moves more than this between neighbouring βs, there is a fold between them


class PlanRow(NamedTuple):
    """What training at one β would do, over the prompts. Shares are of all prompts; KL in nats per sequence.

    Of counts, each number but p_ref and the dead groups at the start is the mean over the posteriors of p_ref.

    beta: the β.
    p_ref, p_ref_low, p_ref_high: mean measured success probability, with its interval; the same in every row.
    p_star, p_star_low, p_star_high: mean success probability at which many small steps end, with its interval.
    p_exact: mean over the last 64 of 256 exactly solved iterations, which can jump past p_star, or cycle.
    iterations: after how many of them their mean stays within 5 % of the gain of p_exact; None: not in 256.
    saturates: share with p* > 0.99.
    dead: share that stays where it is for want of a success: more than 99 % of groups without one, or p_ref exactly 0.
    oscillates: share whose exactly solved iterations end in a cycle or in chaos.
    folds: share whose interval of p_ref straddles a fold, so that p* may lie on either branch.
    kl: KL(π*‖π_ref), mean. kl_budget: mean of the most it can be, ln(1/p_ref); prompts at p_ref = 0 spend nothing.
    dead_groups_start, dead_groups: fraction of groups whose rewards are all equal, at p_ref (from its counts, where there are
      any: `dead_fraction_of_counts`) and at p*; None without groups.
    mirror_steps: steps of mirror GRPO at this β to 95 % of a prompt's gain, mean over the prompts that can move.
    mirror_step_kl: KL of its first step, mean over the same; both None where none can move.
    training: iterations of training after which the mean stays within 5 % of its gain of p_star, at the speed given; None
      without one, and where that takes more than 50 relaxation times.
    attainable: p† of a network of the R² given, mean over prompts with its interval; None without one.
    """

    beta: float
    p_ref: float
    p_ref_low: float
    p_ref_high: float
    p_star: float
    p_star_low: float
    p_star_high: float
    p_exact: float
    iterations: int | None
    saturates: float
    dead: float
    oscillates: float
    folds: float
    kl: float
    kl_budget: float
    dead_groups_start: float | None
    dead_groups: float | None
    mirror_steps: float | None
    mirror_step_kl: float | None
    training: int | None = None
    attainable: Mean | None = None


class TargetBeta(NamedTuple):
    """The β at which the mean p* is a target.

    beta: the smallest β whose mean p* does not exceed the target.
    p_star: mean p* there: the target, unless it is jumped over.
    jumps_to: mean p* just below that β, where a fold jumps over the target; else None.
    """

    beta: float
    p_star: float
    jumps_to: float | None


class BetaRange(NamedTuple):
    """The βs worth sweeping: below ``low`` prompts are saturated, above ``high`` the reference holds them.

    low, high: as for `beta_for_mean`, of 90 % and 10 % of the gain in mean p that any β can reach.
    """

    low: TargetBeta
    high: TargetBeta


class CurvePoint(NamedTuple):
    """Mean p* at one β with its interval, and p* of the prompts at quantiles of p_ref."""

    beta: float
    p_star: float
    p_star_low: float
    p_star_high: float
    quantiles: tuple[float, ...]


class _Block(NamedTuple):
    """Distinct prompts: logit [B], the log-odds of p_ref; times [B], how many prompts, 0 for padding."""

    logit: jax.Array
    times: jax.Array


class _Prompts(NamedTuple):
    """Measured prompts.

    blocks: their success probabilities, exact, or what stands for those that counts allow.
    posterior: of counts; None where the success probabilities are exact.
    p_ref: mean measured success probability, with its interval.
    successful: the share of prompts with any success.
    """

    blocks: list[_Block]
    posterior: Posterior | None
    p_ref: Mean
    successful: float


def plan(
    successes: Counts,
    trials: Counts | None,
    betas: Sequence[float],
    *,
    weights: Weights,
    group_size: int | None = None,
    kl: str = "reverse",
    confidence: float = 0.95,
    speed: float | None = None,
    r2: Mean | None = None,
) -> list[PlanRow]:
    """What training at each of several βs would do to prompts with measured success.

    Args:
      successes: [Q] counts of correct completions of the reference policy; with ``trials`` None, its success
        probabilities themselves, taken as exact.
      trials: [Q] or scalar, counts of completions; None: see ``successes``.
      betas: weights of the KL term, > 0.
      weights: the normaliser.
      group_size: G, for the fraction of dead groups; None: that of ``weights`` if it is a `Group`.
      kl: what the gradient of the KL term descends: "reverse" KL(π‖π_ref), "forward" KL(π_ref‖π) (k3 in the loss),
        or "none", where every prompt with a success runs to 1 whatever β is.
      confidence: of the intervals, in (0, 1).
      speed: κ per iteration of training, > 0, at the peak learning rate, if it is known: all log-odds then follow
        dL/dn = κ[Ω(p) − β(L − L_ref)], which is how Adam was seen to move them, and "training" is filled in.
      r2: share of the pull that the network lets through, with its interval, if it is known: "attainable" is filled in. For
        the reverse KL.

    Returns:
      One row per β, in their order.

    Raises:
      ValueError: names the argument that is out of range or of the wrong shape.

    Source: derived from arXiv 2503.06639, Thm 2, as `predict`, `orbit_end` and `mirror_steps` are.

    >>> row = plan([0, 20, 50], 100, [1.0], weights=Group(8))[0]
    >>> round(row.p_star, 3), round(row.dead, 3), row.iterations
    (0.52, 0.21, 1)
    """
    group_size = weights.size if group_size is None and isinstance(weights, Group) else group_size
    with jax.enable_x64(True):
        for beta in betas:
            check_arguments(beta, kl)
        if speed is not None and not 0 < float(speed) < math.inf:
            raise ValueError(f"speed={speed!r} must be positive and finite")
        if r2 is not None and not (kl == "reverse" and all(0 <= share <= 1 for share in r2)):
            raise ValueError(f"r2={tuple(r2)} must be in [0, 1], and needs kl='reverse'")
        prompts = _prompts(successes, trials, confidence)
        rows = [_row(prompts, float(beta), weights, group_size, kl, confidence, speed) for beta in betas]
        if r2 is not None:
            attainable = [_attainable(prompts, row.beta, weights, r2, confidence) for row in rows]
            rows = [row._replace(attainable=mean) for row, mean in zip(rows, attainable, strict=True)]
        if trials is None or group_size is None:
            return rows
        start = dead_fraction_of_counts(jnp.asarray(successes), jnp.asarray(trials), group_size).mean()
        return [row._replace(dead_groups_start=float(start)) for row in rows]


def beta_for_mean(
    target: float, successes: Counts, trials: Counts | None, *, weights: Weights, kl: str = "reverse"
) -> TargetBeta:
    """The β at which the mean of p* over the prompts is a target; p* falls with β, prompt by prompt.

    Args:
      target: mean success probability, above that of the reference and below the share of prompts with any success,
        which is what β → 0 reaches (of counts, what it reaches for sure).
      successes, trials: as for `plan`.
      weights: the normaliser.
      kl: "reverse" or "forward".

    Returns:
      The β, and what happens where a fold jumps over the target: no β then has it. Of counts the mean p* is an average
      over what p_ref may be and falls without jumps.

    Raises:
      ValueError: ``target`` is out of reach, and why, or a count is wrong.

    Source: derived; bisection in ln β to the last bit.

    >>> from grpo_jax.theory import MeanOnly
    >>> round(beta_for_mean(0.5, [0.2], None, weights=MeanOnly()).beta, 5)  # 1/ln 4
    0.72135
    """
    with jax.enable_x64(True):
        return _beta_for_mean(target, _prompts(successes, trials, 0.95), weights, kl)


def recommended_range(
    successes: Counts, trials: Counts | None, *, weights: Weights, kl: str = "reverse"
) -> BetaRange | None:
    """The βs between which the mean p* does most of its moving: from 90 % of the gain that β → 0 reaches to 10 %.

    Args:
      successes, trials: as for `plan`.
      weights: the normaliser.
      kl: as for `plan`.

    Returns:
      The range, or None where no β moves any prompt, or every β does the same (no KL).

    Raises:
      ValueError: a count is wrong.

    Source: a convention, ours.

    >>> from grpo_jax.theory import MeanOnly
    >>> sweep = recommended_range([0.2], None, weights=MeanOnly())
    >>> round(sweep.low.p_star, 4), round(sweep.high.p_star, 4)
    (0.92, 0.28)
    """
    with jax.enable_x64(True):
        prompts = _prompts(successes, trials, 0.95)
        start, most = _reach(prompts)
        if kl == "none" or not most > start:
            return None
        low, high = (_beta_for_mean(start + share * (most - start), prompts, weights, kl) for share in SWEEP)
        return BetaRange(low, high)


def curve(
    successes: Counts,
    trials: Counts | None,
    betas: Sequence[float],
    *,
    weights: Weights,
    quantiles: Sequence[float],
    kl: str = "reverse",
    confidence: float = 0.95,
) -> list[CurvePoint]:
    """Mean p* over β with its interval, and the p* of the prompts at quantiles of p_ref.

    Args:
      successes, trials, weights, kl, confidence: as for `plan`.
      betas: where to compute it.
      quantiles: of p_ref, in [0, 1]; p* rises with p_ref, so they are those of p* too.

    Returns:
      One point per β.

    Raises:
      ValueError: an argument is out of range.

    Source: as `plan`.

    >>> point = curve([0.2, 0.5], None, [1.0], weights=Group(8), quantiles=[0.0, 1.0])[0]
    >>> [round(p, 4) for p in point.quantiles]
    [0.6249, 0.9142]
    """
    with jax.enable_x64(True):
        prompts = _prompts(successes, trials, confidence)
        shown = jnp.asarray([_quantile(*_references(prompts.blocks), q) for q in quantiles])
        points = []
        for beta in betas:
            check_arguments(beta, kl)
            ends = jax.nn.sigmoid(end_point(shown, jnp.asarray(float(beta)), weights, kl)).tolist()
            points.append(
                CurvePoint(float(beta), *_mean_end(prompts, float(beta), weights, kl, confidence), tuple(ends))
            )
        return points


def _row(
    prompts: _Prompts,
    beta: float,
    weights: Weights,
    group_size: int | None,
    kl: str,
    confidence: float,
    speed: float | None,
) -> PlanRow:
    scale = jnp.asarray(beta)
    ends = [end_point(block.logit, scale, weights, kl) for block in prompts.blocks]
    pairs = [*zip(prompts.blocks, ends, strict=True)]
    sums = _totals([_sums(*pair, scale, weights, group_size, kl) for pair in pairs])
    count, movable = sums["prompts"], sums["movable"]
    numbers: dict[str, Any] = {"beta": beta, "oscillates": _oscillating(prompts.blocks, scale, weights, kl) / count}
    numbers.update(zip(("p_ref", "p_ref_low", "p_ref_high"), prompts.p_ref, strict=True))
    numbers["p_exact"], numbers["iterations"] = _settled([total / count for total in sums["path"]])
    numbers.update((name, total / count) for name, total in sums["per_prompt"].items())
    numbers.update((name, total / movable if movable else None) for name, total in sums["per_movable"].items())
    if prompts.posterior is None:
        numbers.update(p_star=(mean := _mean(pairs)), p_star_low=mean, p_star_high=mean, folds=0.0)
    else:
        found = ends_of(prompts.posterior, beta=beta, weights=weights, confidence=confidence, kl=kl)
        numbers.update(zip(("p_star", "p_star_low", "p_star_high"), found.p_star, strict=True))
        numbers.update(kl=found.kl, kl_budget=found.kl_budget, saturates=found.saturates)
        numbers["folds"] = float(found.fold @ prompts.posterior.times) / count
    if group_size is None:
        numbers.update(dead_groups_start=None, dead_groups=None)
    if speed is not None:
        paths = _totals([_training_path(block, scale, weights, kl) for block in prompts.blocks])
        numbers["training"] = _arrival(
            [total / count for total in paths], _mean(pairs), beta if kl != "none" else 1.0, speed
        )
    return PlanRow(**numbers)


def _totals(parts: list[Any]) -> Any:
    """The sums over blocks, of each number and of each point of a path."""
    return jax.tree.map(
        lambda *values: math.fsum(values), *(jax.tree.map(lambda x: x.tolist(), part) for part in parts)
    )


@partial(jax.jit, static_argnames=("group_size", "kl"))
def _sums(
    block: _Block, ends: jax.Array, beta: jax.Array, weights: Weights, group_size: int | None, kl: str
) -> dict[str, Any]:
    """Totals over the prompts of a block, or over those that can move, named as in `PlanRow`.

    "path" [ITERATIONS + 1] is that of exactly solved iterations, and "prompts" and "movable" count.
    """
    reference, count, star = block.logit, block.times, ends
    never, at_end = reference == -jnp.inf, jnp.isinf(reference)
    movable = jnp.where(at_end, 0.0, count)
    # Groups of equal rewards, at the start and at the end, and prompts that hardly ever see a success.
    dead, dead_groups = never, jnp.zeros((2, *reference.shape))
    if group_size is not None:
        dead = never | (jnp.exp(group_size * jax.nn.log_sigmoid(-reference)) > DEAD)
        dead_groups = dead_fraction(jnp.stack([reference, star]), group_size, logits=True)
    # What mirror GRPO arrives at; prompts at an end of [0, 1] stand at ½ and count for nothing.
    inside = jnp.where(at_end, 0.0, reference)
    p_ref, p_star = jax.nn.sigmoid(inside), jnp.where(at_end, 0.5, jax.nn.sigmoid(star))
    arrived = p_ref + GAIN * (p_star - p_ref)

    # Exactly solved iterations, as the sum of p over the prompts after each of them.
    def exact_step(logit: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        if kl == "none":
            logit = jnp.where(at_end, reference, jnp.inf)
        else:
            step = success_map if kl == "reverse" else forward_kl_success_map
            logit = step(logit, reference, beta=beta, weights=weights, logits=True)
        return logit, count @ jax.nn.sigmoid(logit)

    _, path = jax.lax.scan(exact_step, reference, None, length=ITERATIONS)
    return {
        "prompts": count.sum(),
        "movable": movable.sum(),
        "per_prompt": {
            "saturates": count @ (jax.nn.sigmoid(star) > SATURATED).astype(float),
            "dead": count @ dead.astype(float),
            "kl": count @ bernoulli_kl(star, reference, logits=True),
            "kl_budget": movable @ kl_budget(inside, logits=True),  # prompts at an end of [0, 1] spend nothing
            "dead_groups_start": count @ dead_groups[0],
            "dead_groups": count @ dead_groups[1],
        },
        "per_movable": {
            "mirror_steps": movable @ mirror_steps(p_ref, arrived, beta=beta, weights=weights),
            "mirror_step_kl": movable @ mirror_step_kl(p_ref, beta=beta, weights=weights),
        },
        "path": jnp.concatenate([(count @ jax.nn.sigmoid(reference))[None], path]),
    }


@partial(jax.jit, static_argnames="kl")
def _training_path(block: _Block, beta: jax.Array, weights: Weights, kl: str) -> jax.Array:
    """[1 + CLOCK] the sum of p over the prompts while small steps take their log-odds along, at 0 and at the times of CLOCK.

    In units of 1/(κβ), or of 1/κ without a KL: dL/dt = Ω/β − (L − L_ref); the forward KL pulls with (p − p_ref)/v.
    """
    at_end = jnp.isinf(block.logit)
    reference = jnp.where(at_end, 0.0, block.logit)

    def velocity(logit: jax.Array) -> jax.Array:
        if kl == "none":
            return weights.omega(logit)
        ahead = logit - reference
        if kl == "forward":
            ahead = (jax.nn.sigmoid(logit) - jax.nn.sigmoid(reference)) / variance(logit)
        return weights.omega(logit) / beta - ahead

    # Exponential Rosenbrock steps: exact where the velocity is linear in the log-odds, stable where it is steep.
    def step(logit: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        speed, slope = jax.jvp(velocity, (logit,), (jnp.ones_like(logit),))
        z = slope * time
        small = jnp.abs(z) < 1e-6
        growth = jnp.where(small, 1 + z / 2, jnp.expm1(z) / jnp.where(small, 1.0, z))
        logit = jnp.clip(logit + time * growth * speed, -FAR, FAR)
        return logit, block.times @ jax.nn.sigmoid(jnp.where(at_end, block.logit, logit))

    _, path = jax.lax.scan(step, reference, jnp.diff(jnp.asarray(CLOCK), prepend=0.0))
    return jnp.concatenate([(block.times @ jax.nn.sigmoid(block.logit))[None], path])


def _arrival(path: list[float], end: float, beta: float, speed: float) -> int | None:
    """Iterations of training until a mean stays within 5 % of its gain of its end."""
    away = [i for i, p in enumerate(path) if abs(p - end) > (1 - GAIN) * abs(end - path[0])]
    if not away:
        return 0
    if away[-1] == len(CLOCK):
        return None
    return math.ceil(CLOCK[away[-1]] / (beta * speed))


def _settled(path: list[float]) -> tuple[float, int | None]:
    """Where a path ends, the mean of its tail, and after how many steps it stays near that end."""
    end = fmean(path[-TAIL:])
    away = [n for n, p in enumerate(path) if abs(p - end) > (1 - GAIN) * abs(end - path[0])]
    after = away[-1] + 1 if away else 0
    return end, after if after <= len(path) - TAIL else None


def _oscillating(blocks: list[_Block], beta: jax.Array, weights: Weights, kl: str) -> float:
    """How many prompts exact iterations leave in a cycle or in chaos; only those that can at some β are iterated."""
    limit = {"reverse": flip_limit, "forward": forward_kl_flip_limit, "none": lambda _: None}[kl](weights)
    if limit is None:
        return 0.0
    logit, times = _references(blocks)
    can = (logit > -jnp.inf) & (logit < log_odds(min(1.01 * limit, 0.5)))
    suspects = _padded(logit[can], times[can]) if can.any() else []
    return math.fsum(float(_swings(block, beta, weights, kl)) for block in suspects)


@partial(jax.jit, static_argnames="kl")
def _swings(block: _Block, beta: jax.Array, weights: Weights, kl: str) -> jax.Array:
    """The number of prompts of a block whose exact iterations are still going to and fro after 2000."""
    end_of = orbit_end if kl == "reverse" else forward_kl_orbit_end
    end = end_of(block.logit, beta=beta, weights=weights, logits=True)
    swing = jax.nn.sigmoid(end.high) - jax.nn.sigmoid(end.low)
    # Period 0 without chaos is slow convergence.
    return block.times @ ((swing > SWING) & ((end.period > 1) | (end.lyapunov > 0))).astype(float)


def _beta_for_mean(target: float, prompts: _Prompts, weights: Weights, kl: str) -> TargetBeta:
    start, most = _reach(prompts)
    if kl == "none":
        raise ValueError("target: without a KL term every β leads to the same p*")
    if not 0 < target < 1:
        raise ValueError(f"target={target!r} must be inside (0, 1)")
    if not target > start:
        raise ValueError(f"target={target:g} is not above the mean p_ref of {start:.4g}: training only raises p")
    if not target < most:
        raise ValueError(f"target={target:g} is not below {most:.4g}, the share of prompts with any success")

    return beta_where(lambda beta: _mean_end(prompts, beta, weights, kl, 0.95).mean, target, far=FAR)


def beta_where(of_beta: Callable[[float], float], target: float, *, far: float = 14.0) -> TargetBeta:
    """The β at which a quantity that falls with β, such as a mean p* or KL, is a target.

    Args:
      of_beta: β -> the quantity.
      target: what it is to be.
      far: |ln β| beyond which there is no use looking: a millionth, and a million.

    Returns:
      As `beta_for_mean`, of this quantity.

    Raises:
      ValueError: no such β leads there; the message says what the nearest leads to.

    Source: false position in ln β, M. Dowell and P. Jarratt, BIT 11 (1971).

    >>> round(beta_where(lambda beta: 1 / beta, 0.25).beta, 6)
    4.0
    """

    def excess(x: float) -> float:
        return of_beta(math.exp(x)) - target

    # A bracket in ln β: the quantity is above the target at its lower end, and not at its upper end.
    low = high = 0.0
    while (above := excess(low)) <= 0:
        if (low := low - 2) < -far:
            raise ValueError(f"{target + above:.4g} at most, as β → 0")
    while (below := excess(high)) > 0:
        if (high := high + 2) > far:
            raise ValueError(f"{target + below:.4g} at least, as β → ∞")
    # False position; the weight of the end that stays put is halved each time (Illinois).
    up, down = above, below
    while min(above, -below) > CLOSE and high - low > 1e-15 * (1 + abs(high)):
        middle = low + (high - low) * min(max(up / (up - down), 0.01), 0.99)
        if (gap := excess(middle)) > 0:
            low, above, up, down = middle, gap, gap, down / 2
        else:
            high, below, down, up = middle, gap, gap, up / 2
    # Neighbouring βs with the target between their means: it is jumped over.
    if above - below > JUMP and min(above, -below) > CLOSE:
        return TargetBeta(math.exp(high), target + below, target + above)
    x, off = (low, above) if above < -below else (high, below)
    return TargetBeta(math.exp(x), target + off, None)


def end_point(reference: ArrayLike, beta: ArrayLike, weights: Weights, kl: str) -> jax.Array:
    """Where many small steps end, in log-odds, elementwise.

    Args:
      reference: [...] log-odds of the reference policy.
      beta: weight of the KL, a scalar.
      weights: the normaliser.
      kl: as for `plan`.

    Returns:
      [...] log-odds.

    >>> from grpo_jax.theory import MeanOnly
    >>> float(end_point(jnp.zeros(()), 1.0, MeanOnly(), "reverse"))
    1.0
    """
    if kl == "none":
        return jnp.where(jnp.isneginf(reference), reference, jnp.inf)
    solve = flow_point if kl == "reverse" else forward_kl_fixed_point
    return solve(reference, beta=beta, weights=weights, logits=True)


def _mean_end(prompts: _Prompts, beta: float, weights: Weights, kl: str, confidence: float) -> Mean:
    """The mean p* with its interval."""
    if prompts.posterior is not None:
        return ends_of(prompts.posterior, beta=beta, weights=weights, confidence=confidence, kl=kl).p_star
    mean = _mean([(block, end_point(block.logit, jnp.asarray(beta), weights, kl)) for block in prompts.blocks])
    return Mean(mean, mean, mean)


def _attainable(prompts: _Prompts, beta: float, weights: Weights, r2: Mean, confidence: float) -> Mean:
    """The mean p† with its interval."""
    if prompts.posterior is not None:
        found = attainable_of(prompts.posterior, beta=beta, weights=weights, r2=r2, confidence=confidence)
        return Mean(found.mean, found.low, found.high)
    options: dict[str, Any] = {"beta": beta, "weights": weights, "logits": True}
    by_share = [[(b, attainable_point(b.logit, r2=share, **options)) for b in prompts.blocks] for share in r2]
    return Mean(*map(_mean, by_share))


def _mean(pairs: list[tuple[_Block, jax.Array]]) -> float:
    """The mean success probability of prompts from log-odds [B] per block."""
    count, total = (math.fsum(x) for x in zip(*(_moments(*pair).tolist() for pair in pairs), strict=True))
    return total / count


@jax.jit
def _moments(block: _Block, logit: jax.Array) -> jax.Array:
    return jnp.stack([jnp.ones_like(logit), jax.nn.sigmoid(logit)]) @ block.times


def _reach(prompts: _Prompts) -> tuple[float, float]:
    """Mean p_ref, the measured one or that of the posteriors, whichever is larger, and the share of prompts with any success."""
    start = _mean([(block, block.logit) for block in prompts.blocks])
    return max(start, prompts.p_ref.mean), prompts.successful


def _references(blocks: list[_Block]) -> tuple[jax.Array, jax.Array]:
    """The log-odds [N] of p_ref, ascending, and how often each occurs [N]."""
    logit, times = jnp.concatenate([jnp.stack(block) for block in blocks], axis=1)
    order = jnp.argsort(logit)
    order = order[times[order] > 0]
    return logit[order], times[order]


def _quantile(values: jax.Array, times: jax.Array, q: float) -> jax.Array:
    """The smallest of ascending values with at least a share q of all at or below it."""
    if not 0 <= q <= 1:
        raise ValueError(f"quantiles={q!r} must be in [0, 1]")
    passed = jnp.cumsum(times)
    return values[jnp.searchsorted(passed, q * passed[-1])]


def _prompts(successes: Counts, trials: Counts | None, confidence: float) -> _Prompts:
    """What was measured, checked."""
    counts = jnp.asarray(successes)
    if counts.ndim != 1 or not counts.size:
        raise ValueError(f"successes must be one axis of at least one prompt, got shape {counts.shape}")
    if trials is None:
        times = Counter(counts.astype(float).tolist())
        if not all(0 <= p <= 1 for p in times):
            raise ValueError("successes must be probabilities in [0, 1] where trials is None")
        blocks = _padded(log_odds(jnp.asarray([*times])), jnp.asarray([*times.values()], float))
        mean = _mean([(block, block.logit) for block in blocks])
        never = times[0.0] / counts.size
        return _Prompts(blocks, None, Mean(mean, mean, mean), 1 - never)
    low, high = wilson_interval(counts, jnp.asarray(trials), confidence)
    k, n = (np.asarray(x, float) for x in (counts, jnp.broadcast_to(jnp.asarray(trials), counts.shape)))
    ends = mean_interval(jnp.asarray(k / n), low, high)
    posterior = posterior_of(k, n)
    blocks = _padded(*map(jnp.asarray, mixture(posterior, MIXTURE)))
    return _Prompts(blocks, posterior, Mean(float(np.mean(k / n)), *map(float, ends)), float(np.mean(k > 0)))


def _padded(logit: jax.Array, count: jax.Array) -> list[_Block]:
    """Blocks of one size, a power of two, so that few shapes are ever compiled."""
    size = min(LARGEST_BLOCK, max(16, 1 << (count.size - 1).bit_length()))
    spare = -count.size % size
    logit, count = (jnp.pad(x, (0, spare)) for x in (logit, count))
    return [_Block(logit[i : i + size], count[i : i + size]) for i in range(0, count.size, size)]


def check_arguments(beta: float, kl: str) -> None:
    """Raises a ValueError that names β or the KL, if it makes no sense."""
    if not 0 < float(beta) < math.inf:
        raise ValueError(f"beta={beta!r} must be positive and finite")
    if kl not in KLS:
        raise ValueError(f"kl={kl!r} is not one of {', '.join(map(repr, KLS))}")
