"""The iteration and its gradient step: accumulation, devices, scanning, the two halves, and what it loads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.objective import DAPO, GRPO, GRPO_TRL, group_advantages
from grpo_jax.rollout import Layout, PromptBatch, sample_groups
from grpo_jax.train.iteration import Recipe, iteration, learn, minibatch_rows, role_key, train_step
from grpo_jax.train.sharding import make_mesh, parameter_shardings, row_sharding
from grpo_jax.train.step import Batch, init_state

CONFIG = DecoderConfig(
    vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=32, max_length=16
)
POLICY, PARAMS, REFERENCE = make_policy(CONFIG), *(init_params(CONFIG, jax.random.key(i)) for i in (0, 1))
P, G, T, STOP = 8, 4, 5, 2
SAMPLE = partial(sample_groups, POLICY, group_size=G, max_completion=T, stop_ids=(STOP,))
SGD = optax.sgd(0.1)
BETA, RATE = jnp.float32(0.5), 0.1  # of which the optimizer SGD reads no rate


def prompts() -> PromptBatch:
    tokens = np.random.default_rng(0).integers(3, 16, (P, 4)).astype(np.int32)
    mask = np.arange(4)[None] >= np.array([0, 1, 2, 3] * 2)[:, None]
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(P, dtype=jnp.int32))


def reward(completions, mask, *_):
    """A verifier on tokens: right iff an even number of them is even."""
    return ((completions % 2 == 0) & mask).sum(-1) % 2 == 0


def make_batch() -> Batch:
    rollout = jax.jit(SAMPLE)(PARAMS, prompts(), jax.random.key(3))
    rewards = reward(rollout.completions, rollout.mask).astype(jnp.float32)
    reference = jnp.where(
        rollout.mask, rollout.logps - 0.3 * jnp.sin(jnp.arange(T, dtype=jnp.float32))[None, None], 0.0
    )
    advantages = group_advantages(rewards)
    assert (advantages != 0).any()
    return Batch(prompts(), rollout.completions, rollout.mask, advantages, rollout.logps, None, reference)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch()


def recipe(*, optimizer=SGD, objective=GRPO, microbatch_tokens=64, row_length=None, shards=1, **options):
    layout = Layout(microbatch_tokens, row_length, shards)
    return Recipe(POLICY, objective, SAMPLE, lambda rate: optimizer, layout, verify_tokens=reward, **options)


def step(state, batch, **options):
    return jax.jit(partial(train_step, recipe(**options)))(state, batch, BETA, RATE)


def moved(state):
    return jax.tree.map(lambda new, old: (old - new) / 0.1, state.params, PARAMS)


@pytest.mark.parametrize("objective", [GRPO, GRPO_TRL, DAPO])
@pytest.mark.parametrize("tokens", [1, 40])
def test_accumulation_equals_one_batch(batch, objective, tokens):
    whole, metrics = step(init_state(PARAMS, SGD), batch, objective=objective, microbatch_tokens=10**6)
    parts, part_metrics = step(
        init_state(PARAMS, SGD), batch, objective=objective, microbatch_tokens=tokens, row_length=T
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), moved(whole), moved(parts))
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(moved(whole))) > 1e-2
    for name in metrics.keys() - {"update/useful"}:
        np.testing.assert_allclose(metrics[name], part_metrics[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}])
def test_devices_change_no_sample_and_no_gradient(batch, sizes):
    mesh = make_mesh(**sizes)
    place = lambda tree: jax.device_put(tree, parameter_shardings(tree, mesh))  # noqa: E731
    params, rows = place(PARAMS), jax.device_put(prompts(), row_sharding(mesh))
    used = {a for leaf in jax.tree.leaves(params) for a in leaf.sharding.spec if a is not None and mesh.shape[a] > 1}
    assert used == {a for a in ("fsdp", "tensor") if sizes.get(a, 1) > 1}
    one, many = (jax.jit(SAMPLE)(p, r, jax.random.key(3)) for p, r in ((PARAMS, prompts()), (params, rows)))
    np.testing.assert_array_equal(one.completions, many.completions)
    np.testing.assert_array_equal(one.mask, many.mask)
    np.testing.assert_allclose(one.logps, many.logps, atol=1e-5)
    single, _ = step(init_state(PARAMS, SGD), batch)
    spread, _ = step(init_state(params, SGD), jax.device_put(batch, row_sharding(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), moved(single), moved(spread))


def test_padded_prompts_change_no_gradient(batch):
    wide = PromptBatch(
        jnp.pad(batch.prompts.tokens, ((0, 0), (2, 1)), constant_values=9),
        jnp.pad(batch.prompts.mask, ((0, 0), (2, 1))),
        batch.prompts.index,
    )
    a, b = (step(init_state(PARAMS, SGD), batch._replace(prompts=p))[0] for p in (batch.prompts, wide))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), moved(a), moved(b))


def test_dead_groups_without_kl_do_not_move_the_policy(batch):
    dead = batch._replace(advantages=group_advantages(jnp.ones((P, G)) * 0.1))
    state, metrics = step(init_state(PARAMS, SGD), dead, objective=DAPO)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    assert float(metrics["loss/grad_norm"]) == 0.0


def learner(**options):
    return partial(learn, recipe(**options), learning_rate=RATE)


def run(state, number, **options):
    answers = jnp.zeros((P, T), jnp.int32), jnp.zeros((P, T), bool)
    return iteration(recipe(**options), state, REFERENCE, prompts(), *answers, jax.random.key(0), number, BETA, RATE)


def test_the_iteration_is_its_two_halves():
    state = init_state(PARAMS, SGD)
    whole, metrics = jax.jit(run)(state, jnp.int32(3))
    rollout = jax.jit(SAMPLE)(PARAMS, prompts(), role_key(jax.random.key(0), "rollout", 3))
    rewards = reward(rollout.completions, rollout.mask).astype(jnp.float32)
    key = role_key(jax.random.key(0), "minibatches", 3)
    halves, half_metrics = jax.jit(learner())(state, REFERENCE, prompts(), rollout, rewards, key, BETA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, halves.params)
    np.testing.assert_allclose(metrics["reward/mean"], rewards.mean(), rtol=1e-6)
    assert metrics.keys() == half_metrics.keys()


def test_the_iteration_scans():
    state, numbers = init_state(PARAMS, SGD), jnp.arange(3, dtype=jnp.int32)
    scanned, metrics = jax.jit(lambda s: jax.lax.scan(run, s, numbers))(state)
    looped = state
    for number in numbers:
        looped, last = jax.jit(run)(looped, number)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned.params, looped.params)
    np.testing.assert_allclose(metrics["reward/mean"][-1], last["reward/mean"], rtol=1e-6)


def test_one_compilation_serves_every_beta():
    traced = []

    @jax.jit
    def loss(beta):
        traced.append(beta)
        return run(init_state(PARAMS, SGD), jnp.int32(0))[1]["loss/total"] * beta

    for beta in np.linspace(0.1, 1, 8, dtype=np.float32):
        loss(beta)
    assert len(traced) == 1


def test_inner_epochs_and_minibatches():
    state, metrics = jax.jit(partial(run, inner_epochs=2, minibatches=4))(init_state(PARAMS, SGD), jnp.int32(0))
    assert int(state.updates) == 8
    assert abs(float(metrics["policy/ratio"]) - 1.0) > 1e-4  # later steps are off-policy
    assert float(metrics["rollout/logp_difference"]) < 1e-5  # taken before the first step
    rows = np.asarray(minibatch_rows(jax.random.key(1), P, inner_epochs=2, minibatches=4)).reshape(2, P)
    assert (np.sort(rows, axis=1) == np.arange(P)).all()
    assert (rows[0] != rows[1]).any()


def test_shards_and_minibatches():
    """Each minibatch is packed by itself, whatever its prompts; shards change nothing."""
    state = init_state(PARAMS, SGD)
    one, many = (jax.jit(partial(run, minibatches=2, shards=n))(state, jnp.int32(0)) for n in (1, 4))
    assert int(many[0].updates) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one[0].params, many[0].params)
    for name in one[1].keys() - {"update/useful"}:
        np.testing.assert_allclose(one[1][name], many[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_no_reference_where_the_objective_has_none():
    rollout = jax.jit(SAMPLE)(PARAMS, prompts(), jax.random.key(1))
    arrays = prompts(), rollout, reward(rollout.completions, rollout.mask).astype(jnp.float32), jax.random.key(0), BETA
    state = init_state(PARAMS, SGD)
    without, with_it = (jax.jit(learner(objective=DAPO))(state, p, *arrays) for p in (None, REFERENCE))
    jax.tree.map(np.testing.assert_array_equal, without[0].params, with_it[0].params)
    assert "kl/sequence" not in without[1]
    assert 0.5 < float(without[1]["update/useful"]) <= 1.0
    with pytest.raises(ValueError, match="learn needs ref_params"):
        jax.jit(learner())(state, None, *arrays)


def test_one_minibatch_of_everything_is_one_step():
    """Off-policy bookkeeping changes nothing where the policy is still the sampler's: the first of two epochs."""
    state = init_state(PARAMS, SGD)
    once, _ = jax.jit(run)(state, jnp.int32(0))
    rollout = jax.jit(SAMPLE)(PARAMS, prompts(), role_key(jax.random.key(0), "rollout", 0))
    rewards = reward(rollout.completions, rollout.mask).astype(jnp.float32)
    slow = learner(optimizer=optax.sgd(0.0), inner_epochs=2)
    still, metrics = jax.jit(slow)(state, REFERENCE, prompts(), rollout, rewards, jax.random.key(0), BETA)
    jax.tree.map(np.testing.assert_array_equal, still.params, PARAMS)
    np.testing.assert_allclose(metrics["policy/ratio"], 1.0, atol=1e-6)
    assert max(jnp.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (once.params, PARAMS)), strict=True)) > 1e-4
