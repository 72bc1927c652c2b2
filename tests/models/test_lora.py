"""Adapters against the matrices that they stand for."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from grpo_jax.config import ConfigError, validate
from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.models.lora import TARGETS, Lora, merge
from grpo_jax.objective import Objective
from grpo_jax.rollout import Layout, PromptBatch, sample_groups, score_groups
from grpo_jax.runs import loop
from grpo_jax.runs import setup as setup_file
from grpo_jax.runs.evaluation import evaluate
from grpo_jax.runs.loop import train
from grpo_jax.runs.memory import lasting_memory
from grpo_jax.runs.setup import put_prompts
from grpo_jax.train import scores
from grpo_jax.train.iteration import Recipe, learn
from grpo_jax.train.step import init_state
from tests.tiny_run import on_mesh, on_one_device, tiny_config

CONFIG = DecoderConfig(11, 2, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, max_length=16)
P, G, T = 3, 4, 4


def random_adapters(lora, params, seed=1):
    """Adapters of which both sides are random."""
    adapters = lora.init(params, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(adapters)))
    return {name: x + 0.3 * jax.random.normal(next(keys), x.shape) for name, x in adapters.items()}


@pytest.fixture(scope="module")
def case():
    policy, params = make_policy(CONFIG), init_params(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, 11, (P, 3))
    prompts = PromptBatch(jnp.asarray(tokens, jnp.int32), jnp.ones((P, 3), bool), jnp.arange(P, dtype=jnp.int32))
    return policy, params, prompts


def sample(policy, params, prompts):
    return sample_groups(policy, params, prompts, jax.random.key(1), group_size=G, max_completion=T, stop_ids=(2,))


def logps(policy, params, prompts, rollout):
    return score_groups(policy, params, prompts, rollout.completions, rollout.mask)[0]


def test_new_adapters_change_no_bit(case):
    policy, params, prompts = case
    lora = Lora(3, 5.0)
    joined = lora.join(lora.init(params, jax.random.key(2)), params)
    rollouts = sample(policy, params, prompts), sample(policy, joined, prompts)
    jax.tree.map(np.testing.assert_array_equal, *rollouts)
    np.testing.assert_array_equal(*(logps(policy, x, prompts, rollouts[0]) for x in (params, joined)))


@pytest.mark.parametrize("targets", [TARGETS, ("query", "down")])
def test_joined_is_the_sum_of_matrices_in_sampling_and_in_scoring(case, targets):
    policy, params, prompts = case
    lora = Lora(3, 5.0, targets)
    adapters = random_adapters(lora, params)
    joined = lora.join(adapters, params)
    merged = merge(joined)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for name in ("key", *targets):
        product = adapters[f"{name}_a"] @ adapters[f"{name}_b"] * 5 / 3 if name in targets else 0.0
        np.testing.assert_allclose(merged["layers"][name], params["layers"][name] + product, atol=1e-6)
    for name, x in lora.split(joined).items():
        np.testing.assert_allclose(x, adapters[name], rtol=1e-6)
    rollouts = sample(policy, joined, prompts), sample(policy, merged, prompts)
    np.testing.assert_array_equal(rollouts[0].completions, rollouts[1].completions)
    np.testing.assert_allclose(rollouts[0].logps, rollouts[1].logps, atol=1e-5)
    scored = [logps(policy, x, prompts, rollouts[0]) for x in (joined, merged, params)]
    np.testing.assert_allclose(scored[0], scored[1], atol=1e-5)
    assert np.abs(scored[0] - scored[2]).max() > 0.1


def test_the_gradient_is_that_of_the_whole_matrices_by_the_chain_rule(case):
    policy, params, prompts = case
    lora = Lora(2, 3.0)
    adapters = random_adapters(lora, params)
    joined = lora.join(adapters, params)
    rollout = sample(policy, joined, prompts)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(P, G)), jnp.float32)
    recipe = Recipe(policy, None, None, None, Layout(12), join=lora.join)
    found = scores.pull_back(recipe.of_trained(params), adapters, prompts, rollout, weights)
    whole = scores.pull_back(recipe, merge(joined), prompts, rollout, weights)["layers"]
    assert found.keys() == adapters.keys()
    for name in TARGETS:
        a, b, slope = adapters[f"{name}_a"], adapters[f"{name}_b"], whole[name] * 3.0 / 2
        np.testing.assert_allclose(found[f"{name}_a"], slope @ b.swapaxes(1, 2), rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(found[f"{name}_b"], a.swapaxes(1, 2) @ slope, rtol=1e-3, atol=2e-4)


def test_at_full_rank_with_identities_for_a_one_step_is_that_of_the_whole_matrices(case):
    policy, params, prompts = case
    lora = Lora(8, 8.0, ("query", "gate"))
    begin = lora.init(params, jax.random.key(0))
    begin |= {f"{name}_a": jnp.broadcast_to(jnp.eye(8), (2, 8, 8)) for name in lora.targets}
    rollout = sample(policy, params, prompts)
    rewards = jnp.asarray(np.random.default_rng(2).integers(0, 2, (P, G)), jnp.float32)

    def step(join, trained):
        """One step of gradient descent with rate 0.1."""
        recipe = Recipe(policy, Objective(), None, optax.sgd, Layout(12), join=join)
        state, key = init_state(trained, optax.sgd(0.1)), jax.random.key(4)
        state, _ = learn(recipe, state, params, prompts, rollout, rewards, key, jnp.float32(1), 0.1)
        return recipe.params(state.params, params)["layers"]

    b = {f"{name}_b": begin[f"{name}_b"] for name in lora.targets}
    of_b = step(lambda b, params: lora.join(begin | b, params), b)
    matrices = {name: params["layers"][name] for name in lora.targets}
    whole = step(lambda layers, params: params | {"layers": params["layers"] | layers}, matrices)
    for name in lora.targets:
        np.testing.assert_allclose(of_b[f"{name}_b"], whole[name] - params["layers"][name], rtol=1e-3, atol=1e-6)


LORA = {
    "lora__rank": 2,
    "optimizer__learning_rate": 0.05,
    "attainable__steps": 1,
    "attainable__samples": 12,
    "train__iterations": 4,
    "optimizer__warmup_updates": 0,
    "warm_start__target": 0.05,
}


@pytest.fixture(scope="module")
def run_in():
    """(train or evaluate, directory, **options) -> its result: all with one set of programs, as there is one config."""
    made = []

    def once(*arguments, **options):
        made[:] = made or [make(*arguments, **options)]
        return made[0]

    def run_in(function, directory, said=None, **options):
        with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
            patch.setattr(setup_file, "make_compiled", once)
            return function(tiny_config(**LORA), directory, Console(file=said or io.StringIO(), width=200), **options)

    make = setup_file.make_compiled
    return run_in


@pytest.fixture(scope="module")
def run(run_in, tmp_path_factory):
    """(run directory, what it said) of a finished run that trained adapters."""
    directory, said = tmp_path_factory.mktemp("lora") / "run", io.StringIO()
    run_in(train, directory, said)
    return directory, said.getvalue()


def test_a_run_trains_adapters_alone_and_says_so(run, run_in):
    directory, said = run
    assert "LoRA         rank 2, on query, key, value, output, gate, up, down: 416 beside 1,776 parameters" in said
    assert "what the network lets through" in said
    evaluated = run_in(evaluate, directory, name="latest")
    assert evaluated["kl"]["mean"] > 1e-3  # what it measures is no longer the reference


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, run_in, tmp_path, monkeypatch):
    measure = loop.measure

    def stopped(run, params, ref_params, iteration, **options):
        raise RuntimeError(f"stopped at {iteration}")

    monkeypatch.setattr(loop, "measure", stopped)
    with pytest.raises(RuntimeError, match="stopped at 3"):
        run_in(train, tmp_path / "run")
    monkeypatch.setattr(loop, "measure", measure)
    run_in(train, tmp_path / "run")
    for name in ("metrics.jsonl", "attainable.json", "samples.json"):
        assert (run[0] / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_memory_is_that_of_the_adapters_and_one_model():
    found = {}
    for rank in (0, 1):
        _, setup = on_one_device(lora__rank=rank)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            found[rank] = lasting_memory(setup.recipe, setup.shapes, setup.trained, setup.mesh)
    assert found[1]["reference"] == found[0]["reference"] == found[0]["parameters"]
    adapters = 4 * sum(1 * (x.shape[1] + x.shape[2]) for n, x in setup.shapes["layers"].items() if n in TARGETS)
    assert found[1]["parameters"] == adapters
    assert 2 * adapters <= found[1]["optimizer"] <= 2 * adapters + 64  # two moments, and counters


def test_a_mesh_samples_what_one_device_does():
    _, alone = on_one_device(lora__rank=2)
    _, spread = on_mesh({"data": 2, "fsdp": 2, "tensor": 2}, lora__rank=2)
    found = []
    for setup in (alone, spread):
        params = setup.initial_params(0)
        adapters = jax.tree.map(np.asarray, random_adapters(Lora(2, 4.0), params))
        joined = setup.recipe.params(adapters, params)
        prompts = put_prompts(setup, np.arange(8))[0]
        found.append(setup.compiled.sample(joined, prompts, jax.random.key(3)))
    np.testing.assert_array_equal(found[0].completions, found[1].completions)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora__rank": -1}, "lora.rank=-1 must be at least 0"),
        (
            {"lora__rank": 2, "lora__targets": ("query", "q_proj")},
            "lora.targets=('query', 'q_proj') must be some of query,",
        ),
        ({"lora__rank": 2, "lora__targets": ()}, "lora.targets=() must be some of"),
        ({"lora__rank": 2, "lora__alpha": 0.0}, "lora.alpha=0.0 must be positive"),
    ],
)
def test_settings_that_make_no_adapters_are_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        validate(tiny_config(**changes), num_devices=1)
    assert words in str(error.value)
