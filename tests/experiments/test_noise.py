"""The law of noise: its gradients are the trainer's, its objective is theirs, and runs on a small policy obey it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import noise

SETTING = {"beta": 1.0, "group_size": 4}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def policy():
    with jax.enable_x64(True):
        return noise.random_policy(3, prompts=1, outcomes=4, rank=2)


def every_group(policy, theta):
    """Probabilities of all groups of one prompt, and the gradient of each."""
    groups = np.array(list(itertools.product(range(4), repeat=4)))
    weights = np.exp(np.asarray(policy.logps(theta))[0][groups].sum(1))
    of_group = jax.jit(jax.vmap(lambda outcomes: noise.gradient(policy, theta, outcomes[None], **SETTING)))
    return weights, np.asarray(of_group(jnp.asarray(groups)))


def test_the_mean_gradient_is_that_of_the_objective(policy):
    """Enumerated over all groups, against the derivative of a sum over outcomes; so J is what sampled groups climb."""
    theta = jnp.array([0.4, -0.3])
    weights, gradients = every_group(policy, theta)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    slope = jax.grad(lambda t: noise.exact(policy, t, **SETTING).objective)(theta)
    np.testing.assert_allclose(weights @ gradients, slope, atol=1e-6)  # the loss is float32
    assert np.abs(slope).max() > 0.05


def test_the_pieces_of_a_policy(policy):
    """KL is what buys success and what does not; the reference has none; the rest point is one, and no start beats it."""
    zero = noise.exact(policy, jnp.zeros(2), **SETTING)
    assert np.abs(np.array([zero.kl, zero.excess, zero.objective])).max() < 1e-12
    rest = noise.rest_point(policy, **SETTING)
    best = noise.exact(policy, rest, **SETTING)
    for theta in np.random.default_rng(0).normal(size=(20, 2)):
        other = noise.exact(policy, jnp.asarray(theta), **SETTING)
        assert other.objective < best.objective
        assert 0 <= other.excess < other.kl
    table = noise.tabular(policy)
    free = noise.exact(table, noise.rest_point(table, **SETTING), **SETTING)
    assert free.excess < 1e-9 and free.objective > best.objective + 1e-3


def test_runs_lose_what_the_law_says(policy):
    """SGD: η tr(C)/4 with C enumerated, in proportion to η and 1/B; and θ·∇J = −η E‖g‖²/2 at any rate."""
    rest = noise.rest_point(policy, **SETTING)
    weights, gradients = every_group(policy, rest)
    covariance = (weights[:, None] * gradients).T @ gradients
    sampled = noise.covariance(policy, rest, groups=2, draws=4000, **SETTING)
    np.testing.assert_allclose(sampled, covariance / 2, atol=0.05 * np.trace(covariance))
    hessian = noise.curvature(policy, rest, **SETTING)
    slowest = np.linalg.eigvalsh(hessian).min()
    keys, lost = jax.random.split(jax.random.key(0), 256), {}
    for groups, rate in ((1, 0.05), (1, 0.1), (2, 0.1)):
        count = round(6 / (rate * slowest))
        found = noise.trained(policy, rest, keys, rate, count, optimizer="SGD", groups=groups, **SETTING)
        lost[groups, rate] = float((noise.exact(policy, rest, **SETTING).objective - found["objective"]).mean())
        assert lost[groups, rate] == pytest.approx(noise.law("SGD", rate, covariance / groups), rel=0.15)
        averaged = noise.exact(policy, rest, **SETTING).objective - found["averaged objective"].mean()
        by_law = noise.average_law(count, hessian, covariance / groups)
        assert averaged == pytest.approx(by_law, rel=0.3)
        assert by_law < 0.5 * lost[groups, rate]
        balance = np.asarray(found["virial"] + rate * found["squared"] / 2)
        assert abs(balance.mean()) < 4 * balance.std() / np.sqrt(len(keys))
    assert lost[1, 0.1] / lost[1, 0.05] == pytest.approx(2, rel=0.15)
    assert lost[1, 0.1] / lost[2, 0.1] == pytest.approx(2, rel=0.15)


def test_adam_has_the_law_of_its_own():
    """Per parameter it divides by the spread of the gradient: the sum of spreads, so that four times the batch halve it."""
    covariance = np.diag([4.0, 9.0])
    assert noise.law("SGD", 0.1, covariance) == pytest.approx(0.1 * 13 / 4)
    assert noise.law("Adam", 0.1, covariance) == pytest.approx(0.1 * 5 / 4)
    assert noise.law("Adam", 0.1, covariance / 4) == pytest.approx(0.1 * 2.5 / 4)
