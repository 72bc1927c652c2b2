"""The identity and the bounds of off-policy steps, by importance weights over all outcomes; ages by running the schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.theory import Whitened, off_policy_gain, omega, total_variation, update_staleness

pytestmark = pytest.mark.usefixtures("double")


def cases(count, outcomes=5, *, binary=False):
    """Three unrelated policies [count, outcomes] as arrays of probabilities, and rewards in [0, 1]."""
    rng = np.random.default_rng(0)
    policies = [rng.dirichlet([0.4] * outcomes, count) + 1e-9 for _ in range(3)]
    policies = [x / x.sum(-1, keepdims=True) for x in policies]
    return *policies, rng.integers(0, 2, (count, outcomes)) if binary else rng.uniform(0, 1, (count, outcomes))


def gains(policy, old, sampler, rewards, epsilon):
    return off_policy_gain(*(jnp.log(jnp.asarray(x)) for x in (policy, old, sampler)), rewards, epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 0.9, 3.0])
@pytest.mark.parametrize("binary", [False, True])
def test_the_identity_and_the_bounds_over_all_outcomes(epsilon, binary):
    policy, old, sampler, rewards = cases(4000, binary=binary)
    step = gains(policy, old, sampler, rewards, epsilon)
    # By importance weights, as a trainer sees it.
    mean = (sampler * rewards).sum(-1, keepdims=True)
    deviation = np.sqrt((sampler * (rewards - mean) ** 2).sum(-1, keepdims=True) + epsilon)
    surrogate = (sampler * (policy / sampler) * (rewards - mean) / deviation).sum(-1)
    gain = (policy * rewards).sum(-1) - (old * rewards).sum(-1)
    np.testing.assert_allclose(step.surrogate, surrogate, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(step.gain, gain, atol=1e-13)
    np.testing.assert_allclose(step.scale * surrogate + step.lag, gain, atol=1e-12)
    assert bool((step.gain >= step.bound - 1e-12).all())
    assert bool((step.bound >= step.paper_bound).all())


def test_one_is_the_smallest_constant():
    """Binary rewards and one family of policies: the bound is attained, so that any smaller constant fails."""
    rng = np.random.default_rng(1)
    p_alpha = rng.uniform(0.01, 0.9, 500)
    p, p_old = (rng.uniform(p_alpha, 1) for _ in range(2))
    right, wrong = rng.dirichlet([1.0] * 3), rng.dirichlet([1.0] * 4)
    family = [np.concatenate([x[:, None] * right, (1 - x)[:, None] * wrong], -1) for x in (p, p_old, p_alpha)]
    step = gains(*family, np.array([[1, 1, 1, 0, 0, 0, 0]]), 1e-4)
    np.testing.assert_allclose(step.bound, step.gain, rtol=1e-9, atol=1e-11)
    slightly_less = step.bound + 0.01 * (step.surrogate - step.bound)
    assert bool((slightly_less > step.gain).all())


def test_the_surrogate_is_omega_times_the_step_in_p():
    policy, old, sampler, rewards = cases(200, binary=True)
    rewards[:, 0], rewards[:, 1] = 1, 0
    p, p_alpha = ((x * rewards).sum(-1) for x in (policy, sampler))
    step = gains(policy, old, sampler, rewards, 1e-3)
    np.testing.assert_allclose(step.surrogate, omega(p_alpha, Whitened(1e-3)) * (p - p_alpha), rtol=1e-9)


def test_on_policy_there_is_no_lag():
    policy, old, _, rewards = cases(100)
    step = gains(policy, old, old, rewards, 1e-4)
    np.testing.assert_array_equal(step.lag, 0.0)
    np.testing.assert_allclose(step.gain, step.scale * step.surrogate, atol=1e-13)


def test_prompts_without_variance_make_the_mean_bound_say_nothing():
    """No gradient comes from them, and their bound is −(1/√ε − 1) TV: one weighs as much as fifty others."""
    policy, old, _, _ = cases(100)
    policy = 0.99 * old + 0.01 * policy
    rewards = (np.arange(5) < 2) * np.ones((100, 1))
    rewards[0] = 0
    step = gains(policy, old, old, rewards, 1e-5)
    slope = jax.grad(lambda x: off_policy_gain(x, jnp.log(old[0]), jnp.log(old[0]), rewards[0], epsilon=1e-5).surrogate)
    assert float(step.surrogate[0]) == 0 and bool((slope(jnp.log(policy[0])) == 0).all())
    distance = float(total_variation(jnp.log(policy[0]), jnp.log(old[0])))
    assert float(step.bound[0]) == pytest.approx(-(1 / math.sqrt(1e-5) - 1) * distance, rel=1e-9)
    assert -float(step.bound[0]) > 50 * float(jnp.abs(step.bound[1:]).mean())
    without = gains(policy, old, old, rewards, 0.0)
    assert float(without.bound[0]) == -math.inf and float(without.surrogate[0]) == 0
    still = gains(old, old, old, rewards, 0.0)
    assert float(still.bound[0]) == 0.0


def test_total_variation_is_the_largest_difference_of_an_event():
    policy, other, _, _ = cases(50, outcomes=4)
    events = np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1)
    largest = np.abs((policy - other) @ events).max(-1)
    np.testing.assert_allclose(total_variation(jnp.log(policy), jnp.log(other)), largest, atol=1e-12)


@pytest.mark.parametrize(("refresh", "passes"), [(1, 1), (10, 1), (1, 10), (3, 4)])
def test_ages_by_running_the_schedule(refresh, passes):
    """A trainer of version numbers: take what the sampler holds, update ``passes`` times, refresh every ``refresh`` batches."""
    trained, ages, used, batch = 0, [], [], 0
    while trained < 100:
        if batch % refresh == 0:
            sampler = trained
        for k in range(passes):
            ages.append(trained - sampler)
            used.append(k)
            trained += 1
        batch += 1
    age = update_staleness(100, refresh=refresh, updates_per_batch=passes)
    assert age.updates.tolist() == ages[:100]
    assert age.passes.tolist() == used[:100]


def test_schedules_that_make_no_sense_are_refused():
    for name, options in (
        ("refresh", {"refresh": 0}),
        ("updates_per_batch", {"updates_per_batch": -1}),
        ("num_updates", {"num_updates": -1}),
    ):
        with pytest.raises(ValueError, match=name):
            update_staleness(**({"num_updates": 3} | options))
