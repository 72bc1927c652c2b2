"""Evaluation numbers and their intervals: unbiased by enumeration, covering by simulation; and the pages."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from grpo_jax.report import evaluation_numbers, evaluation_page, run_result
from grpo_jax.report.evaluation_numbers import majority_at_k
from grpo_jax.theory import dead_fraction


def vote(answers, rewards):
    """The expected reward of a voter for a most common answer drawn at random: another way to say it, sample by sample."""
    counts = Counter(answer for answer in answers if answer is not None)
    winners = [answer for answer in counts if counts[answer] == max(counts.values())]
    shares = [np.mean([r for a, r in zip(answers, rewards, strict=True) if a == winner]) for winner in winners]
    return float(np.mean(shares)) if shares else 0.0


@pytest.mark.parametrize(
    "answers",
    [
        ("4", "4", "5", "5", "6", None),
        ("4", "5", "4", "6", "7", "4"),
        (None, None, None, "4", "5", None),
        (None,) * 6,
    ],
)
def test_majorities_are_unbiased(answers):
    """Over all orders of the samples, the mean over disjoint blocks is the mean over all subsets."""
    samples = list(zip(answers, [1.0 if a == "4" else 0.0 for a in answers], strict=True))
    samples[0] = (samples[0][0], 0.0)  # one answer, two rewards: as of a completion that did not stop
    for k in (1, 2, 3, 4, 6):
        over_subsets = np.mean([vote(*zip(*subset, strict=True)) for subset in itertools.combinations(samples, k)])
        orders = itertools.permutations(samples)
        over_orders = np.mean([majority_at_k(*zip(*order, strict=True), k) for order in orders])
        np.testing.assert_allclose(over_orders, over_subsets, atol=1e-12)
    with pytest.raises(ValueError, match="maj@7 needs at least 7 samples, got 6"):
        majority_at_k(answers, [0.0] * 6, 7)


def test_a_single_vote_is_the_share_of_right_answers():
    assert majority_at_k(["4", None, "5", "4"], [1.0, 1.0, 0.0, 1.0], 1) == 0.5  # one right text names no answer


@pytest.mark.parametrize("a, b", [(0.2, 5.0), (0.5, 0.5), (2.0, 2.0), (30.0, 30.0), (0.05, 5.0)])
@pytest.mark.parametrize("prompts, trials, k", [(100, 16, 1), (100, 16, 4), (400, 16, 8), (16, 16, 1), (100, 128, 1)])
def test_intervals_cover_new_prompts_and_new_samples(a, b, prompts, trials, k):
    """Prompts from a Beta distribution, of which hardly any ever succeed (the last) or all are alike (the third)."""
    random = np.random.default_rng(0)
    success = random.beta(a, b, (600, prompts))
    steps = np.arange(k)
    truth = 1 - np.prod((b + steps) / (a + b + steps))  # E[1 − (1 − p)^k]
    intervals = [
        evaluation_numbers.interval_over_prompts(run_result.pass_at_k(counts, trials, k), 0.95, trials / k)
        for counts in random.binomial(trials, success)
    ]
    covered = np.mean([low <= truth <= high for _, low, high in intervals])
    assert 0.9 <= covered <= (0.99 if k == 1 else 1.0)
    means = [mean for mean, _, _ in intervals]
    assert abs(np.mean(means) - truth) < 4 * np.std(means) / 600**0.5


def test_intervals_are_wilsons_where_every_prompt_has_one_trial():
    """For large Q they are scipy's, and they stay inside [0, 1] and exact at the ends."""
    values = np.repeat([1.0, 0.0], [700, 1300])
    theirs = stats.binomtest(700, 2000).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(evaluation_numbers.interval_over_prompts(values, 0.95)[1:], theirs, rtol=2e-3)
    for value in (0.0, 0.1, 1.0):
        mean, low, high = evaluation_numbers.interval_over_prompts(np.full(50, value), 0.95)
        assert 0 <= low <= mean <= high <= 1
        assert high - low > 0.05
    assert evaluation_numbers.interval_over_prompts(np.zeros(50), 0.95)[:2] == (0.0, 0.0)
    assert evaluation_numbers.interval_over_prompts(np.ones(50), 0.95)[2] == 1.0
    assert evaluation_numbers.interval_over_prompts(np.array([0.3]), 0.95) == (0.3, 0.0, 1.0)


def test_the_bound_of_a_policy_that_never_succeeds():
    assert evaluation_numbers.success_bound(0, 21_104, 0.95) == pytest.approx(1 - 0.05 ** (1 / 21_104), rel=1e-9)
    theirs = stats.binomtest(3, 500, alternative="less").proportion_ci(0.95, "exact").high
    assert evaluation_numbers.success_bound(3, 500, 0.95) == pytest.approx(theirs, rel=1e-9)
    assert evaluation_numbers.success_bound(5, 5, 0.95) == 1.0


def test_dead_groups_are_counted_without_bias():
    """Against every group that can be drawn, and against the theory over many measurements."""
    for right in range(6):
        outcomes = [1] * right + [0] * (5 - right)
        dead = np.mean([len(set(group)) == 1 for group in itertools.combinations(outcomes, 3)])
        assert evaluation_numbers.dead_share(np.array([right]), 5, 3) == pytest.approx(dead)
    random, p = np.random.default_rng(1), np.array([0.01, 0.2, 0.9])
    share = evaluation_numbers.dead_share(random.binomial(16, p, (4000, 3)).reshape(-1), 16, 8)
    assert share == pytest.approx(float(np.mean(dead_fraction(p, 8))), abs=0.005)
    assert evaluation_numbers.dead_share(np.array([1]), 4, 8) == pytest.approx(float(dead_fraction(0.25, 8)), rel=1e-5)


def row(index, successes, trials=16, **more):
    return {
        "index": index,
        "prompt": f"prompt {index}",
        "target": "4",
        "successes": successes,
        "trials": trials,
        "greedy": successes > trials / 2,
        "greedy_verdict": "wrong",
        "verdicts": {"correct": successes, "wrong": trials - successes},
        "tokens": 10 * trials,
        "truncated": 0,
        "disagreements": 0,
        "kl": None,
        "majority": None,
    } | more


SAMPLE = {"sample": 0, "greedy": False, "verdict": "wrong", "reward": 0.0, "tokens": 3, "truncated": True}
DETAILS = {"checkpoint": "reference", "task": "gsm8k", "split": "test"}


def summary(rows, **more):
    return evaluation_numbers.summarise(rows, confidence=0.95, group_size=8) | DETAILS | more


def test_a_policy_that_never_succeeds_is_told_as_such():
    result = summary([row(i, 0) for i in range(1319)])
    assert (result["never"], result["dead_groups"], result["successes"]) == (1319, 1.0, 0)
    assert result["success_bound"] == pytest.approx(3 / 21_104, rel=2e-3)
    assert result["success"] == {"mean": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 21_104))}
    assert result["pass"]["1"]["mean"] == 0.0
    assert 0.002 < result["pass"]["16"]["high"] < 0.004  # of prompts like these: 1,319 of them say no more
    words = " ".join(value for name, value in evaluation_page.result_lines(result) if name == "in words")
    assert "not one of 21,104 completions succeeded" in words
    assert "below 0.00014 (95%, one-sided)" in words
    assert "GRPO learns only from groups with successes and failures" in words
    few = summary([row(i, int(i == 0)) for i in range(1319)])
    words = " ".join(value for name, value in evaluation_page.result_lines(few) if name == "in words")
    assert "1 of 21,104 completions succeeded" in words
    good = summary([row(i, 8) for i in range(100)])
    assert "in words" not in dict(evaluation_page.result_lines(good))


def test_the_summary_adds_up():
    rows = [
        row(0, 4, kl=0.1, majority={str(2**i): 0.25 for i in range(5)}),
        row(1, 16, kl=0.3, majority={str(2**i): 1.0 for i in range(5)}),
    ]
    result = summary(rows)
    assert result["success"]["mean"] == result["pass"]["1"]["mean"] == 0.625
    assert result["majority"]["8"]["mean"] == 0.625
    assert result["greedy"]["mean"] == 0.5
    assert (result["kl"]["mean"], result["length"]) == (pytest.approx(0.2), 10.0)
    assert result["verdicts"] == {"correct": 20, "wrong": 12}
    assert (result["never"], result["always"]) == (0, 1)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    table = dict(evaluation_page.result_lines(result))
    assert table["maj@4"].startswith("0.6250")
    assert table["KL(π‖π_ref), nats"].startswith("0.2000   95% ±1.27")
    assert summary(rows[:1])["kl"] == {"mean": pytest.approx(0.1), "half_width": None}


def test_the_page_cuts_and_escapes_what_the_model_said():
    text = "```\n# owned\x1b[31m|<script>" + "x" * 5000
    rows = [row(7, 3, prompt="a\nb\x07")]
    page = evaluation_page.page(
        summary([row(i, i) for i in range(9)]), [("task", "sums")], rows, [SAMPLE | {"index": 7, "text": text}]
    )
    assert page.startswith("# reference on gsm8k\n")
    assert all(c.isprintable() or c == "\n" for c in page)
    assert [line for line in page.split("\n") if line.startswith("#")] == [
        "# reference on gsm8k",
        "## Samples",
        "### prompt 7: 3 of 16",
    ]
    (said,) = (line for line in page.split("\n") if "owned" in line)
    assert said.startswith("- sample ✗ wrong `ˋˋˋ\\n# owned\\x1b[31m|<script>xx")
    assert "more characters" in said
    assert said.count("`") == 2
    assert len(said) < 800


@pytest.mark.parametrize(
    "rows",
    [[row(i, 0) for i in range(5)], [row(i, i % 17, majority={str(2**k): 0.5 for k in range(5)}) for i in range(40)]],
)
def test_the_figure_is_drawn_also_of_nothing(tmp_path, rows):
    evaluation_page.plot_evaluation(tmp_path / "figure.png", rows, summary(rows))
    content = (tmp_path / "figure.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000
