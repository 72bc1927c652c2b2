"""What GRPO with verifiable rewards will do: weights, optimal policies, the p-recurrence, its limits, and predictions.

Probabilities in, probabilities out; with ``logits=True`` log-odds in, log-odds out, because p rounds to 1.
"""

import inspect

from grpo_jax.theory.arguments import in_range
from grpo_jax.theory.attainable import attainable_point, attainable_points
from grpo_jax.theory.clipping import clipped_success_map, contrastive_term
from grpo_jax.theory.convergence import (
    accumulated_error,
    iterate_bounds,
    limit_interval,
    local_beta_bound,
    steepest_slope,
    uniform_beta_bound,
)
from grpo_jax.theory.dynamics import bernoulli_kl, iterate, kl_budget, success_map, success_map_slope
from grpo_jax.theory.explained import Explained, explained_share
from grpo_jax.theory.explanation import explain
from grpo_jax.theory.forward_kl import (
    forward_kl_flip_limit,
    forward_kl_multiplier,
    forward_kl_orbit_end,
    forward_kl_success_map,
)
from grpo_jax.theory.groups import dead_fraction, dead_fraction_of_counts, groups_per_live_group, mean_dead_fraction
from grpo_jax.theory.ledger import KLSplit, objective_gain, potential, rest_excess, split_kl
from grpo_jax.theory.limits import (
    FixedPoint,
    LimitPoint,
    beta_for_target,
    fixed_points,
    flow_point,
    forward_kl_fixed_point,
    limit_point,
)
from grpo_jax.theory.mirror import mirror_flow, mirror_step_kl, mirror_steps
from grpo_jax.theory.off_policy import OffPolicyGain, UpdateAge, off_policy_gain, total_variation, update_staleness
from grpo_jax.theory.orbits import OrbitEnd, orbit_end
from grpo_jax.theory.planning import PlanRow, beta_for_mean, beta_where, plan, recommended_range
from grpo_jax.theory.policies import (
    log_partition,
    log_policy_ratio,
    optimal_log_policy,
    optimality_gap,
    policy_entropy,
    renyi_correction,
)
from grpo_jax.theory.posteriors import Mean
from grpo_jax.theory.prediction import (
    Attainable,
    Prediction,
    mean_interval,
    predict,
    predict_attainable,
    wilson_interval,
)
from grpo_jax.theory.stages import stages
from grpo_jax.theory.staleness import critical_delay, critical_refresh, stale_iterate
from grpo_jax.theory.thresholds import Cusp, bistable_window, cusp, flip_limit, flip_window, fold_beta
from grpo_jax.theory.weights import (
    Group,
    MeanOnly,
    NoisyVerifier,
    Weights,
    Whitened,
    WhitenedStd,
    omega,
    omega_minus,
    omega_plus,
)

__all__ = [
    "Attainable",
    "Cusp",
    "Explained",
    "FixedPoint",
    "Group",
    "KLSplit",
    "LimitPoint",
    "Mean",
    "MeanOnly",
    "NoisyVerifier",
    "OffPolicyGain",
    "OrbitEnd",
    "PlanRow",
    "Prediction",
    "UpdateAge",
    "Weights",
    "Whitened",
    "WhitenedStd",
    "accumulated_error",
    "attainable_point",
    "attainable_points",
    "bernoulli_kl",
    "beta_for_mean",
    "beta_for_target",
    "beta_where",
    "bistable_window",
    "clipped_success_map",
    "contrastive_term",
    "critical_delay",
    "critical_refresh",
    "cusp",
    "dead_fraction",
    "dead_fraction_of_counts",
    "explain",
    "explained_share",
    "fixed_points",
    "flip_limit",
    "flip_window",
    "flow_point",
    "fold_beta",
    "forward_kl_fixed_point",
    "forward_kl_flip_limit",
    "forward_kl_multiplier",
    "forward_kl_orbit_end",
    "forward_kl_success_map",
    "groups_per_live_group",
    "iterate",
    "iterate_bounds",
    "kl_budget",
    "limit_interval",
    "limit_point",
    "local_beta_bound",
    "log_partition",
    "log_policy_ratio",
    "mean_dead_fraction",
    "mean_interval",
    "mirror_flow",
    "mirror_step_kl",
    "mirror_steps",
    "objective_gain",
    "off_policy_gain",
    "omega",
    "omega_minus",
    "omega_plus",
    "optimal_log_policy",
    "optimality_gap",
    "orbit_end",
    "plan",
    "policy_entropy",
    "potential",
    "predict",
    "predict_attainable",
    "recommended_range",
    "renyi_correction",
    "rest_excess",
    "split_kl",
    "stages",
    "stale_iterate",
    "steepest_slope",
    "success_map",
    "success_map_slope",
    "total_variation",
    "uniform_beta_bound",
    "update_staleness",
    "wilson_interval",
]

# What is not in range is refused at the door; inside, where jax traces, nothing can be.
for _name in __all__:
    if inspect.isroutine(globals()[_name]) or hasattr(globals()[_name], "lower"):
        globals()[_name] = in_range(globals()[_name])
