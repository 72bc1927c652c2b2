"""GRPO on a Flax NNX model: `pip install . flax`, then `python examples/flax_nnx.py`.

The model is split once into graph and parameters, and training is jax.jit over the parameters. An answer to a digit is right when
its digits never fall below the one before them, and it stops in time. Each prompt's success is measured before training, the
theory says from that alone where β will take it, and training goes there. Fifteen seconds on a CPU. (In the checkout, without
installing: `python -m examples.flax_nnx`.)
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import grpo_jax as gj
from grpo_jax.environment import prepare_environment

prepare_environment()  # keeps XLA from wrong sums on a CPU (see docs/running.md), and compiled programs for the next time

STOP, PROMPTS = 4, jnp.arange(3)  # tokens 0 … 3 are digits; a prompt is one of the first three
LENGTH, WIDTH, GROUPS, GROUP_SIZE, BETA = 4, 32, 8, 8, 1.0
NORMALISER = gj.objective.GRPO.normaliser()


class Decoder(nnx.Module):
    """One causal transformer block: [B, L] tokens to [B, L, D] states."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, WIDTH, rngs=rngs)
        self.position = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.unembed = nnx.Param(0.1 * rngs.params.normal((WIDTH, 5)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        x = x + self.attention(x, mask=nnx.make_causal_mask(tokens))
        return x + self.down(nnx.gelu(self.up(x)))


def sample(model: Decoder, prompts: jax.Array, key: jax.Array) -> jax.Array:
    """[B] prompts to [B, 1 + T] tokens; after STOP there is only STOP."""
    tokens = prompts[:, None]
    for step_key in jax.random.split(key, LENGTH):
        drawn = jax.random.categorical(step_key, model(tokens)[:, -1] @ model.unembed[...])
        tokens = jnp.concatenate([tokens, jnp.where(tokens[:, -1] == STOP, STOP, drawn)[:, None]], axis=1)
    return tokens


def verify(tokens: jax.Array) -> jax.Array:
    """[B, 1 + T] tokens to [B] rewards: at least one digit, none below the one before it, and a STOP (the largest token)."""
    rises = (tokens[:, 1:] >= tokens[:, :-1]).all(axis=1)
    return (rises & (tokens[:, 1] != STOP) & (tokens[:, -1] == STOP)).astype(jnp.float32)


def logps_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    """[B, T] log-probabilities of the answers' tokens; state t predicts token t + 1."""
    return gj.completion_logps(model(tokens[:, :-1]), model.unembed[...], tokens[:, 1:])[0]


def main(steps: int = 400, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    key = jax.random.key(seed)
    graph, params = nnx.split(Decoder(nnx.Rngs(seed)))
    reference, optimiser = params, optax.adam(5e-3)
    opt_state = optimiser.init(params)

    @jax.jit
    def train_step(params, opt_state, key):
        tokens = sample(nnx.merge(graph, params), jnp.repeat(PROMPTS, GROUPS * GROUP_SIZE), key)
        advantages = gj.group_advantages(verify(tokens).reshape(-1, GROUP_SIZE), **NORMALISER).reshape(-1)
        ref_logps = logps_of(nnx.merge(graph, reference), tokens)
        mask = tokens[:, :-1] != STOP  # a token counts until STOP, and STOP itself does

        def loss(params):
            logps = logps_of(nnx.merge(graph, params), tokens)
            return gj.grpo_loss(logps, None, ref_logps, advantages, mask, beta=BETA, group_size=GROUP_SIZE)

        gradients, metrics = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimiser.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, metrics

    @jax.jit
    def success(params, key):  # [P] of each prompt, from 4,096 samples
        tokens = sample(nnx.merge(graph, params), jnp.repeat(PROMPTS, 4096), key)
        return verify(tokens).reshape(PROMPTS.size, -1).mean(axis=1)

    before = success(params, jax.random.fold_in(key, 0))
    predicted = gj.theory.flow_point(before, beta=BETA, weights=gj.theory.Group(GROUP_SIZE, **NORMALISER))
    for step in range(steps):
        params, opt_state, _ = train_step(params, opt_state, jax.random.fold_in(key, 1 + step))
    after = success(params, jax.random.fold_in(key, 1 + steps))
    for name, p in (("before", before), ("predicted p*", predicted), ("after", after)):
        print(f"{name:12}  {p.mean():.3f}   per prompt", *(f"{x:.3f}" for x in p))
    return before, predicted, after


if __name__ == "__main__":
    main()
