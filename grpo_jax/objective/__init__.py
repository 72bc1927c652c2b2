"""What is optimised: group advantages, log-probabilities, KL terms and losses. Needs jax alone."""

from grpo_jax.objective.advantages import check_normaliser, group_advantages
from grpo_jax.objective.contrastive import contrastive_loss
from grpo_jax.objective.logps import completion_logps
from grpo_jax.objective.loss import LossTerms, grpo_loss, grpo_loss_terms
from grpo_jax.objective.named import (
    BNPO,
    CISPO,
    DAPO,
    DR_GRPO,
    GPG,
    GRPO,
    GRPO_TRL,
    GSPO,
    MAXRL,
    MIRROR_DR_GRPO,
    MIRROR_GRPO,
    NAMED,
    RLOO,
    SAPO,
    TWO_KL_GRPO,
    named_objective,
)
from grpo_jax.objective.objective import Objective, beta_effective

__all__ = [
    "BNPO",
    "CISPO",
    "DAPO",
    "DR_GRPO",
    "GPG",
    "GRPO",
    "GRPO_TRL",
    "GSPO",
    "MAXRL",
    "MIRROR_DR_GRPO",
    "MIRROR_GRPO",
    "NAMED",
    "RLOO",
    "SAPO",
    "TWO_KL_GRPO",
    "LossTerms",
    "Objective",
    "beta_effective",
    "check_normaliser",
    "completion_logps",
    "contrastive_loss",
    "group_advantages",
    "grpo_loss",
    "grpo_loss_terms",
    "named_objective",
]
