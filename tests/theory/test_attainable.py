"""Where networks of limited capacity end: against enumerated policies, the integrated flow, mpmath and proven limits."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import networks
from grpo_jax.theory import (
    Group,
    MeanOnly,
    NoisyVerifier,
    Whitened,
    attainable_point,
    attainable_points,
    flow_point,
    omega,
)

pytestmark = pytest.mark.usefixtures("double")

WEIGHTS = (
    Group(8, epsilon=1e-4),
    Group(8, dynamic_sampling=True),
    Whitened(0.0),
    NoisyVerifier(Group(8), tpr=0.1, fpr=0.9),
)
P_REF = np.asarray([1e-4, 0.01, 0.2, 0.5, 0.9, 0.999])


def logit(p):
    return jnp.log(p) - jnp.log1p(-p)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_everything_explained_is_the_table_and_nothing_the_reference(weights):
    for beta in (0.3, 3.0):
        table = flow_point(P_REF, beta=beta, weights=weights)
        full, none = (attainable_point(P_REF, beta=beta, weights=weights, r2=r2) for r2 in (1.0, 0.0))
        assert jnp.abs(full - table).max() < 1e-15
        assert jnp.abs(none - P_REF).max() < 1e-15
        # Prompts that share nothing are each alone, whatever share is explained.
        shares = jnp.asarray([1.0, 0.9, 0.4, 0.0, 0.7, 0.2])
        alone = attainable_point(P_REF, beta=beta, weights=weights, r2=shares)
        coupling = jnp.diag(shares * P_REF * (1 - P_REF))
        together = attainable_points(P_REF, beta=beta, weights=weights, coupling=coupling)
        assert jnp.abs(alone - together).max() < 1e-11


@given(p_ref=st.floats(1e-4, 0.999), beta=st.floats(0.1, 20), r2=st.floats(0.01, 0.99), epsilon=st.floats(1e-6, 0.1))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_it_is_the_first_solution_above_the_reference(p_ref, beta, r2, epsilon):
    end = float(attainable_point(logit(p_ref), beta=beta, weights=Whitened(epsilon), r2=r2, logits=True))
    start = mp.log(mp.mpf(p_ref)) - mp.log1p(-mp.mpf(p_ref))

    def missing(x):
        v, v_ref = (mp.exp(-abs(y)) / (1 + mp.exp(-abs(y))) ** 2 for y in (x, start))
        share = mp.mpf(r2) * v / (mp.mpf(r2) * v + (1 - mp.mpf(r2)) * v_ref)
        return share / mp.sqrt(v + mp.mpf(epsilon)) / mp.mpf(beta) - (x - start)

    slack = mp.mpf(1e-12) * (1 + abs(end))
    assert missing(mp.mpf(end) - slack) > 0 > missing(mp.mpf(end) + slack)
    assert all(missing(start + (end - slack - start) * k / 100) > 0 for k in range(100))


@pytest.mark.parametrize("weights", [Group(8, epsilon=1e-4), MeanOnly()], ids=repr)
def test_the_flow_of_the_gaussian_model_ends_there(weights):
    """Log-linear, one feature a prompt, Gaussian given success: Euler steps of the natural gradient and of the plain one."""
    p_ref, r2, beta = jnp.asarray([0.02, 0.2, 0.6]), jnp.asarray([0.3, 0.6, 0.9]), 0.8
    # Means 1 apart, variance 1/M within: tilting by θ moves the log-odds by θ.
    within = (1 - r2) * p_ref * (1 - p_ref) / r2

    def drift(theta):
        v = networks.variance(logit(p_ref) + theta)
        return weights.omega(logit(p_ref) + theta) / beta * v - (within + v) * theta, within + v

    def step(ends, _):
        natural, plain = ends
        ahead, fisher = drift(natural)
        return (natural + 0.02 * ahead / fisher, plain + 0.05 / (within + 0.25) * drift(plain)[0]), None

    reached, _ = jax.lax.scan(step, (jnp.zeros(3), jnp.zeros(3)), None, length=4000)
    end = attainable_point(p_ref, beta=beta, weights=weights, r2=r2)
    for theta in reached:
        np.testing.assert_allclose(jax.nn.sigmoid(logit(p_ref) + theta), end, atol=1e-6)


def test_enumerated_gaussian_features_end_there():
    """Two prompts sharing two features on a fine grid of outcomes, Gaussian within successes and failures."""
    side = np.linspace(-6, 6, 61)
    x, y = (z.ravel() for z in np.meshgrid(side, side))
    density, p_ref = np.exp(-(x**2 + y**2) / 2), np.asarray([0.2, 0.6])
    shift = np.asarray([[1.2, 0.3], [-0.4, 0.8]])  # of the features of a success, per prompt
    features = np.stack([np.concatenate([np.stack([x, y], -1) + d, np.stack([x, y], -1)]) for d in shift])
    rewards = np.repeat([[1.0] * x.size + [0.0] * x.size], 2, axis=0)
    prior = np.stack([np.log(np.concatenate([p * density, (1 - p) * density])) for p in p_ref])
    toy = networks.Toy(*map(jnp.asarray, (prior, rewards, features, np.zeros(2))))
    for beta in (0.5, 2.0):
        found = networks.regression(toy, networks.WEIGHTS)
        theta, _ = networks.rest(toy, beta, networks.WEIGHTS)
        reached = jax.nn.sigmoid(networks.state_of(toy, theta).logit)
        end = attainable_points(jnp.asarray(p_ref), beta=beta, weights=networks.WEIGHTS, coupling=found.coupling)
        np.testing.assert_allclose(reached, end, atol=2e-6)
        apart = flow_point(jnp.asarray(p_ref), beta=beta, weights=networks.WEIGHTS)
        assert jnp.abs(reached - apart).max() > 0.05


@pytest.mark.parametrize(("rank", "seed"), [(3, 0), (8, 2)])
def test_the_error_in_powers_of_beta_is_the_stated_one(rank, seed):
    toy = networks.make_toy(seed, prompts=1, outcomes=20, rank=rank, signal=2.0)
    state, found = networks.state_of(toy, toy.start), networks.regression(toy, networks.WEIGHTS)
    (reference,), (weight,), (r,) = state.logit, state.policy, toy.rewards
    p, v, r2 = jax.nn.sigmoid(reference), networks.variance(reference), found.r2
    slope = jnp.einsum("n,nd->d", weight * (r - p), toy.inputs[0])
    g = (toy.inputs[0] - (weight @ toy.inputs[0])[None]) @ networks.natural(toy, toy.start, slope[None])[0]
    assert float(weight @ g**2) == pytest.approx(float(r2 * v), rel=1e-6)
    e = g - r2 * (r - p)
    within = [(weight * mask * e**2).sum() / (weight * mask).sum() for mask in (r, 1 - r)]
    stated = 1.5 * (1 - 2 * r2) * (within[0] - within[1]) - weight @ e**3 / v
    ratios = []
    for beta in (100.0, 200.0):
        theta, _ = networks.rest(toy, beta, networks.WEIGHTS)
        end = attainable_point(reference, beta=beta, weights=networks.WEIGHTS, r2=r2, logits=True)
        pull = omega(reference, networks.WEIGHTS, logits=True) / beta
        ratios.append(float((networks.state_of(toy, theta).logit[0] - end) / (pull**2 * stated)))
    assert abs(ratios[1] - 1) < 0.6 * abs(ratios[0] - 1) < 0.1  # the rest is one more power of 1/β


def test_derivatives_are_those_of_finite_differences():
    def end(p_ref, beta, r2):
        return attainable_point(p_ref, beta=beta, weights=Group(8), r2=r2)

    at = (0.2, 1.0, 0.4)
    exact = jax.grad(end, argnums=(0, 1, 2))(*at)
    for k, slope in enumerate(exact):
        low, high = ([x + (h if j == k else 0.0) for j, x in enumerate(at)] for h in (-1e-5, 1e-5))
        assert float(slope) == pytest.approx(float(end(*high) - end(*low)) / 2e-5, rel=1e-7)
    for r2, h in ((0.0, 1e-6), (1.0, -1e-6)):  # from inside, at either end
        slope = jax.grad(end, argnums=2)(0.2, 1.0, r2)
        assert float(slope) == pytest.approx(float(end(0.2, 1.0, r2 + h) - end(0.2, 1.0, r2)) / h, rel=1e-4)


def test_ends_and_shapes():
    ends = attainable_point(jnp.asarray([0.0, 1.0]), beta=1.0, weights=Group(8), r2=0.5)
    assert ends.tolist() == [0.0, 1.0]
    together = attainable_points(jnp.asarray([0.0, 0.3, 1.0]), beta=1.0, weights=Group(8), coupling=jnp.eye(3) * 0.1)
    assert together[::2].tolist() == [0.0, 1.0]
    assert jnp.isnan(attainable_point(jnp.full(2, 0.3), beta=1.0, weights=Group(8), r2=jnp.asarray([-0.1, 1.1]))).all()
    shaped = attainable_point(jnp.full((2, 3), 0.3), beta=1.0, weights=Group(8), r2=0.5)
    assert shaped.shape == (2, 3) and (shaped == shaped[0, 0]).all()
    with jax.enable_x64(False):
        single = attainable_point(jnp.float32(0.2), beta=1.0, weights=Group(8), r2=0.5)
        assert single.dtype == jnp.float32 and float(single) == pytest.approx(0.4364, abs=5e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "positive"),
        ({"p_ref": [0.2, 1.2]}, "a probability"),
        ({"p_ref": 0.2}, "one probability per prompt"),
        ({"coupling": [[0.1]]}, "2 by 2"),
        ({"coupling": [[0.1, 0.05], [0.0, 0.1]]}, "symmetric"),
        ({"coupling": [[0.5, 0.0], [0.0, 0.1]]}, r"explains 0.476 to 3.125 of the rewards' variance"),
        ({"coupling": [[0.01, 0.1], [0.1, 0.01]]}, "not in"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    inputs = {"p_ref": [0.2, 0.3], "beta": 1.0, "coupling": [[0.1, 0.0], [0.0, 0.1]]} | changes
    p_ref, coupling = jnp.asarray(inputs["p_ref"]), jnp.asarray(inputs["coupling"])
    with pytest.raises(ValueError, match=message):
        attainable_points(p_ref, beta=inputs["beta"], weights=Group(8), coupling=coupling)
