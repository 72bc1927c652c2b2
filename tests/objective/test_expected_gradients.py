"""What each term of the loss descends, by exact expectation over all completions of a tiny language."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import theory
from grpo_jax.objective import Objective, group_advantages, grpo_loss_terms
from tests.tiny_language import MASK, NUM, PREFIX, PREFIXES, TOKENS, logps, probabilities, random_policy

POLICY, REFERENCE, OLD = random_policy(0), random_policy(1), random_policy(2, 0.5)
SUCCESS = jnp.asarray(np.random.default_rng(3).random(NUM) < 0.4)
UNCLIPPED = {"clip_low": None, "clip_high": None}


def total(table, rows, advantages, *, old=None, beta=0.0, group_size=None, reference=REFERENCE, **choices):
    """Sum of the loss over the given completions."""
    take = lambda t: None if t is None else logps(t)[rows]  # noqa: E731
    arrays = (take(table), take(old), take(reference), advantages, jnp.asarray(MASK)[rows])
    objective = Objective(**(UNCLIPPED | choices))
    return grpo_loss_terms(*arrays, beta=beta, objective=objective, group_size=group_size).total


def expected_gradient(sampler, **options):
    """E_{o ~ sampler} ∇ loss(o), with zero advantage: the KL term alone, β = 1."""
    gradients = jax.vmap(lambda i: jax.grad(total)(POLICY, i[None], jnp.zeros(1), beta=1.0, **options))(jnp.arange(NUM))
    return jnp.tensordot(probabilities(sampler), gradients, 1)


def sequence_kl(table):
    p, q = probabilities(table), probabilities(REFERENCE)
    return (p * (jnp.log(p) - jnp.log(q))).sum()


def token_kl(table, *, forward):
    """Σ_t of the exact per-token KL at prefixes visited by the (frozen) policy."""
    log_p, log_q = jax.nn.log_softmax(table), jax.nn.log_softmax(REFERENCE)
    a, b = (log_q, log_p) if forward else (log_p, log_q)
    per_prefix = (jnp.exp(a) * (a - b)).sum(-1)
    visits = jnp.where(MASK, probabilities(POLICY)[:, None], 0.0)
    return (visits * per_prefix[PREFIX]).sum()


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_probabilities_sum_to_one():
    close(probabilities(POLICY).sum(), 1.0)


@pytest.mark.parametrize("ratio", ["sequence_product", "token"])
def test_sequence_kl_is_exact_on_and_off_policy(ratio):
    exact = jax.grad(sequence_kl)(POLICY)
    close(expected_gradient(POLICY, ratio=ratio), exact)
    close(expected_gradient(OLD, old=OLD, ratio=ratio), exact)


def test_sequence_kl_value_is_the_kl():
    for sampler, old in ((POLICY, None), (OLD, OLD)):
        values = jax.vmap(lambda i, old=old: total(POLICY, i[None], jnp.zeros(1), old=old, beta=1.0))(jnp.arange(NUM))
        # The surrogate of a zero advantage is zero, so what is left is the KL.
        close((probabilities(sampler) * values).sum(), sequence_kl(POLICY))


def test_token_terms_descend_what_their_names_say():
    reverse, forward = (jax.grad(lambda t, f=f: token_kl(t, forward=f))(POLICY) for f in (False, True))
    close(expected_gradient(POLICY, kl="token_reverse"), reverse)
    close(expected_gradient(POLICY, kl="token_forward"), forward)
    assert jnp.abs(reverse - forward).max() > 0.01
    assert jnp.abs(reverse - jax.grad(sequence_kl)(POLICY)).max() > 0.01  # cross-token terms are real


def test_mirror_term_is_the_kl_to_the_old_policy():
    def mirror(i):
        rows = i[None]
        arrays = (logps(OLD)[rows], None, jnp.zeros(1), jnp.asarray(MASK)[rows])
        objective = Objective(anchor="previous", **UNCLIPPED)
        terms = lambda t: grpo_loss_terms(logps(t)[rows], *arrays, beta=0.0, beta_mirror=1.0, objective=objective)  # noqa: E731
        return jax.grad(lambda t: terms(t).total)(POLICY)

    found = jnp.tensordot(probabilities(OLD), jax.vmap(mirror)(jnp.arange(NUM)), 1)

    def kl(table):
        p, q = probabilities(table), probabilities(OLD)
        return (p * (jnp.log(p) - jnp.log(q))).sum()

    close(found, jax.grad(kl)(POLICY))


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize(
    "normaliser",
    [
        {},
        {"ddof": 1, "epsilon_in": "std"},
        {"scale": "none"},
        {"scale": "none", "baseline": "leave_one_out"},
        {"scale": "none", "baseline": "none"},
        {"scale": "mean"},
    ],
)
def test_group_gradient_is_omega_of_the_theory(group_size, normaliser):
    """All groups of completions: E gradient = −Ω_G(p)∇p + β∇KL, with the group's KL baseline, for the trainer's normalisers."""
    objective, beta = Objective(**normaliser, **UNCLIPPED), 0.7
    groups = jnp.array(list(itertools.product(range(NUM), repeat=group_size)))

    @jax.jit
    def gradient(rows):
        advantages = group_advantages(SUCCESS[rows].astype(jnp.float32), **objective.normaliser())
        return jax.grad(total)(POLICY, rows, advantages, beta=beta, group_size=group_size, **normaliser) / group_size

    weights = probabilities(POLICY)[groups].prod(-1)
    found = sum(
        jnp.tensordot(w, jax.vmap(gradient)(g), 1)
        for w, g in zip(jnp.array_split(weights, 8), jnp.array_split(groups, 8), strict=True)
    )
    success = lambda table: jnp.where(SUCCESS, probabilities(table), 0.0).sum()  # noqa: E731
    p, slope = jax.value_and_grad(success)(POLICY)
    omega = theory.omega(p, theory.Group(group_size, **objective.normaliser()))
    close(found, -omega * slope + beta * jax.grad(sequence_kl)(POLICY))


def test_group_baseline_silences_the_gradient_at_the_optimum():
    """At π ∝ π_ref·exp(A/β) every row's own gradient vanishes with the group's baseline, not only the mean's."""
    beta, group_size = 0.5, 4
    rewards = SUCCESS.astype(jnp.float32)
    log_optimum = jnp.log(probabilities(REFERENCE)) + rewards / beta
    optimum = log_optimum - jax.nn.logsumexp(log_optimum)
    # The tabular policy with these probabilities: each prefix's next-token log-probabilities are differences of marginals.
    table = np.zeros((len(PREFIXES), 3))
    prob = np.exp(np.asarray(optimum, np.float64))
    for k in range(len(PREFIXES)):
        at = np.asarray((k == PREFIX) & MASK)
        for token in range(3):
            table[k, token] = np.log(prob[(at & (token == TOKENS)).any(-1)].sum())
    table = jnp.asarray(table, jnp.float32)
    close(probabilities(table), jnp.exp(optimum))
    rows = jnp.array([0, 3, 7, 9])
    advantages = rewards[rows] - rewards[rows].mean()
    advantages = advantages * (group_size / (group_size - 1))  # leave-one-out, like the KL's baseline
    gradient = jax.grad(total)(table, rows, advantages, beta=beta, group_size=group_size)
    without = jax.grad(total)(table, rows, advantages, beta=beta)
    assert jnp.abs(gradient).max() < 1e-5
    assert jnp.abs(without).max() > 0.1


def test_small_steps_end_on_the_predicted_point():
    """Exact expected gradients of the default objective at G = 8 lead to the theory's flow point."""
    beta, group = 1.0, theory.Group(8, epsilon=1e-4)
    success = lambda table: jnp.where(SUCCESS, probabilities(table), 0.0).sum()  # noqa: E731

    def step(_, table):
        p, slope = jax.value_and_grad(success)(table)
        exact = jax.vmap(lambda i: jax.grad(total)(table, i[None], jnp.zeros(1), beta=beta))(jnp.arange(NUM))
        kl_gradient = jnp.tensordot(probabilities(table), exact, 1)
        return table + 1.0 * (theory.omega(p, group) * slope - kl_gradient)

    table = jax.jit(lambda t: jax.lax.fori_loop(0, 20_000, step, t))(REFERENCE)
    predicted = theory.flow_point(success(REFERENCE), beta=beta, weights=group)
    close(success(table), predicted)
    ratio = jnp.log(probabilities(table)) - jnp.log(probabilities(REFERENCE))
    for outcome in (True, False):  # conditionals of the reference are kept
        assert jnp.ptp(ratio[np.asarray(SUCCESS) == outcome]) < 1e-3
    close(sequence_kl(table), theory.bernoulli_kl(success(table), success(REFERENCE)))
