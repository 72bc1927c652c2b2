"""Every elementwise function of the theory against mpmath on seeded random cases, in float64 and float32; and its manners.

Manners: shapes (), (3,) and (2, 3), jit, vmap, float32 that stays float32, and finite gradients at p_ref ∈ {0, 1}.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
    beta_for_target,
    clipped_success_map,
    dead_fraction,
    flow_point,
    forward_kl_fixed_point,
    groups_per_live_group,
    iterate,
    iterate_bounds,
    kl_budget,
    local_beta_bound,
    log_partition,
    log_policy_ratio,
    mirror_flow,
    mirror_step_kl,
    mirror_steps,
    omega,
    omega_minus,
    omega_plus,
    policy_entropy,
    success_map,
    success_map_slope,
)
from tests import exact_theory as exact
from tests.exact_theory import log_sigmoid, mp, sigmoid

WEIGHTS = [
    Whitened(0.0),
    Whitened(1e-4),
    WhitenedStd(1e-3),
    MeanOnly(),
    Group(8),
    Group(5, 1, 0.03, "std", baseline="leave_one_out", dynamic_sampling=True),
    NoisyVerifier(Whitened(1e-3), 0.9, 0.05),
]
CASES = 20


class Function(NamedTuple):
    """library and exact take (L, L_ref, β, α, weights); the error is relative, or to max(1, |value|) if ``shifted``."""

    library: Callable
    exact: Callable
    shifted: bool = False


def exact_iterate(L, r, beta, alpha, weights):
    for _ in range(3):
        L = exact.step(L, r, beta, weights, alpha)
    return L


def exact_slope(L, r, beta, alpha, weights):
    h = exact.step(L, r, beta, weights)
    per_p = exact.log_odds_slope(L, weights) / (sigmoid(L) * sigmoid(-L))
    return sigmoid(h) * sigmoid(-h) * per_p / mp.mpf(beta)


def exact_partition(L, r, beta, alpha, weights):
    plus, minus = exact.omega_pair(L, weights)
    right, wrong = log_sigmoid(r) + plus / beta, log_sigmoid(-r) - minus / beta
    return max(right, wrong) + mp.log1p(mp.exp(-min(abs(right - wrong), mp.mpf(1000))))


def exact_entropy(L, r, beta, alpha, weights):
    p, q = sigmoid(L), sigmoid(-L)
    return p * (mp.mpf(1.5) - log_sigmoid(L)) + q * (mp.mpf(0.25) - log_sigmoid(-L))


# Alone, because L = ±230 and probabilities are not for all.
WEIGHTED = {
    "omega": Function(lambda L, r, b, a, w: omega(L, w, logits=True), lambda L, r, b, a, w: exact.omega(L, w)),
    "success_map": Function(
        lambda L, r, b, a, w: success_map(L, r, beta=b, weights=w, alpha=a, logits=True),
        lambda L, r, b, a, w: exact.step(L, r, b, w, a),
        shifted=True,
    ),
    "success_map p": Function(
        lambda L, r, b, a, w: success_map(jax.nn.sigmoid(L), jax.nn.sigmoid(r), beta=b, weights=w),
        lambda L, r, b, a, w: sigmoid(exact.step(L, r, b, w)),
        shifted=True,
    ),
    "success_map_slope": Function(
        lambda L, r, b, a, w: success_map_slope(L, r, beta=b, weights=w, logits=True) * b,
        lambda L, r, b, a, w: exact.log_odds_slope(L, w),
        shifted=True,
    ),
    "local_beta_bound": Function(
        lambda L, r, b, a, w: local_beta_bound(L, weights=w, logits=True),
        lambda L, r, b, a, w: abs(exact.log_odds_slope(L, w)),
        shifted=True,
    ),
    "iterate": Function(
        lambda L, r, b, a, w: iterate(r / 80, 3, beta=b + 4, weights=w, alpha=a, p_0=L / 80, logits=True)[-1],
        lambda L, r, b, a, w: exact_iterate(mp.mpf(L) / 80, mp.mpf(r) / 80, mp.mpf(b) + 4, a, w),
        shifted=True,
    ),
    "beta_for_target": Function(
        lambda L, r, b, a, w: beta_for_target(r + a + 1, r, weights=w, logits=True),
        lambda L, r, b, a, w: exact.omega(mp.mpf(r) + a + 1, w) / (mp.mpf(a) + 1),
    ),
}
CENTRED = {
    "omega_plus": Function(
        lambda L, r, b, a, w: omega_plus(L, w, logits=True), lambda L, r, b, a, w: exact.omega_pair(L, w)[0]
    ),
    "omega_minus": Function(
        lambda L, r, b, a, w: omega_minus(L, w, logits=True), lambda L, r, b, a, w: exact.omega_pair(L, w)[1]
    ),
    "log_partition": Function(
        lambda L, r, b, a, w: log_partition(r, L, beta=b, weights=w, logits=True), exact_partition, shifted=True
    ),
}
UNWEIGHTED = {
    "bernoulli_kl": Function(
        lambda L, r, b, a, w: bernoulli_kl(L, r, logits=True), lambda L, r, b, a, w: exact.kl(L, r)
    ),
    "kl_budget": Function(lambda L, r, b, a, w: kl_budget(r, logits=True), lambda L, r, b, a, w: -log_sigmoid(r)),
    "log_policy_ratio right": Function(
        lambda L, r, b, a, w: log_policy_ratio(1, L, r, logits=True),
        lambda L, r, b, a, w: log_sigmoid(L) - log_sigmoid(r),
        shifted=True,
    ),
    "log_policy_ratio wrong": Function(
        lambda L, r, b, a, w: log_policy_ratio(0, L, r, logits=True),
        lambda L, r, b, a, w: log_sigmoid(-L) - log_sigmoid(-r),
        shifted=True,
    ),
    "policy_entropy": Function(lambda L, r, b, a, w: policy_entropy(L, 1.5, 0.25, logits=True), exact_entropy),
    "dead_fraction": Function(
        lambda L, r, b, a, w: dead_fraction(L, 8, logits=True),
        lambda L, r, b, a, w: sigmoid(L) ** 8 + sigmoid(-L) ** 8,
    ),
    "groups_per_live_group": Function(
        lambda L, r, b, a, w: groups_per_live_group(L, 8, logits=True),
        lambda L, r, b, a, w: (
            1 / mp.fsum(mp.binomial(8, k) * sigmoid(L) ** k * sigmoid(-L) ** (8 - k) for k in range(1, 8))
        ),
    ),
}


def inputs(dtype, far):
    """(L, L_ref, β, α): random ones, then ends so far out that p = 1 − 1e-100, small and large β, and both α of note."""
    rng = np.random.default_rng(7)
    L, r = rng.uniform(-12, 12, (2, CASES))
    beta, alpha = np.exp(rng.uniform(-2, 3, CASES)), rng.uniform(0, 1, CASES)
    L[:4], r[4:6] = (far, -far, 0.75 * far, -0.75 * far), (far, -far)
    beta[6:8], alpha[8:10] = (1e-6, 1e8), (0, 1)
    return tuple(jnp.asarray(x, dtype) for x in (L, r, beta, alpha))


@partial(jax.jit, static_argnames="names")
def evaluate(arguments, weights, *, names):
    table = WEIGHTED | CENTRED | UNWEIGHTED
    return {name: table[name].library(*arguments, weights) for name in names}


def errors(dtype, far, weights, table):
    """name → relative errors [CASES]."""
    arguments = inputs(dtype, far)
    results = evaluate(arguments, weights, names=tuple(table))
    rows = list(zip(*(x.tolist() for x in arguments), strict=True))
    result = {}
    for name, function in table.items():
        assert results[name].dtype == dtype, name
        targets = [function.exact(*row, weights) for row in rows]
        scales = [max(abs(t), 1) if function.shifted else abs(t) for t in targets]
        values = results[name].tolist()
        result[name] = [float(abs(mp.mpf(x) - t) / s) for x, t, s in zip(values, targets, scales, strict=True)]
    return result


def check(result, bound):
    worst = {name: max(row) for name, row in result.items()}
    assert {name: e for name, e in worst.items() if not e <= bound} == {}


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_random_cases_in_float64(weights, double):
    table = WEIGHTED if isinstance(weights, NoisyVerifier) else WEIGHTED | CENTRED
    check(errors(jnp.float64, 230.0, weights, table), 2e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_random_cases_in_float32(weights):
    table = WEIGHTED if isinstance(weights, NoisyVerifier) else WEIGHTED | CENTRED
    # Where p is near 1, float32 probabilities leave no digits; log-odds do.
    check(errors(jnp.float32, 25.0, weights, {k: v for k, v in table.items() if k != "success_map p"}), 2e-5)


def test_random_cases_without_weights(double):
    check(errors(jnp.float64, 230.0, MeanOnly(), UNWEIGHTED), 1e-12)
    check(errors(jnp.float32, 25.0, MeanOnly(), UNWEIGHTED), 2e-5)


# Probabilities in, probabilities out: (p, p_ref, β, weights).
ELEMENTWISE = {
    "omega": lambda p, r, b, w: omega(p, w),
    "omega_plus": lambda p, r, b, w: omega_plus(p, w),
    "omega_minus": lambda p, r, b, w: omega_minus(p, w),
    "success_map": lambda p, r, b, w: success_map(p, r, beta=b, weights=w, alpha=0.3),
    "success_map_slope": lambda p, r, b, w: success_map_slope(p, r, beta=b, weights=w),
    "iterate": lambda p, r, b, w: iterate(r, 2, beta=b, weights=w, p_0=p)[-1],
    "clipped_success_map": lambda p, r, b, w: clipped_success_map(p, r, beta=b, weights=w, clip=0.2, alpha=0.3),
    "flow_point": lambda p, r, b, w: flow_point(r, beta=b, weights=w),
    "forward_kl_fixed_point": lambda p, r, b, w: forward_kl_fixed_point(r, beta=b, weights=w),
    "iterate_bounds low": lambda p, r, b, w: iterate_bounds(r, 3, beta=b, weights=w, alpha=0.3)[0],
    "iterate_bounds high": lambda p, r, b, w: iterate_bounds(r, 3, beta=b, weights=w, alpha=0.3)[1],
    "beta_for_target": lambda p, r, b, w: beta_for_target(p, r * p, weights=w),
    "local_beta_bound": lambda p, r, b, w: local_beta_bound(p, weights=w),
    "log_partition": lambda p, r, b, w: log_partition(r, p, beta=b, weights=w),
    "log_policy_ratio": lambda p, r, b, w: log_policy_ratio(1, p, r),
    "policy_entropy": lambda p, r, b, w: policy_entropy(p, 1.0, r),
    "bernoulli_kl": lambda p, r, b, w: bernoulli_kl(p, r),
    "kl_budget": lambda p, r, b, w: kl_budget(r),
    "dead_fraction": lambda p, r, b, w: dead_fraction(p, 8),
    "groups_per_live_group": lambda p, r, b, w: groups_per_live_group(p, 8),
    "mirror_flow": lambda p, r, b, w: mirror_flow(p, r, beta=b),
    "mirror_steps": lambda p, r, b, w: mirror_steps(r * p, p, beta=b, weights=w),
    "mirror_step_kl": lambda p, r, b, w: mirror_step_kl(p, beta=b, weights=w),
}


def everything(p, r, weights):
    return {name: f(p, r, 1.5, weights) for name, f in ELEMENTWISE.items()}


def test_shapes_jit_vmap_and_float32_in_a_double_session(double):
    """A whole array at once, each number alone, and in float32, which stays float32."""
    weights = Group(4, dynamic_sampling=True)
    p = jnp.asarray([[0.03, 0.4, 0.93], [0.2, 0.5, 0.7]])
    r = jnp.asarray([[0.3, 0.02, 0.6], [0.5, 0.1, 0.98]])
    whole = jax.jit(everything)(p, r, weights)
    alone = jax.jit(jax.vmap(jax.vmap(partial(everything, weights=weights))))(p, r)
    single = jax.jit(everything)(p.astype(jnp.float32), r.astype(jnp.float32), weights)
    assert [name for name, values in whole.items() if values.shape != (2, 3)] == []
    assert [name for name, values in single.items() if values.dtype != jnp.float32] == []
    for name, values in whole.items():
        np.testing.assert_allclose(alone[name], values, rtol=1e-11, err_msg=name)
        np.testing.assert_allclose(single[name], values, rtol=2e-5, atol=1e-6, err_msg=name)


MAPS = ("success_map", "iterate", "clipped_success_map", "flow_point", "forward_kl_fixed_point")


@pytest.mark.parametrize("weights", [Whitened(0.0), WhitenedStd(1e-3), Group(4, dynamic_sampling=True)], ids=repr)
def test_an_end_as_reference_is_returned_with_zero_gradients(weights, double):
    """p there too, or inside; derivatives in p, p_ref, β and ε."""
    p, r = jnp.asarray([0.0, 1.0, 0.3, 0.3]), jnp.asarray([0.0, 1.0, 0.0, 1.0])

    def ends(p, r, beta, weights):
        return {name: ELEMENTWISE[name](p, r, beta, weights) for name in MAPS}

    jacobians = {name: jax.jacrev(ELEMENTWISE[name], argnums=(0, 1, 2, 3)) for name in MAPS}
    values, slopes = jax.tree.map(
        np.asarray, jax.jit(lambda *x: (ends(*x), {name: f(*x) for name, f in jacobians.items()}))(p, r, 2.0, weights)
    )
    assert [name for name, value in values.items() if value.tolist() != r.tolist()] == []
    assert [name for name, s in slopes.items() if any((x != 0).any() for x in jax.tree.leaves(s))] == []


@pytest.mark.parametrize("weights", [Whitened(0.0), Whitened(1e-3)], ids=repr)
def test_bounds_of_an_end_are_that_end(weights, double):
    low, high = iterate_bounds(jnp.asarray([0.0, 1.0]), 3, beta=2.0, weights=weights, alpha=0.3)
    assert low.tolist() == high.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("f", [success_map, partial(clipped_success_map, clip=0.9)], ids=["plain", "clipped"])
def test_the_gradient_in_alpha_is_right_at_one(f, double):
    """d logit h/dα = L_ref − L; α = 1 is the default, and where one asks what damping would do."""

    def mapped(alpha):
        return f(-0.3, -1.4, beta=8.0, weights=Whitened(1e-3), alpha=alpha, logits=True)

    assert float(jax.grad(mapped)(0.5)) == pytest.approx(-1.4 + 0.3, rel=1e-12)
    assert float(jax.grad(mapped)(1.0)) == pytest.approx(-1.4 + 0.3, rel=1e-12)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8])
def test_kl_of_close_coins(gap, double):
    """Nearly d²v/2 in log-odds: what a step of a large β costs; its terms are d/v times larger and cancel."""
    L = jnp.asarray([-8.0, -1.0, 0.0, 0.3, 5.0])
    target = [float(exact.kl(mp.mpf(a), mp.mpf(b))) for a, b in zip((L + gap).tolist(), L.tolist(), strict=True)]
    np.testing.assert_allclose(bernoulli_kl(L + gap, L, logits=True), target, rtol=1e-6)


def test_kl_curves_where_the_coins_are_equal(double):
    """Its second derivative there is the Fisher information, v in log-odds; its first is 0."""
    for L in (-3.0, 0.0, 0.7):
        v = float(sigmoid(L) * sigmoid(-L))
        first = jax.grad(lambda a, b: bernoulli_kl(a, b, logits=True), argnums=(0, 1))
        assert [float(x) for x in first(L, L)] == pytest.approx([0, 0], abs=1e-15)
        for argument, sign in ((0, 1), (1, -1)):
            second = jax.grad(lambda a, b: bernoulli_kl(a, b, logits=True), argnums=0)
            assert float(jax.grad(second, argnums=argument)(L, L)) == pytest.approx(sign * v, rel=1e-9)


def test_slopes_of_steep_weights_at_ends_of_the_reference(double):
    """h is constant there."""
    for weights in (Whitened(0.0), WhitenedStd(1e-3)):
        for end in (0.0, 1.0):
            assert float(success_map_slope(end, end, beta=1.0, weights=weights)) == 0.0


def test_whole_numbers_are_probabilities_too(double):
    for end in (0, 1):
        assert float(success_map(end, end, beta=1, weights=Whitened())) == end
        assert float(flow_point(end, beta=1, weights=Whitened())) == end
