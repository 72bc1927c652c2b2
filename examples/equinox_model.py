"""GRPO on an Equinox model: `pip install . equinox optax`, then `python examples/equinox_model.py`.

The model is a recurrent cell over one sequence; vmap makes the batch. An answer to a digit is right when its digits never fall
below the one before them, and it stops in time. Each prompt's success is measured before training, the theory says from that
alone where β will take it, and training goes there. Ten seconds on a CPU. (In the checkout, without installing:
`python -m examples.equinox_model`.)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import grpo_jax as gj
from grpo_jax.environment import prepare_environment

prepare_environment()  # keeps XLA from wrong sums on a CPU (see docs/running.md), and compiled programs for the next time

STOP, PROMPTS = 4, jnp.arange(3)  # tokens 0 … 3 are digits; a prompt is one of the first three
LENGTH, WIDTH, GROUPS, GROUP_SIZE, BETA = 4, 32, 8, 8, 1.0
NORMALISER = gj.objective.GRPO.normaliser()


class Recurrent(eqx.Module):
    """A gated recurrent unit: [L] tokens to [L, D] states."""

    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    unembed: jax.Array

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(5, WIDTH, key=keys[0])
        self.cell = eqx.nn.GRUCell(WIDTH, WIDTH, key=keys[1])
        self.unembed = 0.2 * jax.random.normal(keys[2], (WIDTH, 5))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        def read(state, token):
            state = self.cell(self.embed(token), state)
            return state, state

        return jax.lax.scan(read, jnp.zeros(WIDTH), tokens)[1]


def sample(model: Recurrent, prompts: jax.Array, key: jax.Array) -> jax.Array:
    """[B] prompts to [B, 1 + T] tokens; after STOP there is only STOP."""
    tokens = prompts[:, None]
    for step_key in jax.random.split(key, LENGTH):
        drawn = jax.random.categorical(step_key, jax.vmap(model)(tokens)[:, -1] @ model.unembed)
        tokens = jnp.concatenate([tokens, jnp.where(tokens[:, -1] == STOP, STOP, drawn)[:, None]], axis=1)
    return tokens


def verify(tokens: jax.Array) -> jax.Array:
    """[B, 1 + T] tokens to [B] rewards: at least one digit, none below the one before it, and a STOP (the largest token)."""
    rises = (tokens[:, 1:] >= tokens[:, :-1]).all(axis=1)
    return (rises & (tokens[:, 1] != STOP) & (tokens[:, -1] == STOP)).astype(jnp.float32)


def logps_of(model: Recurrent, tokens: jax.Array) -> jax.Array:
    """[B, T] log-probabilities of the answers' tokens; state t predicts token t + 1."""
    return gj.completion_logps(jax.vmap(model)(tokens[:, :-1]), model.unembed, tokens[:, 1:])[0]


optimiser = optax.adam(5e-3)


@eqx.filter_jit
def train_step(model, opt_state, reference, key):
    tokens = sample(model, jnp.repeat(PROMPTS, GROUPS * GROUP_SIZE), key)
    advantages = gj.group_advantages(verify(tokens).reshape(-1, GROUP_SIZE), **NORMALISER).reshape(-1)
    ref_logps = logps_of(reference, tokens)
    mask = tokens[:, :-1] != STOP  # a token counts until STOP, and STOP itself does

    def loss(model):
        logps = logps_of(model, tokens)
        return gj.grpo_loss(logps, None, ref_logps, advantages, mask, beta=BETA, group_size=GROUP_SIZE)

    gradients, metrics = eqx.filter_grad(loss, has_aux=True)(model)
    updates, opt_state = optimiser.update(gradients, opt_state)
    return eqx.apply_updates(model, updates), opt_state, metrics


@eqx.filter_jit
def success(model: Recurrent, key: jax.Array) -> jax.Array:
    """[P] success probability of each prompt, from 4,096 samples."""
    return verify(sample(model, jnp.repeat(PROMPTS, 4096), key)).reshape(PROMPTS.size, -1).mean(axis=1)


def main(steps: int = 400, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    key = jax.random.key(seed)
    model = reference = Recurrent(jax.random.fold_in(key, 0))
    opt_state = optimiser.init(eqx.filter(model, eqx.is_array))
    before = success(model, jax.random.fold_in(key, 1))
    predicted = gj.theory.flow_point(before, beta=BETA, weights=gj.theory.Group(GROUP_SIZE, **NORMALISER))
    for step in range(steps):
        model, opt_state, _ = train_step(model, opt_state, reference, jax.random.fold_in(key, 2 + step))
    after = success(model, jax.random.fold_in(key, 2 + steps))
    for name, p in (("before", before), ("predicted p*", predicted), ("after", after)):
        print(f"{name:12}  {p.mean():.3f}   per prompt", *(f"{x:.3f}" for x in p))
    return before, predicted, after


if __name__ == "__main__":
    main()
