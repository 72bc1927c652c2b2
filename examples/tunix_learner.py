"""GRPO by Tunix's learner with our loss: `pip install . google-tunix==0.1.7` in an environment of its own (1.5 GB), then
`python examples/tunix_learner.py`.

Tunix's Llama, sampler, reference and trainer do their work; its registries of policy losses and of advantage estimators take
ours. An answer to a digit is right when its digits never fall below the one before them, and it stops in time. Each prompt's
success is measured before training, the theory says from that alone where β will take it, and Tunix goes there. Half a minute
on a CPU. (In the checkout, without installing: `python -m examples.tunix_learner`.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import common, function_registry, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

import grpo_jax as gj
from grpo_jax.environment import prepare_environment

prepare_environment()  # keeps XLA from wrong sums on a CPU (see docs/running.md), and compiled programs for the next time

BEGIN, STOP = 0, 5  # 1 … 4 are digits; without a token to begin with, attention could not count equal digits
LENGTH, GROUPS, GROUP_SIZE, BETA = 4, 8, 8, 1.0
NORMALISER = gj.objective.GRPO.normaliser()
traces: list[tuple[int, ...]] = []  # of our loss, by the jit of Tunix's train step


class Digits:
    """Text is the digits of its tokens; STOP also pads."""

    def encode(self, text: str) -> list[int]:
        return [BEGIN, *map(int, text)]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(str, tokens))

    def bos_id(self) -> None:
        return None  # `encode` has put it there

    def eos_id(self) -> int:
        return STOP

    pad_id = eos_id


@function_registry.register_advantage_estimator("grpo_jax")
def advantages(rewards: np.ndarray, num_generations: int) -> np.ndarray:
    return np.asarray(gj.group_advantages(jnp.asarray(rewards).reshape(-1, num_generations), **NORMALISER)).reshape(-1)


@function_registry.register_policy_loss_fn("grpo_jax")
def policy_loss(
    model: nnx.Module, example: Any, algo_config: GRPOConfig, pad_id: int, eos_id: int
) -> tuple[jax.Array, Any]:
    """Log-probabilities by Tunix; advantages, KL and loss are ours."""
    tokens, prompts = example.completion_ids, example.prompt_ids
    logps = common.compute_per_token_logps(
        *nnx.split(model), prompts, tokens, pad_id, eos_id, stop_gradient=False, temperature=algo_config.temperature
    )
    # Tunix's sampler cuts the stop token off, but stopping is an action: the first padding token is it, as pad_id == eos_id.
    mask = jnp.arange(LENGTH)[None] <= example.completion_mask.sum(axis=1, keepdims=True)
    old, ref = example.old_per_token_logps, example.ref_per_token_logps
    loss, metrics = gj.grpo_loss(
        logps, old, ref, example.advantages, mask, beta=algo_config.beta, group_size=GROUP_SIZE
    )
    traces.append(tokens.shape)
    return loss, {"kl": metrics["kl/sequence"], "pg_clipfrac": metrics["policy/clip_fraction"]}


def verify(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for at least one digit, none below the one before it, and a stop (which is not in the text) within LENGTH tokens."""
    rises = [list(p + c) == sorted(p + c) for p, c in zip(prompts, completions, strict=True)]
    return [float(rise and 0 < len(c) < LENGTH) for rise, c in zip(rises, completions, strict=True)]


def main(steps: int = 300, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    config = llama.ModelConfig(1, 6, 32, 64, num_heads=4, head_dim=8, num_kv_heads=4, rope_theta=10_000, norm_eps=1e-6)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    rollout = RolloutConfig(max_tokens_to_generate=LENGTH, max_prompt_length=2, kv_cache_size=8, temperature=1.0)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    training = rl_cluster.RLTrainingConfig(actor_optimizer=optax.adam(1e-2), max_steps=steps, eval_every_n_steps=10**9)
    cluster = rl_cluster.RLCluster(
        actor=llama.Llama3(config, rngs=nnx.Rngs(seed)),
        reference=llama.Llama3(config, rngs=nnx.Rngs(seed)),
        tokenizer=Digits(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training, rollout_config=rollout
        ),
    )
    algorithm = GRPOConfig(
        policy_loss_fn="grpo_jax", advantage_estimator="grpo_jax", num_generations=GROUP_SIZE, beta=BETA
    )
    learner = GRPOLearner(cluster, algorithm, reward_fns=verify)

    def success():
        prompts = [prompt for prompt in "123" for _ in range(4096)]
        return jnp.array(verify(prompts, cluster.generate(prompts).text)).reshape(3, -1).mean(axis=1)

    def batches():
        for step in range(steps):
            rollout.seed = step  # Tunix's sampler starts from the same key at every call
            yield {"prompts": np.array(list("123") * GROUPS)}

    rollout.seed = steps
    before = success()
    predicted = gj.theory.flow_point(before, beta=BETA, weights=gj.theory.Group(GROUP_SIZE, **NORMALISER))
    learner.train(batches())
    after = success()
    for name, p in (("before", before), ("predicted p*", predicted), ("after", after)):
        print(f"{name:12}  {p.mean():.3f}   per prompt", *(f"{x:.3f}" for x in p))
    print("Tunix's train step traced our loss for [B, T] =", *traces)
    return before, predicted, after


if __name__ == "__main__":
    main()
