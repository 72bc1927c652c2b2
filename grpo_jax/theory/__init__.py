"""What GRPO with verifiable rewards will do: weights, the p-recurrence, its limits, and predictions from counts.

Probabilities in, probabilities out; with ``logits=True`` log-odds in, log-odds out, because p rounds to 1.
"""

from grpo_jax.theory.dynamics import (
    bernoulli_kl,
    dead_fraction,
    iterate,
    kl_budget,
    success_map,
    success_map_slope,
)
from grpo_jax.theory.limits import (
    FixedPoint,
    LimitPoint,
    beta_for_target,
    fixed_points,
    flow_point,
    forward_kl_fixed_point,
    limit_point,
)
from grpo_jax.theory.prediction import Prediction, mean_interval, predict, wilson_interval
from grpo_jax.theory.weights import Group, MeanOnly, Weights, Whitened, WhitenedStd, omega, omega_minus, omega_plus

__all__ = [
    "FixedPoint",
    "Group",
    "LimitPoint",
    "MeanOnly",
    "Prediction",
    "Weights",
    "Whitened",
    "WhitenedStd",
    "bernoulli_kl",
    "beta_for_target",
    "dead_fraction",
    "fixed_points",
    "flow_point",
    "forward_kl_fixed_point",
    "iterate",
    "kl_budget",
    "limit_point",
    "mean_interval",
    "omega",
    "omega_minus",
    "omega_plus",
    "predict",
    "success_map",
    "success_map_slope",
    "wilson_interval",
]
