"""The prediction beside the measurement: what the objective should do to the measured p_ref, and whether it did."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import theory
from grpo_jax.objective import Objective


def group_weights(objective: Objective, group_size: int) -> theory.Group | None:
    """The theory's weights for what is trained, never configured twice; None where it has none for the objective."""
    return theory.Group(group_size, **objective.normaliser()) if objective.is_predicted else None


def make_forecast(
    successes: np.ndarray, trials: int, *, objective: Objective, group_size: int, beta: float, confidence: float
) -> theory.Prediction | None:
    """The prediction from ``successes`` [Q] of ``trials`` samples of each prompt under the reference.

    None where nothing holds to the reference, or where the theory does not know the objective.
    """
    weights = group_weights(objective, group_size)
    if objective.kl_direction == "none" or weights is None:
        return None
    with jax.enable_x64(True):
        found = theory.predict(
            successes,
            np.full(successes.shape, trials),
            beta=beta,
            weights=weights,
            confidence=confidence,
            kl=objective.kl_direction,
        )
        return jax.tree.map(np.asarray, found)


def mean_with_interval(successes: np.ndarray, trials: int, confidence: float) -> tuple[float, float, float]:
    """(mean, low, high) of the success probability over prompts, each measured by ``successes`` of ``trials``."""
    with jax.enable_x64(True):
        estimates = jnp.asarray(successes) / trials
        low, high = theory.mean_interval(estimates, *theory.wilson_interval(successes, trials, confidence))
        return float(estimates.mean()), float(low), float(high)


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
    """[num_iterations + 1] mean over prompts of p_n = h(p_{n−1}), were each iteration's problem solved exactly.

    With both anchors h damps: β + β_mirror holds in all, and the share β/(β + β_mirror) of it to the reference. An iteration
    moves the share ``visited`` of the prompts, in turn. None where there is no reverse KL, whose recursion this is, or where
    the theory does not know the objective.
    """
    weights = group_weights(objective, group_size)
    if objective.kl in ("none", "token_forward") or weights is None:
        return None
    held, followed = beta * objective.holds_to_reference, beta_mirror * objective.holds_to_previous
    total = held + followed
    with jax.enable_x64(True):
        visits = np.arange(num_iterations + 1) * visited
        orbit = theory.iterate(p_ref, math.ceil(visits[-1]), beta=total, weights=weights, alpha=held / total)
        return np.interp(visits, np.arange(len(orbit)), np.asarray(orbit.mean(-1)))


def probe_row(iteration: int, counts: dict[str, Any], confidence: float) -> dict[str, Any]:
    """The metrics row of a measurement: success probability with its interval, length, KL if known."""
    success = mean_with_interval(np.asarray(counts["successes"]), counts["trials"], confidence)
    row = {"iteration": iteration, "phase": "probe"}
    row |= dict(zip(("success/mean", "success/low", "success/high"), success, strict=True))
    row |= {"rollout/length": counts["length"], "rollout/truncated": counts["truncated"]}
    return row if counts["kl"] is None else row | {"kl/sequence": counts["kl"]}
