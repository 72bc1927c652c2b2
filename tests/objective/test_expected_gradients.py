"""What each term of the loss descends, by exact expectation over all completions of a tiny language."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import objectives
from experiments.objectives import OLD, POLICY, REFERENCE, UNCLIPPED, claimed_gradient, kl_gradient, sequence_kl
from experiments.tiny_language import MASK, NUM, PREFIX, PREFIXES, TOKENS, logps, probabilities
from grpo_jax import theory
from grpo_jax.objective import GRPO, MAXRL, NAMED, Objective, group_advantages, grpo_loss_terms
from grpo_jax.objective.objective import CHOICES

SUCCESS = jnp.asarray(np.random.default_rng(3).random(NUM) < 0.4)
LENGTHS = MASK.sum(-1)
REDUCTIONS = {name: Objective(**choices) for name, choices in objectives.REDUCTIONS.items()}


def total(table, rows, advantages, *, old=None, beta=0.0, group_size=None, reference=REFERENCE, **choices):
    """Sum of the loss over the given completions."""
    take = lambda t: None if t is None else logps(t)[rows]  # noqa: E731
    arrays = (take(table), take(old), take(reference), advantages, jnp.asarray(MASK)[rows])
    objective = Objective(**(UNCLIPPED | choices))
    return grpo_loss_terms(*arrays, beta=beta, objective=objective, group_size=group_size).total


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_probabilities_sum_to_one():
    close(probabilities(POLICY).sum(), 1.0)


@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("kl", [kl for kl in CHOICES["kl"] if kl != "none"])
def test_a_kl_term_descends_what_its_name_says(kl, old):
    """With whole groups, their baseline and the one division; k2 and k3 claim it on-policy only."""
    gradient, claim = kl_gradient(kl, old), claimed_gradient(kl, old)
    if old is None or kl in ("sequence_reverse", "token_reverse_weighted"):
        close(gradient, claim)
    else:
        assert jnp.linalg.norm(gradient - claim) > 0.5 * jnp.linalg.norm(claim)


def test_the_kls_are_different_things():
    claims = [claimed_gradient(kl) for kl in ("sequence_reverse", "token_reverse", "token_forward")]
    for a, b in itertools.combinations(claims, 2):
        assert jnp.abs(a - b).max() > 0.01
    assert jnp.abs(objectives.k1_gradient()).max() < 1e-6  # and k1 is none of them


@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("ratio", CHOICES["ratio"])
@pytest.mark.parametrize("kl", [kl for kl in CHOICES["kl"] if kl != "none"])
def test_every_estimator_under_every_ratio_and_reduction(kl, ratio, old):
    """E ∇ of the KL term is Σ_o π_old(o) w(o) Σ_t c_t ∇log π(o_t), w(o) the reduction's weight and c_t the estimator's."""
    sampler = POLICY if old is None else old
    x = np.where(MASK, np.asarray(logps(POLICY) - logps(REFERENCE), np.float64), 0.0)
    log_ratio = np.where(MASK, np.asarray(logps(POLICY) - logps(sampler), np.float64), 0.0)
    coefficients = {
        "sequence_reverse": np.exp(log_ratio.sum(-1, keepdims=True)) * x.sum(-1, keepdims=True),
        "token_reverse": x,
        "token_reverse_weighted": np.exp(log_ratio) * x,
        "token_forward": 1.0 - np.exp(-x),
    }[kl]
    for name, choices in objectives.REDUCTIONS.items():
        weights = {"sequence_mean": 1.0 / LENGTHS}.get(name, np.ones(NUM))
        pulled = np.asarray(probabilities(sampler), np.float64) * weights
        cotangent = jnp.asarray(np.where(MASK, pulled[:, None] * coefficients, 0.0), jnp.float32)
        wanted = jax.vjp(logps, POLICY)[1](cotangent)[0]
        pull = jax.lax.stop_gradient(probabilities(sampler))
        options = {"old": old, "beta": 1.0, "kl": kl, "ratio": ratio, **choices}
        each = lambda t, o=options: jax.vmap(lambda i: total(t, i[None], jnp.zeros(1), **o))(jnp.arange(NUM))  # noqa: E731
        close(jax.grad(lambda t, each=each, pull=pull: (pull * each(t)).sum())(POLICY), wanted)


@pytest.mark.parametrize(
    ("name", "divisor"), [("sequence_sum", 4), ("sequence_mean", 4), ("constant", 12), ("token_mean", None)]
)
def test_the_divisor_of_every_reduction(name, divisor):
    rows = jnp.array([0, 4, 9, 14])
    terms = grpo_loss_terms(
        logps(POLICY)[rows], None, None, jnp.ones(4), jnp.asarray(MASK)[rows], beta=0.0, objective=REDUCTIONS[name]
    )
    assert float(terms.weight) == (divisor or LENGTHS[rows].sum())


def test_sequence_kl_value_is_the_kl():
    for sampler, old in ((POLICY, None), (OLD, OLD)):
        values = jax.vmap(lambda i, old=old: total(POLICY, i[None], jnp.zeros(1), old=old, beta=1.0))(jnp.arange(NUM))
        # The surrogate of a zero advantage is zero, so what is left is the KL.
        close((probabilities(sampler) * values).sum(), sequence_kl(POLICY))


@pytest.mark.parametrize("kl", ["sequence_reverse", "token_reverse_weighted"])
def test_the_mirror_term_is_the_kl_to_the_old_policy(kl):
    def mirror(table, i):
        rows = i[None]
        objective = Objective(anchor="previous", kl=kl, **UNCLIPPED)
        arrays = (logps(table)[rows], logps(OLD)[rows], None, jnp.zeros(1), jnp.asarray(MASK)[rows])
        return grpo_loss_terms(*arrays, beta=0.0, beta_mirror=1.0, objective=objective).total

    gradient = jax.grad(lambda t: (probabilities(OLD) * jax.vmap(lambda i: mirror(t, i))(jnp.arange(NUM))).sum())(
        POLICY
    )
    if kl == "sequence_reverse":
        close(gradient, jax.grad(lambda t: sequence_kl(t, OLD))(POLICY))
        return
    log_p, log_q = jax.nn.log_softmax(POLICY), jax.nn.log_softmax(OLD)
    visits = jnp.zeros(len(PREFIXES)).at[PREFIX].add(jnp.where(MASK, probabilities(OLD)[:, None], 0.0))
    per_prefix = lambda t: (jax.nn.softmax(t) * (jax.nn.log_softmax(t) - log_q)).sum(-1)  # noqa: E731
    close(gradient, jax.grad(lambda t: (visits * per_prefix(t)).sum())(POLICY))
    assert jnp.abs(log_p - log_q).max() > 0.1


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
        {"scale": "mean", "baseline": "leave_one_out"},
        {"scale": "mean", "baseline": "none"},
        {"baseline": "leave_one_out", "ddof": 1},
        {"baseline": "none"},
        {"epsilon": 0.3, "epsilon_in": "std"},
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
    gradient = sum(
        jnp.tensordot(w, jax.vmap(gradient)(g), 1)
        for w, g in zip(jnp.array_split(weights, 8), jnp.array_split(groups, 8), strict=True)
    )
    success = lambda table: jnp.where(SUCCESS, probabilities(table), 0.0).sum()  # noqa: E731
    p, slope = jax.value_and_grad(success)(POLICY)
    omega = theory.omega(p, theory.Group(group_size, **objective.normaliser()))
    close(gradient, -omega * slope + beta * jax.grad(sequence_kl)(POLICY))


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


@pytest.fixture(scope="module")
def few_steps():
    """Enough for four digits."""
    return {"beta": 0.5, "steps": 1_500}


@pytest.mark.parametrize("kl", [kl for kl in CHOICES["kl"] if kl != "none"])
def test_small_steps_end_on_the_predicted_point(kl, few_steps):
    end = objectives.end_of(Objective(kl=kl, ratio="token"), **few_steps)
    predicted = objectives.prediction(Objective(kl=kl), 0.5)
    np.testing.assert_allclose(objectives.success(end), predicted, atol=2e-4)
    others = [
        objectives.prediction(Objective(kl=k), 0.5) for k in ("sequence_reverse", "token_reverse", "token_forward")
    ]
    assert sorted(abs(p - predicted) > 0.01 for p in others) == [False, True, True]
    if kl == "sequence_reverse":
        ratio = jnp.log(probabilities(end)) - jnp.log(probabilities(REFERENCE))
        for outcome in (True, False):  # conditionals of the reference are kept
            assert jnp.ptp(ratio[np.asarray(objectives.SUCCESS) == outcome]) < 1e-2
        p_ref = objectives.success(REFERENCE)
        np.testing.assert_allclose(sequence_kl(end), theory.bernoulli_kl(objectives.success(end), p_ref), atol=1e-3)


def test_weighing_by_length_leaves_the_papers_point_in_place(few_steps):
    """With the group's baseline the mean gradient vanishes at p* for any weights of completions; k2 has no such luck."""
    by_length = objectives.success(objectives.end_of(replace(MAXRL, reduce="sequence_mean"), **few_steps))
    np.testing.assert_allclose(by_length, objectives.prediction(MAXRL, 0.5), atol=2e-4)
    k2 = objectives.success(objectives.end_of(replace(GRPO, kl="token_reverse", reduce="sequence_mean"), **few_steps))
    assert abs(float(k2) - objectives.prediction(replace(GRPO, kl="token_reverse"), 0.5)) > 0.004


@pytest.mark.parametrize("name", ["MAXRL", "TWO_KL_GRPO", "MIRROR_DR_GRPO"])
def test_solved_iterations_are_the_recursion(name):
    objective = replace(NAMED[name], **UNCLIPPED)
    beta, beta_mirror = 0.5 * objective.holds_to_reference, 1.0 * objective.holds_to_previous
    path = objectives.solved_iterates(objective, 2, beta=beta, beta_mirror=beta_mirror)
    weights = theory.Group(objectives.GROUP, **objective.normaliser())
    total = beta + beta_mirror
    wanted = theory.iterate(path[0], 2, beta=total, weights=weights, alpha=beta / total)
    np.testing.assert_allclose(path, wanted, atol=1e-3)
    assert abs(path[2] - path[1]) > 0.05
