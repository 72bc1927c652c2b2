"""This project's sampling and update, as a worker of `race`."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import cases
from experiments.benchmarks.worker import Prepared, serve
from grpo_jax.models import make_policy
from grpo_jax.objective import DAPO
from grpo_jax.rollout import Layout, Policy, PromptBatch, Rollout, sample_groups
from grpo_jax.train.iteration import Recipe, learn
from grpo_jax.train.step import TrainState, init_state

MICROBATCH_TOKENS = 32768  # the default of the config


class Setup(NamedTuple):
    """A case as this project's functions take it.

    Attributes:
      policy, params, prompts: what is sampled from.
      rollout, rewards: what an update is given, [P, G].
      sample: `sample_groups` with all but (params, prompts, key).
    """

    policy: Policy
    params: dict[str, Any]
    prompts: PromptBatch
    rollout: Rollout
    rewards: jax.Array
    sample: Callable[..., Rollout]


def load(case: cases.Case, folder: str) -> Setup:
    """Of what `cases.write` has left in a folder."""
    policy = make_policy(cases.decoder(case))
    with np.load(f"{folder}/weights.npz") as weights, np.load(f"{folder}/data.npz") as data:
        params: dict[str, Any] = {"layers": {}}
        for name, value in weights.items():
            place = params["layers"] if name.startswith("layers/") else params
            place[name.removeprefix("layers/")] = jnp.array(value)
        tokens, rewards = jnp.array(data["prompts"]), jnp.array(data["rewards"])
        completions, mask = (jnp.array(data[x]).reshape(case.prompts, case.group, -1) for x in ("completions", "mask"))
    prompts = PromptBatch(tokens, jnp.ones(tokens.shape, bool), jnp.arange(case.prompts, dtype=jnp.int32))
    rollout = Rollout(completions, mask, jnp.zeros(mask.shape), mask[..., -1], jnp.float32(1.0))
    options: dict[str, Any] = {"group_size": case.group, "max_completion": case.completion}
    sample: Any = partial(sample_groups, policy, **options, stop_ids=(cases.EOS,), pad_id=cases.PAD)
    return Setup(policy, params, prompts, rollout, rewards, sample)


def learner(setup: Setup, optimizer: optax.GradientTransformation) -> Callable[..., tuple[TrainState, Any]]:
    """`learn` as all cases have it: (state, ref_params, prompts, rollout, rewards, key) -> (state, metrics)."""
    recipe = Recipe(setup.policy, DAPO, setup.sample, lambda _: optimizer, Layout(MICROBATCH_TOKENS))
    return partial(
        learn, recipe, beta=jnp.float32(0.0), learning_rate=0.0
    )  # which neither DAPO nor the optimizer reads


def adamw() -> optax.GradientTransformation:
    """The optimizer of all cases."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))


def odd(rollout: Rollout) -> jax.Array:
    """The rewards of an iteration: 1 for an odd sum of tokens."""
    return (rollout.completions.sum(-1) % 2).astype(jnp.float32)


def whole(setup: Setup, update: Callable[..., tuple[TrainState, Any]]) -> Callable[..., tuple[TrainState, Rollout]]:
    """(state, key) -> (state, rollout): an iteration."""

    def iterate(state: TrainState, key: jax.Array) -> tuple[TrainState, Rollout]:
        rollout = setup.sample(state.params, setup.prompts, key)
        state, _ = update(state, None, setup.prompts, rollout, odd(rollout), key)
        return state, rollout

    return iterate


def prepare(request: dict[str, Any]) -> Prepared:
    """What the worker answers first, and its repetition."""
    case = cases.Case(**{name: request[name] for name in cases.Case._fields})
    setup, optimizer = load(case, request["folder"]), adamw()
    policy, params, prompts, fixed_rollout, rewards, sample = setup
    update = learner(setup, optimizer)
    programs: list[Any] = [
        jax.jit(sample),
        jax.jit(update, donate_argnums=0),
        jax.jit(whole(setup, update), donate_argnums=0),
    ]
    state = [init_state(params, optimizer)] if case.work != "sampling" else []
    compiled, count = [0], itertools.count()

    def repeat() -> dict[str, Any]:
        key, answer = jax.random.key(next(count)), {}
        if case.work == "sampling":
            seen = programs[0](params, prompts, key).mask
        elif case.work == "update":
            seen = fixed_rollout.mask
            state[0], metrics = programs[1](state[0], None, prompts, fixed_rollout, rewards, key)
            answer["check"] = [float(metrics["loss/grad_norm"])]
        else:
            state[0], rollout = programs[2](state[0], key)
            seen = rollout.mask
            jax.block_until_ready(state[0])
        before, compiled[0] = compiled[0], sum(program._cache_size() for program in programs)
        return answer | {"tokens": int(np.array(seen).sum()), "compiled": compiled[0] > before}

    positions = jnp.broadcast_to(jnp.arange(case.prompt_length, dtype=jnp.int32)[None], prompts.tokens.shape)
    logits = policy.unembed(params, policy.forward(params, prompts.tokens, positions, prompts.mask)[0][0, -1])
    check = [*logits[2:6].tolist(), float(jnp.linalg.norm(logits[2:]))]
    return {"versions": {"jax": jax.__version__}, "check": check}, repeat


if __name__ == "__main__":
    serve(prepare)
