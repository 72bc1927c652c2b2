"""Plans against `predict`, against plain Python loops and closed forms, and against numbers worked out elsewhere."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.theory import Group, MeanOnly, Whitened, predict
from grpo_jax.theory.planning import (
    beta_for_mean,
    curve,
    plan,
    recommended_range,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def root(f, low: float, high: float) -> float:
    """A sign change of f, from negative to positive."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("size", "beta", "ends"),
    [
        (8, 1.0, (0.0950, 0.2778, 0.6249, 0.9142)),
        (4, 2.0, (0.0233, 0.1090, 0.3604, 0.6935)),
        (16, 1.0, (0.1276, 0.2993, 0.6543, 0.9703)),
    ],
)
def test_small_steps_end_where_the_published_table_says(size, beta, ends):
    p_ref = [0.01, 0.05, 0.2, 0.5]
    (row,) = plan(p_ref, None, [beta], weights=Group(size))
    assert row.p_star == pytest.approx(sum(ends) / 4, abs=5e-5)
    assert row.p_ref == row.p_ref_low == row.p_ref_high == pytest.approx(0.19)
    assert row.p_star == row.p_star_low == row.p_star_high
    assert row.saturates == row.folds == 0
    for i, end in enumerate(ends):
        assert curve(p_ref, None, [beta], weights=Group(size), quantiles=[(i + 1) / 4])[0].quantiles[0] == (
            pytest.approx(end, abs=5e-5)
        )


def test_k3_ends_at_its_closed_form():
    p_ref, beta = [0.01, 0.2, 0.7], 2.0
    ends = [(2 * p * beta**2 + 1 + math.sqrt(1 + 4 * beta**2 * p * (1 - p))) / (2 * (1 + beta**2)) for p in p_ref]
    (row,) = plan(p_ref, None, [beta], weights=Whitened(0.0), kl="forward")
    assert row.p_star == pytest.approx(sum(ends) / 3, rel=1e-12)
    spent = [a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(ends, p_ref, strict=True)]
    assert row.kl == pytest.approx(sum(spent) / 3, rel=1e-10)
    assert row.kl_budget == pytest.approx(sum(-math.log(p) for p in p_ref) / 3, rel=1e-12)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_a_plan_is_the_prediction_prompt_by_prompt_also_over_several_blocks_and_with_repetitions(kl):
    k = [*range(301), *[20] * 50, *[300] * 9]  # 301 distinct counts: more than one block
    (row,) = plan(k, 300, [0.7], weights=Group(32), kl=kl, confidence=0.9)
    expected = predict(k, 300, beta=0.7, weights=Group(32), kl=kl, confidence=0.9)
    for name in ("p_ref", "p_ref_low", "p_ref_high", "p_star", "p_star_low", "p_star_high", "kl"):
        assert getattr(row, name) == pytest.approx(getattr(expected, f"mean_{name}"), rel=1e-10), name
    assert row.saturates == pytest.approx(float(expected.saturates.mean()), abs=0.02)
    assert row.folds == pytest.approx(float(expected.fold.mean()), rel=1e-6)
    assert row.folds > 0 or kl == "forward"
    assert row.p_exact >= row.p_ref


def test_dead_prompts_and_dead_groups():
    """(1 − p)^8 is 0.9920 at p = 0.001 and 0.9045 at 0.0125; 0.1^8 + 0.9^8 = 0.43046722."""
    (row,) = plan([0.0, 0.001, 0.0125, 0.1], None, [1.0], weights=Group(8))
    assert row.dead == 0.5
    (row,) = plan([0.1], None, [1e9], weights=Group(8))
    assert row.dead_groups_start == pytest.approx(0.43046722, rel=1e-10)
    assert row.dead_groups == pytest.approx(0.43046722, rel=1e-6)
    (row,) = plan([0.1], None, [1.0], weights=Whitened(0.0))
    assert row.dead_groups is None
    (row,) = plan([0.1], None, [1.0], weights=Whitened(0.0), group_size=8)
    assert row.dead_groups_start == pytest.approx(0.43046722, rel=1e-10)


def test_prompts_at_the_ends_stay_and_spend_nothing():
    for kl in ("reverse", "forward", "none"):
        (row,) = plan([0.0, 1.0, 0.0, 1.0], None, [0.5], weights=Group(8), kl=kl)
        assert (row.p_ref, row.p_star, row.p_exact, row.kl, row.kl_budget) == (0.5, 0.5, 0.5, 0.0, 0.0)
        assert (row.dead, row.saturates, row.iterations) == (0.5, 0.5, 0)
        assert row.mirror_steps is row.mirror_step_kl is None


def test_without_kl_everything_that_ever_succeeds_runs_to_one():
    (row,) = plan([0.0, 0.2, 0.5, 0.9], None, [3.0], weights=Group(8), kl="none")
    assert (row.p_star, row.p_exact, row.iterations) == (0.75, 0.75, 1)
    assert row.kl == pytest.approx(sum(-math.log(p) for p in (0.2, 0.5, 0.9)) / 4, rel=1e-12)
    assert recommended_range([0.2], None, weights=Group(8), kl="none") is None


def test_exact_iterations_are_counted_and_followed_as_a_plain_loop_does():
    """p_ref = 0.3 (ε = 0, β = 1.15): slow, just above its fold at 1.0819. p_ref = 0.05, β = 0.7: jumps past 0.4788."""
    for p_ref, beta in ((0.3, 1.15), (0.05, 0.7), (0.3, 2.0)):
        path, x = [p_ref], logit(p_ref)
        for _ in range(256):
            x = logit(p_ref) + 1 / (beta * math.sqrt(sigmoid(x) * sigmoid(-x) + 1e-5))
            path.append(sigmoid(x))
        end = sum(path[-64:]) / 64
        settled = max((n + 1 for n, p in enumerate(path) if abs(p - end) > 0.05 * (end - p_ref)), default=0)
        (row,) = plan([p_ref], None, [beta], weights=Whitened(1e-5))
        assert row.p_exact == pytest.approx(end, rel=1e-9)
        assert row.iterations == settled, (p_ref, beta)
    (jumped,) = plan([0.05], None, [0.7], weights=Whitened(1e-5))
    assert jumped.p_star < 0.5 < 0.999 < jumped.p_exact


def test_oscillating_prompts_are_counted():
    """The 2-cycle of p_ref = 0.001 at β = 3, and chaos for p_0 ≠ p_ref only at p_ref = 1e-4, β = 5."""
    (row,) = plan([1e-3, 1e-3, 0.02, 0.2], None, [3.0], weights=Whitened(1e-5))
    assert (row.oscillates, row.iterations) == (0.5, None)
    assert plan([1e-4], None, [5.0], weights=Whitened(1e-5))[0].oscillates == 0
    assert plan([1e-3, 5e-3], None, [3.0], weights=Group(4))[0].oscillates == 0


def test_oscillating_prompts_of_counts_are_counted_by_how_likely_they_oscillate():
    """At β = 3 prompts with p_ref below .0025 or so do: 1 of 1000 and 2 of 2000 probably, 40 of 2000 never."""
    (row,) = plan([1, 2, 40], [1000, 2000, 2000], [3.0], weights=Whitened(1e-5))
    assert 0.3 < row.oscillates < 0.66
    (sure,) = plan([1000, 2000, 40_000], [1_000_000, 2_000_000, 2_000_000], [3.0], weights=Whitened(1e-5))
    assert sure.oscillates == pytest.approx(2 / 3, abs=1e-3)


def test_oscillation_under_k3_is_counted_by_its_own_map():
    (row,) = plan([1e-3, 0.02, 0.03, 0.2], None, [3.0], weights=Whitened(1e-9), kl="forward")
    assert row.oscillates == 0.5


def test_mirror_steps_follow_the_arc_sine():
    (row,) = plan([0.01, 0.2], None, [5.0], weights=Whitened(0.0))
    stars = curve([0.01, 0.2], None, [5.0], weights=Whitened(0.0), quantiles=[0.5, 1.0])[0].quantiles
    expected, spent = [], []
    for p, star in zip((0.01, 0.2), stars, strict=True):
        arrived = p + 0.95 * (star - p)
        expected.append(10 * (math.asin(math.sqrt(arrived)) - math.asin(math.sqrt(p))))
        moved = sigmoid(logit(p) + 1 / (5 * math.sqrt(p * (1 - p))))
        spent.append(moved * math.log(moved / p) + (1 - moved) * math.log((1 - moved) / (1 - p)))
    assert row.mirror_steps == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert row.mirror_step_kl == pytest.approx(sum(spent) / 2, rel=1e-9)


def test_the_beta_of_a_single_prompt_is_the_closed_form():
    for p_ref, target in ((0.2, 0.5), (0.05, 0.3), (0.6, 0.8)):
        aim = beta_for_mean(target, [p_ref], None, weights=MeanOnly())
        assert aim.beta == pytest.approx(1 / (logit(target) - logit(p_ref)), rel=1e-7)
        aim = beta_for_mean(target, [p_ref], None, weights=Whitened(0.0))
        assert aim.beta == pytest.approx(
            1 / math.sqrt(target * (1 - target)) / (logit(target) - logit(p_ref)), rel=1e-7
        )
        aim = beta_for_mean(target, [p_ref], None, weights=Whitened(0.0), kl="forward")
        assert aim.beta == pytest.approx(math.sqrt(target * (1 - target)) / (target - p_ref), rel=1e-7)
        assert (aim.p_star, aim.jumps_to) == (pytest.approx(target, abs=1e-9), None)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12),
    st.floats(0.05, 0.95),
    st.sampled_from(["reverse", "forward"]),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_the_beta_of_a_mean_is_verified_by_the_plan(counts, share, kl):
    start, most = sum(counts) / 20 / len(counts), sum(k > 0 for k in counts) / len(counts)
    if most - start < 1e-6:
        return
    target = start + share * (most - start)
    aim = beta_for_mean(target, counts, 20, weights=Group(32), kl=kl)
    (at,) = plan(counts, 20, [aim.beta], weights=Group(32), kl=kl)
    assert at.p_star == pytest.approx(aim.p_star, abs=1e-9)
    if aim.jumps_to is None:
        assert at.p_star == pytest.approx(target, abs=1e-9)
    else:
        assert aim.p_star < target < aim.jumps_to
        assert curve(counts, 20, [aim.beta * (1 - 1e-9)], weights=Group(32), quantiles=[])[0].p_star > target


def test_a_target_that_the_fold_jumps_over_is_said_to_be_jumped_over():
    """ε = 0: Δ = ln((Δ+2)/(Δ−2)) − L_ref, β_c = 2/√(Δ²−4), p_c = ½ + 1/Δ; below β_c, p* = 1."""
    delta = root(lambda d: d - math.log((d + 2) / (d - 2)) + logit(0.2), 2 + 1e-12, 50.0)
    aim = beta_for_mean(0.95, [0.2], None, weights=Whitened(0.0))
    assert aim.beta == pytest.approx(2 / math.sqrt(delta**2 - 4), rel=1e-9)
    assert aim.p_star == pytest.approx(0.5 + 1 / delta, abs=1e-5)
    assert aim.jumps_to == 1.0


def test_the_recommended_range_spans_ten_to_ninety_per_cent_of_the_reachable_gain():
    sweep = recommended_range([0.2], None, weights=MeanOnly())
    assert sweep.low.beta == pytest.approx(1 / (logit(0.92) - logit(0.2)), rel=1e-7)
    assert sweep.high.beta == pytest.approx(1 / (logit(0.28) - logit(0.2)), rel=1e-7)
    for counts in ([0, 0], [10, 10], [0, 10]):
        assert recommended_range(counts, 10, weights=Group(8)) is None
    sweep = recommended_range([0, 5], 10, weights=Group(8))  # a prompt without success halves what can be reached
    assert (sweep.low.p_star, sweep.high.p_star) == pytest.approx((0.25 + 0.9 * 0.25, 0.25 + 0.1 * 0.25), abs=1e-9)


def test_the_mean_falls_with_beta_and_the_kl_never_exceeds_its_budget():
    rows = plan([1, 3, 10, 40, 63], 64, [0.1 * 1.3**i for i in range(20)], weights=Group(16, epsilon=1e-4))
    stars = [row.p_star for row in rows]
    assert stars == sorted(stars, reverse=True)
    assert all(0 < row.kl <= row.kl_budget * (1 + 1e-9) for row in rows)
    assert all(row.p_star_low <= row.p_star <= row.p_star_high for row in rows)
    assert all(row.p_exact > row.p_ref for row in rows)


@pytest.mark.parametrize(("kl", "beta"), [("reverse", 1.0), ("reverse", 1.15), ("forward", 2.0), ("none", 1.0)])
def test_iterations_of_training_are_those_of_the_differential_equation(kl, beta):
    """Against Euler's method in steps of a thousandth; β = 1.15 is slow, just above the fold of p_ref = 0.3 (ε = 0, 1.0819)."""
    p_refs, speed, weights = [0.05, 0.3, 1.0], 0.1, Whitened(1e-5)
    (row,) = plan(p_refs, None, [beta], weights=weights, kl=kl, speed=speed)
    start, path, ends = [logit(p) for p in p_refs[:2]], [], []
    x = [*start]
    for _ in range(200_000):
        path.append(sum(map(sigmoid, x)) / 3 + 1 / 3)
        for i, (now, first) in enumerate(zip(x, start, strict=True)):
            v = sigmoid(now) * sigmoid(-now)
            ahead = {"reverse": now - first, "forward": (sigmoid(now) - sigmoid(first)) / v, "none": 0.0}[kl]
            x[i] = min(now + 1e-3 * (1 / math.sqrt(v + 1e-5) / beta - ahead), 30.0)
    ends = row.p_star
    away = max(i for i, p in enumerate(path) if abs(p - ends) > 0.05 * (ends - path[0]))
    expected = away * 1e-3 / (speed * (1.0 if kl == "none" else beta)) * (beta if kl == "none" else 1.0)
    assert row.training == pytest.approx(expected, abs=1.5, rel=0.02)
    assert plan(p_refs, None, [beta], weights=weights, kl=kl)[0].training is None


def test_training_takes_no_time_where_nothing_moves_and_scales_with_the_speed():
    assert plan([0.0, 1.0], None, [1.0], weights=Group(8), speed=0.1)[0].training == 0
    slow, fast = (plan([1, 30, 200], 400, [1.0], weights=Group(8), speed=s)[0].training for s in (0.001, 0.01))
    assert slow == pytest.approx(10 * fast, abs=10)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("successes", lambda: plan([], 10, [1.0], weights=Group(8))),
        ("successes", lambda: plan([11], 10, [1.0], weights=Group(8))),
        ("successes", lambda: plan([1.5], None, [1.0], weights=Group(8))),
        ("successes", lambda: plan([math.nan], None, [1.0], weights=Group(8))),
        ("successes", lambda: plan(3, 10, [1.0], weights=Group(8))),
        ("trials", lambda: plan([1, 2], [10, 10, 10], [1.0], weights=Group(8))),
        ("trials", lambda: plan([0], 0, [1.0], weights=Group(8))),
        ("beta", lambda: plan([1], 10, [1.0, 0.0], weights=Group(8))),
        ("beta", lambda: plan([1], 10, [math.nan], weights=Group(8))),
        ("kl", lambda: plan([1], 10, [1.0], weights=Group(8), kl="k3")),
        ("speed", lambda: plan([1], 10, [1.0], weights=Group(8), speed=0.0)),
        ("speed", lambda: plan([1], 10, [1.0], weights=Group(8), speed=math.nan)),
        ("confidence", lambda: plan([1], 10, [1.0], weights=Group(8), confidence=1.0)),
        ("target", lambda: beta_for_mean(0.1, [2], 10, weights=Group(8))),
        ("target", lambda: beta_for_mean(0.2, [2], 10, weights=Group(8))),
        ("target", lambda: beta_for_mean(1.0, [2], 10, weights=Group(8))),
        ("target", lambda: beta_for_mean(math.nan, [2], 10, weights=Group(8))),
        ("target", lambda: beta_for_mean(0.6, [0, 5], 10, weights=Group(8))),
        ("target", lambda: beta_for_mean(0.6, [5], 10, weights=Group(8), kl="none")),
        ("quantiles", lambda: curve([5], 10, [1.0], weights=Group(8), quantiles=[1.5])),
    ],
)
def test_wrong_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()
