"""Mirror GRPO: its flow against the orbit it stands for, its time against quadrature, its KL against mpmath, its stages."""

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
    iterate,
    limit_point,
    mirror_flow,
    mirror_step_kl,
    mirror_steps,
    omega,
    success_map,
)
from tests import exact_theory as exact
from tests.exact_theory import mp, sigmoid

pytestmark = pytest.mark.usefixtures("double")

mirror_steps = jax.jit(mirror_steps, static_argnames="logits")


def test_the_flow_is_the_sine_law():
    rng = np.random.default_rng(0)
    p_0, beta = rng.uniform(0.001, 0.999, 60), np.exp(rng.uniform(0, 6, 60))
    steps = rng.uniform(0, 1, 60) * beta * (math.pi - 2 * np.arcsin(np.sqrt(p_0))) * 0.999
    climbed = mirror_flow(jnp.asarray(p_0), jnp.asarray(steps), beta=jnp.asarray(beta))
    for p, start, n, b in zip(climbed.tolist(), p_0.tolist(), steps.tolist(), beta.tolist(), strict=True):
        angle = mp.asin(mp.sqrt(mp.mpf(start))) + mp.mpf(n) / (2 * mp.mpf(b))
        assert p == pytest.approx(float(mp.sin(angle) ** 2), rel=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float64, 1e-13), (jnp.float32, 1e-6)])
def test_the_flow_keeps_log_odds_on_both_sides(dtype, bound):
    """No step is no change, and 1 − p falls by the law as p does: log-odds exist for what p cannot hold."""
    logits = jnp.asarray([-60.0, -25.0, -3.0, 0.0, 3.0, 12.0, 25.0, 60.0], dtype)
    np.testing.assert_allclose(mirror_flow(logits, 0.0, beta=2.0, logits=True), logits, rtol=bound, atol=bound)


def test_the_flow_next_to_its_end_in_log_odds():
    for left in (1e-3, 1e-6, 1e-9):  # of the angle
        angle = mp.pi / 2 - mp.mpf(left)
        climbed = mirror_flow(0.0, 2 * float(angle - mp.pi / 4), beta=1.0, logits=True)
        exactly = float(2 * mp.log(mp.tan(mp.pi / 4 + mp.mpf(2 * float(angle - mp.pi / 4)) / 2)))
        assert float(climbed) == pytest.approx(exactly, rel=1e-7)


def test_many_small_mirror_steps_follow_the_flow():
    """β = 400 and ε = 0, from .03 to .9, and the error falls like 1/β."""
    gaps = []
    for beta in (100.0, 400.0):
        n = int(float(mirror_steps(0.03, 0.9, beta=beta)))
        path = iterate(0.03, n, beta=beta, weights=Whitened(0.0), alpha=0.0)
        gaps.append(float(jnp.abs(path - mirror_flow(0.03, jnp.arange(n + 1), beta=beta)).max()))
    assert gaps[1] < 2e-3 and gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


def test_the_flow_arrives():
    beta = 3.0
    end = beta * (math.pi - 2 * math.asin(math.sqrt(0.2)))
    assert float(mirror_flow(0.2, end * (1 + 1e-9), beta=beta)) == 1.0
    assert float(mirror_flow(0.2, 10 * end, beta=beta)) == 1.0
    assert 1 - 1e-12 < float(mirror_flow(0.2, end * (1 - 1e-7), beta=beta)) <= 1.0
    assert mirror_flow(jnp.asarray([0.0, 1.0]), 50.0, beta=beta).tolist() == [0.0, 1.0]


def test_gradients_of_the_flow_at_the_ends_are_finite():
    for p_0 in (0.0, 1.0):
        for steps in (0.0, 10.0):
            slopes = jax.grad(lambda p, n, b: mirror_flow(p, n, beta=b), argnums=(0, 1, 2))(p_0, steps, 2.0)
            assert all(math.isfinite(float(slope)) for slope in slopes), (p_0, steps)


def test_gradient_of_the_flow_inside():
    """dp/dn = √v/β."""
    p = float(mirror_flow(0.2, 1.3, beta=2.0))
    slope = float(jax.grad(lambda n: mirror_flow(0.2, n, beta=2.0))(1.3))
    assert slope == pytest.approx(math.sqrt(p * (1 - p)) / 2, rel=1e-12)


@pytest.mark.parametrize(
    "weights",
    [Whitened(0.0), Whitened(1e-5), Whitened(1e-12), WhitenedStd(1e-4), MeanOnly(), Group(8), Group(16),
     Group(8, dynamic_sampling=True), Group(6, baseline="none"), NoisyVerifier(Whitened(1e-4), 0.9, 0.02)],
    ids=repr,
)  # fmt: skip
def test_steps_are_the_integral_of_one_over_omega(weights):
    spans = [(-5.0, 3.0), (-60.0, 9.0), (-0.1, 0.2)]
    starts, stops = (jnp.asarray(x) for x in zip(*spans, strict=True))
    counts = mirror_steps(starts, stops, beta=1.7, weights=weights, logits=True).tolist()
    with mp.workdps(20):
        for (start, stop), steps in zip(spans, counts, strict=True):
            nodes = [start, *(x for x in (-40, -20, -10, -5, 0, 5) if start < x < stop), stop]
            exactly = mp.mpf(1.7) * mp.quad(lambda L: 1 / exact.omega(L, weights), nodes)
            assert steps == pytest.approx(float(exactly), rel=1e-12), (start, stop)


def test_steps_by_the_closed_forms():
    p_0, p_1 = jnp.asarray([1e-9, 0.01, 0.2, 0.5]), jnp.asarray([0.9, 0.3, 1 - 1e-9, 1.0])
    whitened = 4.0 * (jnp.arcsin(jnp.sqrt(p_1)) - jnp.arcsin(jnp.sqrt(p_0)))
    np.testing.assert_allclose(mirror_steps(p_0, p_1, beta=2.0), whitened, rtol=1e-10)
    logits = jnp.log(p_1[:3] / (1 - p_1[:3])) - jnp.log(p_0[:3] / (1 - p_0[:3]))
    np.testing.assert_allclose(mirror_steps(p_0[:3], p_1[:3], beta=2.0, weights=MeanOnly()), 2 * logits, rtol=1e-12)
    assert float(mirror_steps(0.3, 0.3, beta=2.0)) == 0.0
    back = mirror_flow(p_0[:2], mirror_steps(p_0[:2], p_1[:2], beta=2.0), beta=2.0)
    np.testing.assert_allclose(back, p_1[:2], rtol=1e-12)


def test_table_of_times_to_nine_tenths():
    p_0 = jnp.asarray([0.001, 0.01, 0.05, 0.2, 0.5])
    table = {
        Whitened(0.0): (2.43, 2.30, 2.05, 1.57, 0.93),
        MeanOnly(): (9.10, 6.79, 5.14, 3.58, 2.20),
        Group(4): (5.40, 4.07, 3.11, 2.18, 1.33),
        Group(8): (3.99, 3.11, 2.47, 1.79, 1.08),
        Group(16): (3.28, 2.68, 2.21, 1.66, 0.98),
    }
    for weights, row in table.items():
        np.testing.assert_allclose(mirror_steps(p_0, 0.9, beta=1.0, weights=weights), row, atol=5.1e-3)


def test_steps_between_the_ends():
    for weights in (Whitened(1e-3), MeanOnly(), Group(8)):
        assert float(mirror_steps(0.2, 1.0, beta=1.0, weights=weights)) == math.inf
        assert float(mirror_steps(0.0, 0.2, beta=1.0, weights=weights)) == math.inf
    assert float(mirror_steps(1e-300, 1.0, beta=1.0)) == pytest.approx(math.pi, rel=1e-6)
    # Uncentred advantages stop at 1: Ω(1) = 0.
    assert float(mirror_steps(0.2, 1.0, beta=1.0, weights=Group(8, baseline="none"))) == math.inf


def test_a_verifier_worse_than_chance_takes_the_mirrored_time():
    worse, better = NoisyVerifier(Whitened(1e-3), 0.1, 0.8), NoisyVerifier(Whitened(1e-3), 0.8, 0.1)
    down = float(mirror_steps(0.7, 0.2, beta=2.0, weights=worse))
    assert down == pytest.approx(float(mirror_steps(0.3, 0.8, beta=2.0, weights=better)), rel=1e-12)


def test_steps_have_the_slopes_of_their_bounds():
    """d/dL_1 = β/Ω(L_1), d/dL_0 = −β/Ω(L_0)."""
    weights = Group(8)
    slopes = jax.grad(lambda a, b: mirror_steps(a, b, beta=2.0, weights=weights, logits=True), argnums=(0, 1))(
        -2.0, 1.5
    )
    ends = [2 / float(omega(L, weights, logits=True)) for L in (-2.0, 1.5)]
    assert [float(s) for s in slopes] == pytest.approx([-ends[0], ends[1]], rel=1e-10)


@pytest.mark.parametrize("weights", [Whitened(0.0), Whitened(1e-3), MeanOnly(), Group(8)], ids=repr)
def test_step_kl_in_mpmath(weights):
    logits = jnp.asarray([-30.0, -4.0, 0.0, 1.5, 9.0])
    for beta in (0.05, 1.0, 30.0):
        costs = mirror_step_kl(logits, beta=beta, weights=weights, logits=True).tolist()
        for L, spent in zip(logits.tolist(), costs, strict=True):
            exactly = exact.kl(exact.step(L, 0, beta, weights, alpha=0), L)
            assert spent == pytest.approx(float(exactly), rel=1e-9), (L, beta)


@pytest.mark.parametrize("beta", [1e3, 1e5, 1e7])
def test_step_kl_of_whitening_is_the_same_for_every_prompt(beta):
    """1/(2β²): what makes β a trust region, and the KL there is tiny."""
    spent = mirror_step_kl(jnp.asarray([0.01, 0.3, 0.5, 0.95]), beta=beta, weights=Whitened(0.0))
    np.testing.assert_allclose(2 * beta**2 * spent, 1.0, rtol=10 / beta + 1e-6)


def test_step_kl_of_the_ends_is_nothing():
    for weights in (Whitened(0.0), MeanOnly()):
        assert mirror_step_kl(jnp.asarray([0.0, 1.0]), beta=1.0, weights=weights).tolist() == [0.0, 0.0]


def test_speed_of_the_last_steps():
    """At p = 1 the multiplier of 1 − p is e^{−1/(β√ε)}, at p = 0 that of p is its inverse."""
    weights, beta = Whitened(0.04), 2.0
    for L, factor in ((40.0, math.exp(-2.5)), (-40.0, math.exp(2.5))):
        moved = float(success_map(L, 0.0, beta=beta, weights=weights, alpha=0.0, logits=True))
        assert math.exp(-abs(moved) + abs(L)) == pytest.approx(factor, rel=1e-12)


def test_stages_of_a_reset_reference_climb_to_one():
    """p_ref = .03, β = 2, ε = 1e-3: .123, .296, .533, .798, then 1; each stage adds at least Ω(½)/β to the log-odds."""
    weights, logit, seen = Whitened(1e-3), math.log(3 / 97), []
    least = 2 / math.sqrt(1 + 4e-3) / 2
    for _ in range(5):
        after = limit_point(logit, beta=2.0, weights=weights, logits=True).p
        assert after >= logit + least
        logit = after
        seen.append(float(sigmoid(logit)))
    assert seen == pytest.approx([0.123, 0.296, 0.533, 0.798, 1.0], abs=5.1e-4)


def test_shapes_and_float32():
    p = jnp.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    times = mirror_steps(p, 0.9, beta=2.0, weights=Group(8))
    assert times.shape == (2, 3)
    np.testing.assert_allclose(times[1], mirror_steps(p[1], 0.9, beta=2.0, weights=Group(8)), rtol=1e-13)
    single = mirror_steps(p.astype(jnp.float32), jnp.float32(0.9), beta=2.0, weights=Group(8))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, times, rtol=5e-6)
    assert mirror_flow(jnp.float32(0.2), 3, beta=2.0).dtype == jnp.float32
    assert mirror_step_kl(jnp.float32(0.2), beta=2.0, weights=Whitened()).dtype == jnp.float32
