"""Where a run stands: each word follows from numbers alone, and is found on numbers of every kind."""

import numpy as np
import pytest

from grpo_jax.report import standing
from tests.report.test_report import counts


def interval(mean, half=0.01):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def made(*, p_final=0.5, p_star=0.7, slope=0.0, error=0.01, hold=0.3, objective=0.1, **more):
    """A result with the numbers that the words are made from; p_ref is 0.3."""
    difference = {"mean": p_final - p_star, "half_width": 0.02, "inside": abs(p_final - p_star) < 0.02}
    parts = {
        "kl": interval(0.3),
        "useful": interval(0.1),
        "within_successes": interval(0.12),
        "within_failures": interval(0.08),
    }
    balance = {
        "slope": interval(slope, error),
        "hold": interval(hold),
        "objective": interval(objective),
        "beyond_rest": interval(-slope / 2),
        "followed": interval(0.4),
    }
    result = {"p_ref": interval(0.3), "p_final": interval(p_final), "difference": difference, "ledger": parts | balance}
    return result | more


def probe(iteration, p, kl=0.3):
    return {"iteration": iteration, "phase": "probe", "success/mean": p, "success/high": p + 0.01, "kl/sequence": kl}


@pytest.mark.parametrize(
    ("probes", "words"),
    [
        ([(0.4, 0.0), (0.0, 1.0), (0.0, 1.2)], "success has fallen from 0.400 to 0.000"),
        ([(0.4, 0.0), (0.2, 4.0), (0.2, 5.0)], "KL is 5.00 nats, 20 times what p* takes"),
        ([(0.4, 0.0), (0.0, 1.0), (0.3, 1.2)], None),  # it recovers
        ([(0.4, 0.0), (0.0, 1.0)], None),  # once
        ([(0.4, 0.0), (0.9, 4.0), (0.9, 5.0)], None),  # dear, and no collapse
        ([(0.4, 0.0), (0.3, 0.3), (0.3, 0.3)], None),
    ],
)
def test_a_collapse_is_told_from_what_recovers(probes, words):
    rows = [probe(10 * i, p, kl) for i, (p, kl) in enumerate(probes)]
    assert standing.collapse(rows, 0.4, 0.25) == words


def test_an_entropy_of_nothing_is_a_collapse_where_success_falls():
    rows = [{"iteration": i, "phase": "train", "policy/entropy": x} for i, x in ((1, 0.9), (20, 0.001))]
    low, high = ([probe(10, p), probe(20, p)] for p in (0.3, 0.9))
    assert standing.collapse([*low, *rows], 0.4, 0.25) == "entropy has fallen from 0.9 to 0.001 nats a token"
    assert standing.collapse([*high, *rows], 0.4, 0.25) is None


AVERAGE = {
    "iterations": 600,
    "p_final": interval(0.438),
    "ledger": {"objective": interval(0.159), "beyond_rest": interval(0.036)},
}
CASES = [
    ({"p_final": 0.71}, standing.ARRIVED, "0.200 of its 0.300 nats of KL bought no success"),
    (
        {"p_final": 0.71, "slope": 0.2},
        standing.UNFINISHED,
        "the objective still rises",
    ),  # the interval is wide, the push clear
    ({"p_final": 0.9}, standing.ABOVE, "above p*"),
    (
        {"slope": 0.2},
        standing.UNFINISHED,
        "not arrived yet; the policy has followed 0.40 of the pull, and the objective",
    ),
    ({"slope": 0.2, "speed": {"iterations_to_go": 1234.5}}, standing.UNFINISHED, "about 1,234 iterations to go"),
    ({"slope": -0.2}, standing.NOISY, "noise: the policy is beyond a rest point, with 0.100 nats of KL more"),
    ({"slope": -0.2, "objective": -0.05}, standing.NOISY, "below the start on its objective"),
    ({"slope": -0.2, "trend": interval(0.05)}, standing.NOISY, "Success still rises, +0.050 from the third quarter"),
    ({"slope": 0.005}, standing.LIMITED, "limited by the network: push and hold are in balance"),
    (
        {"slope": 0.0, "attainable": interval(0.45)},
        standing.LIMITED,
        "; p† = 0.450 was expected of this network.",
    ),
    (
        {"slope": -0.2, "attainable": interval(0.6)},
        standing.NOISY,
        "p† = 0.600 was expected of this network",
    ),
    (
        {"slope": -0.2, "objective": 0.02, "average": AVERAGE},
        standing.NOISY,
        "The average of the last 600 iterations has 0.036 of them left, and an objective of +0.159: take it",
    ),
    (  # an average that is no better is not worth a word
        {"slope": -0.2, "objective": 0.2, "average": AVERAGE},
        standing.NOISY,
        "A learning rate that decays, larger batches or train.average bring it back.",
    ),
    ({"slope": 0.02}, standing.LIMITED, "limited"),  # significant, and small beside the hold
    ({"slope": -0.02}, standing.LIMITED, "limited"),
    ({"slope": 0.005, "trend": interval(0.05)}, standing.UNFINISHED, "success still rises, +0.050"),
    (
        {"slope": 0.005, "trend": interval(0.005, 0.001)},
        standing.LIMITED,
        "success moved by +0.005 from the third quarter",
    ),
    ({"slope": 0.005, "trend": interval(0.05, 0.06)}, standing.LIMITED, "limited"),  # it may not have risen at all
    ({"slope": 0.005, "error": 0.2}, standing.UNKNOWN, "too few samples tell push from hold"),
    (
        {"p_final": 0.1, "objective": -0.3},
        standing.COLLAPSED,
        "fell from 0.300 to 0.100 and the objective is at -0.300",
    ),
    ({"p_final": 0.1}, standing.COLLAPSED, "fell from 0.300 to 0.100; lower"),
    ({"p_final": 0.28, "slope": 0.2}, standing.UNFINISHED, "not arrived"),  # a fall that is not worth the word
]


@pytest.mark.parametrize(("numbers", "word", "words"), CASES)
def test_the_word_and_the_sentence_follow_from_the_numbers(numbers, word, words):
    result = made(**numbers)
    result["standing"] = standing.standing(result, counts([300, 200], 1000))
    assert result["standing"] == word
    assert words in standing.in_words(result)


@pytest.mark.parametrize(
    ("successes", "p_ref", "words"),
    [
        ([0, 0], 0.0, "no completion of the reference succeeded"),
        ([9, 9], 1.0, "every completion of the reference succeeded"),
        ([0, 9], 0.5, "of each prompt all or no completions"),
    ],
)
def test_groups_of_equal_rewards_teach_nothing(successes, p_ref, words):
    result = made(p_final=p_ref) | {"p_ref": interval(p_ref)}
    result["standing"] = standing.standing(result, counts(successes, 9))
    assert result["standing"] == standing.HOPELESS and words in standing.in_words(result)


def test_what_was_learned_all_the_same_is_not_hopeless():
    result = made(p_final=0.875) | {"p_ref": interval(0.0)}
    assert standing.standing(result, counts([0, 0], 64)) != standing.HOPELESS


def test_a_trend_is_told_from_chance():
    random, pace = np.random.default_rng(0), np.arange(201.0)
    still = [standing.trend(0.5 + 0.05 * random.normal(size=200), pace, 0.95) for _ in range(300)]
    assert 0.9 < np.mean([t["low"] <= 0 <= t["high"] for t in still]) < 0.99
    rising = standing.trend(np.linspace(0.4, 0.6, 200) + 0.01 * random.normal(size=200), pace, 0.95)
    assert rising["low"] > 0 and rising["mean"] == pytest.approx(0.05, abs=0.005)
    # A rate that decays: as much of the way lies in the first iterations of the last quarter as in all others of it.
    decaying = np.concatenate([[0.0], np.cumsum(1 - np.arange(200) / 200)])
    assert standing.trend(decaying[1:] / decaying[-1], decaying, 0.95)["mean"] == pytest.approx(0.25, abs=0.04)
    assert standing.trend(np.ones(12), np.arange(13.0), 0.95) is None


def test_without_a_prediction_or_log_ratios_it_is_not_known():
    whole = made()
    split = {name: whole["ledger"][name] for name in ("kl", "useful", "within_successes", "within_failures")}
    for changes, words in (
        ({"difference": None}, "no prediction"),
        ({"ledger": None}, "too few log-ratios"),
        ({"ledger": split}, "known only where KL(π‖π_ref) decides the end"),  # as of k3
    ):
        result = {name: value for name, value in (whole | changes).items() if value is not None}
        result["standing"] = standing.standing(result, counts([300, 200], 1000))
        assert result["standing"] == standing.UNKNOWN and words in standing.in_words(result)
