"""The ledger's theory: potentials against quadrature, the split of the KL and the objective against explicit policies."""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

from grpo_jax import group_advantages, theory
from grpo_jax.theory import Group, MeanOnly, NoisyVerifier, Whitened, WhitenedStd
from tests.tabular import enumerated_advantages, success_log_odds

pytestmark = pytest.mark.usefixtures("double")

ALL_WEIGHTS = [
    *(Whitened(epsilon) for epsilon in (0.0, 1e-4, 0.3)),
    *(WhitenedStd(epsilon) for epsilon in (0.0, 1e-6, 1e-2, 0.4999, 0.5, 0.5001, 2.0)),
    MeanOnly(),
    *(Group(size) for size in (2, 3, 8, 64)),
    Group(16, 1, 1e-4, "std"),
    Group(8, baseline="none"),
    Group(8, baseline="leave_one_out", scale="mean"),
    *(Group(size, dynamic_sampling=True) for size in (2, 8, 64)),
    NoisyVerifier(Group(8), tpr=0.9, fpr=0.2),
    NoisyVerifier(Whitened(1e-4), tpr=0.2, fpr=0.7),
]
LOGITS = np.array([-60.0, -42.0, -20.0, -6.0, -1.0, -1e-3, 0.3, 2.0, 9.0, 30.0, 45.0])


@pytest.mark.parametrize("weights", ALL_WEIGHTS, ids=str)
def test_the_potential_is_the_integral_of_omega(weights):
    # ∫Ω dp = ∫Ω v dL, by panels of Gauss and Legendre's rule that are finer and higher than those of the code.
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    edges = np.linspace(0.0, np.asarray(LOGITS), 301, axis=-1)  # [points, panels + 1]
    widths = np.diff(edges)
    x = jnp.asarray(edges[:, :-1, None] + widths[..., None] * (nodes + 1) / 2)
    values = weights.omega(x) * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)
    integral = ((np.asarray(values) * node_weights).sum(-1) * widths / 2).sum(-1)
    np.testing.assert_allclose(theory.potential(LOGITS, weights, logits=True), integral, rtol=1e-12, atol=2e-14)


@pytest.mark.parametrize("weights", ALL_WEIGHTS, ids=str)
def test_the_slope_of_the_potential_is_omega_times_variance(weights):
    slopes = jax.vmap(jax.grad(lambda x: theory.potential(x, weights, logits=True)))(LOGITS)
    expected = weights.omega(LOGITS) * jax.nn.sigmoid(LOGITS) * jax.nn.sigmoid(-LOGITS)
    np.testing.assert_allclose(slopes, expected, rtol=1e-9, atol=1e-15)


def test_known_potentials():
    p = jnp.array([0.0, 1e-9, 0.2, 0.5, 0.9, 1.0])
    np.testing.assert_allclose(theory.potential(p, Whitened(0.0)), 2 * np.arcsin(np.sqrt(p)) - np.pi / 2, atol=1e-15)
    np.testing.assert_allclose(theory.potential(p, MeanOnly()), p - 0.5, atol=1e-15)
    with mp.workdps(30):  # Ω_4 = √3 + (3 − 2√3) p(1−p), stated in the docstring of Group
        exact = mp.quad(lambda x: mp.sqrt(3) + (3 - 2 * mp.sqrt(3)) * x * (1 - x), [0.5, mp.mpf("0.9")])
    assert float(theory.potential(0.9, Group(4))) == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.parametrize("weights", [w for w in ALL_WEIGHTS if not isinstance(w, NoisyVerifier)], ids=str)
def test_potentials_of_both_sides_mirror_each_other(weights):
    if isinstance(weights, Group) and (weights.baseline == "none" or weights.scale == "mean"):
        pytest.skip("its Ω is not the same for p and 1 − p")
    values = theory.potential(LOGITS, weights, logits=True)
    np.testing.assert_allclose(values, -theory.potential(-LOGITS, weights, logits=True), atol=3e-14)


def test_potentials_are_finite_at_the_ends_but_for_dynamic_sampling():
    for weights in ALL_WEIGHTS:
        ends = np.asarray(theory.potential(jnp.array([0.0, 1.0]), weights))
        dynamic = isinstance(weights, Group) and weights.dynamic_sampling
        assert np.isinf(ends).all() if dynamic else np.isfinite(ends).all(), weights


def random_policies(seed, prompts=5, outcomes=7):
    """(log π, log π_ref, rewards), each [prompts, outcomes]; every prompt has a success and a failure."""
    keys = jax.random.split(jax.random.key(seed), 2)
    logs = [jax.nn.log_softmax(2 * jax.random.normal(key, (prompts, outcomes))) for key in keys]
    return *logs, jnp.arange(outcomes)[None] < jnp.arange(1, prompts + 1)[:, None]


@pytest.mark.parametrize("seed", range(3))
def test_the_split_is_that_of_explicit_policies(seed):
    log_policy, log_ref, right = random_policies(seed)
    ratio = log_policy - log_ref

    def mean(mask):
        weights = jnp.where(mask, jnp.exp(log_policy), 0.0)
        return (weights * ratio).sum(-1) / weights.sum(-1)

    logit, ref_logit = success_log_odds(log_policy, right), success_log_odds(log_ref, right)
    split = theory.split_kl(logit, ref_logit, mean(right), mean(~right), logits=True)

    def within(mask):
        inner, inner_ref = (
            jnp.where(mask, jax.nn.log_softmax(jnp.where(mask, x, -jnp.inf)), 0.0) for x in (log_policy, log_ref)
        )
        return jnp.where(mask, jnp.exp(inner) * (inner - inner_ref), 0.0).sum(-1)

    p = jax.nn.sigmoid(logit)
    np.testing.assert_allclose(split.within_successes, p * within(right), atol=1e-14)
    np.testing.assert_allclose(split.within_failures, (1 - p) * within(~right), atol=1e-14)
    np.testing.assert_allclose(sum(split), (jnp.exp(log_policy) * ratio).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(split.useful, theory.bernoulli_kl(logit, ref_logit, logits=True))


def test_the_split_at_the_ends():
    always = theory.split_kl(1.0, 0.2, jnp.log(5.0) + 0.25, jnp.nan)
    np.testing.assert_allclose(always, [np.log(5.0), 0.25, 0.0], rtol=1e-12)
    never = theory.split_kl(0.0, 0.2, jnp.nan, jnp.log(1.25))
    np.testing.assert_allclose(never, [np.log(1.25), 0.0, 0.0], atol=1e-15)
    beyond = theory.split_kl(0.5, 0.0, jnp.inf, -jnp.log(2.0) + 0.25)  # what the reference never does
    np.testing.assert_allclose(beyond, [np.inf, 0.0, 0.125], rtol=1e-12)
    assert np.isnan(jax.jit(lambda beta: theory.rest_excess(0.5, 0.2, beta=beta, weights=MeanOnly()))(0.0))
    nothing = theory.split_kl(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]), jnp.zeros(2), jnp.zeros(2))
    np.testing.assert_array_equal(nothing, np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("size", "normaliser"),
    [
        (4, {}),
        (5, {"ddof": 1, "epsilon": 1e-3, "epsilon_in": "std"}),
        (3, {"baseline": "leave_one_out", "scale": "none"}),
    ],
)
def test_small_steps_climb_the_objective(size, normaliser):
    # The expected gradient of all groups of a policy with shared parameters, enumerated, is the gradient of Σ J.
    features = jax.random.normal(jax.random.key(0), (2, 6, 3))  # 2 prompts, 6 outcomes, 3 shared parameters
    right = jnp.array([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], bool)
    log_ref = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (2, 6)))
    theta, beta, weights = jnp.array([0.3, -0.5, 0.2]), 0.7, Group(size, **normaliser)

    def log_policy(theta):
        return jax.nn.log_softmax(log_ref + features @ theta)

    def objective(theta):
        logs = log_policy(theta)
        kl = (jnp.exp(logs) * (logs - log_ref)).sum(-1)
        logits = success_log_odds(logs, right), success_log_odds(log_ref, right)
        return theory.objective_gain(*logits, kl, beta=beta, weights=weights, logits=True).sum()

    logs = log_policy(theta)
    p = jnp.exp(jnp.where(right, logs, -jnp.inf)).sum(-1)
    normalise = partial(group_advantages, **({"epsilon": 0.0} | normaliser))
    plus, minus = (x[:, None] for x in enumerated_advantages(p, size, normalise))
    advantages = jnp.where(right, plus, -minus)
    coefficients = jnp.exp(logs) * (advantages - beta * (logs - log_ref))
    gradient = jax.vjp(log_policy, theta)[1](jax.lax.stop_gradient(coefficients))[0]
    np.testing.assert_allclose(jax.grad(objective)(theta), gradient, rtol=1e-6)  # the trainer's advantages are float32
    assert float(objective(jnp.zeros(3))) == pytest.approx(0.0, abs=1e-15)
    # And from the reference itself, where J begins.
    uphill = jax.grad(lambda x: theory.objective_gain(x, 0.3, 0.0, beta=beta, weights=weights))(0.3)
    assert float(uphill) == pytest.approx(float(theory.omega(0.3, weights)), rel=1e-9)


@pytest.mark.parametrize("p_ref", [0.05, 0.4])
@pytest.mark.parametrize("beta", [0.8, 3.0])
@pytest.mark.parametrize("weights", [Group(8), MeanOnly()], ids=str)
def test_the_optimum_of_the_objective_is_the_fixed_point(p_ref, beta, weights):
    setting = {"beta": beta, "weights": weights}
    star = theory.flow_point(p_ref, **setting)
    near = star + jnp.array([0.0, -1e-3, 1e-3])
    best, below, above = theory.objective_gain(
        near, jnp.full(3, p_ref), theory.bernoulli_kl(near, jnp.full(3, p_ref)), **setting
    )
    assert best > 0.0 and below < best and above < best
    assert float(theory.rest_excess(star, p_ref, **setting)) == pytest.approx(0.0, abs=1e-14)
    assert float(theory.rest_excess(star - 0.01, p_ref, **setting)) > 0.0


def test_a_prompt_at_an_end_neither_climbs_nor_rests_with_an_excess():
    p = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(
        theory.objective_gain(p, p, jnp.zeros(2), beta=1.0, weights=Group(8, dynamic_sampling=True)), 0.0
    )
    np.testing.assert_array_equal(theory.rest_excess(jnp.full(2, 0.5), p, beta=1.0, weights=Group(8)), 0.0)
