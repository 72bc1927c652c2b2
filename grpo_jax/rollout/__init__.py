"""Group sampling and scoring over a `Policy`; needs jax alone and never sees a model file."""

from grpo_jax.rollout.packing import Layout
from grpo_jax.rollout.policy import Policy
from grpo_jax.rollout.sampling import PromptBatch, Rollout, sample_groups
from grpo_jax.rollout.scoring import score_groups, score_packed

__all__ = ["Layout", "Policy", "PromptBatch", "Rollout", "sample_groups", "score_groups", "score_packed"]
