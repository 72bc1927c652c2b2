"""What ties the rooms together that must not import each other."""

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import theory
from grpo_jax.objective import DR_GRPO, GRPO, GRPO_TRL, beta_effective, group_advantages
from grpo_jax.report.forecast import group_weights

OBJECTIVES = [GRPO, GRPO_TRL, DR_GRPO, replace(GRPO, scale="mean"), replace(DR_GRPO, baseline="leave_one_out")]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("group_size", [2, 5, 8])
def test_the_theory_weighs_what_the_trainer_weighs(objective, group_size):
    """E[A | success] and −E[A | failure] of the trainer's advantages, over all reward vectors, are the theory's ω⁺ and ω⁻."""
    rewards = np.array(list(itertools.product([0.0, 1.0], repeat=group_size)), np.float32)
    advantages = np.asarray(group_advantages(jnp.asarray(rewards), **objective.normaliser()), np.float64)
    for p in (0.03, 0.4, 0.9):
        others = p ** rewards[:, 1:].sum(-1) * (1 - p) ** (group_size - 1 - rewards[:, 1:].sum(-1))
        first = rewards[:, 0] == 1
        plus, minus = (others[first] * advantages[first, 0]).sum(), -(others[~first] * advantages[~first, 0]).sum()
        weights = group_weights(objective, group_size)
        np.testing.assert_allclose(theory.omega_plus(p, weights), plus, rtol=2e-5)
        np.testing.assert_allclose(theory.omega_minus(p, weights), minus, rtol=2e-5)
        np.testing.assert_allclose(theory.omega(p, weights), plus + minus, rtol=2e-5)


def test_effective_beta_of_a_leave_one_out_baseline():
    objective = replace(GRPO, baseline="leave_one_out", epsilon=0.0, ddof=1)
    effective = beta_effective(1.3, objective=objective, group_size=6)
    a = theory.flow_point(0.2, beta=1.3, weights=group_weights(objective, 6))
    b = theory.flow_point(0.2, beta=effective, weights=theory.Group(6))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert beta_effective(1.3, objective=replace(DR_GRPO, baseline="leave_one_out"), group_size=6) == 1.3


def test_effective_beta_is_what_the_fixed_point_sees():
    """ddof 1 at β is ddof 0 at β_eff; mean-only with a group's own mean is Ω = 1 at β_eff."""
    bessel = replace(GRPO, ddof=1, epsilon=0.0)
    for beta in (0.4, 1.0, 3.0):
        effective = beta_effective(beta, objective=bessel, group_size=6)
        a = theory.flow_point(0.2, beta=beta, weights=theory.Group(6, ddof=1))
        b = theory.flow_point(0.2, beta=effective, weights=theory.Group(6))
        np.testing.assert_allclose(a, b, rtol=1e-5)
        effective = beta_effective(beta, objective=DR_GRPO, group_size=6)
        a = theory.flow_point(0.2, beta=beta, weights=group_weights(DR_GRPO, 6))
        b = theory.flow_point(0.2, beta=effective, weights=theory.MeanOnly())
        np.testing.assert_allclose(a, b, rtol=1e-5)
