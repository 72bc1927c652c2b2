"""The exact iteration of the k3 loss against its objective, maximised by search, and against what it does when iterated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.theory import (
    Group,
    MeanOnly,
    Whitened,
    WhitenedStd,
    forward_kl_fixed_point,
    forward_kl_flip_limit,
    forward_kl_multiplier,
    forward_kl_orbit_end,
    forward_kl_success_map,
)

WEIGHTS = [Whitened(0.0), Whitened(1e-2), WhitenedStd(1e-3), MeanOnly(), Group(8, 1)]


def searched(p: float, p_ref: float, beta: float) -> float:
    """One exact iteration (whitened, ε = 0) by golden-section search of the objective itself."""
    pull = 1 / math.sqrt(p * (1 - p))

    def value(x: float) -> float:
        return pull * x + beta * (p_ref * math.log(x) + (1 - p_ref) * math.log(1 - x))

    low, high = 1e-12, 1 - 1e-12
    for _ in range(120):
        a, b = high - (high - low) * 0.6180339887498949, low + (high - low) * 0.6180339887498949
        low, high = (a, high) if value(a) < value(b) else (low, b)
    return (low + high) / 2


def test_one_exact_iteration_maximises_its_objective(double):
    for p, p_ref, beta in ((0.3, 0.2, 1.0), (0.01, 0.2, 3.0), (0.9, 1e-3, 0.5), (0.5, 0.97, 20.0)):
        mapped = float(forward_kl_success_map(p, p_ref, beta=beta, weights=Whitened(0.0)))
        assert mapped == pytest.approx(searched(p, p_ref, beta), abs=1e-7)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_its_fixed_point_and_multiplier(weights, double):
    rng = np.random.default_rng(0)
    p_ref, beta = jnp.asarray(rng.uniform(0.001, 0.99, 300)), jnp.asarray(np.exp(rng.uniform(-2, 2, 300)))
    star = forward_kl_fixed_point(p_ref, beta=beta, weights=weights)
    np.testing.assert_allclose(forward_kl_success_map(star, p_ref, beta=beta, weights=weights), star, rtol=1e-9)
    slope = jax.vmap(jax.grad(lambda p, r, b: forward_kl_success_map(p, r, beta=b, weights=weights)))(star, p_ref, beta)
    np.testing.assert_allclose(forward_kl_multiplier(star, beta=beta, weights=weights), slope, rtol=1e-6, atol=1e-9)


def test_exact_iterations_oscillate_below_their_limit_and_not_above(double):
    """The limit of whitening is (3 − 2√2)/6 = 2.86 %: not 1.004 %, and not never."""
    limit = (3 - 2 * math.sqrt(2)) / 6
    assert forward_kl_flip_limit(Whitened(0.0)) == pytest.approx(limit, rel=1e-9)
    assert forward_kl_flip_limit(MeanOnly()) is None and forward_kl_flip_limit(Group(3)) is None
    assert forward_kl_flip_limit(Whitened(1e-2)) < limit
    betas = jnp.linspace(1.0, 7.0, 61)
    for p_ref, expected in ((0.95 * limit, True), (1.01 * limit, False)):
        end = forward_kl_orbit_end(p_ref, beta=betas, weights=Whitened(1e-9))
        assert bool(((end.period > 1) & (end.high - end.low > 1e-4)).any()) is expected


def test_its_cycle_is_that_of_the_searched_objective():
    p = 1e-3
    for _ in range(60):
        p = searched(p, 1e-3, 3.0)
    cycle = sorted([p, searched(p, 1e-3, 3.0)])
    end = forward_kl_orbit_end(jnp.float32(1e-3), beta=3.0, weights=Whitened(0.0))
    assert [float(end.low), float(end.high)] == pytest.approx(cycle, rel=1e-3)
    assert int(end.period) == 2


def test_ends_stay_and_gradients_are_finite(double):
    options = {"beta": 2.0, "weights": Whitened(1e-4)}
    assert forward_kl_success_map(jnp.array([0.3, 0.3]), jnp.array([0.0, 1.0]), **options).tolist() == [0.0, 1.0]
    slopes = jax.vmap(jax.grad(lambda r: forward_kl_success_map(0.3, r, **options)))(jnp.array([0.0, 0.5, 1.0]))
    assert np.isfinite(slopes).all()
    far = forward_kl_success_map(-200.0, -230.0, logits=True, **options)
    assert float(far) == pytest.approx(math.log(49), rel=1e-6)  # β p = p(1 − p)/√ε: p = 1 − 2/100
    end = forward_kl_orbit_end(jnp.array([0.0, 0.2, 1.0]), beta=2.0, weights=Whitened(0.0))
    np.testing.assert_allclose(end.high, [0, 0.448679622641, 1], atol=1e-9)
    assert end.period.tolist() == [1, 1, 1]
