"""The test of the recurrence finds it where it holds, and misses it where it does not."""

import doctest
import json

import jax
import numpy as np
import pytest

from experiments import recurrence
from grpo_jax import theory

WEIGHTS, BETAS, TRIALS = theory.Group(8, epsilon=1e-4), (0.5, 1.0, 2.0, 4.0), 1024


def sampled(solve, seed):
    """Counts of 100 prompts that have come to rest at each β, as a run would measure them."""
    rng = np.random.default_rng(seed)
    p_ref = rng.beta(1.0, 1.5, 100)
    with jax.enable_x64(True):
        stars = [np.asarray(solve(p_ref, beta=beta, weights=WEIGHTS)) for beta in BETAS]
    before = rng.binomial(TRIALS, p_ref)
    return [
        recurrence.gains(before, rng.binomial(TRIALS, star), star, trials=TRIALS, beta=beta, weights=WEIGHTS)
        for star, beta in zip(stars, BETAS, strict=True)
    ]


def test_prompts_at_their_fixed_points_lie_on_the_line():
    lines = [recurrence.fitted(sampled(theory.flow_point, seed)) for seed in range(8)]
    slopes = np.array([(line["slope"] - 1) / line["slope_error"] for line in lines])
    # The four runs share their reference, so errors are correlated and the standard errors somewhat small.
    assert np.abs(slopes).max() < 6 and abs(np.mean([line["slope"] for line in lines]) - 1) < 0.01
    assert 0.8 < np.mean([line["chi_square"] for line in lines]) < 1.2


def test_prompts_of_the_other_kl_do_not():
    line = recurrence.fitted(sampled(theory.forward_kl_fixed_point, 0))
    assert line["chi_square"] > 20 and abs(line["slope"] - 1) > 0.1


def test_a_run_directory_is_read_with_its_own_normaliser():
    result = {"group_size": 4, "prompts": {"p_ref": [0.25, 0.01], "p_final": [0.5, 0.02], "p_star": [0.5, 0.02]}}
    config = {"objective.name": "GRPO", "objective.beta": 2.0, "objective.scale": "none", "evaluate.final_samples": 100}
    gains = recurrence.gains_of(result, config)
    assert gains.predicted == pytest.approx([0.75 / 2])  # (G − 1)/G over β; the second prompt is too rare
    assert gains.measured == pytest.approx([np.log(75.5 / 25.5)])


def test_the_figure_and_its_numbers_are_written(tmp_path):
    runs = {str(beta): run for beta, run in zip(BETAS, sampled(theory.flow_point, 1), strict=True)}
    recurrence.plot_gains(runs, recurrence.fitted([*runs.values()]), tmp_path)
    numbers = json.loads((tmp_path / "recurrence.json").read_text(encoding="utf-8"))
    assert set(numbers["runs"]) == set(runs) and numbers["fit"]["prompts"] > 300
    assert (tmp_path / "recurrence.png").stat().st_size > 10_000


def test_examples():
    assert doctest.testmod(recurrence).failed == 0
