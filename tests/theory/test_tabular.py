"""Exact GRPO on explicit policies: it proves the recurrences, the clipped map and the finite-group weights; nothing is shared.

Where this file checks `tabular` itself, it does so by certificates of optimality and by enumeration.
"""

import itertools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_sigmoid, log_softmax, logsumexp, sigmoid

from grpo_jax import group_advantages, grpo_loss
from grpo_jax.objective import DR_GRPO, GRPO
from grpo_jax.theory import (
    Group,
    MeanOnly,
    NoisyVerifier,
    Whitened,
    WhitenedStd,
    bernoulli_kl,
    fixed_points,
    flow_point,
    forward_kl_fixed_point,
    iterate,
    omega,
    omega_minus,
    omega_plus,
    success_map,
)
from grpo_jax.theory.clipping import clipped_success_map
from tests.tabular import (
    enumerated_advantages,
    exact_iterates,
    flow_steps,
    maximise,
    outcome_advantages,
    success_log_odds,
)

pytestmark = pytest.mark.usefixtures("double")

REWARDS = np.array([1, 0, 0, 1, 0, 1, 0])
SUCCESS = REWARDS == 1
NORMALISERS = [
    {"baseline": baseline, "scale": scale, "ddof": ddof, "epsilon": epsilon, "epsilon_in": place}
    for baseline in ("mean", "leave_one_out", "none")
    for scale, choices in (
        ("std", [(d, e, w) for d in (0, 1) for e, w in ((0.0, "variance"), (0.03, "variance"), (0.03, "std"))]),
        ("none", [(0, 0.0, "variance")]),
        ("mean", [(0, 0.0, "variance")]),
    )
    for ddof, epsilon, place in choices
]
every_normaliser = pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: "-".join(map(str, n.values())))


def policy(p, seed=0, rewards=REWARDS):
    """Log-probabilities with success probability p and random conditionals."""
    return on_the_line(jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, len(rewards))), p, rewards)


def on_the_line(log_policy, p, rewards=REWARDS):
    """The policy with success probability p and the conditionals of another: the one-parameter family of the theory."""
    success = jnp.asarray(rewards) == 1
    right, wrong = (log_softmax(jnp.where(s, log_policy, -jnp.inf)) for s in (success, ~success))
    return jnp.where(success, math.log(p) + right, math.log1p(-p) + wrong)


def success(log_policy, rewards=REWARDS):
    return jnp.exp(log_policy) @ jnp.asarray(rewards, log_policy.dtype)


def kl(log_policy, log_other):
    return (jnp.exp(log_policy) * (log_policy - log_other)).sum(-1)


def objective(log_policy, praise, blame, log_anchor, log_old, beta, low, high):
    """What is maximised, written as the trainer writes it; each outcome's draws have advantages praise and −blame."""
    ratio = jnp.exp(log_policy - log_old)
    surrogate = sum(jnp.minimum(ratio * a, jnp.clip(ratio, 1 - low, 1 + high) * a) for a in (praise, -blame))
    return (jnp.exp(log_old) * surrogate).sum(-1) - beta * kl(log_policy, log_anchor)


def clipped_cases(count):
    """Random problems [count, 7] where the anchor, the sampled policy and the advantages have nothing to do with each other.

    Every seventh outcome has no advantage, every fourth is praised in some draws and blamed in others.
    """
    rng = np.random.default_rng(1)
    anchor, old = (rng.normal(0, rng.choice([0.3, 2.0], (count, 1)), (count, 7)) for _ in range(2))
    kind = rng.choice(4, (count, 7), p=[0.14, 0.31, 0.3, 0.25])  # none, praise, blame, both
    praise, blame = (rng.exponential(2, (count, 7)) * ((kind == k) | (kind == 3)) for k in (1, 2))
    beta, low, high = 10 ** rng.uniform(-1.5, 1, count), rng.uniform(0.02, 0.5, count), rng.uniform(0.02, 1.0, count)
    anchor, old = (log_softmax(jnp.asarray(x)) for x in (anchor, old))
    return jnp.asarray(praise), jnp.asarray(blame), anchor, old, *(jnp.asarray(x) for x in (beta, low, high))


@jax.jit
@jax.vmap
def clipped(praise, blame, anchor, old, beta, low, high):
    return maximise(praise - blame, anchor, beta=beta, log_old=old, clip=low, clip_high=high, blame=blame)


def test_the_clipped_maximiser_satisfies_the_conditions_of_optimality():
    """One multiplier λ lies between the right and the left derivative of every outcome, and all bends are really in play."""
    praise, blame, anchor, old, beta, low, high = cases = clipped_cases(2000)
    log_policy = clipped(*cases)
    assert float(jnp.abs(logsumexp(log_policy, axis=-1)).max()) < 1e-13
    ratio, slack = jnp.exp(log_policy - old), 1e-12
    top, bottom = (1 + high)[:, None], (1 - low)[:, None]
    cost = beta[:, None] * (log_policy - anchor)
    praised = [jnp.where(x, praise, 0.0) for x in (ratio <= top * (1 + slack), ratio < top * (1 - slack))]
    blamed = [jnp.where(x, blame, 0.0) for x in (ratio > bottom * (1 + slack), ratio >= bottom * (1 - slack))]
    left, right = (a - b - cost for a, b in zip(praised, blamed, strict=True))
    assert float((right.max(-1) - left.min(-1)).max()) < 1e-11
    at_bend = left - right > 1e-9
    for those in (at_bend & (ratio > 1), at_bend & (ratio < 1), ~at_bend & (ratio > top), ~at_bend & (ratio < bottom)):
        assert int((those & (praise > 0)).sum()) > 300
        assert int((those & (blame > 0)).sum()) > 300


def test_no_policy_beats_the_clipped_maximiser():
    """Concave minus β KL: every other policy loses at least β KL(other‖π), near, far and at random."""
    rng = np.random.default_rng(2)
    cases = clipped_cases(200)
    best, beta = clipped(*cases), cases[4]
    share = jnp.asarray(10 ** rng.uniform(-5, 0, (300, 1, 1)))
    others = (1 - share) * jnp.exp(best)[None] + share * jnp.asarray(rng.dirichlet([0.3] * 7, (300, 1)))
    others = log_softmax(jnp.maximum(jnp.log(others), -600.0))
    value = jax.vmap(objective)
    elsewhere = jax.jit(jax.vmap(lambda other: value(other, *cases)))(others)
    loss = jax.vmap(lambda other: beta * kl(other, best))(others)
    assert bool((value(best, *cases)[None] - elsewhere >= loss - 1e-13).all())


def test_the_unclipped_maximiser_is_the_tilt_and_every_gap_is_a_kl():
    """Facts 4 and 5 of the closed form: the best value is β ln Z, and another policy loses exactly β KL(other‖best)."""
    praise, blame, anchor, other, beta, _, _ = clipped_cases(200)
    best = jax.vmap(lambda a, b, c: maximise(a, b, beta=c))(praise - blame, anchor, beta)
    tilted = anchor + (praise - blame) / beta[:, None]
    log_z = logsumexp(tilted, axis=-1)
    assert jnp.allclose(best, tilted - log_z[:, None], rtol=1e-12, atol=1e-12)
    at_best, elsewhere = (
        (jnp.exp(x) * (praise - blame)).sum(-1) - beta * jax.vmap(kl)(x, anchor) for x in (best, other)
    )
    assert jnp.allclose(at_best, beta * log_z, rtol=1e-11, atol=1e-12)
    assert jnp.allclose(at_best - elsewhere, beta * kl(other, best), rtol=1e-10, atol=1e-12)


def test_limits_of_the_clip():
    praise, blame, anchor, old, beta, low, high = clipped_cases(100)
    tilted = log_softmax(anchor + (praise - blame) / beta[:, None])
    never = clipped(praise, blame, anchor, old, beta, jnp.ones(100), jnp.full(100, 1e9))
    assert jnp.allclose(never, tilted, rtol=1e-12, atol=1e-12)
    still = clipped(praise + 0.1, blame, old, old, beta, jnp.zeros(100), jnp.zeros(100))
    assert jnp.allclose(still, old, rtol=1e-13)
    moved, same = (clipped(praise, blame, anchor + c, old, beta, low, high) for c in (3.7, 0.0))
    assert jnp.allclose(moved, same, rtol=1e-12)
    signed = jnp.where(praise > blame, praise, -blame)
    one_sign = jax.vmap(lambda a, b, o, c: maximise(a, b, beta=c, log_old=o, clip=0.2))(signed, anchor, old, beta)
    width = jnp.full(100, 0.2)
    both = clipped(jnp.maximum(signed, 0.0), jnp.maximum(-signed, 0.0), anchor, old, beta, width, width)
    assert jnp.allclose(one_sign, both, rtol=1e-13)


def test_the_clipped_maximiser_is_differentiable():
    at = clipped_cases(50)
    rng = np.random.default_rng(3)
    directions = tuple(x * jnp.asarray(rng.normal(0, 1, x.shape)) for x in at)  # what is zero cannot become negative
    _, slope = jax.jvp(clipped, at, directions)
    up, down = (clipped(*(x + h * d for x, d in zip(at, directions, strict=True))) for h in (1e-7, -1e-7))
    assert jnp.allclose(slope, (up - down) / 2e-7, rtol=1e-5, atol=1e-5)
    weigh = jnp.arange(7.0)
    back = jax.grad(lambda *x: (clipped(*x) @ weigh).sum(), argnums=tuple(range(7)))(*at)
    along = sum(float((g * d).sum()) for g, d in zip(back, directions, strict=True))
    assert along == pytest.approx(float((slope @ weigh).sum()), rel=1e-10)


def test_maximise_refuses_half_a_clip():
    two = jnp.log(jnp.asarray([0.5, 0.5]))
    with pytest.raises(ValueError, match="log_old"):
        maximise(two, two, beta=1.0, clip=0.2)
    with pytest.raises(ValueError, match="clip_high"):
        maximise(two, two, beta=1.0, log_old=two, clip_high=0.2)
    with pytest.raises(ValueError, match="verdicts"):
        exact_iterates(two, [1, 0], 1, beta=1.0, weights=NoisyVerifier(MeanOnly(), tpr=0.9), clip=0.2)


@pytest.mark.parametrize("weights", [Whitened(1e-3), WhitenedStd(1e-2), MeanOnly(), Group(8)], ids=repr)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_iterates_follow_the_recurrence_on_one_line(alpha, weights):
    """The recurrences (a) to (d), and facts 1 to 3: only p moves, every distance is that of two coins, H_S and H_F freeze."""
    log_ref = jnp.stack([policy(p, seed) for seed, p in enumerate((0.02, 0.2, 0.7))])
    path = exact_iterates(log_ref, REWARDS, 12, beta=2.5, weights=weights, alpha=alpha)
    assert path.shape == (13, 3, 7)
    logits = success_log_odds(path, REWARDS)
    expected = iterate(logits[0], 12, beta=2.5, weights=weights, alpha=alpha, logits=True)
    assert jnp.allclose(logits, expected, rtol=1e-9, atol=1e-10)

    p, p_ref = success(path), success(log_ref)
    coin = jnp.where(SUCCESS[None, None], log_sigmoid(logits)[..., None], log_sigmoid(-logits)[..., None])
    frozen = log_ref - jnp.where(SUCCESS[None], jnp.log(p_ref)[:, None], jnp.log1p(-p_ref)[:, None])
    assert jnp.allclose(path, coin + frozen[None], rtol=1e-10, atol=1e-10)

    for a, b in ((12, 0), (0, 12), (5, 2)):
        coins = bernoulli_kl(logits[a], logits[b], logits=True)
        assert jnp.allclose(kl(path[a], path[b]), coins, rtol=1e-9, atol=1e-12)
    assert jnp.allclose(
        jnp.abs(jnp.exp(path) - jnp.exp(log_ref)[None]).sum(-1) / 2, jnp.abs(p - p_ref[None]), atol=1e-12
    )
    assert bool((kl(path, log_ref[None]) <= 1e-12 - jnp.log(p_ref)[None]).all())

    entropy_s, entropy_f = (-(jnp.exp(x) * x).sum(-1)[None] for x in (frozen[:, SUCCESS], frozen[:, ~SUCCESS]))
    entropy = -(p * log_sigmoid(logits) + (1 - p) * log_sigmoid(-logits)) + p * entropy_s + (1 - p) * entropy_f
    assert jnp.allclose(-(jnp.exp(path) * path).sum(-1), entropy, atol=1e-11)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_optimal_value_and_kl_of_two_kl_iterates(alpha):
    """Fact 4: the value is β ln Z + β ln C for the two KLs themselves, and KL(π‖anchor) = (ω⁺p − ω⁻(1 − p))/β − ln Z."""
    beta, weights = 1.4, Whitened(1e-4)
    log_ref = policy(0.15)
    old, new = exact_iterates(log_ref, REWARDS, 4, beta=beta, weights=weights, alpha=alpha)[-2:]
    mixed = alpha * log_ref + (1 - alpha) * old
    log_c = logsumexp(mixed)
    p_a, p_old = success(mixed - log_c), success(old)
    plus, minus = omega_plus(p_old, weights), omega_minus(p_old, weights)
    log_z = jnp.logaddexp(jnp.log(p_a) + plus / beta, jnp.log1p(-p_a) - minus / beta)
    advantages = outcome_advantages(old, REWARDS, weights=weights)
    value = (jnp.exp(new) * advantages).sum() - beta * (alpha * kl(new, log_ref) + (1 - alpha) * kl(new, old))
    assert float(value) == pytest.approx(float(beta * (log_z + log_c)), rel=1e-12)
    drift = (plus * success(new) - minus * (1 - success(new))) / beta
    assert float(kl(new, mixed - log_c)) == pytest.approx(float(drift - log_z), rel=1e-11)


def test_at_a_fixed_point_the_kl_is_minus_log_z():
    end = exact_iterates(policy(0.2), REWARDS, 200, beta=1.0, weights=Whitened(1e-5))[-1]
    plus, minus = omega_plus(success(end), Whitened(1e-5)), omega_minus(success(end), Whitened(1e-5))
    log_z = jnp.logaddexp(jnp.log(0.2) + plus, jnp.log(0.8) - minus)
    assert float(kl(end, policy(0.2))) == pytest.approx(float(-log_z), rel=1e-11)
    assert float(kl(end, policy(0.2))) == pytest.approx(0.541704688723, rel=3e-12)


def renyi_correction(log_ref, log_old, alpha):
    """Δ_R = (1 − α)[D_α(ref_F‖old_F) − D_α(ref_S‖old_S)] from its definition."""

    def divergence(s):
        ref, old = (log_softmax(x[..., s]) for x in (log_ref, log_old))
        return jnp.log(jnp.exp(alpha * ref + (1 - alpha) * old).sum(-1)) / (alpha - 1)

    return (1 - alpha) * (divergence(~SUCCESS) - divergence(SUCCESS))


def test_the_renyi_correction_vanishes_from_the_reference():
    path = exact_iterates(policy(0.05), REWARDS, 20, beta=1.3, weights=Whitened(1e-3), alpha=0.4)
    assert max(abs(float(renyi_correction(policy(0.05), old, 0.4))) for old in path) < 1e-13


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_the_renyi_correction_of_another_start_decays_with_its_square(alpha):
    """The conditionals are ∝ ref^(1−g) start^g with g = (1 − α)^n, and a divergence is quadratic in g: Δ_R ~ (1 − α)^(2n)."""
    beta, weights = 3.0, Whitened(1e-2)
    log_ref, start = policy(0.2, seed=0), policy(0.4, seed=9)
    path = exact_iterates(log_ref, REWARDS, 70, beta=beta, weights=weights, alpha=alpha, log_start=start)
    correction = renyi_correction(log_ref[None], path, alpha)
    assert abs(float(correction[0])) > 1e-2
    logits = success_log_odds(path, REWARDS)
    anchor = alpha * math.log(0.25) + (1 - alpha) * logits[:-1]
    assert jnp.allclose(
        logits[1:], anchor + correction[:-1] + omega(logits[:-1], weights, logits=True) / beta, rtol=1e-11
    )
    share = (1 - alpha) ** jnp.arange(71.0)[:, None]
    for s in (SUCCESS, ~SUCCESS):
        mixed = log_softmax((1 - share) * log_ref[None, s] + share * start[None, s])
        assert jnp.allclose(log_softmax(path[..., s]), mixed, atol=1e-11)
    n = math.ceil(math.log(1e-3) / math.log(1 - alpha))  # where the next order is a thousandth
    assert float(correction[n + 1] / correction[n]) == pytest.approx((1 - alpha) ** 2, rel=1e-2)


def test_with_the_whole_kl_to_the_reference_another_start_is_forgotten_but_for_its_p():
    path = exact_iterates(policy(0.2), REWARDS, 1, beta=1.0, weights=Whitened(1e-5), log_start=policy(0.3, seed=5))
    assert float(success(path[1])) == pytest.approx(0.689082325931, rel=3e-12)
    assert jnp.allclose(path[1], on_the_line(policy(0.2), 0.689082325931), atol=1e-11)


def test_cycles_and_their_cure():
    white = Whitened(1e-5)
    tail = success(exact_iterates(policy(1e-3), REWARDS, 400, beta=3.0, weights=white))[-4:]
    assert sorted(tail.tolist()) == pytest.approx([0.00199486349927] * 2 + [0.633011579742] * 2, rel=1e-9)
    damped = success(exact_iterates(policy(1e-3), REWARDS, 400, beta=6.0, weights=white, alpha=0.5))[-1]
    assert float(damped) == pytest.approx(0.015123, abs=5e-7)
    clipped = success(exact_iterates(policy(1e-3), REWARDS, 600, beta=3.0, weights=white, clip=0.2))[-100:]
    assert [float(clipped.min()), float(clipped.max())] == pytest.approx([0.0132, 0.0168], abs=5.1e-5)
    small = success(exact_iterates(policy(1e-4), REWARDS, 600, beta=5.0, weights=white, clip=0.2))[-100:]
    assert [float(small.min()), float(small.max())] == pytest.approx([0.0027, 0.0037], abs=5.1e-5)
    assert float(success(exact_iterates(policy(1e-4), REWARDS, 50, beta=5.0, weights=white))[-1]) > 1 - 1e-9


@pytest.mark.parametrize("clip", [None, 0.2])
def test_two_ends_from_two_sides_of_the_middle_fixed_point(clip):
    low, middle, high = fixed_points(0.2, beta=1.0, weights=Whitened(1e-5))
    for p_0, end in ((0.2, low), (middle.p - 1e-4, low), (middle.p + 1e-4, high), (0.95, high)):
        start = on_the_line(policy(0.2), p_0)
        path = exact_iterates(policy(0.2), REWARDS, 2000, beta=1.0, weights=Whitened(1e-5), clip=clip, log_start=start)
        assert float(success_log_odds(path[-1], REWARDS)) == pytest.approx(end.logit, rel=1e-9)
    assert low.p == pytest.approx(0.6813, abs=5.1e-5)


def test_clipped_iterates_are_those_of_the_clipped_map_on_the_same_line():
    """No policy outside the one-parameter family does better, whatever the conditionals."""
    rng = np.random.default_rng(4)
    differing = 0
    for seed in range(300):
        p_ref, p_old = sigmoid(jnp.asarray(rng.normal(-1, 2.5, 2))).tolist()
        weights = (Whitened(1e-5), Whitened(0.05), MeanOnly(), Group(8), WhitenedStd(1e-2))[seed % 5]
        beta, alpha = 10 ** rng.uniform(-1, 1.3), rng.choice([0.0, 0.4, 1.0])
        clip, clip_high = rng.uniform(0.02, 0.5), rng.choice([None, rng.uniform(0.02, 0.8)])
        options = {"beta": beta, "weights": weights, "alpha": alpha, "clip": clip, "clip_high": clip_high}
        log_ref = policy(p_ref, seed)
        new = exact_iterates(log_ref, REWARDS, 1, **options, log_start=on_the_line(log_ref, p_old))[-1]
        p = float(success(new))
        assert float(clipped_success_map(p_old, p_ref, **options)) == pytest.approx(p, rel=1e-10)
        assert jnp.allclose(new, on_the_line(log_ref, p), atol=1e-9)
        differing += abs(float(success_map(p_old, p_ref, beta=beta, weights=weights, alpha=alpha)) - p) > 1e-6
    assert differing > 100


def test_clipped_reference_values():
    step = partial(exact_iterates, policy(0.2), REWARDS, 1, weights=Whitened(1e-5), clip=0.2)
    assert float(success(step(beta=1.0)[-1])) == pytest.approx(0.291871903464, rel=3e-12)
    assert float(success(step(beta=0.2)[-1])) == pytest.approx(0.36, rel=1e-12)
    almost_free = exact_iterates(policy(1e-9), REWARDS, 3, beta=1e-3, weights=MeanOnly(), clip=0.2)
    assert float(success(almost_free[1])) == pytest.approx(1.2e-9, rel=1e-6)  # ω⁻ is tiny: ×(1 + c) only


def test_mirror_iterates_follow_the_square_of_a_sine():
    """Constant speed in arcsin √p: p reaches 1 after β(π − 2 arcsin √p_0) steps."""
    beta, p_0 = 400.0, 0.01
    p = success(exact_iterates(policy(p_0), REWARDS, 1177, beta=beta, weights=Whitened(0.0), alpha=0.0))
    assert (math.pi - 2 * math.asin(math.sqrt(p_0))) == pytest.approx(2.94125781127, rel=1e-11)
    expected = jnp.sin(math.asin(math.sqrt(p_0)) + jnp.arange(1178.0) / (2 * beta)) ** 2
    assert float(jnp.abs(p - expected).max()) < 2e-3
    assert float(p[1170]) > 0.9999
    assert int(jnp.argmax(p >= 0.9)) == pytest.approx(2.30 * beta, abs=0.005 * beta)
    per_step = float(kl(*exact_iterates(policy(0.3), REWARDS, 1, beta=beta, weights=Whitened(0.0), alpha=0.0)[::-1]))
    assert per_step == pytest.approx(1 / (2 * beta**2), rel=5e-3)


@every_normaliser
def test_enumerated_weights_of_the_trainers_normaliser(normaliser):
    """At the level of advantages, for every G up to 8: E[A | success] and −E[A | failure] are the theory's ω⁺ and ω⁻."""
    p = jnp.asarray([0.03, 0.37, 0.5, 0.92])
    for size in range(2, 9):
        plus, minus = enumerated_advantages(p, size, partial(group_advantages, **normaliser))
        assert jnp.allclose(plus, omega_plus(p, Group(size, **normaliser)), rtol=2e-6)
        assert jnp.allclose(minus, omega_minus(p, Group(size, **normaliser)), rtol=2e-6, atol=1e-9)


def parametrised(theta, num_outcomes):
    """Log-probabilities that depend on four parameters in no special way."""
    features = jnp.asarray(np.random.default_rng(num_outcomes).normal(0, 1, (num_outcomes, 4)), theta.dtype)
    return log_softmax(jnp.sin(features @ theta) + features[:, 0] * theta[1] ** 2)


def all_groups(log_policy, size):
    """Every group of outcomes [O^G, G] and its chance [O^G]."""
    groups = np.array(list(itertools.product(range(log_policy.shape[0]), repeat=size)))
    return groups, jnp.exp(log_policy[groups].sum(-1))


THETA = jnp.asarray([0.3, -0.8, 0.5, 1.1], jnp.float32)


@pytest.mark.parametrize(("num_outcomes", "size"), [(5, 2), (4, 3), (4, 4), (3, 8)])
def test_the_mean_gradient_over_all_groups_is_omega_times_the_gradient_of_p(num_outcomes, size):
    theta, rewards = THETA.astype(float), REWARDS[:num_outcomes]
    log_policy, scores = parametrised(theta, num_outcomes), jax.jacobian(parametrised)(theta, num_outcomes)
    p, ascent = jax.value_and_grad(lambda t: success(parametrised(t, num_outcomes), rewards))(theta)
    groups, chance = all_groups(log_policy, size)
    for normaliser in NORMALISERS:
        advantages = group_advantages(jnp.asarray(rewards[groups]), **normaliser).astype(float)
        mean = jnp.einsum("n,ng,ngk->k", chance, advantages, scores[groups]) / size
        expected = omega(p, Group(size, **normaliser)) * ascent
        assert jnp.allclose(mean, expected, rtol=3e-6, atol=1e-9), normaliser


def test_what_one_group_teaches():
    """Whitened: σ̂ times the difference of mean scores. Mean-only: (G−1)/G of a U-statistic. G = 2: whitened is twice that."""
    scores = jax.jacobian(parametrised)(THETA.astype(float), 4)
    for size in (2, 3, 5):
        groups, _ = all_groups(jnp.zeros(4), size)
        rewards, s = jnp.asarray(REWARDS[:4][groups], float), scores[groups]
        white, plain = (
            jnp.einsum("ng,ngk->nk", group_advantages(rewards, epsilon=0.0, scale=scale).astype(float), s) / size
            for scale in ("std", "none")
        )
        hits = rewards.sum(-1, keepdims=True)
        right, wrong = jnp.einsum("ng,ngk->nk", rewards, s), jnp.einsum("ng,ngk->nk", 1 - rewards, s)
        split = jnp.sqrt(hits * (size - hits)) / size
        difference = right / jnp.maximum(hits, 1) - wrong / jnp.maximum(size - hits, 1)
        assert jnp.allclose(white, split * difference, rtol=1e-6, atol=1e-7)
        kernel = (rewards[:, :, None] - rewards[:, None, :])[..., None] * (s[:, :, None] - s[:, None, :]) / 2
        statistic = kernel.sum((1, 2)) / (size * (size - 1))
        assert jnp.allclose(plain, (size - 1) / size * statistic, rtol=1e-6, atol=1e-7)
        if size == 2:
            assert jnp.allclose(white, 2 * plain, rtol=1e-6)


@pytest.mark.parametrize("trained", [replace(GRPO, epsilon=0.0), GRPO, DR_GRPO], ids=["epsilon 0", "GRPO", "Dr. GRPO"])
def test_dead_groups_teach_exactly_nothing_and_the_loss_teaches_the_rest(trained):
    size, rewards = 4, REWARDS[:4]
    groups, chance = all_groups(parametrised(THETA, 4), size)

    def loss(theta, group):
        logps = parametrised(theta, 4)[group][:, None]
        advantages = group_advantages(jnp.asarray(rewards)[group], **trained.normaliser())
        mask = jnp.ones((size, 1), bool)
        return grpo_loss(logps, None, logps, advantages, mask, beta=0.0, objective=replace(trained, kl="none"))[0]

    slopes = jax.vmap(jax.grad(loss), in_axes=(None, 0))(THETA, jnp.asarray(groups))
    hits = rewards[groups].sum(-1)
    dead = (hits == 0) | (hits == size)
    assert 0 < dead.sum() < len(groups)
    assert bool((slopes[dead] == 0).all())
    assert bool(jnp.isfinite(slopes).all())
    p, ascent = jax.value_and_grad(lambda t: success(parametrised(t, 4), jnp.asarray(rewards, t.dtype)))(THETA)
    weights = Group(size, **trained.normaliser())
    assert jnp.allclose(chance @ slopes, -omega(p, weights) * ascent, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "reverse", "forward"),
    [(Whitened(0.0), 0.146, 0.510), (Group(16), 0.1276, 0.4935), (Group(8), 0.0950, 0.4730)],
    ids=repr,
)
def test_small_steps_end_where_their_kl_says(weights, reverse, forward):
    """p_ref = 0.01, β = 1: KL(π‖π_ref), the gradient of k2, and KL(π_ref‖π), that of k3, end far apart."""
    rewards = np.array([1, 0, 1, 0])
    log_ref = policy(0.01, rewards=rewards)
    steps = partial(flow_steps, log_ref, rewards, 30_000, step_size=0.5, beta=1.0, weights=weights)
    for name, stated, solve in (("reverse", reverse, flow_point), ("forward", forward, forward_kl_fixed_point)):
        path = success(steps(kl=name), rewards)
        assert float(path[-1]) == pytest.approx(stated, abs=5.1e-4 if weights == Whitened(0.0) else 5.1e-5)
        assert float(path[-1]) == pytest.approx(float(solve(0.01, beta=1.0, weights=weights)), rel=1e-6)
    assert jnp.allclose(
        steps()[-1], on_the_line(log_ref, float(flow_point(0.01, beta=1.0, weights=weights)), rewards), atol=1e-5
    )


def test_small_steps_never_flip():
    """Exact iterations cycle here; the flow climbs to the fixed point between."""
    rewards = np.array([1, 0])
    path = success(
        flow_steps(policy(1e-3, rewards=rewards), rewards, 4000, step_size=0.3, beta=3.0, weights=Whitened(1e-5)),
        rewards,
    )
    assert bool((jnp.diff(path) > -1e-12).all())
    assert float(path[-1]) == pytest.approx(0.015123, abs=5e-7)


@pytest.mark.parametrize("name", ["reverse", "forward"])
def test_flow_steps_are_those_of_the_estimators_in_the_loss(name):
    """Plain gradient ascent whose KL term is k2 or k3, as a mean over what the current policy samples."""
    log_ref, beta, size = policy(0.1), 1.7, 0.2

    def loss(logits, sampled, advantages):
        log_policy = log_softmax(logits)
        gap = log_ref - log_policy
        estimate = gap**2 / 2 if name == "reverse" else jnp.exp(gap) - 1 - gap
        return jnp.exp(sampled) @ (beta * estimate - advantages * log_policy)

    logits = log_ref
    for _ in range(30):
        advantages = outcome_advantages(logits, REWARDS, weights=Group(8))
        logits = logits - size * jax.grad(loss)(logits, log_softmax(logits), advantages)
    path = flow_steps(log_ref, REWARDS, 30, step_size=size, beta=beta, weights=Group(8), kl=name)
    assert jnp.allclose(path[-1], log_softmax(logits), rtol=1e-11)


@pytest.mark.parametrize(("tpr", "fpr"), [(0.9, 0.2), (1.0, 0.1), (0.3, 0.6)])
def test_a_noisy_verifier_shifts_the_recurrence(tpr, fpr):
    """Verdicts flipped per draw: the true log-odds move by J Ω(p̃)/β; worse than chance they fall."""
    verdicts = fpr + (tpr - fpr) * REWARDS
    for weights in (Whitened(1e-3), Group(8), Group(4, baseline="none", scale="none")):
        for alpha, clip in ((1.0, None), (0.3, None), (1.0, 0.15)):
            options = {"beta": 1.8, "weights": weights, "alpha": alpha}
            path = exact_iterates(policy(0.1), verdicts, 8, clip=clip, **options)
            p = success(path)
            if clip is None:
                noisy = NoisyVerifier(weights, tpr=tpr, fpr=fpr)
                assert jnp.allclose(p, iterate(0.1, 8, beta=1.8, weights=noisy, alpha=alpha), rtol=1e-10)
            assert bool(((p[1:] - 0.1) * (tpr - fpr) > 0).all())
            assert jnp.allclose(path[-1], on_the_line(policy(0.1), float(p[-1])), atol=1e-10)


def test_a_clip_sees_the_single_verdicts_of_a_noisy_verifier():
    """No policy beats the iterate where right answers are sometimes blamed and wrong ones praised, each draw clipped alone."""
    rng = np.random.default_rng(6)
    accept, log_old, weights = 0.3 + 0.3 * REWARDS, policy(0.3), Whitened(1e-3)
    p_seen = float(success(log_old, accept))
    praise = jnp.asarray(accept) * omega_plus(p_seen, weights)
    blame = jnp.asarray(1 - accept) * omega_minus(p_seen, weights)
    _, best = exact_iterates(log_old, accept, 1, beta=0.4, weights=weights, clip=0.2)
    assert float(success(best)) == pytest.approx(0.36, rel=1e-12)  # 0.404 if the mean advantage were clipped
    others = jnp.log(0.99 * jnp.exp(best)[None] + 0.01 * jnp.asarray(rng.dirichlet([0.3] * 7, 300)))
    value = partial(
        objective, praise=praise, blame=blame, log_anchor=log_old, log_old=log_old, beta=0.4, low=0.2, high=0.2
    )
    gap = value(best) - jax.vmap(value)(others)
    assert bool((gap >= 0.4 * jax.vmap(lambda other: kl(other, best))(others) - 1e-13).all())


@pytest.mark.parametrize("normaliser", [NORMALISERS[0], NORMALISERS[4], NORMALISERS[6], NORMALISERS[-1]], ids=str)
def test_a_noisy_verifier_in_every_group_of_outcomes_and_verdicts(normaliser):
    """All groups of (outcome, verdict) pairs, the verdicts independent draws: mean gradient, and E[A | outcome]."""
    tpr, fpr, size, rewards = 0.85, 0.3, 4, REWARDS[:3]
    theta = THETA.astype(float)
    accept = fpr + (tpr - fpr) * rewards
    log_policy = parametrised(theta, 3)
    pairs = jnp.concatenate([log_policy + jnp.log(accept), log_policy + jnp.log1p(-accept)])
    groups, chance = all_groups(pairs, size)
    advantages = group_advantages(jnp.asarray(groups < 3, float), **normaliser).astype(float)
    scores = jax.jacobian(parametrised)(theta, 3)
    mean = jnp.einsum("n,ng,ngk->k", chance, advantages, scores[groups % 3]) / size
    p, ascent = jax.value_and_grad(lambda t: success(parametrised(t, 3), rewards))(theta)
    inner = Group(size, **normaliser)
    assert jnp.allclose(mean, omega(p, NoisyVerifier(inner, tpr=tpr, fpr=fpr)) * ascent, rtol=3e-6)
    expected_advantages = outcome_advantages(log_policy, accept, weights=inner)
    for outcome in range(3):
        first = groups[:, 0] % 3 == outcome
        conditional = chance[first] @ advantages[first, 0] / jnp.exp(log_policy[outcome])
        assert float(expected_advantages[outcome]) == pytest.approx(float(conditional), rel=3e-6)


def test_a_verifier_that_errs_on_one_wrong_answer_teaches_that_answer():
    """What no recurrence in p says: the accepted wrong answer grows among the wrong ones."""
    verdicts = np.where(np.arange(7) == 1, 0.5, REWARDS)
    path = exact_iterates(policy(0.1), verdicts, 5, beta=1.0, weights=Whitened(1e-3))
    wrong = log_softmax(path[:, ~SUCCESS])
    assert float(wrong[-1, 0]) > float(wrong[0, 0]) + 0.5


@pytest.mark.parametrize("weights", [Whitened(0.0), Whitened(1e-4), MeanOnly(), Group(8)], ids=repr)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_prompts_that_are_always_or_never_solved_stay(weights, alpha, clip):
    for impossible in (SUCCESS, ~SUCCESS):
        log_ref = log_softmax(jnp.where(impossible, -jnp.inf, policy(0.3)))
        path = exact_iterates(log_ref, REWARDS, 5, beta=0.5, weights=weights, alpha=alpha, clip=clip)
        assert jnp.allclose(jnp.exp(path), jnp.exp(log_ref)[None], rtol=1e-12)
        for name in ("reverse", "forward"):
            flow = flow_steps(log_ref, REWARDS, 5, step_size=0.1, beta=0.5, weights=weights, kl=name)
            assert jnp.allclose(jnp.exp(flow), jnp.exp(log_ref)[None], rtol=1e-12)


def test_float32_keeps_the_conditionals_also_where_the_pull_is_large():
    single = policy(0.2).astype(jnp.float32)
    for beta in (1e-3, 1.0):  # A/β up to 1e5, whose float32 neighbours are 0.008 apart
        for clip in (None, 0.3):
            path = exact_iterates(single, REWARDS, 5, beta=beta, weights=Whitened(1e-4), clip=clip)
            exact = exact_iterates(policy(0.2), REWARDS, 5, beta=beta, weights=Whitened(1e-4), clip=clip)
            assert path.dtype == jnp.float32
            assert jnp.allclose(path.astype(float), exact, rtol=1e-5, atol=2e-5)
            assert jnp.allclose(log_softmax(path[:, SUCCESS]), log_softmax(single[SUCCESS])[None], atol=3e-6)


def test_jit_and_vmap_over_everything_traced():
    def end(p_ref, beta, clip, alpha, epsilon):
        log_ref = jnp.where(SUCCESS, jnp.log(p_ref / 3), jnp.log((1 - p_ref) / 4))
        path = exact_iterates(log_ref, REWARDS, 3, beta=beta, weights=Whitened(epsilon), alpha=alpha, clip=clip)
        return sigmoid(success_log_odds(path[-1], REWARDS))

    columns = [jnp.asarray(x) for x in ([0.1, 0.3], [0.5, 2.0], [0.1, 0.4], [1.0, 0.5], [1e-3, 0.1])]
    together = jax.jit(jax.vmap(end))(*columns)
    assert together.tolist() == pytest.approx([float(end(*row)) for row in zip(*columns, strict=True)], rel=1e-12)
    batch = maximise(jnp.asarray([[1.0, -1.0]]), jnp.log(jnp.asarray([[[0.5, 0.5]], [[0.1, 0.9]]])), beta=1.0)
    assert batch.shape == (2, 1, 2)


def test_an_unknown_kl_is_refused():
    with pytest.raises(ValueError, match="sideways"):
        flow_steps(policy(0.3), REWARDS, 1, step_size=0.1, beta=1.0, weights=MeanOnly(), kl="sideways")
