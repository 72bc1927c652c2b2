"""The ledger estimated from samples: unbiased, with intervals that cover, and sums that add up."""

import numpy as np
import pytest

from grpo_jax import theory
from grpo_jax.objective import GRPO, GRPO_TRL
from grpo_jax.report.ledger import (
    Tally,
    ledger_of_prompts,
    ledger_of_run,
    log_ratio_sums,
    mean_over_prompts,
)
from tests.tiny_run import tiny_config

SETTING = {"weights": theory.Group(8), "beta": 1.0}
SPLIT = ("kl", "useful", "within_successes", "within_failures")


class Policies:
    """Explicit policies over outcomes, moved from their references in and among successes, and their exact ledger."""

    def __init__(self, prompts=60, outcomes=24, seed=0):
        self.random = np.random.default_rng(seed)
        normalised = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))  # noqa: E731
        log_ref = normalised(self.random.normal(size=(prompts, outcomes)))
        self.right = np.arange(outcomes) < outcomes // 4
        log_policy = normalised(log_ref + 0.6 * self.random.normal(size=log_ref.shape) + self.right)
        self.policy, self.ratio = np.exp(log_policy), log_policy - log_ref
        self.p_ref = (np.exp(log_ref) * self.right).sum(-1)

    def exact(self):
        """Of each prompt, name -> [Q]."""
        mean = lambda x: (self.policy * x).sum(-1)  # noqa: E731
        p, p_ref, kl = mean(self.right), self.p_ref, mean(self.ratio)
        inner = mean(self.right * self.ratio) / p, mean(~self.right * self.ratio) / (1 - p)
        useful, *within = (np.asarray(x) for x in theory.split_kl(p, p_ref, *inner))
        rest = np.asarray(theory.rest_excess(p, p_ref, **SETTING))
        omega, var = np.asarray(theory.omega(p, SETTING["weights"])), mean(self.ratio**2) - kl**2
        gain = p * (1 - p) * (np.log(p / (1 - p)) - np.log(p_ref / (1 - p_ref)))
        return {
            "kl": kl,
            "useful": useful,
            "within_successes": within[0],
            "within_failures": within[1],
            "at_rest": rest,
            "beyond_rest": sum(within) - rest,
            "objective": np.asarray(theory.objective_gain(p, p_ref, kl, **SETTING)),
            "slope": omega * (mean(self.right * self.ratio) - p * kl) - var,
            "hold": var,
            "followed": np.full_like(p, gain.sum() / (p * (1 - p) * omega).sum()),
        }

    def sampled(self, trials, ref_trials):
        """(tally, successes of the reference) of a new measurement."""
        uniform = self.random.random((len(self.p_ref), trials, 1))
        outcome = (uniform > self.policy.cumsum(-1)[:, None, :-1]).sum(-1)  # [Q, n]
        rewards = self.right[outcome]
        sums = log_ratio_sums(rewards, np.take_along_axis(self.ratio, outcome, 1))
        return Tally(rewards.sum(1), trials, sums), self.random.binomial(ref_trials, self.p_ref)


def test_the_ledger_of_samples_is_unbiased_and_its_intervals_cover():
    # 200 measurements of 32 samples, as a probe draws them. The mean of a quantity must be within four standard errors of its
    # exact value, or within 3 % of a probe's interval; a nominal 95 % interval must cover in 88 to 99 % of them.
    policies = Policies()
    exact = {name: values.mean() for name, values in policies.exact().items()}
    means, covered = [], []
    for _ in range(200):
        tally, ref_successes = policies.sampled(32, 512)
        numbers = mean_over_prompts(ledger_of_prompts(tally, ref_successes, 512, **SETTING), 0.95)
        assert numbers.keys() == exact.keys()
        means.append([numbers[name]["mean"] for name in exact])
        covered.append([numbers[name]["low"] <= exact[name] <= numbers[name]["high"] for name in exact])
    means, coverage = np.array(means), dict(zip(exact, np.mean(covered, axis=0), strict=True))
    bias, noise = means.mean(0) - [*exact.values()], means.std(0) / len(means) ** 0.5
    assert (np.abs(bias) < 4 * noise + 0.004).all(), dict(zip(exact, bias, strict=True))
    assert all(0.88 <= share <= 0.99 for share in coverage.values()), coverage


def test_the_parts_of_every_prompt_add_up_to_its_kl():
    tally, ref_successes = Policies(prompts=7).sampled(20, 64)
    values = ledger_of_prompts(tally, ref_successes, 64, **SETTING).values
    np.testing.assert_allclose(sum(values[name] for name in SPLIT[1:]), values["kl"], atol=1e-12)
    excess = values["within_successes"] + values["within_failures"]
    np.testing.assert_allclose(values["beyond_rest"], excess - values["at_rest"], atol=1e-12)


def test_sums_of_batches_are_the_sums_of_the_whole():
    random = np.random.default_rng(1)
    rewards, ratios = random.integers(0, 2, (5, 12)), random.normal(size=(5, 12))
    whole = log_ratio_sums(rewards, ratios)
    parts = log_ratio_sums(rewards[:, :7], ratios[:, :7]) + log_ratio_sums(rewards[:, 7:], ratios[:, 7:])
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_prompts_at_the_ends_have_finite_numbers():
    successes, ref_successes = np.array([0, 0, 8, 8, 3, 3]), np.array([0, 9, 9, 0, 0, 9])
    rewards = np.arange(8) < successes[:, None]
    tally = Tally(successes, 8, log_ratio_sums(rewards, np.linspace(-1, 2, 48).reshape(6, 8)))
    values, errors = ledger_of_prompts(tally, ref_successes, 9, **SETTING)
    for name in values:
        assert np.isfinite(values[name]).all() and np.isfinite(errors[name]).all(), name
        assert (errors[name] >= 0).all(), name


def test_too_few_samples_are_refused():
    tally = Tally(np.array([1]), 2, np.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match="a ledger needs 3 samples of each prompt, got 2"):
        ledger_of_prompts(tally, np.array([1]), 8, **SETTING)


@pytest.mark.parametrize(
    ("objective", "changes", "balance"),
    [
        (GRPO, {}, True),
        (GRPO_TRL, {"objective.name": "GRPO_TRL"}, False),  # another KL
        (GRPO, {"objective.entropy_bonus": 0.01}, False),
    ],
)
def test_a_ledger_says_what_it_can(objective, changes, balance):
    config = tiny_config(**{key.replace(".", "__"): value for key, value in changes.items()})
    tally, ref_successes = Policies(prompts=4).sampled(20, 64)
    before = {"successes": ref_successes.tolist(), "trials": 64}
    of_run = ledger_of_run(config, objective, before, tally)
    ledger = of_run.means
    assert set(SPLIT) <= ledger.keys() and all({"mean", "low", "high"} == ledger[name].keys() for name in SPLIT)
    assert ("objective" in ledger) == ("at_rest" in ledger) == ("objective_optimum" in ledger) == balance
    row = of_run.row()
    assert row["ledger/useful"] == ledger["useful"]["mean"] and ("ledger/objective" in row) == balance


def test_without_log_ratios_or_samples_there_is_no_ledger():
    config, before = tiny_config(), {"successes": [1, 2], "trials": 8}
    assert ledger_of_run(config, GRPO, before, None) is None
    assert ledger_of_run(config, GRPO, before, Tally(np.array([1, 1]), 2, np.zeros((2, 2, 4)))) is None
    assert ledger_of_run(config, GRPO, before, Tally(np.array([1, 1]), 8, np.full((2, 2, 4), np.inf))) is None
