"""What the theory predicts from the measured p_ref: p*, and the path to it; and the metrics row of a measurement."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import theory
from grpo_jax.objective import Objective
from grpo_jax.objective.objective import KL_TERMS


def group_weights(objective: Objective, group_size: int) -> theory.Group | None:
    """The theory's weights, from the objective that is trained; None where the theory does not know it."""
    return theory.Group(group_size, **objective.normaliser()) if objective.is_predicted else None


def make_forecast(
    successes: np.ndarray, trials: int, *, objective: Objective, group_size: int, beta: float, confidence: float
) -> theory.Prediction | None:
    """The prediction from ``successes`` [Q] of ``trials`` samples of each prompt under the reference.

    None where the objective has no KL to the reference, or where the theory does not know it.
    """
    weights = group_weights(objective, group_size)
    if objective.kl_direction == "none" or weights is None:
        return None
    options: dict[str, Any] = {"beta": beta, "confidence": confidence, "kl": objective.kl_direction}
    with jax.enable_x64(True):
        prediction = theory.predict(successes, np.full(successes.shape, trials), weights=weights, **options)
        return jax.tree.map(np.asarray, prediction)


def make_attainable(
    successes: np.ndarray,
    trials: int,
    measured: dict[str, Any],
    *,
    objective: Objective,
    group_size: int,
    beta: float,
    confidence: float,
) -> theory.Attainable | None:
    """Where the network ends, from what `grpo_jax.runs.attainable` measured of it; None where R² was not determined."""
    weights = group_weights(objective, group_size)
    if "r2" not in measured or measured["needed"] or weights is None:
        return None
    setting: dict[str, Any] = {"beta": beta, "weights": weights, "confidence": confidence}
    shares = measured["shares"] if len(measured["shares"]) == len(successes) else None  # else of some prompts alone
    return theory.predict_attainable(successes, trials, r2=theory.Mean(**measured["r2"]), shares=shares, **setting)


def interval_dict(mean: Any, low: Any, high: Any) -> dict[str, float]:
    """A mean and the ends of its interval, as result.json holds them."""
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def mean_with_interval(successes: np.ndarray, trials: int, confidence: float) -> dict[str, float]:
    """`interval_dict` of the success probability over prompts, each measured by ``successes`` of ``trials``."""
    with jax.enable_x64(True):
        estimates = jnp.asarray(successes) / trials
        ends = theory.mean_interval(estimates, *theory.wilson_interval(successes, trials, confidence))
        return interval_dict(estimates.mean(), *ends)


def exact_iterates(
    p_ref: np.ndarray,
    num_iterations: int,
    *,
    objective: Objective,
    group_size: int,
    beta: float,
    beta_mirror: float = 0.0,
    visited: float = 1.0,
) -> np.ndarray | None:
    """[num_iterations + 1] mean over prompts of p_n = h(p_{n−1}): where each iteration ends if its problem is solved exactly.

    With a KL to the reference and one to the previous policy, h has the weight β + β_mirror, of which the share
    β/(β + β_mirror) belongs to the reference. Each iteration trains the share ``visited`` of the prompts, in turn. None
    without a reverse KL, since this is its recursion, or where the theory does not know the objective.
    """
    weights = group_weights(objective, group_size)
    if objective.kl == "none" or KL_TERMS[objective.kl].direction != "reverse" or weights is None:
        return None
    to_reference, to_previous = beta * objective.holds_to_reference, beta_mirror * objective.holds_to_previous
    total = to_reference + to_previous
    with jax.enable_x64(True):
        visits = np.arange(num_iterations + 1) * visited
        orbit = theory.iterate(p_ref, math.ceil(visits[-1]), beta=total, weights=weights, alpha=to_reference / total)
        return np.interp(visits, np.arange(len(orbit)), np.asarray(orbit.mean(-1)))


def probe_row(iteration: int, counts: dict[str, Any], confidence: float) -> dict[str, Any]:
    """The metrics row of a measurement: success probability with its interval, also of held-out prompts, length, KL if known."""
    success = mean_with_interval(np.asarray(counts["successes"]), counts["trials"], confidence)
    row = {"iteration": iteration, "phase": "probe"} | {f"success/{end}": x for end, x in success.items()}
    if apart := counts.get("held_out"):
        held_out = mean_with_interval(np.asarray(apart["successes"]), apart["trials"], confidence)
        row |= {f"held_out/{end}": x for end, x in held_out.items()}
    row |= {"rollout/length": counts["length"], "rollout/truncated": counts["truncated"]}
    return row if counts["kl"] is None else row | {"kl/sequence": counts["kl"]}
