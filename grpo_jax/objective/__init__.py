"""What is optimised: group advantages, log-probabilities, KL terms and losses. Needs jax alone."""

from grpo_jax.objective.advantages import check_normaliser, group_advantages
from grpo_jax.objective.logps import completion_logps
from grpo_jax.objective.loss import LossTerms, grpo_loss, grpo_loss_terms
from grpo_jax.objective.objective import (
    DAPO,
    DR_GRPO,
    FIXED_POINTS,
    GRPO,
    GRPO_TRL,
    NAMED,
    Objective,
    beta_effective,
    named_objective,
)

__all__ = [
    "DAPO",
    "DR_GRPO",
    "FIXED_POINTS",
    "GRPO",
    "GRPO_TRL",
    "NAMED",
    "LossTerms",
    "Objective",
    "beta_effective",
    "check_normaliser",
    "completion_logps",
    "group_advantages",
    "grpo_loss",
    "grpo_loss_terms",
    "named_objective",
]
