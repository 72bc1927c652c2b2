"""Closed-form policies on explicit outcomes: optimal by the conditions of optimality, and against mpmath throughout."""

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
    bernoulli_kl,
    iterate,
    kl_budget,
    log_partition,
    log_policy_ratio,
    omega,
    omega_minus,
    omega_plus,
    optimal_log_policy,
    optimality_gap,
    policy_entropy,
    renyi_correction,
)
from tests import exact_theory as exact
from tests.exact_theory import mp

pytestmark = pytest.mark.usefixtures("double")

WEIGHTS = [Whitened(1e-3), WhitenedStd(1e-2), MeanOnly(), Group(8), Group(4, dynamic_sampling=True)]
REWARDS = jnp.asarray([1, 0, 0, 1, 0, 1, 0])


def random_policies(seed, *shape):
    return jax.nn.log_softmax(jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, (*shape, len(REWARDS)))))


def success(log_policy):
    return jnp.where(REWARDS > 0, jnp.exp(log_policy), 0.0).sum(-1)


def value(log_policy, log_ref, log_old, p_old, beta, alpha, weights):
    """E_π[A] − β [α KL(π‖π_ref) + (1 − α) KL(π‖π_old)], outcome by outcome."""
    policy = jnp.exp(log_policy)
    advantage = jnp.where(REWARDS > 0, omega_plus(p_old, weights), -omega_minus(p_old, weights))
    kl = alpha * (log_policy - log_ref) + (1 - alpha) * (log_policy - log_old)
    return (policy * (advantage - beta * kl)).sum(-1)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_the_policy_is_where_the_gradient_of_the_objective_vanishes(weights):
    """Stationary in the logits of a softmax, and every other policy is worse by exactly the gap."""
    log_ref, log_old, other = random_policies(0, 3)
    p_old, beta = float(success(log_old)), 0.7
    for alpha in (0.0, 0.35, 1.0):
        options = {"p_old": p_old, "beta": beta, "weights": weights, "alpha": alpha}
        best = optimal_log_policy(log_ref, REWARDS, log_old=log_old, **options)

        def objective(logits, alpha=alpha):
            return value(jax.nn.log_softmax(logits), log_ref, log_old, p_old, beta, alpha, weights)

        top, slope = jax.value_and_grad(objective)(best)
        np.testing.assert_allclose(slope, 0.0, atol=1e-13)
        gap = optimality_gap(other, best, beta=beta)
        assert float(top - objective(other)) == pytest.approx(float(gap), rel=1e-12)
        assert float(gap) > 0.01
        if alpha == 1:
            partition = log_partition(float(success(log_ref)), p_old, beta=beta, weights=weights)
            assert float(top) == pytest.approx(beta * float(partition), rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_the_closed_form_as_the_page_displays_it(weights):
    """π_ref exp(A/β) / Z, with A = ω⁺ or −ω⁻ and Z = p_ref exp(ω⁺/β) + (1 − p_ref) exp(−ω⁻/β)."""
    (log_ref,) = random_policies(5, 1)
    p_ref, p_old, beta = float(success(log_ref)), 0.35, 0.8
    plus, minus = float(omega_plus(p_old, weights)), float(omega_minus(p_old, weights))
    z = p_ref * math.exp(plus / beta) + (1 - p_ref) * math.exp(-minus / beta)
    displayed = [
        math.exp(log) * math.exp((plus if reward else -minus) / beta) / z
        for log, reward in zip(log_ref.tolist(), REWARDS.tolist(), strict=True)
    ]
    policy = jnp.exp(optimal_log_policy(log_ref, REWARDS, p_old=p_old, beta=beta, weights=weights))
    np.testing.assert_allclose(policy, displayed, rtol=1e-12)
    assert float(log_partition(p_ref, p_old, beta=beta, weights=weights)) == pytest.approx(math.log(z), rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_random_policies_in_mpmath(weights):
    log_ref, log_old = random_policies(1, 2)
    p_old = float(success(log_old))
    plus, minus = exact.omega_pair(exact.logit(p_old), weights)
    for beta in (0.02, 1.3, 1e4):
        for alpha in (0.0, 0.2, 1.0):
            policy = optimal_log_policy(
                log_ref, REWARDS, p_old=p_old, beta=beta, weights=weights, alpha=alpha, log_old=log_old
            )
            scores = [
                mp.mpf(alpha) * a + (1 - mp.mpf(alpha)) * b + (plus if r else -minus) / mp.mpf(beta)
                for a, b, r in zip(log_ref.tolist(), log_old.tolist(), REWARDS.tolist(), strict=True)
            ]
            top = max(scores)
            total = top + mp.log(mp.fsum(mp.exp(s - top) for s in scores))
            np.testing.assert_allclose(policy, [float(s - total) for s in scores], rtol=1e-12, atol=1e-12)


def test_without_the_old_policy_it_is_the_iterate_of_the_reference():
    """π_old has the reference's conditionals, moved to p_old."""
    log_ref = random_policies(2)
    p_ref, p_old = float(success(log_ref)), 0.61
    log_old = log_ref + jnp.where(REWARDS > 0, math.log(p_old / p_ref), math.log((1 - p_old) / (1 - p_ref)))
    for alpha in (0.0, 0.35, 1.0):
        options = {"p_old": p_old, "beta": 1.1, "weights": Whitened(1e-3), "alpha": alpha}
        from_old = optimal_log_policy(log_ref, REWARDS, log_old=log_old, **options)
        np.testing.assert_allclose(optimal_log_policy(log_ref, REWARDS, **options), from_old, rtol=1e-12)
    assert float(optimal_log_policy(log_ref, REWARDS, p_old=p_ref, beta=1e12, weights=MeanOnly()) @ jnp.ones(7)) == (
        pytest.approx(float(log_ref.sum()), rel=1e-9)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("weights", [Whitened(1e-3), Group(8), NoisyVerifier(Whitened(1e-3), 0.9, 0.1)], ids=repr)
def test_what_holds_of_every_iterate(weights, alpha):
    """p by the recurrence, KL and total variation by the coin, conditionals frozen, entropy by its formula, Δ_R = 0."""
    log_ref = random_policies(3)
    p_ref, beta = float(success(log_ref)), 8.0
    path = iterate(p_ref, 5, beta=beta, weights=weights, alpha=alpha).tolist()
    log_old, right = log_ref, REWARDS > 0

    def entropy_of(class_):
        inside = jax.nn.log_softmax(jnp.where(class_, log_ref, -jnp.inf))
        return -jnp.where(class_, jnp.exp(inside) * jnp.where(class_, inside, 0.0), 0.0).sum()

    for n in range(1, 6):
        options = {"p_old": path[n - 1], "beta": beta, "weights": weights, "alpha": alpha}
        log_new = optimal_log_policy(log_ref, REWARDS, log_old=log_old, **options)
        np.testing.assert_allclose(optimal_log_policy(log_ref, REWARDS, **options), log_new, rtol=1e-11, atol=1e-11)
        p, policy, ref = path[n], jnp.exp(log_new), jnp.exp(log_ref)
        assert float(success(log_new)) == pytest.approx(p, rel=1e-12)
        np.testing.assert_allclose(log_new - log_ref, log_policy_ratio(REWARDS, p, p_ref), rtol=1e-11, atol=1e-12)
        explicit = float((policy * (log_new - log_ref)).sum())
        assert explicit == pytest.approx(float(bernoulli_kl(p, p_ref)), rel=1e-10)
        assert explicit <= float(kl_budget(p_ref))
        backwards = float((ref * (log_ref - log_new)).sum())
        assert backwards == pytest.approx(float(bernoulli_kl(p_ref, p)), rel=1e-10)
        between = float((policy * (log_new - log_old)).sum())
        assert between == pytest.approx(float(bernoulli_kl(p, path[n - 1])), rel=1e-7, abs=1e-15)
        assert 0.5 * float(jnp.abs(policy - ref).sum()) == pytest.approx(abs(p - p_ref), rel=1e-12)
        explicit = -float((policy * log_new).sum())
        by_formula = policy_entropy(p, entropy_of(right), entropy_of(~right))
        assert explicit == pytest.approx(float(by_formula), rel=1e-12)
        assert float(renyi_correction(log_ref, log_new, REWARDS, alpha=alpha)) == pytest.approx(0, abs=1e-13)
        log_old = log_new


def test_renyi_correction_is_what_strange_conditionals_add_to_the_recursion():
    """logit p = α L_ref + (1 − α) L_old + Δ_R + Ω/β, and Δ_R by its Rényi divergences in mpmath."""
    log_ref, log_old = random_policies(4, 2)
    p_ref, p_old = float(success(log_ref)), float(success(log_old))
    for alpha in (0.15, 0.5, 0.9):
        correction = float(renyi_correction(log_ref, log_old, REWARDS, alpha=alpha))
        divergences = []
        for wanted in (0, 1):
            chosen = [i for i, r in enumerate(REWARDS.tolist()) if r == wanted]
            ref, old = ([mp.exp(mp.mpf(float(x[i]))) for i in chosen] for x in (log_ref, log_old))
            terms = [
                (a / mp.fsum(ref)) ** mp.mpf(alpha) * (b / mp.fsum(old)) ** (1 - mp.mpf(alpha))
                for a, b in zip(ref, old, strict=True)
            ]
            divergences.append(mp.log(mp.fsum(terms)) / (mp.mpf(alpha) - 1))
        expected = (1 - mp.mpf(alpha)) * (divergences[0] - divergences[1])
        assert correction == pytest.approx(float(expected), rel=1e-10)
        options = {"p_old": p_old, "beta": 3.0, "weights": Group(8), "alpha": alpha}
        p = float(success(optimal_log_policy(log_ref, REWARDS, log_old=log_old, **options)))
        predicted = alpha * math.log(p_ref / (1 - p_ref)) + (1 - alpha) * math.log(p_old / (1 - p_old)) + correction
        predicted += float(omega(p_old, Group(8))) / 3
        assert math.log(p / (1 - p)) == pytest.approx(predicted, rel=1e-11)
    for alpha in (0.0, 1.0):
        assert float(renyi_correction(log_ref, log_old, REWARDS, alpha=alpha)) == pytest.approx(0, abs=1e-14)


def test_strange_conditionals_are_forgotten_geometrically():
    """From any start they are ∝ ref^{1−(1−α)^n} start^{(1−α)^n}."""
    log_ref, log_start = random_policies(5, 2)
    alpha, log_pi = 0.3, log_start
    for n in range(1, 8):
        log_pi = optimal_log_policy(
            log_ref,
            REWARDS,
            p_old=float(success(log_pi)),
            beta=2.0,
            weights=Whitened(1e-3),
            alpha=alpha,
            log_old=log_pi,
        )
        memory = (1 - alpha) ** n
        for wanted in (REWARDS > 0, REWARDS == 0):
            expected = jax.nn.log_softmax(jnp.where(wanted, (1 - memory) * log_ref + memory * log_start, -jnp.inf))
            conditional = jax.nn.log_softmax(jnp.where(wanted, log_pi, -jnp.inf))
            np.testing.assert_allclose(conditional[wanted], expected[wanted], rtol=1e-10)


def test_partition_at_a_fixed_point_is_minus_the_kl():
    """There ω⁺p* = ω⁻(1 − p*), so KL* = −ln Z*."""
    weights, beta = Whitened(1e-5), 1.0
    p = 0.681283437786  # fixed point of p_ref = 0.2
    z = float(log_partition(0.2, p, beta=beta, weights=weights))
    assert -z == pytest.approx(float(bernoulli_kl(p, 0.2)), rel=1e-11)


def test_ratio_and_its_gradient_in_p():
    """d ln(π/π_ref)/dp = 1/p or −1/(1 − p), at the reference itself too: that is where training starts."""
    for p, p_ref in ((0.5, 0.2), (0.9, 0.2), (0.2, 0.2)):
        assert float(log_policy_ratio(1, p, p_ref)) == pytest.approx(math.log(p / p_ref), rel=1e-14, abs=1e-15)
        slopes = [float(jax.grad(lambda x, r=r, q=p_ref: log_policy_ratio(r, x, q))(p)) for r in (1, 0)]
        assert slopes == pytest.approx([1 / p, -1 / (1 - p)], rel=1e-12), p


def test_ratio_at_the_ends():
    assert [float(log_policy_ratio(r, e, e)) for r in (0, 1) for e in (0.0, 1.0)] == [0.0] * 4
    assert float(log_policy_ratio(1, 1.0, 0.25)) == pytest.approx(math.log(4), rel=1e-14)
    assert float(log_policy_ratio(0, 1.0, 0.25)) == -math.inf


def test_derivatives_of_the_policy_at_its_defaults():
    """In α at 1 and in p_old at p_ref, against differences from inside."""
    log_ref = random_policies(6)
    p_ref = float(success(log_ref))

    def policy(alpha, p_old):
        options = {"beta": 2.0, "weights": Whitened(1e-3)}
        return optimal_log_policy(log_ref, REWARDS, p_old=p_old, alpha=alpha, **options)[0]

    h = 1e-6
    numeric = float(policy(1.0, 0.5) - policy(1.0 - h, 0.5)) / h
    assert float(jax.grad(policy)(1.0, 0.5)) == pytest.approx(numeric, rel=1e-4)
    numeric = float(policy(0.5, p_ref + h) - policy(0.5, p_ref - h)) / (2 * h)
    assert float(jax.grad(policy, argnums=1)(0.5, p_ref)) == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("dtype", [bool, int, float])
def test_rewards_of_any_type(dtype):
    log_ref = random_policies(7)
    rewards = REWARDS.astype(dtype)
    target = optimal_log_policy(log_ref, REWARDS, p_old=0.3, beta=1.0, weights=MeanOnly(), log_old=log_ref)
    policy = optimal_log_policy(log_ref, rewards, p_old=0.3, beta=1.0, weights=MeanOnly())
    np.testing.assert_allclose(policy, target, rtol=1e-14)
    assert float(log_policy_ratio(rewards[0], 0.5, 0.25)) == pytest.approx(math.log(2), rel=1e-14)
    assert float(renyi_correction(log_ref, log_ref, rewards, alpha=0.5)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("weights", [Whitened(0.0), Whitened(1e-3)], ids=repr)
@pytest.mark.parametrize("reward", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_reference_that_is_always_right_or_always_wrong_stays(weights, reward, dtype):
    """A = 0 everywhere, however the probabilities sum up."""
    log_ref = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=(40, 50)), dtype))
    for alpha in (0.0, 0.5, 1.0):
        options = {"p_old": float(reward), "beta": 1.0, "weights": weights, "alpha": alpha}
        policy = optimal_log_policy(log_ref, jnp.full((40, 50), reward), **options)
        np.testing.assert_allclose(policy, log_ref, atol=1e-6, err_msg=f"alpha={alpha}")


def test_impossible_outcomes_stay_impossible():
    """Zeros of the reference, of π_old, and of both."""
    ref, old = jnp.asarray([0.25, 0.25, 0.5, 0.0, 0.0]), jnp.asarray([0.5, 0.0, 0.25, 0.25, 0.0])
    rewards = jnp.asarray([1, 0, 0, 1, 1])
    for alpha, support in ((1.0, [1, 1, 1, 0, 0]), (0.5, [1, 0, 1, 0, 0]), (0.0, [1, 0, 1, 1, 0])):
        policy = jnp.exp(
            optimal_log_policy(
                jnp.log(ref), rewards, p_old=0.75, beta=1.0, weights=MeanOnly(), alpha=alpha, log_old=jnp.log(old)
            )
        )
        assert (policy > 0).astype(int).tolist() == support, alpha
        assert float(policy.sum()) == pytest.approx(1, rel=1e-14)


def test_gap_with_zeros():
    one, half = jnp.log(jnp.asarray([1.0, 0.0])), jnp.log(jnp.asarray([0.5, 0.5]))
    assert float(optimality_gap(one, half, beta=3.0)) == pytest.approx(3 * math.log(2), rel=1e-14)
    assert float(optimality_gap(half, one, beta=3.0)) == math.inf
    assert float(optimality_gap(one, one, beta=3.0)) == 0.0


def test_leading_axes_of_every_argument():
    """[..., O] policies and rewards, [...] numbers; each alone may carry the axes."""
    log_ref, log_old = random_policies(8, 2, 3), random_policies(9, 2, 3)
    rewards = jnp.broadcast_to(REWARDS, (2, 3, 7))
    p_old, beta = jnp.full((2, 3), 0.4), jnp.full((2, 3), 1.5)
    options = {"weights": Group(8), "alpha": 0.3}

    def single(log_ref, rewards, p_old, beta, log_old):
        return optimal_log_policy(log_ref, rewards, p_old=p_old, beta=beta, log_old=log_old, **options)

    whole = single(log_ref, rewards, p_old, beta, log_old)
    each = jax.jit(jax.vmap(jax.vmap(single)))(log_ref, rewards, p_old, beta, log_old)
    np.testing.assert_allclose(whole, each, rtol=1e-13)
    alone = {"log_ref": log_ref[0, 0], "rewards": REWARDS, "p_old": 0.4, "beta": 1.5, "log_old": log_old[0, 0]}
    wrong = []
    for name, many in (
        ("log_ref", log_ref),
        ("rewards", rewards),
        ("p_old", p_old),
        ("beta", beta),
        ("log_old", log_old),
    ):
        try:
            batched = single(**alone | {name: many})
        except ValueError:
            wrong.append(name)
        else:
            assert batched.shape == (2, 3, 7), name
    assert wrong == []
    corrections = renyi_correction(log_ref, log_old, rewards, alpha=jnp.full((2, 3), 0.4))
    assert corrections.shape == (2, 3)
    one = renyi_correction(log_ref[1, 2], log_old[1, 2], REWARDS, alpha=0.4)
    assert float(corrections[1, 2]) == pytest.approx(float(one), rel=1e-12)
    assert optimality_gap(whole, log_ref, beta=beta).shape == (2, 3)


def test_entropy_at_the_ends_and_its_gradient():
    assert float(policy_entropy(0.0, 1.5, 0.25)) == 0.25 and float(policy_entropy(1.0, 1.5, 0.25)) == 1.5
    for p in (0.0, 1.0):
        assert math.isfinite(float(jax.grad(lambda p: policy_entropy(p, 1.5, 0.25))(p)))
    slope = float(jax.grad(lambda p: policy_entropy(p, 1.5, 0.25))(0.3))
    assert slope == pytest.approx(math.log(0.7 / 0.3) + 1.25, rel=1e-12)


def test_float32_stays_float32():
    log_ref = random_policies(10).astype(jnp.float32)
    options = {"p_old": 0.3, "beta": 1.0, "weights": Group(8), "alpha": 0.5}
    log_old = random_policies(11)
    single = optimal_log_policy(log_ref, REWARDS, log_old=log_old.astype(jnp.float32), **options)
    assert single.dtype == jnp.float32
    target = optimal_log_policy(log_ref.astype(float), REWARDS, log_old=log_old, **options)
    np.testing.assert_allclose(single, target, rtol=5e-6)
    assert renyi_correction(log_ref, log_ref, REWARDS, alpha=0.3).dtype == jnp.float32
    assert optimality_gap(log_ref, log_ref, beta=2.0).dtype == jnp.float32
    for x in (log_policy_ratio(1, jnp.float32(0.2), jnp.float32(0.3)), policy_entropy(jnp.float32(0.2), 1.0, 0.0)):
        assert x.dtype == jnp.float32
    assert log_partition(jnp.float32(0.2), jnp.float32(0.3), beta=1.0, weights=Whitened()).dtype == jnp.float32
