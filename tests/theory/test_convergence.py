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
    flip_window,
    flow_point,
    iterate,
    iterate_bounds,
    limit_interval,
    limit_point,
    local_beta_bound,
    omega,
    optimal_log_policy,
    steepest_slope,
    success_map,
    total_variation,
    uniform_beta_bound,
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


def test_one_beta_for_all_prompts_attracts_above_the_uniform_bound():
    """Remark 2: the fixed points of all prompts attract exactly if β > max B(p*), which is so above every flip window."""
    rng = np.random.default_rng(4)
    weights, decided = Whitened(1e-5), []
    for _ in range(8):
        p_ref = 10 ** rng.uniform(-3.5, -0.1, 5)
        beta = float(10 ** rng.uniform(-0.5, 1.3))
        passes = beta > float(uniform_beta_bound(jnp.asarray(p_ref), beta=beta, weights=weights))
        ends = flow_point(jnp.log(p_ref / (1 - p_ref)), beta=beta, weights=weights, logits=True).tolist()
        nearest = [
            min(fixed_points(p, beta=beta, weights=weights), key=lambda point, end=end: abs(point.logit - end))
            for p, end in zip(p_ref, ends, strict=True)
        ]
        assert passes == all(abs(point.multiplier) < 1 for point in nearest)
        windows = [flip_window(p, weights=weights) for p in p_ref]
        assert passes == (not any(window and window[0] < beta < window[1] for window in windows))
        decided.append(passes)
    assert {True, False} == set(decided)


def test_the_steepest_slope_on_a_dense_grid():
    for epsilon in (1e-5, 0.1):
        for p_ref, beta in ((0.5, 3.0), (0.01, 0.7), (0.9, 20.0)):
            p = 1 / (1 + np.exp(-np.linspace(-20, 20, 400_001)))
            v = p * (1 - p)
            mapped = 1 / (1 + (1 - p_ref) / p_ref * np.exp(-1 / (beta * np.sqrt(v + epsilon))))
            dense = np.abs(mapped * (1 - mapped) * (2 * p - 1) / (2 * beta * (v + epsilon) ** 1.5)).max()
            found = float(steepest_slope(p_ref, beta=beta, weights=Whitened(epsilon)))
            assert found == pytest.approx(dense, rel=1e-7)
    assert float(steepest_slope(0.3, beta=1.0, weights=MeanOnly())) == 0
    assert math.isinf(float(steepest_slope(0.3, beta=1.0, weights=WhitenedStd(1e-2))))


@pytest.mark.parametrize("p_ref", [0.1, 0.5])
def test_the_sufficient_condition_of_table_1_is_vacuous_for_whitening(p_ref):
    """sup |h'| < 1 holds above v_ref/(2ε^1.5), where p* is p_ref, and below β_c, where p* is 1; nowhere between."""
    epsilon, weights = 1e-5, Whitened(1e-5)
    above = p_ref * (1 - p_ref) / (2 * epsilon**1.5)
    for beta, holds in ((above * 1.01, True), (above * 0.99, False)):
        assert (float(steepest_slope(p_ref, beta=beta, weights=weights)) < 1) == holds
    assert float(flow_point(p_ref, beta=above, weights=weights)) - p_ref < 1e-6
    betas = jnp.geomspace(0.1, above * 0.99, 400)
    holds = steepest_slope(jnp.full(400, p_ref), beta=betas, weights=weights) < 1
    ends = flow_point(jnp.full(400, p_ref), beta=betas, weights=weights)
    assert bool(holds.any()) and bool((ends[holds] > 0.999).all()) and not bool((jnp.diff(holds.astype(int)) > 0).any())
    # While p* attracts at every β: the condition is about the map everywhere, not about where it goes.
    assert all(limit_point(p_ref, beta=beta, weights=weights).kind == "fixed" for beta in (2.0, 10.0, 1000.0))


def test_for_groups_the_sufficient_condition_says_something():
    """Groups of 8 contract everywhere, at every β, from p_ref = 0.1 on; so errors of iterations do not add up there."""
    betas, p_ref = (x.reshape(-1) for x in jnp.meshgrid(jnp.geomspace(0.05, 100, 100), jnp.asarray([0.1, 0.3, 0.5])))
    slopes = steepest_slope(p_ref, beta=betas, weights=Group(8))
    assert float(slopes.max()) == pytest.approx(0.9, abs=0.02)
    p = wrong = 0.1
    worst, kappa = 0.0, float(steepest_slope(0.1, beta=1.0, weights=Group(8)))
    rng = np.random.default_rng(0)
    errors = rng.uniform(-1e-2, 1e-2, 60)
    bounds = accumulated_error(jnp.abs(jnp.asarray(errors)), kappa).tolist()
    for error, bound in zip(errors, bounds, strict=True):
        p, wrong = (float(success_map(x, 0.1, beta=1.0, weights=Group(8))) for x in (p, wrong))
        wrong += error
        assert abs(wrong - p) <= bound + 1e-15
        worst = max(worst, abs(wrong - p))
    assert worst > 5e-3


def test_inexact_policies_end_within_their_total_variations():
    """Theorem 10 on explicit policies: steps of the tilt, each then mixed with a random policy."""
    rng = np.random.default_rng(5)
    rewards, beta, weights = jnp.asarray([1, 0, 0, 1, 0]), 4.0, Whitened(0.05)
    log_ref = jnp.log(jnp.asarray([0.1, 0.3, 0.2, 0.2, 0.2]))
    right = rewards.astype(float)
    exact = inexact = log_ref
    apart, deltas = 0.0, []
    for n in range(40):
        exact, inexact = (
            optimal_log_policy(log_ref, rewards, p_old=float(jnp.exp(x) @ right), beta=beta, weights=weights, log_old=x)
            for x in (exact, inexact)
        )
        share = 0.05 * 0.8**n
        inexact = jnp.log((1 - share) * jnp.exp(inexact) + share * jnp.asarray(rng.dirichlet(jnp.ones(5))))
        distance = float(total_variation(inexact, exact))
        deltas.append(max(distance - apart, 0.0))
        apart = distance
    p_star = float(flow_point(0.3, beta=beta, weights=weights))
    low, high = limit_interval(p_star, jnp.asarray(deltas))
    end = float(jnp.exp(inexact) @ right)
    assert float(low) - 1e-9 <= end <= float(high) + 1e-9 and 0 < float(high - low) < 0.5


def test_the_constant_of_theorem_10_is_attained():
    """All the mass δ* that may move goes from wrong to correct answers: p* + δ*, and no event is further away."""
    exact = jnp.asarray([0.25, 0.35, 0.4])
    deltas = jnp.asarray([0.1, 0.05, 0.02])
    moved = exact + jnp.asarray([0.17, 0.0, -0.17])
    assert float(total_variation(jnp.log(moved), jnp.log(exact))) == pytest.approx(float(deltas.sum()))
    low, high = limit_interval(0.25, deltas)
    assert float(high) == pytest.approx(float(moved[0])) and float(low) == pytest.approx(0.08)
    cut = limit_interval(jnp.asarray([0.05, 0.95]), deltas)
    np.testing.assert_allclose(jnp.stack(cut), [[0.0, 0.78], [0.22, 1.0]], atol=1e-12)
    inside = limit_interval(jnp.log(jnp.asarray([0.25, 0.95]) / jnp.asarray([0.75, 0.05])), deltas, logits=True)
    np.testing.assert_allclose(jax.nn.sigmoid(jnp.stack(inside)), [[0.08, 0.78], [0.42, 1.0]], atol=1e-12)
    assert float(limit_interval(400.0, jnp.asarray([0.1]), logits=True)[0]) == pytest.approx(math.log(9))
