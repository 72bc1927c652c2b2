"""The compiled functions of a run on a mesh: sampling, several iterations as one program, and the halves of an iteration."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.rollout.compaction import Stage
from grpo_jax.runs.loop import visits
from grpo_jax.runs.setup import put_prompts, put_table
from grpo_jax.train.iteration import role_key
from tests.tiny_run import on_mesh, on_one_device

MESHES = ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 4, "tensor": 2})


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def sampled(setup, rows=16, **options):
    params, prompts = setup.initial_params(0), put_prompts(setup, np.arange(rows))[0]
    if options:
        return setup.compiled.sample_probe(params, prompts, jax.random.key(5), **options)
    return setup.compiled.sample(params, prompts, jax.random.key(5))


@pytest.mark.parametrize(
    ("mesh", "gather"), [*((mesh, "model") for mesh in MESHES), *((mesh, "layer") for mesh in MESHES[1:3])], ids=str
)
def test_the_same_tokens_on_any_mesh(mesh, gather):
    _, setup = on_mesh(mesh, model__gather=gather)
    one = on_one_device()[1]
    wanted, found = sampled(one), sampled(setup)
    for field in ("completions", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field), err_msg=field)
    np.testing.assert_allclose(found.logps, wanted.logps, atol=1e-5)
    assert len(found.completions.sharding.device_set) == 8
    lengths = np.asarray(wanted.mask).sum(-1)
    assert lengths.min() < lengths.max()
    # Each device decodes until its longest has ended; where they need each other at every token, until the longest of all has.
    by_device = lengths.reshape(mesh.get("data", 1) * mesh.get("fsdp", 1), -1)
    steps = np.full(len(by_device), lengths.max()) if "tensor" in mesh or gather == "layer" else by_device.max(1)
    np.testing.assert_allclose(found.useful, lengths.sum() / (by_device.shape[1] * steps).sum(), rtol=1e-6)
    # For probes: other sizes, and a number of prompts that the devices do not divide.
    options = {"group_size": 3, "greedy": False, "first_sample": jnp.int32(4)}
    for rows in (16, 5):
        wanted, found = (sampled(p, rows=rows, **options) for p in (one, setup))
        np.testing.assert_array_equal(found.completions, wanted.completions)


def test_every_device_decodes_its_own_rows_without_talking():
    """With prompts over all devices there is one gathering of what fsdp spreads, before the loop, and nothing inside it."""
    before, inside = transfers({"data": 4, "fsdp": 2})
    assert "all-gather" in before
    assert not inside


def test_layer_by_layer_no_device_holds_the_model():
    """Every matrix of a layer is gathered inside the loop over tokens, and not before it for all of them."""
    _, inside = transfers({"data": 4, "fsdp": 2}, model__gather="layer", model__num_layers=3)
    assert inside.count("all-gather") == 3 * 7


def transfers(mesh, **changes):
    """Names of the collectives of sampling, of the program's entry and of its other computations, in stages of one loop."""
    _, setup = on_mesh(mesh, **changes)
    params, prompts = setup.initial_params(0), put_prompts(setup, np.arange(16))[0]
    stages = (Stage(16 * setup.recipe.sample.keywords["group_size"] // 8, (3,)),)
    text = setup.compiled.sample.lower(params, prompts, jax.random.key(0), stages=stages).compile().as_text()
    names = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
    computations = re.split(r"\n(?=(?:ENTRY )?%\S+ \()", text)
    entry = next(c for c in computations if c.startswith("ENTRY"))
    return re.findall(names, entry), [name for c in computations if c is not entry for name in re.findall(names, c)]


@pytest.mark.slow
def test_iterations_are_the_same_on_any_mesh():
    """Three iterations as one program, on one device and on eight: same tokens, so the same metrics and parameters."""

    def run(config, setup):
        f, table = setup.compiled, put_table(setup)
        state, reference = apart(setup)
        index = visits(config, np.arange(16), 0, 3)
        beta, rate = jnp.float32(1.0), jnp.float32(1e-2)
        numbers = jnp.int32(3), jax.random.key(7), jnp.int32(1)
        return f.iterate(state, reference, table, index, *numbers, beta, rate)

    state, metrics, skipped = run(*on_one_device())
    assert index_of_last(metrics["loss/grad_norm"]) == 2
    assert skipped.shape == (10,)
    for mesh in MESHES[:2]:
        other, others, _ = run(*on_mesh(mesh))
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3)  # noqa: E731
        jax.tree.map(close, other.params, state.params)
        for name in ("reward/mean", "rollout/length", "rollout/truncated"):
            np.testing.assert_allclose(others[name], metrics[name], atol=1e-6, err_msg=name)


def apart(setup):
    """(state, reference) of a policy that has left its reference, so that there is a gradient where nothing succeeds."""
    params = setup.initial_params(0)
    return setup.compiled.start(params), jax.tree.map(lambda x: 1.2 * x, params)


def index_of_last(values):
    return int(np.flatnonzero(np.asarray(values))[-1])


def test_the_setup_is_the_halves_one_after_the_other():
    """What one program does for several iterations, the two halves do with the host between them."""
    config, setup = on_one_device()
    f, (state, params) = setup.compiled, apart(setup)
    beta, rate, base = jnp.float32(0.7), jnp.float32(1e-2), jax.random.key(3)
    index = visits(config, np.arange(16), 0, 2)
    whole, metrics, _ = f.iterate(
        jax.tree.map(jnp.copy, state), params, put_table(setup), index, jnp.int32(2), base, jnp.int32(1), beta, rate
    )
    for n in (1, 2):
        prompts, answers, answer_mask = put_prompts(setup, index[n - 1])
        rollout = f.sample(state.params, prompts, role_key(base, "rollout", n))
        rewards = jnp.asarray(f.verify(rollout, answers, answer_mask), jnp.float32)
        key = role_key(base, "minibatches", n)
        state, row = f.learn(state, params, prompts, rollout, rewards, key, beta, rate)
        np.testing.assert_allclose(row["reward/mean"], metrics["reward/mean"][n - 1])
        np.testing.assert_allclose(row["loss/grad_norm"], metrics["loss/grad_norm"][n - 1], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, state.params)
    assert int(whole.updates) == 2
    assert not np.asarray(metrics["rollout/length"])[2:].any()


def test_beta_and_the_learning_rate_are_data():
    """One compilation serves them all, and each decides the outcome."""
    config, setup = on_one_device()
    f, (start, reference) = setup.compiled, apart(setup)
    index, results, norms = visits(config, np.arange(16), 0, 2), [], []
    f.iterate.clear_cache()
    for beta, rate in ((1.0, 1e-2), (5.0, 1e-2), (1.0, 1e-3)):
        arguments = reference, put_table(setup), index, jnp.int32(2), jax.random.key(3), jnp.int32(1)
        state, metrics, _ = f.iterate(jax.tree.map(jnp.copy, start), *arguments, jnp.float32(beta), jnp.float32(rate))
        norms.append(float(metrics["loss/grad_norm"][0]))
        results.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]))
    assert f.iterate._cache_size() == 1
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(start.params)])
    moved = [np.abs(r - start).max() for r in results]
    assert norms[1] == pytest.approx(5 * norms[0], rel=1e-4)  # nothing succeeds: the gradient is that of the KL alone
    assert moved[2] == pytest.approx(moved[0] / 10, rel=0.05)
