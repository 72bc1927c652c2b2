"""A verifier that errs: Ω by enumeration of labels and flips, and tpr < fpr as the mirror image of tpr > fpr."""

import itertools
import math

import jax
import jax.numpy as jnp
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
    beta_for_target,
    bistable_window,
    contrastive_term,
    fixed_points,
    flip_window,
    flow_point,
    fold_beta,
    forward_kl_fixed_point,
    iterate,
    iterate_bounds,
    limit_point,
    local_beta_bound,
    omega,
    omega_minus,
    omega_plus,
    success_map,
)
from grpo_jax.theory.dynamics import log_odds_slope
from tests import exact_theory as exact
from tests.exact_theory import mp

pytestmark = pytest.mark.usefixtures("double")

RATES = [(1.0, 0.0), (0.9, 0.1), (1.0, 0.25), (0.7, 0.0), (0.4, 0.4), (0.2, 0.85), (0.0, 1.0)]


def by_flips(p, weights, tpr, fpr):
    """(Ω, E[A r]/p, −E[A (1 − r)]/(1 − p)) over all true labels r and all verdicts of a group."""
    size, kinds = weights.size, list(itertools.product((0, 1), repeat=2))  # (label, verdict)
    total = plus = minus = live = 0.0
    for group in itertools.product(kinds, repeat=size):
        k = sum(verdict for _, verdict in group)
        if weights.dynamic_sampling and k in (0, size):
            continue
        chance = 1.0
        for label, verdict in group:
            passes = tpr if label else fpr
            chance *= (p if label else 1 - p) * (passes if verdict else 1 - passes)
        live += chance
        above, below = (float(a) for a in exact.advantages(size, k, weights))
        for label, verdict in group:
            a = above if verdict else below
            total += chance * a * (1 / p if label else -1 / (1 - p)) / size
            plus += chance * a * label / (size * p)
            minus -= chance * a * (1 - label) / (size * (1 - p))
    return total / live if live else math.nan, plus / live if live else math.nan, minus / live if live else math.nan


@pytest.mark.parametrize(
    "weights",
    [Group(2), Group(4), Group(4, 1, 0.02, "std"), Group(3, baseline="leave_one_out", scale="mean"),
     Group(4, baseline="none"), Group(3, baseline="none", scale="mean"), Group(3, dynamic_sampling=True),
     Group(4, scale="none", dynamic_sampling=True)],
    ids=repr,
)  # fmt: skip
def test_group_weights_equal_the_sum_over_labels_and_flips(weights):
    p = jnp.asarray([0.07, 0.6])
    for tpr, fpr in RATES:
        noisy = NoisyVerifier(weights, tpr, fpr)
        computed = [f(p, noisy) for f in (omega, omega_plus, omega_minus)]
        for i, x in enumerate(p.tolist()):
            expected = by_flips(x, weights, tpr, fpr)
            assert [float(f[i]) for f in computed] == pytest.approx(expected, rel=1e-12, abs=1e-13), (tpr, fpr)


@pytest.mark.parametrize("weights", [Whitened(1e-3), WhitenedStd(1e-2), MeanOnly()], ids=repr)
def test_population_weights_are_those_of_normalised_verdicts(weights):
    """The verdict's mean and deviation normalise; the truth of the completion decides what is pushed."""
    for p in (0.05, 0.5, 0.9):
        for tpr, fpr in RATES:
            chance = {
                (r, s): (p if r else 1 - p) * ((tpr if r else fpr) if s else (1 - tpr if r else 1 - fpr))
                for r in (0, 1)
                for s in (0, 1)
            }
            seen = sum(c for (_, s), c in chance.items() if s)
            deviation = math.sqrt(seen * (1 - seen))
            scale = {Whitened: math.sqrt(seen * (1 - seen) + 1e-3), WhitenedStd: deviation + 1e-2, MeanOnly: 1.0}
            advantage = {s: (s - seen) / scale[type(weights)] for s in (0, 1)}
            right = sum(c * advantage[s] for (r, s), c in chance.items() if r) / p
            wrong = sum(c * advantage[s] for (r, s), c in chance.items() if not r) / (1 - p)
            noisy = NoisyVerifier(weights, tpr, fpr)
            assert float(omega(p, noisy)) == pytest.approx(right - wrong, rel=1e-12, abs=1e-14)
            assert float(omega_plus(p, noisy)) == pytest.approx(right, rel=1e-12, abs=1e-14)
            assert float(omega_minus(p, noisy)) == pytest.approx(-wrong, rel=1e-12, abs=1e-14)


def test_random_rates_in_mpmath_also_far_out():
    rng = np.random.default_rng(3)
    logits = np.concatenate([rng.uniform(-12, 12, 16), [-230.0, -40.0, 40.0, 230.0]])
    for inner in (Whitened(1e-4), Group(8)):
        for tpr, fpr in [*rng.uniform(0, 1, (4, 2)).tolist(), (1.0, 0.0), (0.95, 0.0), (1.0, 0.03)]:
            noisy = NoisyVerifier(inner, tpr, fpr)
            values = omega(jnp.asarray(logits), noisy, logits=True).tolist()
            for L, value in zip(logits.tolist(), values, strict=True):
                assert value == pytest.approx(float(exact.omega(L, noisy)), rel=1e-12), (L, tpr, fpr)


@pytest.mark.parametrize("inner", [Whitened(0.0), Whitened(1e-4), Group(8), Group(4, dynamic_sampling=True)], ids=repr)
def test_a_faultless_verifier_changes_nothing(inner):
    logits = jnp.asarray([-230.0, -30.0, -2.0, 0.0, 1.5, 30.0, 230.0])
    for f in (omega, omega_plus, omega_minus):
        np.testing.assert_allclose(
            f(logits, NoisyVerifier(inner), logits=True), f(logits, inner, logits=True), rtol=1e-13
        )


def test_slopes_and_the_derivatives_in_both_rates():
    logits = jnp.asarray([-20.0, -3.0, -0.4, 0.0, 1.3, 9.0])
    for inner in (Whitened(1e-3), Group(8), Group(8, dynamic_sampling=True)):
        noisy = NoisyVerifier(inner, 0.9, 0.15)
        automatic = jax.vmap(jax.grad(lambda L, w=noisy: w.omega(L)))(logits)
        np.testing.assert_allclose(log_odds_slope(logits, noisy), automatic, rtol=1e-9, atol=1e-13)

    def f(tpr, fpr):
        return omega(0.3, NoisyVerifier(Whitened(1e-3), tpr, fpr))

    slopes = jax.jit(jax.grad(f, argnums=(0, 1)))(0.9, 0.15)
    h = 1e-6
    numeric = [(f(0.9 + h, 0.15) - f(0.9 - h, 0.15)) / (2 * h), (f(0.9, 0.15 + h) - f(0.9, 0.15 - h)) / (2 * h)]
    assert [float(s) for s in slopes] == pytest.approx([float(n) for n in numeric], rel=1e-7)


def mirrored(noisy):
    """Failures as successes: they pass with the old false-pass rate."""
    return NoisyVerifier(noisy.weights, noisy.fpr, noisy.tpr)


@jax.jit
def elementwise(L, reference, beta, noisy):
    """Odd and even functions of the log-odds under the exchange of success and failure."""
    low, high = iterate_bounds(reference, 3, beta=beta, weights=noisy, alpha=0.4, logits=True)
    odd = {
        "success_map": success_map(L, reference, beta=beta, weights=noisy, alpha=0.3, logits=True),
        "iterate": iterate(reference, 12, beta=beta, weights=noisy, alpha=0.5, logits=True),
        "flow_point": flow_point(reference, beta=beta, weights=noisy, logits=True),
        "forward": forward_kl_fixed_point(reference, beta=beta, weights=noisy, logits=True),
    }
    even = {
        "omega": -noisy.omega(L) * jnp.sign(jnp.asarray(noisy.tpr) - jnp.asarray(noisy.fpr)),
        "bound": local_beta_bound(L, weights=noisy, logits=True),
    }
    return odd, even, (low, high)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    L=st.lists(st.floats(-15, 15), min_size=4, max_size=4),
    log_beta=st.floats(-2, 3),
    log_epsilon=st.floats(-10, 0),
    rates=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda r: abs(r[0] - r[1]) > 1e-3),
    shift=st.floats(-8, 8),
)
def test_tpr_below_fpr_is_the_mirrored_problem(L, log_beta, log_epsilon, rates, shift):
    with jax.enable_x64(True):
        noisy = NoisyVerifier(Whitened(math.exp(log_epsilon)), min(rates), max(rates))
        L, beta = jnp.asarray(L), jnp.asarray(math.exp(log_beta))
        odd, even, (low, high) = elementwise(L, L + shift, beta, noisy)
        other_odd, other_even, (other_low, other_high) = elementwise(-L, -L - shift, beta, mirrored(noisy))
        for name, values in odd.items():
            # Just at a fold a last bit decides; nothing here is nearer than hypothesis has found.
            np.testing.assert_allclose(values, -other_odd[name], rtol=1e-8, atol=1e-8, err_msg=name)
        for name, values in even.items():
            np.testing.assert_allclose(values, other_even[name], rtol=1e-8, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(low, -other_high, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(high, -other_low, rtol=1e-12, atol=1e-12)
        # It de-amplifies.
        assert bool((odd["flow_point"] < L + shift).all()) and bool((odd["iterate"][1:] < (L + shift)[None]).all())


@pytest.mark.parametrize(("p_ref", "beta"), [(0.8, 1.0), (0.9, 0.4), (0.999, 3.0)])
def test_fixed_points_and_limits_of_the_mirrored_problem(p_ref, beta):
    worse, better = (NoisyVerifier(Whitened(1e-3), *rates) for rates in ((0.01, 0.98), (0.98, 0.01)))
    points = fixed_points(p_ref, beta=beta, weights=worse)
    mirror = fixed_points(1 - p_ref, beta=beta, weights=better)[::-1]
    assert [f.logit for f in points] == pytest.approx([-f.logit for f in mirror], rel=1e-9)
    assert [f.multiplier for f in points] == pytest.approx([f.multiplier for f in mirror], rel=1e-7, abs=1e-9)
    ends = [limit_point(p, beta=beta, weights=w, logits=True) for p, w in ((2.0, worse), (-2.0, better))]
    assert ends[0].kind == ends[1].kind and ends[0].p == pytest.approx(-ends[1].p, rel=1e-9)
    assert limit_point(p_ref, beta=beta, weights=worse, alpha=0.0).p == 0.0


def test_the_beta_for_a_target_below_the_reference():
    """Where the push is down, targets below the reference are the ones that some β reaches, and β is positive."""
    noisy = NoisyVerifier(Whitened(1e-3), 0.1, 0.8)
    beta = float(beta_for_target(0.1, 0.3, weights=noisy))
    assert beta == pytest.approx(float(beta_for_target(0.9, 0.7, weights=mirrored(noisy))), rel=1e-12)
    assert float(flow_point(0.3, beta=beta, weights=noisy)) == pytest.approx(0.1, rel=1e-9)
    assert math.isnan(beta_for_target(0.5, 0.3, weights=noisy))


@pytest.mark.parametrize("threshold", [fold_beta, bistable_window, flip_window])
def test_thresholds_of_the_mirrored_problem(threshold):
    for rates in ((0.0, 1.0), (0.001, 0.999)):
        noisy = NoisyVerifier(Whitened(1e-4), *rates)
        for p_ref in (0.8, 0.999):
            expected = threshold(1 - p_ref, weights=mirrored(noisy))
            limits = threshold(p_ref, weights=noisy)
            assert limits == (None if expected is None else pytest.approx(expected, rel=1e-7)), (rates, p_ref)


@pytest.mark.parametrize("inner", [MeanOnly(), Whitened(1e-3)], ids=repr)
def test_a_coin_as_verifier_teaches_nothing(inner):
    """tpr = fpr: Ω = 0, and the reference is the one fixed point, whatever β."""
    noisy = NoisyVerifier(inner, 0.5, 0.5)
    assert float(omega(0.2, noisy)) == 0.0
    assert iterate(0.2, 3, beta=1.0, weights=noisy).tolist() == pytest.approx([0.2] * 4, rel=1e-14)
    assert float(flow_point(0.2, beta=1.0, weights=noisy)) == pytest.approx(0.2, rel=1e-12)
    assert float(forward_kl_fixed_point(0.2, beta=1.0, weights=noisy)) == pytest.approx(0.2, rel=1e-12)
    assert limit_point(0.2, beta=1.0, weights=noisy) == ("fixed", pytest.approx(0.2, rel=1e-12), 1)
    assert [f.p for f in fixed_points(0.2, beta=1.0, weights=noisy)] == pytest.approx([0.2], rel=1e-12)


def test_false_passes_remove_the_blow_up_of_rare_success():
    noisy = NoisyVerifier(Whitened(0.0), 1.0, 0.04)
    assert float(omega(0.0, noisy)) == pytest.approx(0.96 / math.sqrt(0.04 * 0.96), rel=1e-13)
    assert float(omega(0.0, NoisyVerifier(Whitened(0.0), 1.0, 0.0))) == math.inf


def test_the_unclipped_contrastive_mean_uses_the_true_labels():
    rng = np.random.default_rng(2)
    old, new = jnp.asarray(rng.dirichlet(np.ones(6), 2))
    rewards = jnp.asarray([1, 1, 0, 0, 0, 0])
    noisy = NoisyVerifier(Whitened(1e-3), 0.8, 0.1)
    p_old, p_new = old[:2].sum(), new[:2].sum()
    mean = float((old * contrastive_term(new / old, rewards, p_old, weights=noisy)).sum())
    offset = float(p_old * omega_plus(p_old, noisy) - (1 - p_old) * omega_minus(p_old, noisy))
    assert offset == pytest.approx(0, abs=1e-14)
    assert mean == pytest.approx(float(omega(p_old, noisy) * (p_new - p_old)), rel=1e-11)


@pytest.mark.parametrize("rates", [(1.1, 0.0), (0.5, -0.1), (math.nan, 0.0)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="rate"):
        NoisyVerifier(Whitened(), *rates)


def test_float32_and_vmap_over_the_rates():
    p = jnp.float32([0.01, 0.4, 0.97])
    noisy = NoisyVerifier(Whitened(1e-3), 0.9, 0.1)
    single = omega(p, noisy)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, omega(p.astype(float), noisy), rtol=2e-6)
    curve = jax.jit(jax.vmap(lambda fpr: omega(0.2, NoisyVerifier(Whitened(1e-3), 0.9, fpr))))(jnp.asarray([0.0, 0.5]))
    seen = [float(exact.omega(mp.log(mp.mpf(1) / 4), NoisyVerifier(Whitened(1e-3), 0.9, fpr))) for fpr in (0.0, 0.5)]
    np.testing.assert_allclose(curve, seen, rtol=1e-12)
