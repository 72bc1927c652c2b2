"""Local bounds, bounds of iterates and errors, against mpmath and real orbits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.theory import (
    Group,
    MeanOnly,
    NoisyVerifier,
    Whitened,
    WhitenedStd,
    accumulated_error,
    fixed_points,
    iterate,
    iterate_bounds,
    local_beta_bound,
    omega,
    success_map,
)
from tests.exact_theory import mp

pytestmark = pytest.mark.usefixtures("double")

WEIGHTS = [Whitened(1e-5), WhitenedStd(1e-3), MeanOnly(), Group(8), NoisyVerifier(Whitened(1e-3), 0.95, 0.05)]


def test_local_bound_in_its_closed_form():
    """v |2p − 1| / (2 (v + ε)^1.5)."""
    rng = np.random.default_rng(0)
    p, epsilon = rng.uniform(0, 1, 50), np.exp(rng.uniform(-12, 0, 50))
    v = p * (1 - p)
    bounds = jax.vmap(lambda p, e: local_beta_bound(p, weights=Whitened(e)))(jnp.asarray(p), jnp.asarray(epsilon))
    np.testing.assert_allclose(bounds, v * np.abs(2 * p - 1) / (2 * (v + epsilon) ** 1.5), rtol=1e-12, atol=1e-14)
    assert float(local_beta_bound(0.5, weights=Whitened(1e-5))) == 0.0
    assert local_beta_bound(jnp.asarray([0.0, 1.0]), weights=Whitened(1e-5)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_a_fixed_point_attracts_exactly_above_its_bound(weights):
    for p_ref in (1e-3, 0.2):
        for beta in (0.6, 1.2, 3.0):
            for point in fixed_points(p_ref, beta=beta, weights=weights):
                bound = float(local_beta_bound(point.logit, weights=weights, logits=True))
                assert point.stable == (beta > bound)
                start = point.logit + 1e-7
                after = float(
                    iterate(math.log(p_ref / (1 - p_ref)), 6, beta=beta, weights=weights, p_0=start, logits=True)[-1]
                )
                shrunk = abs(after - point.logit) < 1e-7
                assert shrunk == point.stable or abs(abs(point.multiplier) - 1) < 1e-3


NORMALISERS = [
    Whitened(0.0),
    WhitenedStd(0.1),
    MeanOnly(),
    Group(8, 1),
    Group(5, scale="mean"),
    Group(5, baseline="none"),
    Group(4, dynamic_sampling=True),
    Group(5, scale="mean", dynamic_sampling=True),
    Group(5, baseline="none", dynamic_sampling=True),
    NoisyVerifier(WhitenedStd(1e-3), 0.9, 0.1),
    NoisyVerifier(Whitened(0.0), 0.2, 0.7),
    NoisyVerifier(Group(8, baseline="none"), 0.6, 0.3),
    NoisyVerifier(Group(5, scale="mean", dynamic_sampling=True), 0.9, 0.2),
]


def test_bounds_of_one_iterate_are_the_range_of_omega():
    """Nothing is outside, for every kind of normaliser, and what is not infinite is reached."""
    outside, loose = [], []

    @jax.jit
    def ranges(weights):
        values = weights.omega(jnp.linspace(-45, 45, 3601))
        return *iterate_bounds(0.0, beta=1.0, weights=weights, logits=True), values.min(), values.max()

    for weights in NORMALISERS:
        low, high, least, most = (float(x) for x in ranges(weights))
        slack = 1e-9 * (1 + abs(least))
        if least < low - slack or most > high * (1 + 1e-9) + 1e-9:
            outside.append((weights, (low, high), (least, most)))
        elif least > low + 0.02 * (1 + abs(low)) or (math.isfinite(high) and most < high - 0.02 * (1 + abs(high))):
            loose.append((weights, (low, high), (least, most)))
    assert outside == []
    # A polynomial is only known to lie between its coefficients.
    assert [w for w, *_ in loose if not (isinstance(w, Group) and w.baseline == "none")] == []


@pytest.mark.parametrize("alpha", [1e-13, 1e-9, 1e-5, 0.1, 0.999, 1.0, 0.0])
def test_bounds_for_a_share_of_the_reference_that_is_small(alpha):
    """Σ_{j<n} (1 − α)^j = (1 − (1 − α)^n)/α, which cancels; mean-only iterates lie on both bounds."""
    n = 100
    total = mp.fsum((1 - mp.mpf(alpha)) ** j for j in range(n))
    for bound in iterate_bounds(-2.0, n, beta=0.5, weights=MeanOnly(), alpha=alpha, logits=True):
        assert float(bound) == pytest.approx(float(-2 + 2 * total), rel=1e-12)
    low = iterate_bounds(jnp.float32(-2.0), n, beta=0.5, weights=MeanOnly(), alpha=alpha, logits=True)[0]
    assert low.dtype == jnp.float32 and float(low) == pytest.approx(float(-2 + 2 * total), rel=1e-5)


def test_the_lower_bound_is_a_mean_only_orbit():
    """GRPO at β is never below Dr. GRPO at β√(1 + 4ε)/2, reached at p_1 = h(½)."""
    p_ref = jnp.asarray([1e-5, 0.2, 0.8])
    low, high = iterate_bounds(p_ref, beta=1.3, weights=Whitened(0.02))
    other = success_map(p_ref, p_ref, beta=1.3 * math.sqrt(1.08) / 2, weights=MeanOnly())
    np.testing.assert_allclose(low, other, rtol=1e-13)
    np.testing.assert_allclose(low, success_map(0.5, p_ref, beta=1.3, weights=Whitened(0.02)), rtol=1e-13)
    np.testing.assert_allclose(high, success_map(1.0, p_ref, beta=1.3, weights=Whitened(0.02)), rtol=1e-13)


def test_accumulated_error_is_its_recursion():
    rng = np.random.default_rng(1)
    errors, slope = rng.uniform(0, 1, (9, 3)), rng.uniform(0, 1.2, 3)
    expected = [
        [math.fsum(slope[i] ** (n - j) * errors[j, i] for j in range(n + 1)) for i in range(3)] for n in range(9)
    ]
    np.testing.assert_allclose(accumulated_error(jnp.asarray(errors), jnp.asarray(slope)), expected, rtol=1e-13)
    np.testing.assert_allclose(accumulated_error(jnp.asarray(errors), 1.0), np.cumsum(errors, 0), rtol=1e-13)
    assert accumulated_error(jnp.asarray(errors, jnp.float32), 0.5).dtype == jnp.float32
    steady = accumulated_error(jnp.full(200, 0.1), 0.8)
    assert float(steady[-1]) == pytest.approx(0.5, rel=1e-12)


def test_accumulated_error_of_whole_numbers():
    assert accumulated_error(jnp.asarray([1, 1, 1]), 0.5).tolist() == [1.0, 1.5, 1.75]


def test_total_variations_that_add_up():
    """κ = 1: the sum of the distances that wrong steps add bounds |p̃ − p| where the map does not expand."""
    rng = np.random.default_rng(2)
    p, wrong, weights = 0.5, 0.5, Whitened(0.05)
    deltas = rng.uniform(0, 2e-3, 40)
    bounds = accumulated_error(jnp.asarray(deltas), 1.0).tolist()
    for delta, bound in zip(deltas, bounds, strict=True):
        p, wrong = (float(success_map(x, 0.5, beta=4.0, weights=weights)) for x in (p, wrong))
        wrong += delta
        assert abs(wrong - p) <= bound


def test_omega_min_of_a_group_is_at_one_half():
    low, high = iterate_bounds(0.0, beta=1.0, weights=Group(16), logits=True)
    assert float(low) == pytest.approx(float(omega(0.5, Group(16))), rel=1e-13)
    assert float(high) == pytest.approx(math.sqrt(15), rel=1e-13)


def test_bounds_have_their_slope_in_alpha_also_at_one():
    """d/dα Σ_{j<n} (1 − α)^j = −1 at α = 1 and −n(n − 1)/2 at 0; mean-only at β = 1 has the sum alone."""
    slope = jax.grad(lambda a: iterate_bounds(0.0, 5, beta=1.0, weights=MeanOnly(), alpha=a, logits=True)[0])
    assert float(slope(0.5)) == pytest.approx(-(1 + 2 * 0.5 + 3 * 0.25 + 4 * 0.125), rel=1e-12)
    assert float(slope(1.0)) == pytest.approx(-1, rel=1e-12)
    assert float(slope(0.0)) == pytest.approx(-10, rel=1e-12)
