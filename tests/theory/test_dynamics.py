"""The success map and its iterates against explicit policies, mpmath, the paper's numbers and the ends of [0, 1]."""

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
    dead_fraction,
    iterate,
    kl_budget,
    omega_minus,
    omega_plus,
    success_map,
    success_map_slope,
)

pytestmark = pytest.mark.usefixtures("double")


def test_reference_values():
    white = Whitened(1e-5)
    for value, expected in (
        (success_map(0.3, 0.2, beta=1.0, weights=white), 0.689082325931),
        (success_map(0.5, 0.1, beta=0.5, weights=Whitened(1e-2)), 0.848784342270),
        (success_map_slope(0.3, 0.2, beta=1.0, weights=white), -0.445232188335),
        (success_map(0.9, 0.2, beta=2.0, weights=MeanOnly()), 0.291875132741),
        (success_map(0.2, 0.2, beta=2.0, weights=white, alpha=0.0), 0.465969338329),
        (iterate(0.2, 5, beta=2.0, weights=MeanOnly(), alpha=0.0)[-1], 0.752819311429),
        (success_map(0.4, 0.2, beta=2.0, weights=white, alpha=0.25), 0.591441349219),
        (iterate(0.2, 200, beta=2.0, weights=MeanOnly(), alpha=0.25)[-1], 0.648785644284),
        (bernoulli_kl(success_map(0.2, 0.2, beta=1.0, weights=white), 0.2), 0.707519810104),
        (kl_budget(0.2), 1.60943791243),
        (dead_fraction(0.1, 8), 0.43046722),
    ):
        assert float(value) == pytest.approx(expected, rel=3e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_iterates_are_those_of_exactly_optimal_policies_on_explicit_outcomes(alpha):
    """Four outcomes, two of them correct; each iteration is the closed-form maximiser of E[A] − β KL(π‖anchor)."""
    reward = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    log_ref = jnp.log(jnp.asarray([0.03, 0.05, 0.7, 0.22]))
    beta, weights = 2.5, Whitened(1e-3)
    log_pi, seen = log_ref, []
    for _ in range(6):
        p = (jnp.exp(log_pi) * reward).sum()
        seen.append(float(p))
        advantage = jnp.where(reward == 1, omega_plus(p, weights), -omega_minus(p, weights))
        anchor = alpha * log_ref + (1 - alpha) * log_pi
        log_pi = jax.nn.log_softmax(anchor + advantage / beta)
        p_now = (jnp.exp(log_pi) * reward).sum()
        explicit_kl = (jnp.exp(log_pi) * (log_pi - log_ref)).sum()
        assert float(bernoulli_kl(p_now, 0.08)) == pytest.approx(float(explicit_kl), rel=1e-12)
    assert iterate(0.08, 5, beta=beta, weights=weights, alpha=alpha).tolist() == pytest.approx(seen, rel=1e-12)


def test_the_papers_chaotic_panel_needs_its_start():
    """Figure 5, β = 5, p_ref = 1e-4: from p_0 = 0.1 it wanders, from p_ref it saturates."""
    wander = iterate(1e-4, 50, beta=5.0, weights=Whitened(1e-5), p_0=0.1)
    assert float(wander[-20:].max() - wander[-20:].min()) > 1e-3
    assert float(iterate(1e-4, 50, beta=5.0, weights=Whitened(1e-5))[-1]) == 1.0


@given(
    p_ref=st.floats(1e-4, 0.999),
    beta=st.floats(0.05, 50),
    alpha=st.floats(0, 1),
    epsilon=st.floats(1e-6, 0.2),
    size=st.sampled_from([None, 4, 16]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_iterate_is_better_than_the_reference(p_ref, beta, alpha, epsilon, size):
    weights = Whitened(epsilon) if size is None else Group(size, 0, epsilon)
    path = iterate(p_ref, 20, beta=beta, weights=weights, alpha=alpha, logits=False)
    logits = iterate(math.log(p_ref / (1 - p_ref)), 20, beta=beta, weights=weights, alpha=alpha, logits=True)
    assert bool((logits[1:] > logits[0]).all())
    assert jnp.allclose(path, jax.nn.sigmoid(logits), rtol=1e-9)


@pytest.mark.parametrize("weights", [Whitened(1e-4), WhitenedStd(1e-2), MeanOnly(), Group(8)], ids=repr)
@pytest.mark.parametrize("logits", [False, True])
def test_slope_is_the_derivative_of_the_map(weights, logits):
    def h(x):
        return success_map(x, -1.0 if logits else 0.2, beta=1.7, weights=weights, logits=logits)

    x = jnp.asarray([-6.0, -0.3, 0.0, 2.0]) if logits else jnp.asarray([0.01, 0.3, 0.5, 0.97])
    slope = success_map_slope(x, -1.0 if logits else 0.2, beta=1.7, weights=weights, logits=logits)
    assert jnp.allclose(slope, (h(x + 1e-6) - h(x - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-9)


def test_ends_stay_and_gradients_are_finite():
    for alpha in (0.0, 0.4, 1.0):
        for end in (0.0, 1.0):
            path = iterate(jnp.asarray([end, 0.3]), 4, beta=1.0, weights=Whitened(), alpha=alpha)
            assert path[:, 0].tolist() == [end] * 5
            assert bool((path[1:, 1] > 0.3).all())
            slope = jax.grad(lambda r, a=alpha: iterate(r, 3, beta=1.0, weights=Whitened(), alpha=a)[-1])(end)
            assert bool(jnp.isfinite(slope))
    # An end as the sampled policy: without a share of the mirror term it is forgotten.
    assert float(success_map(0.0, 0.2, beta=1.0, weights=MeanOnly())) == pytest.approx(
        float(jax.nn.sigmoid(jnp.log(0.25) + 1.0)), rel=1e-14
    )


def test_the_mirror_anchor_may_differ_from_the_sampled_policy():
    moved = success_map(0.4, 0.2, beta=2.0, weights=Whitened(1e-4), alpha=0.25, p_prev=0.3, logits=False)
    expected = 0.25 * math.log(0.25) + 0.75 * math.log(3 / 7) + 1 / math.sqrt(0.24 + 1e-4) / 2
    assert float(moved) == pytest.approx(1 / (1 + math.exp(-expected)), rel=1e-14)


def test_kl_matches_mpmath_also_where_probabilities_round_away():
    mp.mp.dps = 250
    for a, b in ((-230.0, -225.0), (230.0, 1.5), (-3.0, 200.0), (0.4, 0.4), (35.0, -35.0)):
        pa, qa = 1 / (1 + mp.exp(-mp.mpf(a))), 1 / (1 + mp.exp(mp.mpf(a)))
        pb, qb = 1 / (1 + mp.exp(-mp.mpf(b))), 1 / (1 + mp.exp(mp.mpf(b)))
        exact = pa * mp.log(pa / pb) + qa * mp.log(qa / qb)
        assert float(bernoulli_kl(a, b, logits=True)) == pytest.approx(float(exact), rel=1e-12, abs=1e-100)
    table = [[float(bernoulli_kl(p, q)) for q in (0.0, 0.5, 1.0)] for p in (0.0, 0.5, 1.0)]
    assert table == [[0.0, pytest.approx(math.log(2)), math.inf], [math.inf, 0.0, math.inf],
                     [math.inf, pytest.approx(math.log(2)), 0.0]]  # fmt: skip
    assert float(jax.grad(bernoulli_kl)(0.3, 0.2)) == pytest.approx(math.log(0.3 / 0.7 * 4), rel=1e-13)


def test_beta_alpha_and_p_are_traced():
    def f(p_ref, beta, alpha):
        return iterate(p_ref, 3, beta=beta, weights=Group(8), alpha=alpha)[-1]

    at = (0.2, 1.5, 0.6)
    for i, slope in enumerate(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*at)):
        high, low = (f(*(x + s * (i == j) for j, x in enumerate(at))) for s in (1e-6, -1e-6))
        assert float(slope) == pytest.approx(float(high - low) / 2e-6, rel=1e-7)
    sweep = jax.vmap(lambda b: iterate(jnp.asarray([0.1, 0.5]), 3, beta=b, weights=Group(8)))(jnp.asarray([1.0, 2.0]))
    assert sweep.shape == (2, 4, 2)


def test_float32_stays_float32():
    path = iterate(jnp.float32(0.2), 30, beta=1.0, weights=Whitened(1e-5))
    assert path.dtype == jnp.float32
    assert float(path[-1]) == pytest.approx(0.681283437786, abs=3e-6)
