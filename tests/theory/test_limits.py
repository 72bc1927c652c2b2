"""Fixed points against mpmath and the paper's numbers, flow ends against the integrated flow, gradients, folds, ends."""

import math

import jax
import jax.numpy as jnp
import mpmath as mp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.theory import (
    Group,
    MeanOnly,
    Whitened,
    WhitenedStd,
    bernoulli_kl,
    beta_for_target,
    fixed_points,
    flow_point,
    forward_kl_fixed_point,
    iterate,
    limit_point,
    omega,
)

pytestmark = pytest.mark.usefixtures("double")


def test_reference_values_of_fixed_points():
    low, middle, high = fixed_points(0.2, beta=1.0, weights=Whitened(1e-5))
    assert low.p == pytest.approx(0.681283437786, rel=2e-12)
    assert low.multiplier == pytest.approx(0.389011012374, rel=3e-12)
    assert float(bernoulli_kl(low.p, 0.2)) == pytest.approx(0.541704688723, rel=3e-12)
    assert middle.p == pytest.approx(0.934713591453, rel=2e-12)
    assert high.logit == pytest.approx(314.841471656, rel=2e-12)
    assert (low.stable, middle.stable, high.stable) == (True, False, True)
    for value, expected in (
        (fixed_points(0.5, beta=5.0, weights=Whitened(1e-5))[0].p, 0.600694169590),
        (fixed_points(0.3, beta=2.0, weights=Whitened(1e-2))[0].p, 0.533809708510),
        (fixed_points(0.3, beta=2.0, weights=WhitenedStd(1e-4))[0].p, 0.538803324701),
        (fixed_points(0.2, beta=1.0, weights=Group(8))[0].p, 0.624862533686),
        (float(forward_kl_fixed_point(0.2, beta=2.0, weights=Whitened(0.0))), 0.448679622641),
    ):
        assert value == pytest.approx(expected, rel=3e-12)


def test_table_of_predicted_success_at_finite_groups():
    p_ref = jnp.asarray([0.01, 0.05, 0.2, 0.5])
    table = {
        (4, 1.0): (0.0528, 0.2157, 0.5576, 0.8416),
        (8, 1.0): (0.0950, 0.2778, 0.6249, 0.9142),
        (16, 1.0): (0.1276, 0.2993, 0.6543, 0.9703),
        (4, 2.0): (0.0233, 0.1090, 0.3604, 0.6935),
        (8, 2.0): (0.0344, 0.1385, 0.3910, 0.7311),
        (16, 2.0): (0.0493, 0.1567, 0.4010, 0.7501),
    }
    for (size, beta), row in table.items():
        assert jnp.abs(flow_point(p_ref, beta=beta, weights=Group(size)) - jnp.asarray(row)).max() < 5.1e-5
    dr = flow_point(p_ref, beta=1.0, weights=MeanOnly())
    assert jnp.allclose(dr, jax.nn.sigmoid(jnp.log(p_ref / (1 - p_ref)) + 1.0), rtol=1e-14)
    for size, expected in ((16, 0.4935), (8, 0.4730)):  # k3, finite group
        assert float(forward_kl_fixed_point(0.01, beta=1.0, weights=Group(size))) == pytest.approx(expected, abs=5.1e-5)


def test_limit_points_of_the_paper_and_its_cycles():
    white = Whitened(1e-5)
    for beta, p_ref, expected in ((1, 0.2, 0.6813), (5, 0.2, 0.2807), (5, 0.5, 0.6007), (5, 0.8, 0.8813)):
        limit = limit_point(p_ref, beta=beta, weights=white)
        assert (limit.kind, limit.period) == ("fixed", 1)
        assert limit.p == pytest.approx(expected, abs=5.1e-5)
    cycle = limit_point(1e-3, beta=3.0, weights=white)
    assert (cycle.kind, cycle.period) == ("cycle", 2)
    assert cycle.p == pytest.approx((0.00199486349927, 0.633011579742), rel=3e-12)
    damped = limit_point(1e-3, beta=6.0, weights=white, alpha=0.5)
    assert damped.kind == "fixed"
    assert damped.p == pytest.approx(0.015123, abs=5e-7)
    assert limit_point(0.2, beta=1.0, weights=white, p_0=0.95).p > 1 - 1e-9  # past the middle fixed point
    assert limit_point(1e-4, beta=5.0, weights=white, p_0=0.1).kind == "chaos"
    assert limit_point(0.2, beta=2.0, weights=MeanOnly(), alpha=0.25).p == pytest.approx(0.648785644284, rel=3e-12)
    assert limit_point(0.2, beta=1.0, weights=white, alpha=0.0) == ("fixed", 1.0, 1)
    assert [limit_point(end, beta=1.0, weights=white).p for end in (0.0, 1.0)] == [0.0, 1.0]


@given(
    p_ref=st.floats(1e-4, 0.999),
    beta=st.floats(0.05, 30),
    epsilon=st.floats(1e-6, 0.2),
    size=st.sampled_from([None, 4, 16, 64]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_fixed_points_solve_their_equation_and_exceed_the_reference(p_ref, beta, epsilon, size):
    weights = Whitened(epsilon) if size is None else Group(size, 0, epsilon)
    points = fixed_points(p_ref, beta=beta, weights=weights)
    reference = math.log(p_ref) - math.log1p(-p_ref)
    assert len(points) in (1, 3)
    mp.mp.dps = 40
    for point in points:
        p, q = 1 / (1 + mp.exp(-mp.mpf(point.logit))), 1 / (1 + mp.exp(mp.mpf(point.logit)))
        if size is None:
            pull = 1 / mp.sqrt(p * q + mp.mpf(epsilon))
        else:
            pull = mp.fsum(
                mp.binomial(size, k) * p ** (k - 1) * q ** (size - k - 1) * v / mp.sqrt(v + mp.mpf(epsilon))
                for k in range(1, size)
                for v in [mp.mpf(k) * (size - k) / size**2]
            )
        slack = 1e-10 * (1 + abs(point.logit)) * max(1, abs(point.multiplier))
        assert abs(point.logit - reference - float(pull / beta)) < slack
        assert point.logit > reference
    first = flow_point(reference, beta=beta, weights=weights, logits=True)
    assert float(first) == pytest.approx(points[0].logit, rel=1e-9, abs=1e-9)


def test_the_flow_ends_at_the_flow_point():
    """Euler steps of dL/dt = L_ref + Ω/β − L, small enough to be monotone, on both sides of the folds."""
    p_ref = jnp.asarray([1e-4, 1e-3, 0.05, 0.2, 0.5, 0.8, 0.95])
    reference = jnp.log(p_ref) - jnp.log1p(-p_ref)
    for weights in (Whitened(1e-3), Whitened(1e-2), Group(64), Group(8), Group(8, baseline="none"), WhitenedStd(1e-2)):
        for beta in (0.3, 0.9, 1.6, 5.0):

            def step(logit, _, weights=weights, beta=beta):
                drift = reference + omega(logit, weights, logits=True) / beta - logit
                return logit + 0.05 / (1 + 5 / beta) * drift, None

            end, _ = jax.lax.scan(step, reference, None, length=20_000)
            predicted = flow_point(reference, beta=beta, weights=weights, logits=True)
            assert jnp.allclose(end, predicted, rtol=1e-6, atol=1e-6), (weights, beta)


@pytest.mark.parametrize(("p_ref", "fold"), [(0.5, 1.50887956154), (0.2, 0.895700990223), (0.01, 0.400742153350)])
def test_the_flow_point_jumps_exactly_at_the_fold(p_ref, fold):
    """Known to 12 digits for ε → 0, where below the fold there is no fixed point at all."""
    for off in (1e-3, 1e-6, 1e-9):
        above = flow_point(p_ref, beta=fold * (1 + off), weights=Whitened(0.0))
        assert float(above) < 0.98
        assert float(flow_point(p_ref, beta=fold * (1 - off), weights=Whitened(0.0))) == 1.0
        assert len(fixed_points(p_ref, beta=fold * (1 + off), weights=Whitened(0.0))) == 2
        assert fixed_points(p_ref, beta=fold * (1 - off), weights=Whitened(0.0)) == []
    if p_ref == 0.5:
        assert float(flow_point(p_ref, beta=fold * (1 + 1e-10), weights=Whitened(0.0))) == pytest.approx(
            0.916778279800, abs=1e-5
        )
    assert float(flow_point(p_ref, beta=fold * 0.999, weights=Whitened(1e-5))) > 1 - 1e-9


def test_exact_iterations_can_jump_past_the_point_where_the_flow_stops():
    assert float(flow_point(1e-4, beta=5.0, weights=Whitened(1e-5))) < 0.01
    assert limit_point(1e-4, beta=5.0, weights=Whitened(1e-5)).p == 1.0


@pytest.mark.parametrize("solve", [flow_point, forward_kl_fixed_point])
@pytest.mark.parametrize("weights", [Whitened, WhitenedStd, lambda e: Group(16, 1, e)])
def test_gradients_match_finite_differences_and_second_ones_too(solve, weights):
    def f(p_ref, beta, epsilon):
        return solve(p_ref, beta=beta, weights=weights(epsilon))

    at = (0.15, 1.3, 0.01)
    for i in range(3):
        first = jax.grad(f, argnums=i)
        high, low = (tuple(x + s * (i == j) for j, x in enumerate(at)) for s in (1e-5, -1e-5))
        assert float(first(*at)) == pytest.approx(float(f(*high) - f(*low)) / 2e-5, rel=2e-5)
        second = float(first(*high) - first(*low)) / 2e-5
        assert float(jax.grad(first, argnums=i)(*at)) == pytest.approx(second, rel=2e-5)


def test_flow_sensitivity_is_the_closed_form():
    """dL*/dL_ref = 1/(1 − m)."""
    point = fixed_points(0.2, beta=1.0, weights=Whitened(1e-5))[0]
    slope = jax.grad(lambda L: flow_point(L, beta=1.0, weights=Whitened(1e-5), logits=True))(math.log(0.25))
    assert float(slope) == pytest.approx(1 / (1 - point.multiplier), rel=1e-10)


def test_forward_kl_closed_form_for_whitened_rewards():
    p_ref = jnp.asarray([1e-6, 0.01, 0.3, 0.9, 1 - 1e-9])
    for beta in (0.01, 0.4, 2.0, 30.0):
        closed = (2 * p_ref * beta**2 + 1 + jnp.sqrt(1 + 4 * beta**2 * p_ref * (1 - p_ref))) / (2 * (1 + beta**2))
        assert jnp.allclose(forward_kl_fixed_point(p_ref, beta=beta, weights=Whitened(0.0)), closed, rtol=1e-12)


@pytest.mark.parametrize(
    "weights",
    [Whitened(1e-3), WhitenedStd(0.05), MeanOnly(), Group(8, 1), Group(8, baseline="none", scale="mean"), Group(2)],
    ids=repr,
)
def test_forward_kl_point_balances_the_gradients_and_is_alone(weights):
    for p_ref in (0.003, 0.4, 0.97):
        for beta in (0.02, 1.0, 40.0):
            p = float(forward_kl_fixed_point(p_ref, beta=beta, weights=weights))
            assert p > p_ref
            assert p - p_ref == pytest.approx(p * (1 - p) * float(omega(p, weights)) / beta, rel=1e-8)
            grid = jnp.linspace(p_ref, 1.0, 4001)[1:-1]
            above = grid - p_ref > grid * (1 - grid) * omega(grid, weights) / beta
            assert int((above[1:] != above[:-1]).sum()) <= 1


@pytest.mark.parametrize(
    "weights", [Whitened(1e-5), WhitenedStd(1e-4), MeanOnly(), Group(8), Group(64, 1, 1e-4, "std")]
)
def test_the_beta_for_a_target_reaches_it(weights):
    for p_ref, target in ((0.01, 0.05), (0.2, 0.6), (0.6, 0.9)):
        beta = float(beta_for_target(target, p_ref, weights=weights))
        assert min(abs(f.p - target) for f in fixed_points(p_ref, beta=beta, weights=weights)) < 1e-12
    assert math.isnan(beta_for_target(0.2, 0.2, weights=weights))


def test_extreme_log_odds():
    far = 230.2585  # p = 1 − 1e-100
    end = flow_point(jnp.asarray([-far, far]), beta=2.0, weights=Whitened(1e-4), logits=True)
    assert end.tolist() == pytest.approx([-far + 50, far + 50], rel=1e-13)
    group = flow_point(jnp.asarray([-far, far]), beta=0.5, weights=Group(17), logits=True)
    assert group.tolist() == pytest.approx([-far + 8, far + 8], rel=1e-13)
    forward = float(forward_kl_fixed_point(far, beta=2.0, weights=MeanOnly(), logits=True))
    assert forward == pytest.approx(far + math.log(1.5), rel=1e-14)  # (1−p*)(1 + 1/β) = 1−p_ref
    assert flow_point(0.5, beta=1e-6, weights=Whitened(1e-8)).tolist() == 1.0


@pytest.mark.parametrize("solve", [flow_point, forward_kl_fixed_point])
def test_ends_are_returned_and_do_not_poison_gradients(solve):
    p_ref = jnp.asarray([0.0, 0.3, 1.0])
    for weights in (Whitened(0.0), Whitened(), WhitenedStd(), Group(8)):
        p = solve(p_ref, beta=2.0, weights=weights)
        assert (float(p[0]), float(p[2])) == (0.0, 1.0)
        for slope in jax.grad(lambda r, b, w=weights: solve(r, beta=b, weights=w).sum(), argnums=(0, 1))(p_ref, 2.0):
            assert bool(jnp.isfinite(slope).all())
    with pytest.raises(ValueError, match=r"p_ref=1\.2 must be a probability"):
        solve(1.2, beta=2.0, weights=Whitened())
    assert bool(jnp.isnan(jax.jit(lambda p: solve(p, beta=2.0, weights=Whitened()))(1.2)))


def test_flow_point_under_jit_vmap_and_float32():
    p_ref = jnp.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    grid = jax.jit(jax.vmap(lambda b: flow_point(p_ref, beta=b, weights=Group(8))))(jnp.asarray([0.5, 1.0, 2.0, 4.0]))
    assert grid.shape == (4, 2, 3)
    assert bool((grid[:-1] > grid[1:]).all())
    assert bool((grid > p_ref[None]).all())
    assert float(grid[1, 0, 1]) == pytest.approx(0.624862533686, rel=1e-11)
    for weights in (Group(8), Group(64, 1, 1e-4, "std"), Group(5, baseline="none"), Whitened(1e-4), WhitenedStd(1e-4)):
        for solve in (flow_point, forward_kl_fixed_point):
            single = solve(p_ref.astype(jnp.float32), beta=3.0, weights=weights)
            assert single.dtype == jnp.float32
            assert jnp.allclose(single.astype(float), solve(p_ref, beta=3.0, weights=weights), rtol=1e-5)
    epsilons = jax.vmap(lambda e: flow_point(0.2, beta=1.0, weights=Whitened(e)))(jnp.asarray([1e-5, 1e-2]))
    assert float(epsilons[0]) == pytest.approx(0.681283437786, rel=1e-11)


def test_iterating_from_above_one_half_climbs_to_the_flow_point():
    """Monotone there, so the limit is the smallest fixed point."""
    p_ref = jnp.asarray([0.5, 0.7, 0.9])
    end = iterate(p_ref, 4000, beta=5.0, weights=Whitened(1e-4))[-1]
    assert jnp.allclose(end, flow_point(p_ref, beta=5.0, weights=Whitened(1e-4)), rtol=1e-9)


def test_host_functions_are_double_precision_whatever_the_session():
    with jax.enable_x64(False):
        assert fixed_points(0.2, beta=1.0, weights=Whitened(1e-5))[0].p == pytest.approx(0.681283437786, rel=2e-12)
        assert limit_point(1e-3, beta=3.0, weights=Whitened(1e-5)).p[1] == pytest.approx(0.633011579742, rel=3e-12)


def test_host_functions_refuse_what_is_no_probability_or_beta():
    for call in (fixed_points, limit_point):
        with pytest.raises(ValueError, match="beta"):
            call(0.2, beta=0.0, weights=Whitened())
        with pytest.raises(ValueError, match="probability"):
            call(1.2, beta=1.0, weights=Whitened())
    with pytest.raises(ValueError, match="alpha"):
        limit_point(0.2, beta=1.0, weights=Whitened(), alpha=1.5)
