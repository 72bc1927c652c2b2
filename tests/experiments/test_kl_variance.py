"""Gradients of KL terms on Markov chains: what is called exact is, against enumeration, and what is sampled agrees with it."""

import doctest
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kl_gradients, kl_variance, markov_language
from experiments.kl_gradients import BOUND, ESTIMATORS, GROUP, TOKENWISE
from experiments.markov_language import START, TOKENS, Completions, language, repeat
from grpo_jax import theory
from grpo_jax.objective import surrogate

T = 3
# Which estimators are right about the KL of whole completions; the token-wise ones are right about their own expectation.
EXACT = [name for name in ESTIMATORS if name not in TOKENWISE]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def every_completion(ends):
    """All completions of at most three tokens, by hand."""
    rows = []
    for first, second, third in itertools.product(range(TOKENS), repeat=T):
        stop = TOKENS - 1 if ends else None
        if first == stop:
            rows += [[first]] * (second == third == 0)
        elif second == stop:
            rows += [[first, second]] * (third == 0)
        else:
            rows.append([first, second, third])
    tokens = np.array([row + [0] * (T - len(row)) for row in rows])
    before = np.array([([START, *row[:-1]] + [0] * T)[:T] for row in rows])
    mask = np.array([[t < len(row) for t in range(T)] for row in rows])
    return tokens, before, mask


def log_probability(table, everything):
    tokens, before, mask = everything
    shifted = table - jnp.log(jnp.exp(table).sum(-1, keepdims=True))
    return jnp.where(mask, shifted[before, tokens], 0.0).sum(-1)


@pytest.mark.parametrize("ends", [False, True])
def test_the_exact_gradient_is_that_of_the_enumerated_sum(ends):
    spoken, everything = language(T, kl=0.7, drift=0.2, ends=ends), every_completion(ends)
    assert len(everything[0]) == (1 + 7 + 7 * 7 * 8 if ends else 512)

    def divergence(table, anchor):
        log = log_probability(table, everything)
        return (jnp.exp(log) * (log - log_probability(anchor, everything))).sum()

    kl, gradient = jax.value_and_grad(divergence)(spoken.policy, spoken.reference)
    assert [float(kl), float(divergence(spoken.policy, spoken.old))] == pytest.approx([0.7, 0.2], rel=1e-9)
    expected = kl_gradients.expected_gradients(spoken, T)
    for k, name in enumerate(ESTIMATORS):
        if name in EXACT:
            np.testing.assert_allclose(expected[k], gradient, atol=1e-12)
    # The token-wise terms: the library's loss, each completion alone, weighted by its probability under the old policy.
    rows = Completions(*(jnp.asarray(x)[:, None] for x in everything))
    chains = spoken.policy, spoken.old, spoken.reference
    each = jax.vmap(lambda row: kl_gradients.group_gradients(*chains, row, TOKENWISE))(rows)
    weights = jnp.exp(log_probability(spoken.old, everything))
    np.testing.assert_allclose(expected[len(EXACT) :], jnp.tensordot(weights, each, 1), atol=1e-6)


@pytest.mark.parametrize(("drift", "ends"), [(0.0, False), (0.1, True)])
def test_what_is_sampled_has_the_expectation(drift, ends):
    length, groups = 10, 1024
    noises = kl_gradients.measure(language(length, kl=1.0, drift=drift, ends=ends), length, groups)
    for name in ESTIMATORS:
        assert noises[name].error < 1.8, name
        assert (noises[name].bias < 1e-12) == (name in EXACT), name
    # The test could tell: the bias of k3 is many standard errors.
    k3 = noises["token k3"]
    assert k3.bias > 4 * k3.noise / math.sqrt(GROUP * groups)
    if not drift:  # r·k3 and k2 are then the same gradient
        assert noises["token r·k3"].noise == pytest.approx(float(noises["token k2"].noise), rel=1e-5)


@pytest.mark.slow
def test_how_the_noise_grows_with_length():
    lengths = (10, 160)
    short, long = (
        kl_gradients.measure(language(t, kl=0.1 * t), t, n) for t, n in zip(lengths, (1024, 256), strict=True)
    )

    def slope(name, field):
        return math.log(getattr(long[name], field) / getattr(short[name], field)) / math.log(lengths[1] / lengths[0])

    assert abs(slope("sequence", "noise")) < 0.1 and abs(slope("per decision", "noise")) < 0.1
    assert 0.15 < slope("sequence, alone", "noise") < 0.5
    assert slope("token k2", "noise") == pytest.approx(-0.5, abs=0.1)
    assert slope("sequence", "to_surrogate") == pytest.approx(0.5, abs=0.1)
    assert abs(slope("token k2", "to_surrogate")) < 0.1
    expected = math.sqrt(2 * 0.1 * lengths[1] * GROUP / (GROUP - 1))
    assert long["sequence"].to_surrogate == pytest.approx(expected, rel=0.1)
    match = kl_gradients.completions_to_match(long["sequence"], long["token k2"])
    error = long["sequence"].noise ** 2 / match
    assert error == pytest.approx(float(long["token k2"].noise ** 2 / match + long["token k2"].bias ** 2))


def test_the_change_of_measure_is_what_is_sampled_where_that_can_be():
    spoken = language(10, kl=1.0, drift=0.1)
    drifted, sampled = kl_gradients.drifted(spoken, 10, 1024), kl_gradients.measure(spoken, 10, 1024)
    assert drifted["noise"] == pytest.approx(float(sampled["sequence"].noise), rel=0.1)
    assert drifted["beyond"] == 0.0
    completions = markov_language.sample(jax.random.key(1), repeat(spoken.old, 10), spoken.goes_on, 1024, GROUP)
    ratio = jnp.exp(markov_language.log_ratio(spoken.policy, spoken.old, completions))
    assert ratio.mean() == pytest.approx(1.0, abs=0.03)
    assert drifted["effective"] == pytest.approx(1 / float((ratio**2).mean()), rel=0.05)
    # Far away about half of the policy's own completions are beyond the bound when D is the bound: log ρ has mean D under π.
    assert 0.3 < kl_gradients.drifted(language(10, kl=1.0, drift=BOUND), 10, 1024)["beyond"] < 0.7
    assert math.log(surrogate.bounded_exp(jnp.asarray(1e9))) == pytest.approx(BOUND)


def test_the_tilted_chain_has_the_enumerated_density():
    table = language(T, kl=1.0).policy
    everything, last = every_completion(ends=False), jnp.linspace(-1.0, 2.0, TOKENS)
    steps, log_total = markov_language.path_measure(table, last, T, jnp.ones(TOKENS))
    tokens, before, mask = everything
    weights = jnp.where(mask, table[before, tokens], 0.0).sum(-1) + last[tokens[:, -1]]
    assert log_total == pytest.approx(math.log(jnp.exp(weights).sum()), rel=1e-12)
    logps = markov_language.logps(steps, Completions(*everything)).sum(-1)
    np.testing.assert_allclose(logps, weights - log_total, atol=1e-12)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_only_the_sequence_term_is_at_rest_at_the_fixed_point(scale):
    rest = kl_gradients.at_fixed_point(20, scale, 64)
    # With two outcomes, KL(π*‖π_ref) is that of the outcomes: π* and π_ref differ by a function of the reward alone.
    assert rest["kl"] == pytest.approx(float(theory.bernoulli_kl(rest["p_star"], rest["p_ref"])), rel=1e-6)
    assert rest["unbalanced"]["sequence"] < 1e-9
    assert rest["unbalanced"]["token k3"] > rest["unbalanced"]["token k2"] > 0.05
    assert rest["noise"]["sequence"] < (1e-5 if scale == "none" else 0.25)
    assert min(rest["noise"][name] for name in TOKENWISE) > 0.9
    away = kl_gradients.at_fixed_point(20, scale, 64, wander=1.0)
    assert away["kl"] > rest["kl"] and away["noise"]["sequence"] > 1.2 * away["noise"]["token k2"]


@pytest.mark.slow
def test_the_figure_the_tables_and_the_numbers_are_written(tmp_path, capsys):
    kl_variance.experiment(tmp_path, quick=True)
    numbers = json.loads((tmp_path / "kl_variance.json").read_text(encoding="utf-8"))
    assert set(numbers) == {"on_policy", "off_policy", "fixed_point"}
    shown = numbers["on_policy"]["K = 1"]["8"]["sequence"]["noise"]
    printed = capsys.readouterr().out
    assert f"| K = 1 | sequence | 0 | 1 | {shown:.3g} |" in printed
    assert (tmp_path / "kl_variance.png").stat().st_size > 20_000


def test_examples():
    assert sum(doctest.testmod(x).failed for x in (markov_language, kl_gradients, kl_variance)) == 0
