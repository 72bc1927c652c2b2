"""Weights against mpmath, against enumeration of all groups, and at the ends of [0, 1]."""

import itertools
import math
from functools import partial
from statistics import mean, pstdev, stdev

import jax
import jax.numpy as jnp
import mpmath as mp
import pytest

from grpo_jax import group_advantages
from grpo_jax.theory import (
    Group,
    MeanOnly,
    NoisyVerifier,
    Whitened,
    WhitenedStd,
    omega,
    omega_minus,
    omega_plus,
)
from grpo_jax.theory.dynamics import log_odds_slope
from grpo_jax.theory.weights import _log_choose
from tests.tabular import enumerated_advantages

pytestmark = pytest.mark.usefixtures("double")

NORMALISERS = [
    {"baseline": baseline, "scale": scale, "ddof": ddof, "epsilon": epsilon, "epsilon_in": where}
    for baseline in ("mean", "leave_one_out", "none")
    for scale, choices in (
        ("std", [(d, e, w) for d in (0, 1) for e, w in ((0.0, "variance"), (0.03, "variance"), (0.03, "std"))]),
        ("none", [(0, 0.0, "variance")]),
        ("mean", [(0, 0.0, "variance")]),
    )
    for ddof, epsilon, where in choices
]
ALL_WEIGHTS = [
    Whitened(1e-4),
    Whitened(0.0),
    WhitenedStd(1e-3),
    MeanOnly(),
    Group(2),
    Group(8),
    Group(16, 1, 1e-4, "std"),
    Group(8, baseline="none"),
    Group(8, baseline="leave_one_out", scale="mean"),
]


def advantages(rewards, *, baseline, scale, ddof, epsilon, epsilon_in):
    """The trainer's normaliser in plain Python."""
    if len(set(rewards)) == 1 and (baseline != "none" or scale == "std" or rewards[0] == 0):
        return [0.0] * len(rewards)
    size, average = len(rewards), mean(rewards)
    std = (stdev if ddof else pstdev)(rewards)
    divisor = {
        "std": math.sqrt(std**2 + epsilon) if epsilon_in == "variance" else std + epsilon,
        "mean": average,
        "none": 1.0,
    }[scale]
    others = {
        "mean": lambda r: average,
        "leave_one_out": lambda r: (sum(rewards) - r) / (size - 1),
        "none": lambda r: 0.0,
    }[baseline]
    return [(r - others(r)) / divisor for r in rewards]


def enumerated(p, size, normaliser):
    """(Ω, E[A|success], −E[A|failure]) by summing over all 2^G reward vectors; a score is 1/p or −1/(1−p) times ∇p."""
    total = plus = minus = 0.0
    for rewards in itertools.product((0.0, 1.0), repeat=size):
        chance = math.prod(p if r else 1 - p for r in rewards)
        for r, a in zip(rewards, advantages(rewards, **normaliser), strict=True):
            total += chance * a * (1 / p if r else -1 / (1 - p)) / size
            plus += chance * a * r / (size * p)
            minus -= chance * a * (1 - r) / (size * (1 - p))
    return total, plus, minus


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: "-".join(map(str, n.values())))
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_group_weights_equal_the_sum_over_all_reward_vectors(size, normaliser):
    weights = Group(size, **normaliser)
    for p in (0.03, 0.37, 0.5, 0.92):
        total, plus, minus = enumerated(p, size, normaliser)
        assert float(omega(p, weights)) == pytest.approx(total, rel=1e-12)
        assert float(omega_plus(p, weights)) == pytest.approx(plus, rel=1e-12)
        assert float(omega_minus(p, weights)) == pytest.approx(minus, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: "-".join(map(str, n.values())))
def test_group_weights_are_those_of_the_trainers_advantages(normaliser):
    size, p = 6, 0.3
    rewards = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=size)), jnp.float32)
    a = group_advantages(rewards, **normaliser).astype(float)
    r = rewards.astype(float)
    chance = jnp.prod(jnp.where(r == 1, p, 1 - p), axis=1)
    score = jnp.where(r == 1, 1 / p, -1 / (1 - p))
    expected = float((chance * (a * score).mean(1)).sum())
    assert float(omega(p, Group(size, **normaliser))) == pytest.approx(expected, rel=1e-5)


def test_reference_values():
    for value, expected in (
        (omega_plus(0.2, Whitened(0.0)), 2.0),
        (omega_minus(0.2, Whitened(0.0)), 0.5),
        (omega_plus(0.1, Whitened(1e-2)), 2.84604989415),
        (omega_minus(0.1, Whitened(1e-2)), 0.316227766017),
        (omega_plus(0.0, Whitened(1e-5)), 316.227766017),
        (omega(0.3, Whitened(1e-4)), 2.18165952144),
        (omega(0.2, Group(8)), 2.10672902553),
        (omega(0.2, Group(8, 1)), 1.97066455507),
        (omega(0.2, Group(8, 1, 1e-4, "std")), 1.97020953976),
        (omega(0.5, Group(16)), 1.93412260488),
        (omega(0.01, Group(16)), 3.73299184637),
        (omega(0.01, Group(16, 1)), 3.61445381313),
        (omega_plus(0.2, Group(8)), 1.68538322042),
        (omega_minus(0.2, Group(8)), 0.421345805106),
        (omega(0.37, Group(4)), 1.62386872108),
    ):
        assert float(value) == pytest.approx(expected, rel=3e-12)


def test_shrink_factors_of_finite_groups():
    table = {
        4: (0.1719, 0.3727, 0.5071, 0.7491, 0.8080),
        8: (0.2596, 0.5390, 0.6983, 0.8994, 0.9278),
        16: (0.3714, 0.7120, 0.8543, 0.9589, 0.9671),
        64: (0.6702, 0.9451, 0.9764, 0.9905, 0.9921),
    }
    p = jnp.asarray([0.01, 0.05, 0.1, 0.3, 0.5])
    for size, row in table.items():
        assert jnp.abs(omega(p, Group(size)) / omega(p, Whitened(0.0)) - jnp.asarray(row)).max() < 5.1e-5


@pytest.mark.parametrize("normaliser", [n for n in NORMALISERS if n["baseline"] != "none"], ids=repr)
def test_the_rarer_side_is_pushed_harder_and_both_weigh_the_same_in_all(normaliser):
    """By the trainer's own advantages over all groups of 5, and by the weights of groups and populations."""
    p = jnp.asarray([0.01, 0.2, 0.49, 0.5, 0.51, 0.8, 0.99])
    pairs = [enumerated_advantages(p, 5, partial(group_advantages, **normaliser))]
    centred = [w for w in ALL_WEIGHTS if not (isinstance(w, Group) and w.baseline == "none")]
    pairs += [(omega_plus(p, w), omega_minus(p, w)) for w in [Group(5, **normaliser), *centred]]
    for plus, minus in pairs:
        assert float(plus[3]) == pytest.approx(float(minus[3]), rel=1e-6)
        assert bool((plus[:3] > minus[:3]).all()) and bool((minus[4:] > plus[4:]).all())
        assert (p * plus).tolist() == pytest.approx(((1 - p) * minus).tolist(), rel=1e-6)


def test_whitened_weights_match_mpmath_on_extreme_log_odds():
    mp.mp.dps = 60
    for logit in (-230.0, -30.5, -1.25, 0.0, 0.7, 41.0, 230.0):
        p = 1 / (1 + mp.exp(-mp.mpf(logit)))
        q = 1 / (1 + mp.exp(mp.mpf(logit)))
        for weights, exact in (
            (Whitened(1e-5), 1 / mp.sqrt(p * q + mp.mpf(1e-5))),
            (Whitened(0.0), 1 / mp.sqrt(p * q)),
            (WhitenedStd(1e-3), 1 / (mp.sqrt(p * q) + mp.mpf(1e-3))),
        ):
            assert float(omega(logit, weights, logits=True)) == pytest.approx(float(exact), rel=1e-13)
            assert float(omega_plus(logit, weights, logits=True)) == pytest.approx(float(q * exact), rel=1e-13)
            assert float(omega_minus(logit, weights, logits=True)) == pytest.approx(float(p * exact), rel=1e-13)


@pytest.mark.parametrize("size", [3, 16, 256])
def test_group_weights_match_mpmath_for_large_groups(size):
    mp.mp.dps = 50
    for logit in (-40.0, -3.0, 0.1, 6.0, 40.0):
        p, q = 1 / (1 + mp.exp(-mp.mpf(logit))), 1 / (1 + mp.exp(mp.mpf(logit)))
        exact = mp.fsum(
            mp.binomial(size, k) * p ** (k - 1) * q ** (size - k - 1) * mp.sqrt(mp.mpf(k) * (size - k)) / size
            for k in range(1, size)
        )
        assert float(omega(logit, Group(size), logits=True)) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("weights", ALL_WEIGHTS, ids=repr)
def test_slopes_are_the_derivatives_of_omega(weights):
    logit = jnp.asarray([-20.0, -3.0, -0.4, 0.0, 1.3, 9.0])
    numeric = (weights.omega(logit + 1e-5) - weights.omega(logit - 1e-5)) / 2e-5
    assert jnp.allclose(log_odds_slope(logit, weights), numeric, rtol=1e-7, atol=1e-8)
    automatic = jax.vmap(jax.grad(weights.omega))(logit)
    assert jnp.allclose(log_odds_slope(logit, weights), automatic, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [w for w in ALL_WEIGHTS if w != Whitened(0.0)], ids=repr)
def test_ends_are_finite_with_finite_gradients(weights):
    for p in (0.0, 1.0):
        for f in (omega, omega_plus, omega_minus):
            assert jnp.isfinite(f(p, weights))
            assert float(f(p, weights)) == pytest.approx(
                float(f(90.0 if p else -90.0, weights, logits=True)), rel=1e-12, abs=1e-12
            )
            assert float(jax.grad(lambda x, f=f: f(x, weights))(p)) == 0.0
            ends = jax.grad(lambda x, f=f: f(x, weights, logits=True))(jnp.inf if p else -jnp.inf)
            assert float(ends) == 0.0


def test_group_of_the_ends():
    assert float(omega(0.0, Group(17))) == pytest.approx(4.0, rel=1e-12)  # √(G−1)
    assert float(omega(1.0, Group(17))) == pytest.approx(4.0, rel=1e-12)
    assert float(omega(1.0, Whitened(0.0))) == math.inf


def test_epsilon_is_traced_and_the_rest_static():
    def f(epsilon):
        return omega(0.2, Group(8, 1, epsilon, "std")) + omega(0.2, Whitened(epsilon))

    numeric = (f(0.1 + 1e-6) - f(0.1 - 1e-6)) / 2e-6
    assert float(jax.jit(jax.grad(f))(0.1)) == pytest.approx(float(numeric), rel=1e-8)
    batch = jax.vmap(lambda e: omega(jnp.asarray([0.2, 0.7]), Whitened(e)))(jnp.asarray([0.0, 1e-2]))
    assert batch.shape == (2, 2)
    assert float(batch[1, 1]) == pytest.approx(1 / math.sqrt(0.22), rel=1e-14)


def test_float32_stays_float32_and_accurate():
    p = jnp.asarray([1e-6, 0.02, 0.5, 0.999], jnp.float32)
    for weights in ALL_WEIGHTS:
        single = omega(p, weights)
        assert single.dtype == jnp.float32
        assert jnp.allclose(single.astype(float), omega(p.astype(float), weights), rtol=3e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Group(1),
        lambda: Group(8, 2),
        lambda: Group(8, epsilon_in="root"),
        lambda: Group(8, baseline="median"),
        lambda: Group(8, scale="batch"),
        lambda: Whitened(-1e-3),
        lambda: WhitenedStd(math.nan),
    ],
)
def test_impossible_normalisers_are_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: "-".join(map(str, n.values())))
@pytest.mark.parametrize("size", [2, 3, 6])
def test_dynamic_sampling_is_the_mean_over_live_groups(size, normaliser):
    """The sum over all reward vectors with both rewards in them, over the chance of these."""
    weights = Group(size, **normaliser, dynamic_sampling=True)
    p = jnp.asarray([0.03, 0.37, 0.5, 0.92])
    computed = [f(p, weights) for f in (omega, omega_plus, omega_minus)]
    for i, x in enumerate(p.tolist()):
        total = plus = minus = live = 0.0
        for rewards in itertools.product((0.0, 1.0), repeat=size):
            if len(set(rewards)) == 1:
                continue
            chance = math.prod(x if r else 1 - x for r in rewards)
            live += chance
            for r, a in zip(rewards, advantages(rewards, **normaliser), strict=True):
                total += chance * a * (1 / x if r else -1 / (1 - x)) / size
                plus += chance * a * r / (size * x)
                minus -= chance * a * (1 - r) / (size * (1 - x))
        expected = [total / live, plus / live, minus / live]
        assert [float(f[i]) for f in computed] == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("normaliser", [{}, {"baseline": "none"}, {"scale": "mean"}, {"ddof": 1, "epsilon": 0.03}])
def test_dynamic_sampling_far_out(normaliser):
    """Next to p = 0 one success is all a live group has, next to 1 one failure: Ω p → A⁺/G, and its slope −Ω."""
    weights = Group(6, **normaliser, dynamic_sampling=True)
    plain = {"baseline": "mean", "scale": "std", "ddof": 0, "epsilon": 0.0, "epsilon_in": "variance"} | normaliser
    for logit in (-230.0, -60.0):
        lone = advantages((1.0, *[0.0] * 5), **plain)
        expected = (lone[0] - math.exp(logit) * lone[1]) / 6
        assert float(omega(logit, weights, logits=True)) * math.exp(logit) == pytest.approx(expected, rel=1e-12)
        slope = log_odds_slope(jnp.asarray(logit), weights)
        assert float(slope) == pytest.approx(-float(omega(logit, weights, logits=True)), rel=1e-10)
    lone = advantages((0.0, *[1.0] * 5), **plain)
    if lone[0]:
        scaled = float(omega(230.0, weights, logits=True)) * math.exp(-230.0)
        assert scaled == pytest.approx(-lone[0] / 6, rel=1e-12)
    automatic = jax.vmap(jax.grad(weights.omega))(jnp.asarray([-20.0, -2.0, 0.0, 3.0, 20.0]))
    slopes = log_odds_slope(jnp.asarray([-20.0, -2.0, 0.0, 3.0, 20.0]), weights)
    assert jnp.allclose(slopes, automatic, rtol=1e-8, atol=1e-9)


def test_dynamic_sampling_of_pairs_is_half_the_inverse_variance():
    """A live pair is one of each: A = ±1, Ω = 1/(2v)."""
    p = jnp.asarray([1e-9, 0.2, 0.5, 0.77])
    assert jnp.allclose(omega(p, Group(2, dynamic_sampling=True)), 1 / (2 * p * (1 - p)), rtol=1e-13)


def test_no_two_normalisers_are_the_same_tree():
    """Else jit, which finds compiled programs by their trees, now and then takes the one of the other normaliser.

    jaxlib (0.10 to 0.12 at least) compares registered dataclasses by their meta fields and number of leaves, not by class.
    """
    kinds = [
        Whitened(0.1),
        WhitenedStd(0.1),
        MeanOnly(),
        Group(8),
        Group(8, 0, 0.1, "std"),
        Group(8, dynamic_sampling=True),
    ]
    kinds += [NoisyVerifier(weights, 0.9, 0.1) for weights in kinds]
    trees = [jax.tree.structure(weights) for weights in kinds]
    same = [(kinds[i], kinds[j]) for i, a in enumerate(trees) for j, b in enumerate(trees) if i < j and a == b]
    assert same == []
    assert jax.tree.structure(Whitened(0.1)) == jax.tree.structure(Whitened(0.2))


def test_groups_of_any_size_are_quick_and_go_to_the_population():
    """Ω_G < Ω, by about as much as 1/G; and the logarithms of binomial coefficients of large groups are those of the numbers."""
    gaps = [float(omega(0.3, Whitened(0.0)) - omega(0.3, Group(size))) for size in (1000, 2000, 10_000)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[0] / gaps[2] == pytest.approx(10.0, rel=0.02)
    large = _log_choose(1500)
    assert max(abs(large[j] - math.log(math.comb(1500, j))) for j in range(0, 1501, 50)) < 1e-10
    for size in (1_000_001, 2**40):
        with pytest.raises(ValueError, match="at most 1,000,000"):
            Group(size)
    for epsilon in (math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match="epsilon"):
            Group(8, epsilon=epsilon)
