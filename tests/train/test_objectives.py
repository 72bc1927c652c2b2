"""Every named objective drives the trainer, and every extra of the objective is read by it."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from grpo_jax import theory
from grpo_jax.config import ConfigError, validate
from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.objective import DAPO, DR_GRPO, GRPO, MIRROR_GRPO, NAMED, TWO_KL_GRPO
from grpo_jax.report.forecast import exact_iterates, group_weights, make_forecast
from grpo_jax.rollout import Layout, sample_groups
from grpo_jax.train.iteration import Recipe, learn
from grpo_jax.train.step import init_state
from tests.train.test_iteration import BETA, RATE, SGD, T, prompts, reward

CONFIG = DecoderConfig(
    vocab_size=16, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=4, d_ff=8, max_length=16
)
POLICY, PARAMS, REFERENCE = make_policy(CONFIG), *(init_params(CONFIG, jax.random.key(i)) for i in (0, 1))
SAMPLE = partial(sample_groups, POLICY, group_size=4, max_completion=T, stop_ids=(2,))


@cache
def compiled(objective, inner_epochs):
    recipe = Recipe(POLICY, objective, SAMPLE, lambda rate: SGD, Layout(1024), inner_epochs=inner_epochs)

    def learned(*arguments, **weights):
        return learn(recipe._replace(**weights), *arguments, RATE)

    return jax.jit(learned)


@cache
def sampled():
    return jax.jit(SAMPLE)(PARAMS, prompts(), jax.random.key(3))


def improved(objective, *, rollout=None, inner_epochs=2, reference=REFERENCE, **weights):
    """(parameters, metrics) after the gradient steps of one iteration."""
    rollout = sampled() if rollout is None else rollout
    rewards = reward(rollout.completions, rollout.mask).astype(jnp.float32)
    state, metrics = compiled(objective, inner_epochs)(
        init_state(PARAMS, SGD), reference, prompts(), rollout, rewards, jax.random.key(4), BETA, **weights
    )
    return state.params, metrics


def distance(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", NAMED)
def test_named_objectives_train(name):
    objective = NAMED[name]
    weights = {"beta_mirror": 0.5} if objective.holds_to_previous else {}
    params, metrics = improved(objective, **weights)
    assert 1e-5 < distance(params, PARAMS) < 10.0
    assert all(jnp.isfinite(m) for m in metrics.values())
    assert ("kl/sequence" in metrics) == objective.holds_to_reference
    # Only what holds to the reference looks at it.
    other, _ = improved(objective, reference=jax.tree.map(lambda x: x * 1.1, REFERENCE), **weights)
    assert (distance(params, other) > 0) == objective.holds_to_reference


def test_beta_mirror_holds_to_the_previous_policy():
    loose, tight = (improved(MIRROR_GRPO, beta_mirror=b, inner_epochs=6)[1]["kl/previous"] for b in (0.01, 30.0))
    assert float(tight) < 0.5 * float(loose)
    both, alone = improved(TWO_KL_GRPO, beta_mirror=3.0), improved(GRPO)
    assert distance(both[0], alone[0]) > 1e-5


def test_the_entropy_bonus_raises_the_entropy():
    low, high = (improved(DAPO, entropy_bonus=b)[1]["policy/entropy"] for b in (1e-9, 3.0))
    assert float(high) > float(low) + 1e-4


def test_overlong_completions_are_ignored():
    """What is truncated has no advantage: its reward may be anything, and rows that are not still teach."""
    rollout = sampled()
    assert 0 < float(rollout.truncated.mean(dtype=jnp.float32)) < 1
    all_truncated = rollout._replace(truncated=jnp.ones_like(rollout.truncated))
    ignoring = replace(DAPO, overlong="ignore")
    assert distance(improved(ignoring, rollout=all_truncated)[0], PARAMS) == 0.0
    assert distance(improved(DAPO, rollout=all_truncated)[0], PARAMS) > 1e-5
    some, keeping = improved(ignoring, rollout=rollout)[0], improved(DAPO, rollout=rollout)[0]
    assert distance(some, PARAMS) > 1e-5
    assert distance(some, keeping) > 1e-5


def test_the_correction_reads_what_the_sampler_reported():
    rollout = sampled()
    off = rollout._replace(logps=jnp.where(rollout.mask, rollout.logps - jnp.log(1.5), 0.0))
    corrected = replace(DAPO, correction="token", correction_cap=2.0)
    plain = improved(DAPO, rollout=off, inner_epochs=1)[0]
    (weighed, metrics), (capped, _) = (
        improved(o, rollout=off, inner_epochs=1) for o in (corrected, replace(corrected, correction_cap=1.0))
    )
    np.testing.assert_allclose(metrics["rollout/correction"], 1.5, rtol=1e-5)
    jax.tree.map(
        lambda w, p, start: np.testing.assert_allclose(w - start, 1.5 * (p - start), atol=1e-6), weighed, plain, PARAMS
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), capped, plain)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "DAPO"}, "objective.beta=1.0 would do nothing"),
        ({"beta": 0.0}, "objective.beta=0.0 must be positive"),
        ({"beta_mirror": 0.5}, "objective.beta_mirror=0.5 would do nothing"),
        ({"name": "MIRROR_GRPO", "beta": 0.0}, "objective.beta_mirror=0.0 must be positive"),
        ({"name": "TWO_KL_GRPO", "beta_mirror": 1.0}, "train.inner_epochs=1 with a KL to the previous policy"),
        ({"entropy_bonus": -1.0}, "entropy_bonus=-1.0 must not be negative"),
        ({"reduce": "constant"}, "needs constant_length"),
    ],
)
def test_weights_that_do_nothing_are_refused(changes, match):
    config = default.get_config()
    for key, value in changes.items():
        config.objective[key] = value
    with pytest.raises(ConfigError, match=match):
        validate(config, num_devices=1)


def test_a_mirror_config_is_accepted():
    config = default.get_config()
    config.objective.update(name="MIRROR_GRPO", beta=0.0, beta_mirror=1.0)
    config.train.inner_epochs = 2
    _, objective = validate(config, num_devices=1)
    assert objective == MIRROR_GRPO


def test_exact_iterates_follow_both_anchors():
    """Mirror climbs without end; two-KL ends where GRPO ends, and later."""
    p_ref, options = np.array([0.2]), {"group_size": 8, "beta": 1.0}
    mirror = exact_iterates(p_ref, 30, objective=replace(DR_GRPO, anchor="previous"), beta_mirror=2.0, **options)
    logits = np.log(mirror / (1 - mirror))
    np.testing.assert_allclose(np.diff(logits), 7 / 8 / 2.0, rtol=1e-5)  # Ω_G = (G − 1)/G, weight 2
    plain = exact_iterates(p_ref, 200, objective=GRPO, **options)
    both = exact_iterates(p_ref, 200, objective=TWO_KL_GRPO, beta_mirror=4.0, **options)
    np.testing.assert_allclose(both[-1], plain[-1], atol=1e-6)
    np.testing.assert_allclose(plain[-1], theory.flow_point(0.2, beta=1.0, weights=group_weights(GRPO, 8)), atol=1e-5)
    assert both[1] < plain[1]


def test_gpg_is_refused_off_policy():
    config = default.get_config()
    config.objective.update(name="GPG", beta=0.0)
    config.train.minibatches = 2
    with pytest.raises(ConfigError, match="ratio='none' is for data from the current policy"):
        validate(config, num_devices=1)


def test_iterates_wait_for_their_turn():
    """With half of the prompts in each iteration, a prompt moves in every second one, and the mean half as fast."""
    options = {"objective": GRPO, "group_size": 8, "beta": 3.0}
    p_ref = np.array([0.1, 0.3])
    whole, halves = (exact_iterates(p_ref, n, visited=v, **options) for n, v in ((4, 1.0), (8, 0.5)))
    np.testing.assert_allclose(halves[::2], whole, rtol=1e-6)
    np.testing.assert_allclose(halves[1], (whole[0] + whole[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "choices",
    [{"scale": "batch_std"}, {"overlong": "ignore"}, {"baseline": "none", "reduce": "sequence_mean"}],
)
def test_what_the_theory_does_not_know_is_not_predicted(choices):
    unknown = replace(GRPO, **choices)
    options = {"objective": unknown, "group_size": 8, "beta": 1.0}
    assert make_forecast(np.array([3]), 10, confidence=0.95, **options) is None
    assert exact_iterates(np.array([0.3]), 5, **options) is None
    assert "no p* is predicted" in unknown.fixed_point
