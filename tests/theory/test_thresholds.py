"""Folds, cusps and flips against closed forms, high precision, and what fixed points and orbits do on either side."""

import itertools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.theory import (
    Group,
    MeanOnly,
    NoisyVerifier,
    Whitened,
    WhitenedStd,
    bistable_window,
    cusp,
    fixed_points,
    flip_limit,
    flip_window,
    flow_point,
    fold_beta,
    limit_point,
    success_map,
)

P_REFS = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)


def test_folds_of_unsmoothed_whitening_solve_their_closed_form():
    for p_ref in P_REFS:
        reference = mpmath.log(mpmath.mpf(p_ref) / (1 - mpmath.mpf(p_ref)))
        gain = mpmath.findroot(
            lambda d, r=reference: d - mpmath.log((d + 2) / (d - 2)) + r, (2.0000001, 40), "anderson"
        )
        low, high = bistable_window(p_ref, weights=Whitened(0.0))
        assert low == pytest.approx(float(2 / mpmath.sqrt(gain**2 - 4)), rel=1e-12)
        assert high == math.inf


@pytest.mark.parametrize(
    ("epsilon", "lower", "upper"),
    [
        (
            1e-5,
            (0.2123, 0.2784, 0.4007, 0.5712, 0.6970, 0.8957, 1.0818, 1.5088, 2.1847, 4.1355, 13.4917),
            (13.10, 14.55, 16.39, 18.03, 18.89, 19.93, 20.69, 22.01, 23.52, 26.44, 34.16),
        ),
        (
            1e-2,
            (0.2080, 0.2726, 0.3917, 0.5564, 0.6768, 0.8641, 1.0357, 1.4098, None, None, None),
            (0.594, 0.696, 0.845, 1.003, 1.097, 1.225, 1.331, 1.550, None, None, None),
        ),
    ],
)
def test_table_of_folds(epsilon, lower, upper):
    for p_ref, low, high in zip(P_REFS, lower, upper, strict=True):
        window = bistable_window(p_ref, weights=Whitened(epsilon))
        assert (window is None) == (low is None)
        if window is not None:
            assert window == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(p_ref=st.floats(1e-6, 0.6), epsilon=st.sampled_from([1e-5, 1e-3, 1e-2]), share=st.floats(0.02, 0.98))
def test_three_fixed_points_exactly_between_the_folds(p_ref, epsilon, share):
    weights = Whitened(epsilon)
    low, high = bistable_window(p_ref, weights=weights)
    between = low + share * (high - low)
    counts = [len(fixed_points(p_ref, beta=beta, weights=weights)) for beta in (low * 0.999, between, high * 1.001)]
    assert counts == [1, 3, 1]
    assert fixed_points(p_ref, beta=low * 0.999, weights=weights)[0].p > 0.5 > 0.4 * p_ref
    middle = fixed_points(p_ref, beta=between, weights=weights)[1]
    assert middle.multiplier > 1 and not middle.stable


@pytest.mark.parametrize("epsilon", [1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2])
def test_cusp_has_its_closed_form(epsilon):
    u = math.sqrt((1 + 4 * epsilon) / (1 + 12 * epsilon))
    gain = 3 * math.sqrt((1 + 4 * epsilon) * (1 + 12 * epsilon))
    meeting = cusp(Whitened(epsilon))
    assert meeting.p == pytest.approx((1 + u) / 2, rel=1e-9)
    assert meeting.p_ref == pytest.approx(1 / (1 + math.exp(gain - 2 * math.atanh(u))), rel=1e-9)
    assert meeting.beta == pytest.approx(2 / math.sqrt(1 - u**2 + 4 * epsilon) / gain, rel=1e-9)
    assert bistable_window(meeting.p_ref * 0.999, weights=Whitened(epsilon))[0] < meeting.beta
    just_below = math.log(meeting.p_ref / (1 - meeting.p_ref)) - 1e-3
    low, high = bistable_window(just_below, weights=Whitened(epsilon), logits=True)
    assert 0.99 * meeting.beta < low < high < 1.01 * meeting.beta
    assert bistable_window(min(meeting.p_ref * 1.001, 0.99999), weights=Whitened(epsilon)) is None


def test_what_has_no_cusp():
    assert cusp(MeanOnly()) is None and cusp(Group(2)) is None and cusp(Group(3)) is None
    assert cusp(Whitened(0.0)) is None  # every p_ref has a fold
    assert fold_beta(0.99999, weights=Whitened(0.0)) > 0


def test_table_of_flip_windows():
    low = (0.1496, 0.1823, 0.2349, 0.3382, 0.4418, 0.5285, 0.7653, 0.9490)
    high = (183.9, 58.15, 18.35, 5.681, 3.110, 2.257, 1.341, 1.055)
    p_refs = (1e-6, 1e-5, 1e-4, 1e-3, 0.003, 0.005, 0.009, 0.01)
    for p_ref, first, last in zip(p_refs, low, high, strict=True):
        window = flip_window(p_ref, weights=Whitened(0.0))
        assert window == (pytest.approx(first, abs=6e-5), pytest.approx(last, rel=6e-4))


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.5, 0.25])
def test_flip_limit_of_unsmoothed_whitening_has_its_closed_form(alpha):
    c = (2 - alpha) / alpha
    d = 2 * math.sqrt(c**2 + c)
    expected = 1 / (1 + math.exp(d - math.log((d - 2 * c) / (d + 2 * c))))
    limit = flip_limit(Whitened(0.0), alpha=alpha)
    assert limit == pytest.approx(expected, rel=1e-9)
    low, high = flip_window(limit * 0.99, weights=Whitened(0.0), alpha=alpha)
    assert 0 < low < high < 2 * low
    assert flip_window(limit * 1.01, weights=Whitened(0.0), alpha=alpha) is None


@pytest.mark.parametrize(
    ("epsilon", "limit"),
    [(1e-5, 0.010037), (1e-3, 0.009817), (0.01, 0.008038), (0.05, 0.003370), (0.1, 0.001160), (0.2, 1.409e-4)],
)
def test_smoothing_lowers_the_flip_limit(epsilon, limit):
    assert flip_limit(Whitened(epsilon)) == pytest.approx(limit, rel=2e-4)


@pytest.mark.parametrize(
    ("size", "flip", "three"),
    [
        (4, 2e-17, 3e-16),
        (8, 1.9e-4, 0.0027),
        (12, 0.0018, 0.035),
        (16, 0.0037, 0.094),
        (32, 0.0076, 0.33),
        (64, 0.0091, 0.585),
        (256, 0.0098, 0.876),
    ],
)
def test_finite_groups_are_calmer(size, flip, three):
    assert flip_limit(Group(size)) == pytest.approx(flip, rel=0.2 if size == 4 else 0.02)
    assert cusp(Group(size)).p_ref == pytest.approx(three, rel=0.02)


@pytest.mark.parametrize(
    ("size", "limit"), [(2, 0.0453), (3, 0.0453), (4, 0.0420), (8, 0.0302), (16, 0.0198), (64, 0.0091)]
)
def test_dynamic_sampling_oscillates_up_to_higher_references(size, limit):
    """Its Ω grows like 1/p: small groups, the calmest of all without it, flip at larger p_ref than the population does."""
    # Without our Ω: at the limit L_ref = L + 1/(ln Ω)'(L) is largest, by a sum over the number of successes and differences.
    step = 1e-3
    grid = np.arange(-4, -1, step)
    pull = np.array([_dynamic_pull(x, size) for x in grid])
    references = grid[1:-1] + 2 * step / (np.log(pull[2:]) - np.log(pull[:-2]))
    assert 1 / (1 + np.exp(-references.max())) == pytest.approx(limit, abs=6e-5)
    assert (limit > flip_limit(Whitened(0.0))) == (size < 64)


def test_the_flip_limit_of_dynamic_sampling():
    assert flip_limit(Group(8, dynamic_sampling=True)) == pytest.approx(0.030236, abs=1e-6)
    assert flip_limit(Group(8)) == pytest.approx(1.875e-4, abs=1e-6)


def test_two_cycles_of_dynamic_sampling_at_two_percent():
    """Groups of 8, p_ref = 2 %: from the reference exact iterations cycle for β in [2.22, 4.60]; below they jump to 1."""
    weights = Group(8, dynamic_sampling=True)
    window = flip_window(0.02, weights=weights)
    assert window == (pytest.approx(0.8132, abs=1e-4), pytest.approx(4.5994, abs=1e-4))
    for beta in (2.22, 3.0, 4.5):
        end = limit_point(0.02, beta=beta, weights=weights)
        assert end.kind == "cycle" and end.period == 2 and end.p[1] - end.p[0] > 0.02
        low, high = (math.log(p / (1 - p)) for p in end.p)
        mapped = [math.log(0.02 / 0.98) + _dynamic_pull(x, 8) / beta for x in (low, high)]
        assert mapped == pytest.approx([high, low], abs=1e-9)
    assert limit_point(0.02, beta=2.21, weights=weights).p > 0.99
    above = limit_point(0.02, beta=4.7, weights=weights)
    assert max(above.p) - min(above.p) < 1e-6 if above.kind == "cycle" else above.kind == "fixed"
    assert flip_window(0.0305, weights=weights) is None


def _dynamic_pull(logit, size):
    """Ω of whitened groups that are drawn again until their rewards differ, by a sum over the number of successes."""
    p = 1 / (1 + math.exp(-logit))
    shares = [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(1, size)]
    spread = sum(x * math.sqrt(k * (size - k)) / size for k, x in enumerate(shares, 1))
    return spread / (p * (1 - p)) / sum(shares)


def test_exact_iterations_saturate_above_the_fold_where_small_steps_do_not():
    """β_c is the smallest β that does not saturate for small steps only: here 1 > β_c = 0.354, and one exact step jumps past."""
    weights = Whitened(1e-5)
    assert fold_beta(0.005, weights=weights) == pytest.approx(0.354, abs=5e-4)
    assert float(flow_point(0.005, beta=1.0, weights=weights)) < 0.2
    end = limit_point(0.005, beta=1.0, weights=weights)
    assert end.kind == "fixed" and end.p > 1 - 1e-9


def test_whitening_without_smoothing_has_its_two_ends_as_one_fixed_point():
    """At ε = 0 the compact interval is that of p: h is continuous on [0, 1] with h(0) = h(1) = 1, so no 2-cycle has an end."""
    with jax.enable_x64(True):
        ends = success_map(jnp.asarray([0.0, 1e-300, 1 - 1e-16, 1.0]), 0.3, beta=1.0, weights=Whitened(0.0))
        assert ends.tolist() == [1.0] * 4


@pytest.mark.parametrize("p_ref", [1e-4, 1e-3, 0.005])
def test_orbits_cycle_inside_the_flip_window_and_not_outside(p_ref):
    weights = Whitened(1e-5)
    low, high = flip_window(p_ref, weights=weights)
    low_end, high_end = (fixed_points(p_ref, beta=beta, weights=weights)[0] for beta in (low, high))
    assert [low_end.multiplier, high_end.multiplier] == pytest.approx([-1, -1], abs=1e-8)
    inside = fixed_points(p_ref, beta=0.9 * high, weights=weights)[0]
    assert inside.multiplier < -1
    assert limit_point(p_ref, beta=0.9 * high, weights=weights, p_0=inside.p * 1.001).kind != "fixed"
    outside = fixed_points(p_ref, beta=1.1 * high, weights=weights)[0]
    assert limit_point(p_ref, beta=1.1 * high, weights=weights, p_0=outside.p * 1.001).kind == "fixed"


def test_two_kl_damps_the_flip_of_reference_4():
    weights = Whitened(1e-5)
    assert flip_window(1e-3, weights=weights)[0] < 3.0 < flip_window(1e-3, weights=weights)[1]
    assert flip_window(1e-3, weights=weights, alpha=0.5) is None
    end = limit_point(1e-3, beta=6.0, weights=weights, alpha=0.5)
    assert end.kind == "fixed" and end.p == pytest.approx(0.015123, abs=5e-7)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    log_ref=st.floats(-14, 3),
    log_a=st.floats(-3, 3.5),
    ratio=st.floats(1.001, 30),
    epsilon=st.sampled_from([0.0, 1e-5, 1e-2]),
)
def test_two_cycles_are_the_pairs_of_equal_psi(log_ref, log_a, ratio, epsilon):
    """ψ(a) = a Ω(L_ref + a) takes a value at a and at b > a exactly if these two are a 2-cycle at β = ψ/(ab)."""
    with jax.enable_x64(True):
        omega = Whitened(epsilon).omega
        a, b = math.exp(log_a), math.exp(log_a) * ratio
        at_a, at_b = (float(omega(jnp.asarray(log_ref + x))) for x in (a, b))
        beta = at_a / b
        back = log_ref + at_b / beta
        # a → b by the choice of β; b → a exactly if ψ agrees.
        assert (back - (log_ref + a)) / a == pytest.approx((b * at_b - a * at_a) / (a * at_a), rel=1e-9, abs=1e-9)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    p_ref=st.floats(0.010040, 0.999),
    log_beta=st.floats(-3, 4),
    log_epsilon=st.floats(-12, 0),
    p_0=st.floats(1e-6, 1 - 1e-6),
)
def test_no_orbit_oscillates_above_the_flip_limit(p_ref, log_beta, log_epsilon, p_0):
    end = limit_point(p_ref, beta=math.exp(log_beta), weights=Whitened(math.exp(log_epsilon)), p_0=p_0)
    assert end.kind == "fixed"


@pytest.mark.parametrize("size", [*range(2, 41), 64, 100, 128, 200, 256, 400, 512])
def test_groups_have_at_most_three_fixed_points(size):
    """v Ω_G' in Bernstein form: its coefficients e, less any β > 0, change sign at most twice (variation diminishing)."""
    normalisers = [
        Group(size, ddof, epsilon, epsilon_in, baseline=baseline)
        for ddof, epsilon, epsilon_in, baseline in itertools.product(
            (0, 1), (0.0, 1e-6, 1e-4, 1e-2, 0.3), ("variance", "std"), ("mean", "leave_one_out")
        )
    ]
    with jax.enable_x64(True):
        for weights in [*normalisers, Group(size, scale="mean"), Group(size, scale="none")]:
            f = np.asarray(weights._coefficients(jnp.dtype("float64")))
            degree = len(f) - 1  # of Ω; f[i − 1] belongs to i successes
            i = np.arange(1, degree + 1)
            e = np.diff(f) * i * (degree + 1 - i) / (degree + 1)
            above = np.maximum(e, 0)
            peak = int(above.argmax()) if len(above) else 0
            slack = 1e-12 * np.abs(f).max() * size  # of rounding
            assert (np.diff(above[: peak + 1]) >= -slack).all() and (np.diff(above[peak:]) <= slack).all(), weights


def test_what_bernstein_form_is_meant():
    """The coefficients of the test above are those of v Ω'."""
    with jax.enable_x64(True):
        weights, p = Group(7, 1, 1e-3), 0.31
        f = np.asarray(weights._coefficients(jnp.dtype("float64")))
        n = len(f) + 1
        e = [0.0, *((f[i] - f[i - 1]) * i * (n - 1 - i) / (n - 1) for i in range(1, n - 1)), 0.0]
        bernstein = sum(c * math.comb(n - 1, i) * p**i * (1 - p) ** (n - 1 - i) for i, c in enumerate(e))
        logit = jnp.asarray(math.log(p / (1 - p)))
        assert p * (1 - p) * float(weights.slope(logit)) == pytest.approx(bernstein, rel=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(epsilon=st.floats(1e-6, 0.9), std=st.booleans())
def test_the_pull_of_whitening_is_unimodal_above_one_half(epsilon, std):
    """So population whitening has at most three fixed points; the proof in thresholds.py, on a grid."""
    with jax.enable_x64(True):
        weights = WhitenedStd(epsilon) if std else Whitened(epsilon)
        grid = jnp.linspace(1e-3, 40, 20001)
        pull = jax.nn.sigmoid(grid) * jax.nn.sigmoid(-grid) * weights.slope(grid)
        rises = np.asarray(jnp.diff(pull) > 1e-15)
        assert not (~rises[:-1] & rises[1:]).any()
        u = jnp.tanh(grid[int(pull.argmax())] / 2)
        if not std:
            assert float(u**2) == pytest.approx((1 + 4 * epsilon) / (1 + 12 * epsilon), abs=5e-3)
        else:
            s = float(jnp.sqrt(1 - u**2) / 2)
            assert epsilon - s - 8 * epsilon * s**2 == pytest.approx(0, abs=5e-3)


def test_a_leaky_verifier_moves_the_thresholds():
    honest = Whitened(1e-4)
    assert fold_beta(0.2, weights=NoisyVerifier(honest)) == pytest.approx(fold_beta(0.2, weights=honest), rel=1e-9)
    noisy = NoisyVerifier(honest, tpr=0.9, fpr=0.1)
    assert fold_beta(0.2, weights=noisy) is None and fold_beta(0.2, weights=honest) > 0.89
    # With failures that never pass, missed successes make the whitening steeper: the limit rises a little.
    assert (
        flip_limit(NoisyVerifier(honest, tpr=0.99)) > flip_limit(honest) > flip_limit(NoisyVerifier(honest, 0.99, 0.01))
    )


def test_uncentred_whitening_oscillates_at_every_small_beta():
    weights = Group(8, baseline="none")
    assert flip_limit(weights) == pytest.approx(1.0)
    low, high = flip_window(0.5, weights=weights)
    assert low == 0 and limit_point(0.5, beta=0.9 * high, weights=weights).kind == "cycle"
    assert limit_point(0.5, beta=1.1 * high, weights=weights).kind == "fixed"


@pytest.mark.parametrize("p_ref", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_references_outside_are_refused(p_ref):
    for threshold in (fold_beta, bistable_window, flip_window):
        with pytest.raises(ValueError, match=r"strictly between 0 and 1|a probability"):
            threshold(p_ref, weights=Whitened())


@pytest.mark.parametrize("alpha", [0.0, 1.1, -1.0])
def test_shares_outside_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        flip_window(0.001, weights=Whitened(), alpha=alpha)
    with pytest.raises(ValueError, match="alpha"):
        flip_limit(Whitened(), alpha=alpha)


def test_log_odds_reach_where_probabilities_do_not():
    assert fold_beta(-230.0, weights=Whitened(0.0), logits=True) == pytest.approx(2 / math.sqrt(230.0**2 - 4), rel=1e-3)
    assert flip_window(-100.0, weights=Whitened(0.0), logits=True)[0] > 0
