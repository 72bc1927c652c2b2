"""Intervals against their definitions and by coverage, predictions prompt by prompt, and refusal of what is no count."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.theory import (
    Group,
    MeanOnly,
    Whitened,
    bernoulli_kl,
    flow_point,
    forward_kl_fixed_point,
    mean_interval,
    predict,
    wilson_interval,
)

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_ends_are_z_standard_errors_from_the_estimate(confidence):
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    k, n = jnp.asarray([1.0, 3, 50, 99, 999_999]), jnp.asarray([8.0, 4, 100, 100, 1_000_000])
    for end in wilson_interval(k, n, confidence):
        assert jnp.allclose(jnp.abs(k / n - end), z * jnp.sqrt(end * (1 - end) / n), rtol=1e-8)


def test_wilson_known_numbers_and_ends():
    low, high = wilson_interval(jnp.asarray([0, 10, 2]), 10)
    assert (float(low[0]), float(high[1])) == (0.0, 1.0)
    z2 = 1.959963984540054**2
    assert float(high[0]) == pytest.approx(z2 / (10 + z2), rel=1e-12)
    assert float(low[1]) == pytest.approx(10 / (10 + z2), rel=1e-12)
    assert (float(low[2]), float(high[2])) == pytest.approx((0.056682, 0.509838), abs=1e-6)


def test_mean_interval_is_the_quadrature_sum_of_one_sided_errors():
    low, high = mean_interval(jnp.asarray([0.2, 0.6]), jnp.asarray([0.17, 0.56]), jnp.asarray([0.26, 0.68]))
    assert (float(low), float(high)) == pytest.approx((0.4 - 0.05 / 2, 0.4 + 0.1 / 2), rel=1e-12)


def test_mean_interval_covers_the_mean_success_probability():
    """16 prompts of unequal difficulty, 20 samples each, 2000 repetitions: 95 % nominal."""
    p = jnp.linspace(0.05, 0.9, 16)
    k = jax.random.binomial(jax.random.key(0), 20.0, jnp.broadcast_to(p, (2000, 16)))
    low, high = wilson_interval(k, 20)
    low, high = jax.vmap(mean_interval)(k / 20, low, high)
    covered = float(((low <= p.mean()) & (p.mean() <= high)).mean())
    assert 0.935 < covered < 0.975


@pytest.mark.parametrize(("kl", "solve"), [("reverse", flow_point), ("forward", forward_kl_fixed_point)])
def test_predictions_are_the_end_points_of_the_estimates_and_of_their_intervals(kl, solve):
    k, n, beta, weights = jnp.asarray([0, 3, 20, 64, 64]), jnp.asarray([64, 64, 40, 80, 64]), 1.5, Group(8)
    result = predict(k, n, beta=beta, weights=weights, confidence=0.9, kl=kl)
    low, high = wilson_interval(k, n, 0.9)
    for predicted, p in ((result.p_star, k / n), (result.p_star_low, low), (result.p_star_high, high)):
        assert jnp.allclose(predicted, solve(p, beta=beta, weights=weights), rtol=1e-12)
    assert jnp.allclose(result.p_ref, k / n)
    assert (result.p_ref_low.tolist(), result.p_ref_high.tolist()) == (low.tolist(), high.tolist())
    assert bool((result.p_star_low <= result.p_star).all() & (result.p_star <= result.p_star_high).all())
    assert result.mean_p_star == pytest.approx(float(result.p_star.mean()), rel=1e-12)
    expected = mean_interval(result.p_star, result.p_star_low, result.p_star_high)
    assert (result.mean_p_star_low, result.mean_p_star_high) == pytest.approx([float(x) for x in expected], rel=1e-12)
    spent = [float(bernoulli_kl(a, b)) for a, b in zip(result.p_star, result.p_ref, strict=True)]
    assert result.mean_kl == pytest.approx(sum(spent) / 5, rel=1e-9)
    assert result.saturates.tolist() == [False, False, False, False, True]


def test_the_fold_flag_is_up_exactly_where_the_prediction_jumps_inside_the_interval():
    """At β = 1.50887956 the fold is at p_ref = 1/2 (ε → 0): 48/100 and 52/100 straddle it, 20/100 does not."""
    result = predict([20, 48, 52, 95], 100, beta=1.50887956154, weights=Whitened(1e-6))
    assert result.fold.tolist() == [False, True, True, False]
    assert result.saturates.tolist() == [False, False, True, True]
    assert float(result.p_star_low[1]) < 0.9
    assert float(result.p_star_high[1]) > 1 - 1e-9
    assert predict([20, 48, 52, 95], 100, beta=1.5, weights=MeanOnly()).fold.tolist() == [False] * 4
    for counts in range(4, 101, 16):  # against a fine scan of the interval
        one = predict([counts], 100, beta=1.2, weights=Group(64))
        scan = jnp.linspace(float(one.p_ref_low[0]), float(one.p_ref_high[0]), 4001)[1:-1]
        ends = flow_point(scan, beta=1.2, weights=Group(64))
        assert bool(one.fold[0]) == bool(jnp.diff(ends).max() > 0.02), counts


def test_the_stable_flag_tells_where_exact_iterations_would_oscillate():
    result = predict([1, 100], 1000, beta=3.0, weights=Whitened(1e-5))
    assert result.stable.tolist() == [False, True]
    forward = predict([1, 20, 100], 1000, beta=3.0, weights=Whitened(1e-5), kl="forward")  # whose limit is 2.86 %
    assert forward.stable.tolist() == [False, False, True]


def test_saturated_prompts_spend_their_whole_budget():
    result = predict([10], 100, beta=0.05, weights=Whitened(1e-5))
    assert bool(result.saturates[0])
    assert result.mean_kl == pytest.approx(math.log(10), rel=1e-9)


def test_predictions_do_not_depend_on_the_precision_of_the_session():
    with jax.enable_x64(False):
        single = predict([20, 50], 100, beta=1.0, weights=Group(8))
        assert single.p_star.dtype == jnp.float32
        assert float(single.p_star[0] + 1) == pytest.approx(1.624862533686, abs=2e-7)
    double = predict([20, 50], 100, beta=1.0, weights=Group(8))
    assert float(double.p_star[0]) == pytest.approx(0.624862533686, rel=3e-12)
    assert single.mean_p_star == double.mean_p_star


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("successes", {"successes": [11], "trials": 10}),
        ("successes", {"successes": [-1], "trials": 10}),
        ("successes", {"successes": [2.5], "trials": 10}),
        ("successes", {"successes": [math.nan], "trials": 10}),
        ("successes", {"successes": [], "trials": 10}),
        ("successes", {"successes": 3, "trials": 10}),
        ("trials", {"successes": [0], "trials": 0}),
        ("trials", {"successes": [1, 2], "trials": [10, 10, 10]}),
        ("trials", {"successes": [1, 2], "trials": 10.5}),
        ("beta", {"beta": 0.0}),
        ("beta", {"beta": -1.0}),
        ("beta", {"beta": math.nan}),
        ("confidence", {"confidence": 1.0}),
        ("confidence", {"confidence": 0.0}),
        ("kl", {"kl": "k3"}),
    ],
)
def test_wrong_arguments_are_named(name, arguments):
    good = {"successes": [3, 4], "trials": 10, "beta": 1.0, "weights": Group(8)}
    with pytest.raises(ValueError, match=name):
        predict(**(good | arguments))
