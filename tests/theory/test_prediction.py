"""Intervals against their definitions and by coverage, predictions prompt by prompt, and refusal of what is no count."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import beta as beta_distribution

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
from grpo_jax.theory.posteriors import posterior_of

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
def test_predictions_are_averages_over_what_the_counts_allow(kl, solve):
    """Against 2000 quantiles of scipy's Beta(k + a, n − k + b), for each (a, b) of the posterior; G = 64 has a fold."""
    k, n = np.array([0, 3, 20, 30, 64]), np.array([64, 64, 40, 80, 64])
    posterior = posterior_of(k, n)
    levels = (np.arange(2000) + 0.5) / 2000
    for beta, weights in ((1.5, Group(8)), (0.9, Group(64))):
        result = predict(k, n, beta=beta, weights=weights, confidence=0.9, kl=kl)
        a, b = _hyperparameters_of(posterior, k, n)
        p = beta_distribution.ppf(levels, a[..., None], b[..., None]).clip(1e-13, 1 - 1e-13)  # [H, Q, levels]
        grid = jnp.linspace(-30.0, 30.0, 20_001)
        ends = np.asarray(solve(grid, beta=beta, weights=weights, logits=True))
        logit = np.log(p) - np.log1p(-p)
        star = expit(np.interp(logit, grid, ends))
        each = np.einsum("h,hql->q", posterior.shares, star) / len(levels)
        assert np.asarray(result.p_star) == pytest.approx(each, abs=1.5e-3)
        assert result.mean_p_star == pytest.approx(each.mean(), abs=5e-4)
        spent = np.asarray(bernoulli_kl(jnp.asarray(star), jnp.asarray(p)))
        assert result.mean_kl == pytest.approx(
            np.einsum("h,hql->", posterior.shares, spent) / len(levels) / 5, rel=0.02
        )
        ends = np.asarray([result.p_star_low, result.p_star_high])
        for i in (1, 2, 3):  # without the two that lie next to 0 and 1
            reached = [posterior.shares @ (star[:, i] <= end).mean(-1) for end in ends[:, i]]
            assert bool(result.fold[i]) or reached == pytest.approx([0.05, 0.95], abs=0.01)
        assert bool((result.p_star_low <= result.p_star).all() & (result.p_star <= result.p_star_high).all())
        assert result.mean_p_star_low < result.mean_p_star < result.mean_p_star_high
    assert jnp.allclose(result.p_ref, k / n)
    low, high = wilson_interval(k, n, 0.9)
    assert (result.p_ref_low.tolist(), result.p_ref_high.tolist()) == (low.tolist(), high.tolist())


def _hyperparameters_of(posterior, k, n):
    """k + a and n − k + b [H, Q], from the mean and the variance of p that the nodes have."""
    p = expit(posterior.logits)
    mean = (posterior.weights * p).sum(-1)
    variance = (posterior.weights * (p - mean[..., None]) ** 2).sum(-1)
    size = mean * (1 - mean) / variance - 1
    row = posterior.row
    return (mean * size)[:, row], ((1 - mean) * size)[:, row]


def test_many_trials_lead_to_the_end_point_of_the_estimate():
    k, n = jnp.asarray([10_000, 300_000, 900_000]), 1_000_000
    result = predict(k, n, beta=1.5, weights=Group(8))
    assert jnp.allclose(result.p_star, flow_point(k / n, beta=1.5, weights=Group(8)), atol=2e-5)
    slope = jax.vmap(jax.grad(lambda p: flow_point(p, beta=1.5, weights=Group(8))))(k / n)
    width = 1.96 * slope * jnp.sqrt(k / n * (1 - k / n) / n)
    assert jnp.allclose(result.p_star_high - result.p_star_low, 2 * width, rtol=0.05)
    assert result.mean_p_star_high - result.mean_p_star_low == pytest.approx(
        2 * float(jnp.sqrt((width**2).sum())) / 3, rel=0.05
    )


def test_prompts_that_never_or_always_succeeded_are_not_certain_to_stay():
    result = predict([0, 0, 4, 12, 16, 16], 16, beta=1.0, weights=Group(8))
    assert 0 < float(result.p_star[0]) < 0.1 < float(result.p_star_high[0])
    assert float(result.p_star_low[-1]) < 0.996 < float(result.p_star[-1]) < 1
    assert result.p_ref.tolist()[0] == 0.0 and result.p_ref.tolist()[-1] == 1.0
    alone = predict([0], 16, beta=1.0, weights=Group(8))
    assert 0 < alone.mean_p_star < alone.mean_p_star_high < 0.6


def test_the_mean_moves_smoothly_across_a_fold():
    """p* of 1/2 jumps from .7 to 1 at β = 1.50887956; its average over Beta(50 + a, 50 + b) does not."""
    means = [
        predict([50], 100, beta=b, weights=Whitened(1e-6)).mean_p_star for b in (1.5088794, 1.5088796, 1.50888, 1.52)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[2] < 1e-3
    assert 0.85 < means[1] < 0.95


def test_the_fold_flag_is_up_exactly_where_the_prediction_jumps_inside_the_interval():
    """At β = 1.50887956 the fold is at p_ref = 1/2 (ε → 0): 48/100 and 52/100 straddle it, 20/100 does not."""
    result = predict([20, 48, 52, 95], 100, beta=1.50887956154, weights=Whitened(1e-6))
    assert result.fold.tolist() == [False, True, True, False]
    assert result.saturates.tolist() == [False, False, True, True]
    assert float(result.p_star_low[1]) < 0.9
    assert float(result.p_star_high[1]) > 1 - 1e-9
    assert predict([20, 48, 52, 95], 100, beta=1.5, weights=MeanOnly()).fold.tolist() == [False] * 4
    # Against a fine scan of what lies between the ends of the intervals.
    many = predict(range(4, 101, 8), 100, beta=1.2, weights=Group(64))
    ends = flow_point(jnp.linspace(0.1, 0.6, 4_001), beta=1.2, weights=Group(64))
    (at,) = jnp.nonzero(jnp.diff(ends) > 0.04)
    below, above = float(ends[at[0]]), float(ends[at[0] + 1])
    straddles = (many.p_star_low <= below + 1e-3) & (many.p_star_high >= above - 1e-3)
    assert many.fold.tolist() == straddles.tolist() and 0 < int(straddles.sum()) < 13


def test_the_stable_flag_tells_where_exact_iterations_would_oscillate():
    result = predict([1, 100], 1000, beta=3.0, weights=Whitened(1e-5))
    assert result.stable.tolist() == [False, True]
    forward = predict([1, 20, 100], 1000, beta=3.0, weights=Whitened(1e-5), kl="forward")  # whose limit is 2.86 %
    assert forward.stable.tolist() == [False, False, True]


def test_saturated_prompts_spend_their_whole_budget():
    """E[ln 1/p] over Beta(α, β) is ψ(α + β) − ψ(α): 2.302 at Beta(10 000, 90 000)."""
    result = predict([10_000], 100_000, beta=0.05, weights=Whitened(1e-5))
    assert bool(result.saturates[0])
    assert result.mean_kl == pytest.approx(math.log(10), rel=1e-4)


def test_predictions_do_not_depend_on_the_precision_of_the_session():
    with jax.enable_x64(False):
        single = predict([20, 50], 100, beta=1.0, weights=Group(8))
        assert single.p_star.dtype == jnp.float32
    double = predict([20, 50], 100, beta=1.0, weights=Group(8))
    assert double.p_star.dtype == jnp.float64
    assert float(single.p_star[0]) == pytest.approx(float(double.p_star[0]), rel=1e-7)
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
