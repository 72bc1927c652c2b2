"""The test of the recurrence finds it where it holds, and misses it where it does not."""

import doctest
import functools
import json

import jax
import numpy as np
import pytest

from experiments import recurrence
from grpo_jax import theory

WEIGHTS, BETAS, TRIALS = theory.Group(8, epsilon=1e-4), (0.5, 1.0, 2.0, 4.0), 1024


@functools.cache
def ends(solve, seed):
    rng = np.random.default_rng(seed)
    p_ref = rng.beta(1.0, 1.5, 100)
    with jax.enable_x64(True):
        return p_ref, [np.asarray(solve(p_ref, beta=beta, weights=WEIGHTS)) for beta in BETAS]


def sampled(solve, seed, off=0.0):
    """Counts of 100 prompts that have come to rest at each β, as a run would measure them; ``off``: each run's own shift."""
    p_ref, stars = ends(solve, 0)
    rng = np.random.default_rng(seed)
    before = rng.binomial(TRIALS, p_ref)
    runs = []
    for star, beta in zip(stars, BETAS, strict=True):
        reached = 1 / (1 + (1 - star) / star * np.exp(-off * rng.normal()))
        after = rng.binomial(TRIALS, reached)
        runs.append(recurrence.gains(before, after, star, trials=TRIALS, beta=beta, weights=WEIGHTS))
    return runs


def naive(runs):
    """The slope and its standard error as if all points were independent."""
    x, y, error, _ = (np.concatenate(values) for values in zip(*runs, strict=True))
    design = np.stack([x, np.ones_like(x)], axis=1) / error[:, None]
    covariance = np.linalg.inv(design.T @ design)
    return (covariance @ design.T @ (y / error))[0], covariance[0, 0] ** 0.5


@pytest.mark.parametrize(("off", "least", "naive_most"), [(0.0, 0.92, 1.0), (0.05, 0.88, 0.65)])
def test_the_interval_of_the_slope_holds_its_limit_where_that_of_independent_points_does_not(off, least, naive_most):
    """100 experiments of four runs. The limit is the slope without sampling and without shifts, 1 but for what Ω_G(p̂) adds."""
    lines, alone = [], []
    for seed in range(100):
        runs = sampled(theory.flow_point, seed, off)
        lines.append(recurrence.fitted(runs))
        alone.append(naive(runs))
    limit = 1.0
    held = np.mean([line["slope_low"] <= limit <= line["slope_high"] for line in lines])
    held_alone = np.mean([abs(slope - limit) <= 1.96 * error for slope, error in alone])
    assert least <= held <= 1.0, held
    assert held_alone <= naive_most, held_alone


def test_prompts_at_their_fixed_points_lie_on_the_line():
    lines = [recurrence.fitted(sampled(theory.flow_point, seed)) for seed in range(8)]
    assert abs(np.mean([line["slope"] for line in lines]) - 1) < 0.01
    assert 0.8 < np.mean([line["chi_square"] for line in lines]) < 1.2


def test_prompts_of_the_other_kl_do_not():
    line = recurrence.fitted(sampled(theory.forward_kl_fixed_point, 0))
    assert line["chi_square"] > 20 and abs(line["slope"] - 1) > 0.1


def test_a_single_run_is_clustered_by_prompt_alone():
    (run,) = sampled(theory.flow_point, 0)[:1]
    line = recurrence.fitted([run])
    assert line["runs"] == 1 and line["slope_low"] < line["slope"] < line["slope_high"]


def test_a_run_directory_is_read_with_its_own_normaliser():
    result = {"group_size": 4, "prompts": {"p_ref": [0.25, 0.01], "p_final": [0.5, 0.02], "p_star": [0.5, 0.02]}}
    config = {"objective.name": "GRPO", "objective.beta": 2.0, "objective.scale": "none", "evaluate.final_samples": 100}
    gains = recurrence.gains_of(result, config)
    assert gains.predicted == pytest.approx([0.75 / 2])  # (G − 1)/G over β; the second prompt is too rare
    assert gains.measured == pytest.approx([np.log(75.5 / 25.5)])
    assert gains.prompt.tolist() == [0]


def test_the_figure_and_its_numbers_are_written(tmp_path):
    runs = {str(beta): run for beta, run in zip(BETAS, sampled(theory.flow_point, 1), strict=True)}
    recurrence.plot_gains(runs, recurrence.fitted([*runs.values()]), tmp_path)
    numbers = json.loads((tmp_path / "recurrence.json").read_text(encoding="utf-8"))
    assert set(numbers["runs"]) == set(runs) and numbers["fit"]["prompts"] > 300
    assert (tmp_path / "recurrence.png").stat().st_size > 10_000


def test_examples():
    assert doctest.testmod(recurrence).failed == 0
