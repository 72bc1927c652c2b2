"""Sums over nodes against scipy's Beta distribution, (a, b) against a fine grid, and counts that say next to nothing."""

import numpy as np
import pytest
from scipy.special import betaln, expit
from scipy.stats import beta as beta_distribution

from grpo_jax.theory.posteriors import (
    FINE,
    LEAST,
    MEAN_REACH,
    SPREAD,
    Jumps,
    beta_nodes,
    expectations,
    mean_of,
    mixture,
    posterior_of,
    quantiles,
)

IDENTITY = np.linspace(-30.0, 30.0, 60_001)


def mean_p(posterior, confidence=0.95):
    """The mean success probability over the prompts with its interval, as if p itself were the thing."""
    p = expit(posterior.logits)
    first, second = ((x * posterior.weights).sum(-1) for x in (p, p**2))
    return mean_of(posterior, first, second, confidence)


@pytest.mark.parametrize(
    ("a", "b"), [(0.5, 16.5), (3.0, 14.0), (0.3, 0.3), (16.05, 0.05), (2.0, 1024.0), (500.0, 600.0), (1e9, 2e9)]
)
def test_nodes_have_the_moments_and_the_quantiles_of_the_beta_distribution(a, b):
    exact = beta_distribution(a, b)
    for count, off in ((33, 0.02), (FINE, 1e-3)):
        logits, weights = beta_nodes(np.array(a), np.array(b), count)
        assert weights.sum() == pytest.approx(1, rel=1e-12) and (np.diff(logits) > 0).all()
        p = expit(logits)
        assert weights @ p == pytest.approx(exact.mean(), rel=min(off, 0.006))
        assert weights @ (p - exact.mean()) ** 2 == pytest.approx(exact.var(), rel=off)
    found = np.interp([0.025, 0.5, 0.975], np.cumsum(weights) - weights / 2, p)
    assert found == pytest.approx(exact.ppf([0.025, 0.5, 0.975]), rel=2e-4)


@pytest.mark.parametrize(("a", "b", "trials"), [(0.5, 0.8, 16), (1.0, 3.0, 64), (0.3, 3.0, 1024)])
def test_the_hyperparameters_are_those_of_a_fine_grid(a, b, trials):
    """Posterior mean of p of each count, and mean and variance of ln a/b and ln(a + b): 300 × 300 points."""
    counts = np.random.default_rng(0).binomial(trials, np.random.default_rng(1).beta(a, b, 100))
    k, times = np.unique(counts, return_counts=True)
    u, w = np.meshgrid(np.linspace(-MEAN_REACH, MEAN_REACH, 300), np.linspace(*np.log(SPREAD), 300), indexing="ij")
    a, b = (np.maximum(np.exp(w) * expit(x), LEAST) for x in (u, -u))
    log = 0.5 * np.log(expit(u) * expit(-u)) - betaln(a, b) * len(counts)
    for x, n in zip(k, times, strict=True):
        log += n * betaln(x + a, trials - x + b)
    shares = np.exp(log - log.max())
    shares /= shares.sum()
    expected = [(shares * (x + a) / (trials + a + b)).sum() for x in k]
    posterior = posterior_of(counts, np.full(100, trials))
    p = np.einsum("h,hdn,hdn->d", posterior.shares, posterior.weights, expit(posterior.logits))
    assert p == pytest.approx(expected, rel=0.01, abs=2e-5)
    assert posterior.times[posterior.row].tolist() == [times[k == x][0] for x in counts]


def test_a_step_counts_by_the_probability_to_lie_above_it():
    posterior = posterior_of(np.array([3, 40, 90]), np.array([100, 100, 100]))
    for place in (0.02, 0.35, 0.4, 0.95):
        logit = float(np.log(place / (1 - place)))
        step = Jumps(np.array([-9.0, 9.0]), np.zeros((1, 2)), logit, np.ones(1))
        above = posterior.shares @ expectations(posterior, step)[..., 0]
        smooth = posterior.shares @ (posterior.weights * (expit(posterior.logits) > place)).sum(-1)
        assert above == pytest.approx(smooth, abs=0.1)
        # The prior of three prompts says little beside 100 trials: Beta(k + a, n − k + b) with any a and b below 3.
        bounds = [
            beta_distribution.sf(place, np.array([3, 40, 90]) + x, np.array([97, 60, 10]) + y)
            for x, y in ((0, 3), (3, 0))
        ]
        assert (above >= bounds[0] - 0.01).all() and (above <= bounds[1] + 0.01).all()


@pytest.mark.parametrize(
    ("counts", "trials"),
    [
        ([0], 16),
        ([16], 16),
        ([5], 16),
        ([0], 1),
        ([0] * 100, 16),
        ([16] * 100, 16),
        ([8] * 100, 16),
        ([0, 16] * 50, 16),
    ],
)
def test_counts_that_leave_the_hyperparameters_open_give_finite_intervals_that_hold_the_estimate(counts, trials):
    posterior = posterior_of(np.array(counts), np.full(len(counts), trials))
    mean, low, high = mean_p(posterior)
    assert 0 <= low <= mean <= high <= 1 and high - low > 1e-4
    assert low - 1e-3 <= np.mean(counts) / trials <= high + 1e-3
    ends = expit(quantiles(posterior, [0.025, 0.5, 0.975]))
    assert np.isfinite(ends).all() and (np.diff(ends, axis=0) >= 0).all()


def test_no_success_in_n_trials_allows_what_the_rule_of_three_says():
    for prompts, trials in ((1, 64), (100, 16)):
        posterior = posterior_of(np.zeros(prompts, int), np.full(prompts, trials))
        assert 1.0 / (prompts * trials) < mean_p(posterior).high < 4.0 / (prompts * trials)


def test_many_trials_leave_the_interval_of_the_binomial():
    """Up to 2⁵³ − 1 of them, where the variance has lost its digits."""
    for trials, off in ((10**6, 0.02), (10**9, 0.02), (10**12, 0.02), (2**53 - 1, 0.5)):
        mean, low, high = mean_p(posterior_of(np.array([trials // 3]), np.array([trials])))
        assert mean == pytest.approx(1 / 3, abs=max(0.02 / trials**0.5, 1e-12))
        assert (high - low) / 2 == pytest.approx(1.96 * (2 / 9 / trials) ** 0.5, rel=off)


def test_prompts_with_the_same_counts_cost_nothing_and_the_bits_are_the_same():
    few, many = ([posterior_of(np.tile([1, 4, 4], r), np.full(3 * r, 8)) for _ in range(2)] for r in (1, 10_000))
    assert many[0].logits.shape[1:] == few[0].logits.shape[1:] == (2, 33)
    for one, other in (few, many):
        assert all((x == y).all() for x, y in zip(one, other, strict=True))


def test_the_mixture_keeps_the_mean_and_the_spread():
    posterior = posterior_of(np.array([0, 3, 8, 40, 64]), np.full(5, 64))
    logits, times = mixture(posterior, 512)
    p = expit(logits)
    weights = posterior.weights * posterior.shares[:, None, None]
    exact = [(weights * expit(posterior.logits) ** power).sum() / 5 for power in (1, 2)]
    assert len(logits) <= 512 and (np.diff(logits) > -1e-12).all() and times.sum() == pytest.approx(5)
    assert [times @ p / 5, times @ p**2 / 5] == pytest.approx(exact, rel=1e-3)


def test_the_interval_of_a_mean_is_that_of_two_moments():
    """Two prompts, each 0 or 1 with probability ½: mean ½, variance ⅛, and Beta(½, ½) has both."""
    posterior = posterior_of(np.array([1, 2]), np.array([4, 4]))
    half = np.full(posterior.logits.shape[:2], 0.5)
    assert mean_of(posterior, half, half, 0.8) == pytest.approx(
        (0.5, *beta_distribution(0.5, 0.5).ppf([0.1, 0.9])), abs=1e-4
    )
