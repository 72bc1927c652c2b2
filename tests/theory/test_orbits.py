"""Ends of orbits against stored orbits of NumPy and mpmath, known cycles and chaos, and who must converge."""

import math

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.theory.bifurcation import two_cycles
from experiments.theory.phase_diagram import classify, fast, group_polynomial, plain_classify
from grpo_jax.theory.dynamics import iterate
from grpo_jax.theory.limits import flow_point, limit_point
from grpo_jax.theory.orbits import orbit_end
from grpo_jax.theory.thresholds import flip_window
from grpo_jax.theory.weights import Group, MeanOnly, NoisyVerifier, Whitened, WhitenedStd

pytestmark = pytest.mark.usefixtures("double")


def plain_orbits(p_ref, beta, epsilon, alpha, p_0, length):
    """[length + 1, N] log-odds and [length, N] slopes of the map, in p and 1 − p and without jax."""
    reference, logit = np.log(p_ref / (1 - p_ref)), np.log(p_0 / (1 - p_0))
    path, slopes = [logit], []
    for _ in range(length):
        p, q = 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(logit))
        slopes.append(1 - alpha + p * q * (p - q) / (2 * beta * (p * q + epsilon) ** 1.5))
        logit = alpha * reference + (1 - alpha) * logit + 1 / (beta * np.sqrt(p * q + epsilon))
        path.append(logit)
    return np.array(path), np.array(slopes)


def test_ends_periods_and_exponents_are_those_of_stored_orbits():
    random = np.random.default_rng(0)
    n, length = 400, 1000
    p_ref, beta = 10 ** random.uniform(-6, -0.01, n), 10 ** random.uniform(-0.7, 1.5, n)
    p_0 = np.where(random.random(n) < 0.5, p_ref, random.uniform(0.01, 0.99, n))
    alpha = np.where(random.random(n) < 0.5, 1.0, random.uniform(0.3, 1, n))
    end = orbit_end(p_ref, beta=beta, weights=Whitened(1e-3), alpha=alpha, p_0=p_0, num_iterations=length)
    path, slopes = plain_orbits(p_ref, beta, 1e-3, alpha, p_0, length + 64)
    periods = set()
    for i in range(n):
        tail = path[length:, i]
        near = np.abs(tail[1:] - tail[0]) < 3e-11 * (1 + abs(tail[0]))
        period = 1 + int(near.argmax()) if near.any() else 0
        exponent = float(np.log(np.maximum(np.abs(slopes[length // 2 : length, i]), 1e-300)).mean())
        assert int(end.period[i]) == period
        if exponent > 0:  # chaos: other roundings, another orbit
            assert float(end.lyapunov[i]) > 0.01
            continue
        periods.add(period)
        cycle = 1 / (1 + np.exp(-tail[: period or 65]))
        assert float(end.low[i]) == pytest.approx(cycle.min(), rel=1e-8)
        assert float(end.high[i]) == pytest.approx(cycle.max(), rel=1e-8)
        assert float(end.lyapunov[i]) == pytest.approx(exponent, rel=1e-6, abs=1e-6)
    assert {1, 2, 4} <= periods


@pytest.mark.parametrize(
    ("beta", "period"), [(3.0, 2), (4.67, 3), (6.43, 4), (5.04, 5), (5.61, 6), (6.02, 8), (5.73, 10)]
)
def test_long_cycles_close_in_forty_digits(beta, period):
    """mpmath iterates from the end that was found: it has to come back, not earlier, and attract."""
    p_ref = 1e-3 if period == 2 else 1e-4
    end = orbit_end(p_ref, beta=beta, weights=Whitened(1e-5), p_0=0.1, num_iterations=4000, logits=False)
    assert int(end.period) == period
    mp.mp.dps = 40
    reference, epsilon = mp.log(mp.mpf(p_ref) / (1 - mp.mpf(p_ref))), mp.mpf(1e-5)
    start = logit = mp.log(mp.mpf(float(end.low)) / (1 - mp.mpf(float(end.low))))
    visited, slope = [], mp.mpf(1)
    for _ in range(period):
        p = 1 / (1 + mp.exp(-logit))
        slope *= p * (1 - p) * (2 * p - 1) / (2 * mp.mpf(beta) * mp.sqrt(p * (1 - p) + epsilon) ** 3)
        logit = reference + 1 / (mp.mpf(beta) * mp.sqrt(p * (1 - p) + epsilon))
        visited.append(logit)
    assert abs(visited[-1] - start) < 1e-9
    assert all(abs(point - start) > 1e-3 for point in visited[:-1])
    assert abs(slope) < 1
    assert float(end.high) == pytest.approx(float(1 / (1 + mp.exp(-max(visited)))), rel=1e-9)
    assert float(end.lyapunov) == pytest.approx(float(mp.log(abs(slope)) / period), abs=0.02)


def test_known_cycle_and_known_chaos():
    cycle = orbit_end(1e-3, beta=3.0, weights=Whitened(1e-5))
    assert int(cycle.period) == 2
    assert float(cycle.low) == pytest.approx(0.00199486349927, rel=3e-12)
    assert float(cycle.high) == pytest.approx(0.633011579742, rel=3e-12)
    chaos = orbit_end(1e-4, beta=5.0, weights=Whitened(1e-5), p_0=0.1, num_iterations=40_000)
    assert int(chaos.period) == 0
    assert float(chaos.lyapunov) == pytest.approx(0.352, abs=0.01)
    near = orbit_end(1e-4, beta=5.0, weights=Whitened(1e-5), p_0=jnp.asarray([0.1, 0.1 + 1e-12]), num_iterations=100)
    assert abs(float(near.high[0] - near.high[1])) > 1e-6  # what chaos means


@given(
    p_ref=st.lists(st.floats(0.0101, 0.9999), min_size=64, max_size=64),
    start=st.lists(st.floats(0.001, 0.999), min_size=64, max_size=64),
    beta=st.floats(-2, 2),
    epsilon=st.floats(-7, -0.7),
    std=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_prompts_above_one_percent_converge_from_everywhere(p_ref, start, beta, epsilon, std):
    """Above `flip_limit` at ε = 0, 1.0039 %, nothing oscillates; an ε only damps, inside the root or beside the std."""
    weights = WhitenedStd(10**epsilon) if std else Whitened(10**epsilon)
    end = orbit_end(np.array(p_ref), beta=10**beta, weights=weights, p_0=np.array(start), num_iterations=20_000)
    assert set(end.period.tolist()) <= {1}
    assert bool((end.high - end.low < 1e-9).all())
    assert bool((end.lyapunov < 0).all())


def test_less_of_the_reference_cures_oscillation_and_chaos():
    """Same fixed points as α = 1 at αβ."""
    p_ref = jnp.asarray([1e-3, 1e-4])
    beta = jnp.asarray([3.0, 5.0])
    wild = orbit_end(p_ref, beta=beta, weights=Whitened(1e-5), p_0=0.1)
    assert wild.period.tolist() == [2, 0]
    calm = orbit_end(
        p_ref, beta=beta / jnp.asarray([0.5, 0.25]), weights=Whitened(1e-5), alpha=jnp.asarray([0.5, 0.25]), p_0=0.1
    )
    assert calm.period.tolist() == [1, 1]
    still = flow_point(p_ref, beta=beta, weights=Whitened(1e-5))
    assert jnp.allclose(calm.high, still, rtol=1e-9)
    assert float(calm.high[0]) == pytest.approx(0.015123, abs=5e-7)


def test_ends_and_mirrors_and_runaways():
    ends = orbit_end(jnp.asarray([0.0, 1.0]), beta=2.0, weights=Whitened(0.0), p_0=0.3)
    assert ends.low.tolist() == ends.high.tolist() == [0.0, 1.0]
    assert ends.period.tolist() == [1, 1]
    assert ends.lyapunov.tolist() == [-math.inf, -math.inf]
    mirror = orbit_end(jnp.asarray([0.2, 0.0]), beta=2.0, weights=MeanOnly(), alpha=0.0)
    assert mirror.low.tolist() == mirror.high.tolist() == [1.0, 0.0]
    liar = NoisyVerifier(MeanOnly(), tpr=0.2, fpr=0.7)
    assert float(orbit_end(0.2, beta=2.0, weights=liar, alpha=0.0).high) == 0.0
    for alpha in (1.0, 0.5):  # without ε, below the fold, p overtakes every float
        away = orbit_end(0.2, beta=0.3 / alpha, weights=Whitened(0.0), alpha=alpha)
        assert (float(away.low), float(away.high), int(away.period)) == (1.0, 1.0, 1)
        assert float(away.lyapunov) == (-math.inf if alpha == 1 else pytest.approx(math.log(0.5)))
    assert limit_point(0.2, beta=0.3, weights=Whitened(0.0)) == ("fixed", 1.0, 1)
    assert bool(jnp.isnan(orbit_end(1.2, beta=1.0, weights=Whitened()).low))


def test_mean_only_converges_at_the_rate_of_its_slope():
    end = orbit_end(0.2, beta=2.0, weights=MeanOnly(), alpha=0.25)
    assert float(end.lyapunov) == pytest.approx(math.log(0.75), rel=1e-12)
    assert float(end.high) == pytest.approx(0.648785644284, rel=3e-12)


@pytest.mark.parametrize("weights", [Whitened(1e-3), Group(64)], ids=repr)
def test_shapes_transformations_and_single_precision(weights):
    logits = jnp.linspace(-9.0, 2.0, 6)[:, None]
    beta = jnp.geomspace(0.5, 20.0, 5)
    end = orbit_end(logits, beta=beta, weights=weights, num_iterations=400, logits=True)
    assert end.low.shape == end.high.shape == end.period.shape == end.lyapunov.shape == (6, 5)
    assert end.period.dtype == jnp.int32
    one = orbit_end(logits[2, 0], beta=beta[3], weights=weights, num_iterations=400, logits=True)
    assert jnp.allclose(one.high, end.high[2, 3], rtol=1e-9)
    mapped = jax.jit(jax.vmap(lambda b: orbit_end(logits, beta=b, weights=weights, num_iterations=400, logits=True)))(
        beta
    )
    assert jnp.allclose(mapped.low[..., 0].T, end.low, rtol=1e-7)
    single = orbit_end(
        logits.astype(jnp.float32), beta=beta.astype(jnp.float32), weights=weights, num_iterations=400, logits=True
    )
    assert single.low.dtype == single.lyapunov.dtype == jnp.float32
    settled = end.lyapunov < -0.05
    assert int(settled.sum()) >= 25
    assert bool((single.period == end.period)[settled].all())
    assert jnp.allclose(single.high.astype(float)[settled], end.high[settled], rtol=1e-4, atol=1e-4)


def test_watching_continues_the_orbit():
    """low and high of an orbit that has not settled are those of its last 64 iterations."""
    end = orbit_end(1e-4, beta=5.0, weights=Whitened(1e-5), p_0=0.1, num_iterations=50)
    path = iterate(1e-4, 114, beta=5.0, weights=Whitened(1e-5), p_0=0.1)
    assert float(end.low) == pytest.approx(float(path[50:].min()), rel=1e-5)
    assert float(end.high) == pytest.approx(float(path[50:].max()), rel=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1e-2, 0.2])
def test_the_schwarzian_is_negative_so_flips_are_supercritical(epsilon):
    """(3/8) x²v²/(v + ε)² + 1 − 12v − (3/2)(1 − 6v)²/x², and never above its value at ε = 0."""

    def omega(logit):
        return Whitened(epsilon).omega(logit)

    first = jax.grad(omega)
    second, third = jax.grad(first), jax.grad(jax.grad(first))
    grid = jnp.concatenate([jnp.linspace(-14.0, -0.1, 400), jnp.linspace(0.1, 14.0, 400)])
    one, two, three = (jax.vmap(f)(grid) for f in (first, second, third))
    schwarzian = three / one - 1.5 * (two / one) ** 2
    x, v = jnp.tanh(grid / 2), 0.25 / jnp.cosh(grid / 2) ** 2
    closed = 0.375 * (x * v / (v + epsilon)) ** 2 + 1 - 12 * v - 1.5 * (1 - 6 * v) ** 2 / x**2
    assert jnp.allclose(schwarzian, closed, rtol=1e-6, atol=1e-6)
    assert bool((closed <= 0.25 - 0.375 / x**2 + 1e-9).all())


@pytest.mark.parametrize("weights", [Whitened(0.0), Whitened(1e-2), Group(16), Group(64)], ids=repr)
@pytest.mark.parametrize("p_ref", [1e-5, 1e-3, 3e-3])
def test_two_cycles_exist_exactly_inside_the_flip_window(p_ref, weights):
    window = flip_window(p_ref, weights=weights)
    cycles = two_cycles(p_ref, window, weights)
    assert (float(cycles["lowest"]), float(cycles["highest"])) == pytest.approx(window, rel=2e-5)
    assert window[0] < float(cycles["lowest"])
    assert float(cycles["highest"]) < window[1]
    assert float(cycles["rise"]) < 0  # one for each β


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16, 64])
def test_group_weights_are_polynomials_with_positive_coefficients(size):
    """Of (2p − 1)²; what the phase diagram iterates."""
    coefficients = group_polynomial(size)
    assert min(coefficients) > 0
    assert len(coefficients) == size // 2
    logit = jnp.linspace(-20.0, 20.0, 801)
    assert jnp.allclose(
        jnp.polyval(jnp.asarray(coefficients[::-1]), jnp.tanh(logit / 2) ** 2), Group(size).omega(logit), rtol=1e-12
    )


def test_the_phase_diagram_and_its_numpy_twin_agree():
    reference, beta = jnp.linspace(-13.0, 8.0, 30, dtype=jnp.float32), jnp.geomspace(0.06, 90, 31, dtype=jnp.float32)
    for weights in (Whitened(1e-3), Group(16)):
        kinds = np.asarray(classify(reference, beta, fast(weights), 1000))
        coefficients = np.asarray(group_polynomial(16), np.float32) if isinstance(weights, Group) else None
        plain = plain_classify(np.asarray(reference), np.asarray(beta), 1e-3, coefficients, 1000)
        assert kinds.shape == (31, 30)
        assert (kinds == plain).mean() > 0.99
        assert {0, 1, 2} <= set(kinds.ravel().tolist())
