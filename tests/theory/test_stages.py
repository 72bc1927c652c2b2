"""Stages of training against the fixed-point equation of each, and against the gain that each must bring."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.theory import Group, MeanOnly, Whitened, bernoulli_kl, kl_budget, omega, stages

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("weights", [Whitened(1e-3), Group(8)], ids=repr)
def test_every_stage_solves_its_equation_and_gains_at_least_the_least_pull(weights):
    p_ref, beta = jnp.asarray([1e-4, 0.03, 0.5]), jnp.asarray([2.0, 2.0, 7.0])
    path = stages(jnp.log(p_ref / (1 - p_ref)), 6, beta=beta, weights=weights, logits=True)
    gained = jnp.diff(path, axis=0)
    np.testing.assert_allclose(gained, omega(path[1:], weights, logits=True) / beta[None], rtol=1e-9)
    least = float(omega(0.5, weights)) / beta
    assert bool((gained >= (least * (1 - 1e-12))[None]).all())
    assert bool((path[-1] - path[0] >= 6 * least * (1 - 1e-12)).all())


def test_the_stages_of_the_reference_values():
    path = stages(0.03, 5, beta=2.0, weights=Whitened(1e-3)).tolist()
    assert path[:5] == pytest.approx([0.03, 0.123, 0.296, 0.533, 0.798], abs=5e-4)
    assert 1 - path[5] < 1e-6


def test_mean_only_stages_are_a_line():
    path = stages(0.2, 8, beta=2.0, weights=MeanOnly(), logits=False)
    np.testing.assert_allclose(jnp.log(path / (1 - path)), math.log(0.25) + jnp.arange(9) / 2, rtol=1e-12)


def test_stages_outspend_no_budget_but_that_of_one():
    """Reset or not, the policy stays on one line: KL to the first reference is that of two coins, below ln(1/p_ref)."""
    path = stages(0.03, 12, beta=1.0, weights=MeanOnly())
    assert bool((bernoulli_kl(path, 0.03) <= kl_budget(0.03)).all()) and float(path[-1]) > 0.99


def test_ends_stay_and_bad_counts_are_refused():
    assert stages(jnp.asarray([0.0, 1.0]), 2, beta=1.0, weights=MeanOnly()).tolist() == [[0.0, 1.0]] * 3
    assert stages(0.3, 0, beta=1.0, weights=MeanOnly()).tolist() == pytest.approx([0.3])
    with pytest.raises(ValueError, match="num_stages"):
        stages(0.3, -1, beta=1.0, weights=MeanOnly())
