"""The loss of the warm start: supervised learning on demonstrations."""

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.objective import LossTerms
from grpo_jax.rollout import Policy, PromptBatch, score_groups


def demonstration_terms(
    policy: Policy, params: Any, prompts: PromptBatch, answers: jax.Array, mask: jax.Array, *, chunk_size: int | None
) -> LossTerms:
    """−log π of the demonstrations' tokens, summed over tokens; the weight is their number.

    Args:
      policy, params: the model.
      prompts: [P, S].
      answers, mask: [P, T], a demonstration for each prompt.
      chunk_size: positions whose logits exist at a time; None chooses.
    """
    logps, _ = score_groups(policy, params, prompts, answers[:, None], mask[:, None], chunk_size=chunk_size)  # [P, T]
    return LossTerms(-jnp.where(mask, logps, 0.0).sum(), mask.sum().astype(jnp.float32), {})
