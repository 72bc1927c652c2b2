"""GRPO on a language model that is a dictionary of arrays: `pip install . optax`, then `python examples/plain.py`.

The model is one random causal transformer block. A prompt is a digit; an answer is right when it has a digit, no digit is below
the one before it, and it stops in time. Each prompt's success is measured before training, the theory says from that alone where
β will take it, and training goes there. Ten seconds on a CPU. (In the checkout, without installing: `python -m examples.plain`.)

The full form of `iteration` is grpo_jax/train/iteration.py, whose steps have the same numbers. Left out here: a temperature,
several updates per rollout, the rule that skips steps that are not finite, a schedule of the learning rate, packing, and a mesh.
Dimension key: see grpo_jax.
"""

import jax
import jax.numpy as jnp
import optax

import grpo_jax as gj
from grpo_jax.environment import prepare_environment

prepare_environment()  # avoids a fault of XLA on CPUs (see docs/running.md), and keeps compiled programs for the next time

STOP, PROMPTS = 4, jnp.arange(3)  # tokens 0 … 3 are digits; a prompt is one of the first three
LENGTH, WIDTH, GROUPS, GROUP_SIZE, BETA = 4, 32, 8, 8, 1.0
NORMALISER = gj.objective.GRPO.normaliser()
Params = dict[str, jax.Array]


def init_params(key: jax.Array) -> Params:
    shapes = {"embed": (5, WIDTH), "position": (LENGTH, WIDTH), "qkv": (WIDTH, 3 * WIDTH), "unembed": (WIDTH, 5)}
    shapes |= {"up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {name: 0.2 * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}


def forward(params: Params, tokens: jax.Array) -> jax.Array:
    """[B, L] tokens to [B, L, D] states: causal attention, then an MLP."""
    x = params["embed"][tokens] + params["position"][None, : tokens.shape[1]]
    q, k, v = jnp.split((x @ params["qkv"])[:, :, None], 3, axis=-1)  # [B, L, 1, D] each
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True)[:, :, 0]
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def sample(params: Params, prompts: jax.Array, key: jax.Array) -> jax.Array:
    """[B] prompts to [B, 1 + T] tokens; after STOP there is only STOP."""
    tokens = prompts[:, None]
    for step_key in jax.random.split(key, LENGTH):
        token = jax.random.categorical(step_key, forward(params, tokens)[:, -1] @ params["unembed"])  # [B]
        tokens = jnp.concatenate([tokens, jnp.where(tokens[:, -1] == STOP, STOP, token)[:, None]], axis=1)
    return tokens


def verify(tokens: jax.Array) -> jax.Array:
    """[B, 1 + T] tokens to [B] rewards: at least one digit, none below the one before it, and a STOP (the largest token)."""
    rises = (tokens[:, 1:] >= tokens[:, :-1]).all(axis=1)
    return (rises & (tokens[:, 1] != STOP) & (tokens[:, -1] == STOP)).astype(jnp.float32)


def logps_of(params: Params, tokens: jax.Array) -> jax.Array:
    """[B, T] log-probabilities of the answers' tokens; state t predicts token t + 1."""
    return gj.completion_logps(forward(params, tokens[:, :-1]), params["unembed"], tokens[:, 1:])[0]


optimizer = optax.adam(5e-3)


@jax.jit
def iteration(params, opt_state, ref_params, key):
    # 1 Prompts: each of the three, for several groups.
    prompts = jnp.repeat(PROMPTS, GROUPS * GROUP_SIZE)  # [B]
    # 2 Sample completions from the policy as it is now, π_old.
    tokens = sample(params, prompts, key)  # [B, 1 + T]
    mask = tokens[:, :-1] != STOP  # [B, T]; STOP itself counts, and nothing after it
    # 3 Verify them.
    rewards = verify(tokens).reshape(-1, GROUP_SIZE)  # [P, G]
    # 4 Advantages: each reward against the rewards of its group.
    advantages = gj.group_advantages(rewards, **NORMALISER).reshape(-1)  # [B]
    # 5 Log-probabilities under π_ref. Those under π_old are the ones the loss computes: with one update per rollout the ratio
    # is 1, and the clip decides nothing.
    ref_logps = logps_of(ref_params, tokens)  # [B, T]

    # 6 The loss and its gradient.
    def loss(params):
        logps = logps_of(params, tokens)  # [B, T]
        return gj.grpo_loss(logps, None, ref_logps, advantages, mask, beta=BETA, group_size=GROUP_SIZE)

    gradients, metrics = jax.grad(loss, has_aux=True)(params)
    # 7 Update.
    updates, opt_state = optimizer.update(gradients, opt_state)
    params = optax.apply_updates(params, updates)
    # 8 Metrics are those of the loss, such as the KL.
    return params, opt_state, metrics


@jax.jit
def success(params: Params, key: jax.Array) -> jax.Array:
    """[Q] success probability of each prompt, from 4,096 samples."""
    return verify(sample(params, jnp.repeat(PROMPTS, 4096), key)).reshape(PROMPTS.size, -1).mean(axis=1)


def main(steps: int = 400, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    key = jax.random.key(seed)
    params = ref_params = init_params(jax.random.fold_in(key, 0))
    opt_state = optimizer.init(params)
    before = success(params, jax.random.fold_in(key, 1))
    predicted = gj.theory.flow_point(before, beta=BETA, weights=gj.theory.Group(GROUP_SIZE, **NORMALISER))
    for step in range(steps):
        params, opt_state, _ = iteration(params, opt_state, ref_params, jax.random.fold_in(key, 2 + step))
    after = success(params, jax.random.fold_in(key, 2 + steps))
    for name, p in (("before", before), ("predicted p*", predicted), ("after", after)):
        print(f"{name:12}  {p.mean():.3f}   per prompt", *(f"{x:.3f}" for x in p))
    return before, predicted, after


if __name__ == "__main__":
    main()
