"""What finite groups waste, against enumeration of all groups, quadrature, closed forms and a simulation of redrawing."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.theory import dead_fraction, dead_fraction_of_counts, groups_per_live_group, mean_dead_fraction
from tests.exact_theory import mp

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_dead_groups_by_enumeration(size):
    for p in (0.0, 0.03, 0.5, 0.81, 1.0):
        dead = sum(
            math.prod(p if r else 1 - p for r in rewards)
            for rewards in itertools.product((0, 1), repeat=size)
            if len(set(rewards)) == 1
        )
        assert float(dead_fraction(p, size)) == pytest.approx(dead, rel=1e-14)
        live = groups_per_live_group(p, size)
        assert float(live) == (math.inf if dead > 1 - 1e-15 else pytest.approx(1 / (1 - dead), rel=1e-13))


def test_dead_groups_of_counts_by_enumeration():
    """All groups that can be drawn from the trials; and on average over measurements, exactly p^G + (1 − p)^G."""
    trials, size, p = 6, 3, 0.3
    shares = [float(dead_fraction_of_counts(c, trials, size)) for c in range(trials + 1)]
    for successes, share in enumerate(shares):
        drawn = [*itertools.combinations([1] * successes + [0] * (trials - successes), size)]
        assert share == pytest.approx(sum(len(set(group)) == 1 for group in drawn) / len(drawn), rel=1e-14)
    chances = [math.comb(trials, c) * p**c * (1 - p) ** (trials - c) for c in range(trials + 1)]
    assert sum(map(math.prod, zip(chances, shares, strict=True))) == pytest.approx(p**size + (1 - p) ** size, rel=1e-14)
    mixed = dead_fraction_of_counts([1, 1], [4, 2], 3)  # three of two trials cannot be drawn
    np.testing.assert_allclose(mixed, [0.25, 0.25], rtol=1e-14)


def test_live_groups_where_nearly_all_are_dead():
    """1/(G p) for small p, on both sides, without a difference of ones."""
    logits = jnp.asarray([-230.0, -50.0, 50.0, 230.0])
    draws = groups_per_live_group(logits, 8, logits=True)
    np.testing.assert_allclose(draws, jnp.exp(jnp.abs(logits)) / 8, rtol=1e-13)


def test_drawing_until_the_group_lives_takes_that_many_draws():
    rng = np.random.default_rng(0)
    k = rng.binomial(6, 0.08, 400_000)
    draws = len(k) / ((k > 0) & (k < 6)).sum()
    assert float(groups_per_live_group(0.08, 6)) == pytest.approx(draws, rel=0.01)


@pytest.mark.parametrize("size", [1, 4, 8, 64])
def test_mean_dead_fraction_by_beta_functions(size):
    for a, b in ((0.5, 0.5), (2.0, 0.7), (1.0, 1.0), (0.2, 9.0), (30.0, 4.0)):
        target = (mp.beta(a + size, b) + mp.beta(a, b + size)) / mp.beta(a, b)
        assert float(mean_dead_fraction(a, b, size)) == pytest.approx(float(target), rel=1e-13)
    assert float(mean_dead_fraction(1.0, 1.0, size)) == pytest.approx(2 / (size + 1), rel=1e-14)
    by_quadrature = mp.quad(lambda p: 6 * p * (1 - p) * (p**size + (1 - p) ** size), [0, 1])  # p ~ Beta(2, 2)
    assert float(mean_dead_fraction(2.0, 2.0, size)) == pytest.approx(float(by_quadrature), rel=1e-13)
    # A prior that is a point is the point.
    assert float(mean_dead_fraction(3e9, 7e9, size)) == pytest.approx(float(dead_fraction(0.3, size)), rel=1e-6)


def test_table_of_dead_fractions():
    for size, expected in ((4, 0.547), (8, 0.393), (16, 0.280), (32, 0.199), (64, 0.141)):
        assert float(mean_dead_fraction(0.5, 0.5, size)) == pytest.approx(expected, abs=5.1e-4)


def test_shapes_types_and_gradients():
    a = jnp.asarray([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]])
    assert mean_dead_fraction(a, 2.0, 8).shape == (2, 3)
    rows = jax.vmap(lambda x: mean_dead_fraction(x, 2.0, 8))(a)
    np.testing.assert_allclose(rows, mean_dead_fraction(a, 2.0, 8), rtol=1e-14)
    slope = jax.jit(jax.grad(lambda x: mean_dead_fraction(x, 2.0, 8)))(1.5)
    high, low = (float(mean_dead_fraction(1.5 + h, 2.0, 8)) for h in (1e-6, -1e-6))
    assert float(slope) == pytest.approx((high - low) / 2e-6, rel=1e-7)
    for f in (dead_fraction, groups_per_live_group):
        slope = float(jax.grad(lambda p, f=f: f(p, 8))(0.3))
        assert slope == pytest.approx(float(f(0.3 + 1e-6, 8) - f(0.3 - 1e-6, 8)) / 2e-6, rel=1e-7)
        assert f(jnp.float32([0.1, 0.5]), 8).dtype == jnp.float32
    for end in (0.0, 1.0):
        assert math.isfinite(float(jax.grad(lambda p: dead_fraction(p, 8))(end)))


def test_mean_dead_fraction_keeps_float32():
    assert mean_dead_fraction(jnp.float32(0.5), jnp.float32(0.5), 8).dtype == jnp.float32
