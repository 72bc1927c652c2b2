"""Log-probabilities of given completions under a policy: the trainer's view of what the sampler drew."""

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.objective import completion_logps
from grpo_jax.rollout.policy import Policy
from grpo_jax.rollout.sampling import PromptBatch, prefill


def score_groups(
    policy: Policy,
    params: Any,
    prompts: PromptBatch,
    completions: jax.Array,
    mask: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log π(o_t | q, o_<t) of completions in groups, differentiable in ``params``.

    As in sampling, a prompt is run once and its group attends to its keys and values. This is the one place that shifts by
    one: the prompt's last state predicts token 0, the state of token t − 1 predicts token t.

    Args:
      policy, params: the model.
      prompts: [P, S].
      completions: [P, G, T] int32.
      mask: [P, G, T] bool, True on the completion's tokens.
      temperature: the sampler's, so that the scored distribution is the sampled one.
      chunk_size: positions whose logits exist at a time; None chooses, see `completion_logps`.

    Returns:
      (logps [B, T], entropy [B, T]) float32, B = P·G; meaningless where the mask is False.
    """
    num_prompts, group_size, length = completions.shape
    rows = num_prompts * group_size
    first, prefix = prefill(policy, params, prompts)
    tokens, mask = completions.reshape(rows, length), mask.reshape(rows, length)
    lengths = jnp.repeat(prompts.mask.sum(-1).astype(jnp.int32), group_size)
    positions = lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    hidden, _ = policy.forward(params, tokens, positions, mask, prefix=prefix)
    predicting = jnp.concatenate([jnp.repeat(first, group_size, axis=0)[:, None], hidden[:, :-1]], axis=1)
    unembed = lambda h: policy.unembed(params, h)  # noqa: E731
    logps, entropy = completion_logps(predicting, unembed, tokens, temperature=temperature, chunk_size=chunk_size)
    return logps, entropy
