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
    sensitivity,
    success_map,
    success_map_slope,
)
from tests import exact_theory as exact
from tests.exact_theory import mp, sigmoid

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
    return mp.log(sigmoid(r) * mp.exp(plus / beta) + sigmoid(-r) * mp.exp(-minus / beta))


def exact_entropy(L, r, beta, alpha, weights):
    p, q = sigmoid(L), sigmoid(-L)
    return p * (mp.mpf(1.5) - mp.log(p)) + q * (mp.mpf(0.25) - mp.log(q))


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
        lambda L, r, b, a, w: iterate(r, 3, beta=b + 2, weights=w, alpha=a, p_0=L, logits=True)[-1],
        lambda L, r, b, a, w: exact_iterate(L, r, b + 2, a, w),
        shifted=True,
    ),
    "beta_for_target": Function(
        lambda L, r, b, a, w: beta_for_target(r + b + 1, r, weights=w, logits=True),
        lambda L, r, b, a, w: exact.omega(mp.mpf(r) + b + 1, w) / (mp.mpf(b) + 1),
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
    "kl_budget": Function(
        lambda L, r, b, a, w: kl_budget(r, logits=True), lambda L, r, b, a, w: mp.log(1 + mp.exp(-mp.mpf(r)))
    ),
    "log_policy_ratio right": Function(
        lambda L, r, b, a, w: log_policy_ratio(1, L, r, logits=True),
        lambda L, r, b, a, w: mp.log(sigmoid(L) / sigmoid(r)),
        shifted=True,
    ),
    "log_policy_ratio wrong": Function(
        lambda L, r, b, a, w: log_policy_ratio(0, L, r, logits=True),
        lambda L, r, b, a, w: mp.log(sigmoid(-L) / sigmoid(-r)),
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
    found = evaluate(arguments, weights, names=tuple(table))
    rows = list(zip(*(x.tolist() for x in arguments), strict=True))
    result = {}
    for name, function in table.items():
        assert found[name].dtype == dtype, name
        targets = [function.exact(*row, weights) for row in rows]
        scales = [max(abs(t), 1) if function.shifted else abs(t) for t in targets]
        values = found[name].tolist()
        result[name] = [float(abs(mp.mpf(x) - t) / s) for x, t, s in zip(values, targets, scales, strict=True)]
    return result


def check(result, bound, skip=()):
    worst = {name: max(e for i, e in enumerate(row) if i not in skip) for name, row in result.items()}
    assert {name: e for name, e in worst.items() if not e <= bound} == {}


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_random_cases_in_float64(weights, double):
    table = WEIGHTED if isinstance(weights, NoisyVerifier) else WEIGHTED | CENTRED
    check(errors(jnp.float64, 230.0, weights, table), 2e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
@pytest.mark.parametrize("x64", [False, True])
def test_random_cases_in_float32(weights, x64):
    table = WEIGHTED if isinstance(weights, NoisyVerifier) else WEIGHTED | CENTRED
    with jax.enable_x64(x64):
        # Where p is near 1, float32 probabilities and β = 1e-6 leave no digits; log-odds do.
        check(errors(jnp.float32, 25.0, weights, {k: v for k, v in table.items() if k != "success_map p"}), 2e-5)


def test_random_cases_without_weights(double):
    check(errors(jnp.float64, 230.0, MeanOnly(), UNWEIGHTED), 1e-12)
    check(errors(jnp.float32, 25.0, MeanOnly(), UNWEIGHTED), 2e-5)
