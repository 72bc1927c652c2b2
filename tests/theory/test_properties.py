"""What the theory says of every orbit, at every β: searched for counterexamples by hypothesis, over wide ranges.

Each example is an array of log-odds of references with a β and an α each, so that n examples are 12 n cases.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grpo_jax.theory import (
    Group,
    MeanOnly,
    NoisyVerifier,
    Whitened,
    WhitenedStd,
    accumulated_error,
    bernoulli_kl,
    bistable_window,
    clipped_success_map,
    contrastive_term,
    fixed_points,
    flow_point,
    iterate,
    iterate_bounds,
    kl_budget,
    omega,
    omega_minus,
    omega_plus,
    optimal_log_policy,
    success_map,
)

CASES, STEPS = 12, 40
ORBITS = settings(max_examples=30, deadline=None, derandomize=True)
HOST = settings(max_examples=25, deadline=None, derandomize=True)


def many(low, high):
    return st.lists(st.floats(low, high), min_size=CASES, max_size=CASES)


references, log_betas, shares, log_epsilons = many(-25, 25), many(-3.5, 5), many(0, 1), st.floats(-16, 0)
scalar_reference, scalar_log_beta = st.floats(-14, 6), st.floats(-3, 3.5)

SYMMETRIC = {  # Ω(p) = Ω(1 − p), least at ½; each a function of ε
    "whitened": Whitened,
    "std": WhitenedStd,
    "mean only": lambda epsilon: MeanOnly(),
    "group": lambda epsilon: Group(8, 0, epsilon),
    "group, ddof 1, std": lambda epsilon: Group(16, 1, epsilon, "std", baseline="leave_one_out"),
    "dynamic": lambda epsilon: Group(4, 0, epsilon, dynamic_sampling=True),
    "fair noise": lambda epsilon: NoisyVerifier(Whitened(epsilon), 0.9, 0.1),
}
OTHERS = {
    "uncentred": lambda epsilon: Group(8, 0, epsilon, baseline="none"),
    "per mean": lambda epsilon: Group(6, scale="mean"),
    "noise": lambda epsilon: NoisyVerifier(WhitenedStd(epsilon), 0.97, 0.2),
    "noisy group": lambda epsilon: NoisyVerifier(Group(8, 0, epsilon), 0.8, 0.01),
}
ALL = SYMMETRIC | OTHERS


def compiled(function, **static):
    """Jitted, and with numpy arrays out: checks on these compile nothing."""
    jitted = jax.jit(function, **static)
    return lambda *arguments, **named: jax.tree.map(np.asarray, jitted(*arguments, **named))


def arrays(*columns):
    return tuple(np.asarray(column, float) for column in columns)


def not_below(a, b, slack=1e-12):
    """a ≥ b but for rounding, also where both are infinite."""
    with np.errstate(invalid="ignore"):
        return bool(((a >= b - slack * (1 + np.abs(b))) | (a == b)).all())


@compiled
def orbits(L, beta, alpha, weights):
    options = {"beta": beta, "weights": weights, "logits": True}
    return {
        "alpha": iterate(L, STEPS, alpha=alpha, **options),
        "one": iterate(L, STEPS, **options),
        "mirror": iterate(L, STEPS, alpha=0.0, **options),
        "bounds": [iterate_bounds(L, n, alpha=alpha, **options) for n in (1, 7, STEPS)],
        "bounds of one": iterate_bounds(L, **options),
        "bounds of mirror": [iterate_bounds(L, n, alpha=0.0, **options) for n in (1, 7, STEPS)],
        "half": L + weights.omega(jnp.zeros_like(L)) / beta,
        "flow": flow_point(L, **options),
        "flow, more beta": flow_point(L, beta=beta * 1.05, weights=weights, logits=True),
        "flow, better reference": flow_point(L + 0.03, **options),
    }


@pytest.mark.parametrize("name", ["whitened", "mean only", "group", "dynamic", "fair noise", "uncentred", "noise"])
@ORBITS
@given(L=references, log_beta=log_betas, alpha=shares, log_epsilon=log_epsilons)
def test_orbits_and_their_ends(name, L, log_beta, alpha, log_epsilon):
    """210 examples of 12 orbits of 40 steps, at three α each."""
    with jax.enable_x64(True), np.errstate(invalid="ignore"):
        L, beta, alpha = arrays(L, np.exp(log_beta), alpha)
        facts = orbits(L, beta, alpha, ALL[name](math.exp(log_epsilon)))
        row = L[None]
        for path in (facts["alpha"], facts["one"], facts["mirror"]):
            # Above the reference for ever, by more than rounding unless the push is less than that.
            assert bool((path[1:] >= row).all())
            assert bool((path[1:] > row)[:, np.abs(facts["half"] - L) > 1e-10].all()) or name in OTHERS
        for n, (low, high), (mirror_low, mirror_high) in zip(
            (1, 7, STEPS), facts["bounds"], facts["bounds of mirror"], strict=True
        ):
            assert not_below(facts["alpha"][n], low, 1e-10) and not_below(high, facts["alpha"][n], 1e-10)
            assert not_below(facts["mirror"][n], mirror_low, 1e-10) and not_below(
                mirror_high, facts["mirror"][n], 1e-10
            )
        low, high = facts["bounds of one"]
        assert all(not_below(x, low) and not_below(high, x) for x in facts["one"][1:])
        assert not_below(facts["flow"], low) and not_below(high, facts["flow"])
        assert not_below(facts["mirror"][1:], facts["mirror"][:-1], 1e-14)
        # Along the flow p* falls with β and rises with p_ref, through every fold.
        assert not_below(facts["flow"], facts["flow, more beta"]) and not_below(
            facts["flow, better reference"], facts["flow"]
        )
        if name in SYMMETRIC:
            easy = L >= 0
            for path in (facts["alpha"], facts["one"]):
                assert not_below(path[1:, easy], path[:-1, easy])
            settled = facts["half"] >= 0
            path = facts["one"][1:, settled]
            rises, falls = path[1:] - path[:-1], path[:-1] - path[1:]
            slack = 1e-12 * (1 + np.abs(path[1:]))
            monotone = ((rises >= -slack) | (path[1:] == path[:-1])).all(0) | (falls >= -slack).all(0)
            assert bool(monotone.all())
            # Bounded and monotone, it converges; where it started at or above ½, to the first fixed point.
            end, first = facts["one"][-1], facts["flow"]
            near = easy & (np.abs(facts["one"][-1] - facts["one"][-2]) < 1e-13 * (1 + np.abs(end)))
            apart = np.where(end == first, 0.0, np.abs(end - first))
            assert bool((apart < 1e-6 * (1 + np.abs(end)))[near].all())


@ORBITS
@given(L=references, log_beta=log_betas, log_epsilon=log_epsilons)
def test_grpo_is_never_below_dr_grpo_at_a_smaller_beta(L, log_beta, log_epsilon):
    """30 examples: β√(1 + 4ε)/2."""
    with jax.enable_x64(True):
        L, beta = arrays(L, np.exp(log_beta))
        epsilon = math.exp(log_epsilon)
        facts = orbits(L, beta, np.ones(CASES), Whitened(epsilon))
        floor = L + 2 / (beta * math.sqrt(1 + 4 * epsilon))
        assert all(not_below(x, floor) for x in facts["one"][1:])


@compiled
def crossings(L, beta, weights):
    """How often L − L_ref − Ω(L)/β changes sign on a dense grid."""
    grid = jnp.concatenate([jnp.linspace(-45, 45, 9001), jnp.asarray([1e9])])[:, None]
    values = grid - L[None] - weights.omega(grid) / beta[None]
    return ((values[1:] >= 0) != (values[:-1] >= 0)).sum(0)


@pytest.mark.parametrize("name", ALL)
@ORBITS
@given(L=many(-14, 6), log_beta=many(-2, 3.5), log_epsilon=st.floats(-12, 0))
def test_never_more_than_three_fixed_points(name, L, log_beta, log_epsilon):
    """330 examples of 12, counted without the library's root finder. Where Ω is unbounded, p = 1 stands for the last."""
    with jax.enable_x64(True):
        crossed = crossings(*arrays(L, np.exp(log_beta)), ALL[name](math.exp(log_epsilon))).tolist()
        assert set(crossed) <= ({0, 2} if name == "dynamic" else {1, 3}), crossed


@pytest.mark.parametrize("name", ["whitened", "dynamic", "uncentred", "noisy group"])
@HOST
@given(reference=scalar_reference, log_beta=scalar_log_beta, log_epsilon=log_epsilons)
def test_all_fixed_points_are_found_and_alternate(name, reference, log_beta, log_epsilon):
    """100 examples. Alternately m < 1 and m > 1; where Ω is unbounded, p = 1 stands for the last, which is missing."""
    with jax.enable_x64(True):
        weights, beta = ALL[name](math.exp(log_epsilon)), math.exp(log_beta)
        points = fixed_points(reference, beta=beta, weights=weights, logits=True)
        assert len(points) in ((0, 2) if name == "dynamic" else (1, 3))
        assert all(f.logit >= reference for f in points)
        for i, point in enumerate(points):
            assert point.multiplier <= 1 + 1e-6 if i % 2 == 0 else point.multiplier >= 1 - 1e-6
            left = point.logit - reference - float(omega(point.logit, weights, logits=True)) / beta
            assert abs(left) < 1e-9 * (1 + abs(point.logit)) * (1 + abs(point.multiplier))
        first = float(flow_point(reference, beta=beta, weights=weights, logits=True))
        assert first == (pytest.approx(points[0].logit, rel=1e-9, abs=1e-9) if points else math.inf)


@compiled
def damped(L, reference, beta, alpha, weights):
    def two_kl(x):
        return success_map(x, reference, beta=beta, weights=weights, alpha=alpha, logits=True)

    def plain(x):
        return success_map(x, reference, beta=alpha * beta, weights=weights, logits=True)

    ones = jnp.ones_like(L)
    (moved, slope), (target, m) = (jax.jvp(f, (L,), (ones,)) for f in (two_kl, plain))
    return moved, slope, (1 - alpha) * L + alpha * target, 1 - alpha + alpha * m


@pytest.mark.parametrize("name", ["std", "group", "noise"])
@ORBITS
@given(L=references, shift=many(-10, 10), log_beta=log_betas, alpha=many(1e-3, 1), log_epsilon=log_epsilons)
def test_two_kl_is_damped(name, L, shift, log_beta, alpha, log_epsilon):
    """90 examples: (1 − α) id + α h_{αβ}, and the multipliers accordingly."""
    with jax.enable_x64(True):
        L, shift, beta, alpha = arrays(L, shift, np.exp(log_beta), alpha)
        moved, slope, expected, damping = damped(L, L + shift, beta, alpha, ALL[name](math.exp(log_epsilon)))
        np.testing.assert_allclose(moved, expected, rtol=1e-11, atol=1e-10)
        np.testing.assert_allclose(slope, damping, rtol=1e-9, atol=1e-9)


@compiled
def explicit_orbit(log_ref, rewards, beta, alpha, weights):
    """(p_n, KL(π_n‖π_ref), coin KL) of four iterations on explicit policies."""
    log_old, seen = log_ref, []
    for _ in range(4):
        p = jnp.minimum(jnp.where(rewards > 0, jnp.exp(log_old), 0.0).sum(-1), 1.0)  # else 1 + 2e-16 is no probability
        log_old = optimal_log_policy(
            log_ref, rewards, p_old=p, beta=beta, weights=weights, alpha=alpha, log_old=log_old
        )
        moved = jnp.minimum(jnp.where(rewards > 0, jnp.exp(log_old), 0.0).sum(-1), 1.0)
        seen.append((moved, (jnp.exp(log_old) * (log_old - log_ref)).sum(-1)))
    return seen


@ORBITS
@given(seed=st.integers(0, 2**31), log_beta=many(-1, 4), alpha=shares, log_epsilon=log_epsilons)
def test_kl_of_explicit_policies_is_that_of_coins_and_within_the_budget(seed, log_beta, alpha, log_epsilon):
    """30 examples of 12 random policies over 7 outcomes."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        log_ref = np.asarray(jax.nn.log_softmax(rng.normal(0, 2, (CASES, 7))))
        rewards = np.asarray(rng.permuted(np.tile([1, 1, 1, 0, 0, 0, 0], (CASES, 1)), axis=1))
        beta, alpha = arrays(np.exp(log_beta), alpha)
        p_ref = np.where(rewards > 0, np.exp(log_ref), 0.0).sum(-1)
        budget = kl_budget(p_ref)
        for p, kl in explicit_orbit(log_ref, rewards, beta, alpha, Whitened(math.exp(log_epsilon))):
            below_one = p < 1 - 1e-9  # else p has no digits left
            np.testing.assert_allclose(kl[below_one], bernoulli_kl(p, p_ref)[below_one], rtol=1e-6, atol=1e-13)
            assert bool((kl <= budget + 1e-12).all())


@compiled
def pair(L, weights):
    return tuple(f(L, weights, logits=True) for f in (omega, omega_plus, omega_minus))


@pytest.mark.parametrize("size", [2, 4, 33])
@ORBITS
@given(L=references, log_epsilon=log_epsilons)
def test_group_weights_are_bounded_and_do_not_tilt(size, L, log_epsilon):
    """90 examples: Ω_G ≤ min(1/√v, √(G − 1)), less with ddof and ε, and ω⁺/ω⁻ = (1 − p)/p."""
    with jax.enable_x64(True):
        (L,) = arrays(L)
        total, plus, minus = pair(L, Group(size))
        v = 1 / (2 + np.exp(L) + np.exp(-L))
        assert not_below(1 / np.sqrt(v), total) and not_below(math.sqrt(size - 1) + 0 * L, total)
        np.testing.assert_allclose(plus / minus, np.exp(-L), rtol=1e-12)
        np.testing.assert_allclose(plus + minus, total, rtol=1e-12)
        smaller, plus, minus = pair(L, Group(size, 1, math.exp(log_epsilon)))
        assert not_below(total, smaller)
        np.testing.assert_allclose(plus / minus, np.exp(-L), rtol=1e-12)
        # More of the group is live than is drawn.
        assert not_below(pair(L, Group(size, dynamic_sampling=True))[0], total)


@partial(compiled, static_argnames="clipped")
def surrogate(log_old, log_new, rewards, low, high, weights, clipped):
    p_old, p_new = (jnp.where(rewards > 0, jnp.exp(x), 0.0).sum(-1) for x in (log_old, log_new))
    options = {"weights": weights} | ({"clip": low[:, None], "clip_high": high[:, None]} if clipped else {})
    old = jnp.broadcast_to(p_old[:, None], rewards.shape)

    def total(ratio):
        terms = contrastive_term(ratio, rewards, old, **options)
        return terms.sum(), terms

    ratio = jnp.exp(log_new - log_old)
    slopes, terms = jax.grad(total, has_aux=True)(ratio)
    advantage = jnp.where(rewards > 0, omega_plus(old, weights), -omega_minus(old, weights))
    mean = (jnp.exp(log_old) * (terms - advantage)).sum(
        -1
    )  # uncentred advantages have a mean already at the old policy
    return ratio, advantage, terms, slopes, mean, omega(p_old, weights) * (p_new - p_old)


@pytest.mark.parametrize("name", ["whitened", "group", "uncentred"])
@ORBITS
@given(seed=st.integers(0, 2**31), low=many(0.01, 1), high=many(0.01, 3), log_epsilon=log_epsilons)
def test_contrastive_term_on_random_policies(name, seed, low, high, log_epsilon):
    """90 examples of 12 pairs of policies: min(ρA, clip(ρ)A), its flat sides, and a gain of Ω(p_old)(p − p_old) unclipped."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        log_old, log_new = (np.asarray(jax.nn.log_softmax(rng.normal(0, 1, (CASES, 6)))) for _ in range(2))
        rewards = np.asarray(rng.permuted(np.tile([1, 1, 0, 0, 0, 0], (CASES, 1)), axis=1))
        low, high = arrays(low, high)
        arguments = (log_old, log_new, rewards, low, high, ALL[name](math.exp(log_epsilon)))
        ratio, advantage, terms, slopes, _, _ = surrogate(*arguments, clipped=True)
        clipped = np.clip(ratio, 1 - low[:, None], 1 + high[:, None]) * advantage
        np.testing.assert_allclose(terms, np.minimum(ratio * advantage, clipped), rtol=1e-13)
        flat = np.where(rewards > 0, ratio > 1 + high[:, None], ratio < 1 - low[:, None])
        assert bool((slopes == np.where(flat, 0.0, advantage)).all())
        _, advantage, terms, slopes, mean, gain = surrogate(*arguments, clipped=False)
        assert bool((slopes == advantage).all())
        np.testing.assert_allclose(mean, gain, rtol=1e-9, atol=1e-12 * float(np.abs(terms).max()))


def test_the_flat_sides_begin_at_the_kink():
    """ "from ρ = 1 + c up" and "from ρ = 1 − c down" hold the kinks themselves."""
    with jax.enable_x64(True):
        for reward, edge in ((1, 1 + 0.25), (0, 1 - 0.25)):
            slope = jax.grad(lambda r, x=reward: contrastive_term(r, x, 0.3, weights=MeanOnly(), clip=0.25))(edge)
            assert float(slope) == 0.0


@compiled
def clipped_facts(L, reference, beta, low, high, weights):
    options = {"beta": beta, "weights": weights, "logits": True}
    star = flow_point(reference, **options)
    finite = jnp.where(jnp.isfinite(star), star, 0.0)

    def clipped(x):
        return clipped_success_map(x, reference, clip=low, clip_high=high, **options)

    ones = jnp.ones_like(L)
    there, slope = jax.jvp(clipped, (finite,), (ones,))
    _, unclipped = jax.jvp(lambda x: success_map(x, reference, **options), (finite,), (ones,))
    return star, there, slope, unclipped, clipped(L), success_map(L, reference, **options)


@pytest.mark.parametrize("name", ["whitened", "group", "dynamic", "uncentred"])
@ORBITS
@given(
    L=many(-12, 12), shift=many(0, 10), log_beta=many(-2, 4), low=many(0.01, 1), high=many(0.01, 3),
    log_epsilon=log_epsilons,
)  # fmt: skip
def test_clipping(name, L, shift, log_beta, low, high, log_epsilon):
    """120 examples: same fixed points, same multipliers, a bounded climb, never further than the unclipped map."""
    with jax.enable_x64(True):
        L, shift, beta, low, high = arrays(L, shift, np.exp(log_beta), low, high)
        facts = clipped_facts(L, L - shift, beta, low, high, ALL[name](math.exp(log_epsilon)))
        star, there, slope, unclipped, moved, free = facts
        # In p the neighbourhood of p* that no clip touches is as small as 1 − p*: leave room for rounding.
        finite = np.isfinite(star) & (star < 20)
        np.testing.assert_allclose(there[finite], star[finite], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(slope[finite], unclipped[finite], rtol=1e-9, atol=1e-9)
        p, q = 1 / (1 + np.exp(-L)), 1 / (1 + np.exp(L))
        climb = np.maximum((1 + high) * p, p + low * q)  # the reference is not above p
        assert bool((1 / (1 + np.exp(-moved)) <= climb * (1 + 1e-12)).all())
        assert not_below(free, moved, 1e-11)


@partial(compiled, static_argnames="num_steps")
def clipped_orbit(start, reference, beta, low, high, weights, num_steps=60):
    def step(L, _):
        L = clipped_success_map(L, reference, beta=beta, weights=weights, clip=low, clip_high=high, logits=True)
        return L, L

    return jax.lax.scan(step, start, None, length=num_steps)[1]


@HOST
@given(reference=st.floats(-20, 0), where=st.floats(1e-4, 0.999), low=many(0.02, 1), part=many(0, 0.999),
       log_epsilon=st.floats(-14, -5))  # fmt: skip
def test_clipped_orbits_do_not_pass_an_unstable_fixed_point(reference, where, low, part, log_epsilon):
    """25 examples of 12 starts, β between the folds; c_high as wide as the docstring allows: (2p_m − 1)/(1 − p_m)."""
    with jax.enable_x64(True):
        weights = Whitened(math.exp(log_epsilon))
        window = bistable_window(reference, weights=weights, logits=True)
        assume(window is not None)
        beta = window[0] * (window[1] / window[0]) ** where
        points = fixed_points(reference, beta=beta, weights=weights, logits=True)
        assume(len(points) == 3)
        middle = points[1]
        wide = (2 * middle.p - 1) * (1 + math.exp(middle.logit))
        (low, part) = arrays(low, part)
        start = reference + part * (middle.logit - reference)
        path = clipped_orbit(start, np.full(CASES, reference), beta, low, np.full(CASES, wide), weights)
        assert bool((path <= middle.logit + 1e-9 * (1 + abs(middle.logit))).all())


@compiled
def perturbed(p_ref, beta, noise, weights):
    """Exact and disturbed orbits of probabilities, and the steepest |h'| between the lowest and the highest of both."""
    h = partial(success_map, p_ref=p_ref, beta=beta, weights=weights)

    def step(state, e):
        exact, wrong = h(state[0]), jnp.clip(h(state[1]) + e, 0.0, 1.0)
        return (exact, wrong), (exact, wrong)

    _, (exact, wrong) = jax.lax.scan(step, (p_ref, p_ref), noise)
    low = jnp.minimum(jnp.minimum(exact, wrong).min(0), p_ref)
    high = jnp.maximum(jnp.maximum(exact, wrong).max(0), p_ref)
    at = low[None] + (high - low)[None] * jnp.linspace(0, 1, 400)[:, None]
    slopes = jax.vmap(jax.vmap(jax.grad(lambda p, r, b: success_map(p, r, beta=b, weights=weights))), (0, None, None))
    # Between grid points it is at most a little steeper.
    steepest = jnp.abs(slopes(at, p_ref, beta)).max(0) * 1.02 + 1e-3 * (high - low)
    return exact, wrong, steepest


@pytest.mark.parametrize("name", ["whitened", "noise"])
@ORBITS
@given(
    L=many(-7, 4),
    log_beta=many(-1, 4),
    seed=st.integers(0, 2**31),
    size=st.floats(1e-6, 0.1),
    log_epsilon=st.floats(-8, 0),
)
def test_accumulated_error_bounds_disturbed_orbits(name, L, log_beta, seed, size, log_epsilon):
    """60 examples of 12 orbits of 30 steps with errors of either sign."""
    with jax.enable_x64(True):
        p_ref, beta = 1 / (1 + np.exp(-np.asarray(L))), np.exp(np.asarray(log_beta))
        noise = size * np.asarray(np.random.default_rng(seed).uniform(-1, 1, (30, CASES)))
        exact, wrong, steepest = perturbed(p_ref, beta, noise, ALL[name](math.exp(log_epsilon)))
        bound = accumulated_error(np.abs(noise), steepest)
        assert bool((np.abs(wrong - exact) <= bound * (1 + 1e-9) + 1e-13).all())
        constant = accumulated_error(np.full((30, CASES), size), np.minimum(steepest, 0.9))
        limit = np.broadcast_to((size / (1 - np.minimum(steepest, 0.9)))[None], constant.shape)
        assert bool((constant <= limit * (1 + 1e-12)).all())


@ORBITS
@given(L=references, log_beta=many(-1, 3), log_epsilon=log_epsilons)
def test_stages_of_a_reset_reference(L, log_beta, log_epsilon):
    """30 examples: the converged policy as the next reference, and each stage gains at least Ω(½)/β."""
    with jax.enable_x64(True):
        L, beta = arrays(L, np.exp(log_beta))
        epsilon = math.exp(log_epsilon)
        least = 2 / math.sqrt(1 + 4 * epsilon) / beta
        for _ in range(4):
            after = orbits(L, beta, np.ones(CASES), Whitened(epsilon))["flow"]
            assert not_below(after, L + least)
            L = after
