"""The loss by hand: clips, caps and the effective β; other peers' numbers are in test_golden.py."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import (
    CISPO,
    GRPO,
    GRPO_TRL,
    RLOO,
    Objective,
    beta_effective,
    grpo_loss,
    grpo_loss_terms,
)


def of_ratios(objective, ratios, advantages):
    """(total, slope in log π) of completions of one token with the given ratios to π_old."""
    mask, old = jnp.ones((len(ratios), 1), bool), jnp.full((len(ratios), 1), -0.5)

    def loss(logps):
        return grpo_loss_terms(logps, old, None, jnp.array(advantages), mask, beta=0.0, objective=objective).total

    value, slope = jax.value_and_grad(loss)(old + jnp.log(jnp.array(ratios))[:, None])
    return value, slope[:, 0]


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_product"])
def test_clip_by_hand(ratio):
    objective = Objective(ratio=ratio, kl="none", clip_low=0.2, clip_high=0.3)
    value, slope = of_ratios(objective, [1.5, 0.5, 1.5, 0.5], [1.0, 1.0, -1.0, -1.0])
    np.testing.assert_allclose(value, -(1.3 + 0.5 - 1.5 - 0.8), rtol=1e-6)
    # Constant beyond the bound on the side that would profit; full gradient on the other side.
    np.testing.assert_allclose(slope, [0.0, -0.5, 1.5, 0.0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bound", [{"ratio_cap": 3.0}, {"dual_clip": 3.0}])
def test_failures_that_became_likely_stop_pushing(bound):
    """From the bound up, for A < 0 alone; what is below and what succeeds is as without it."""
    objective = Objective(ratio="token", kl="none", **bound)
    value, slope = of_ratios(objective, [5.0, 2.0, 0.5, 5.0], [-1.0, -1.0, -1.0, 1.0])
    np.testing.assert_allclose(value, 3.0 + 2.0 + 0.8 - 1.2, rtol=1e-6)
    np.testing.assert_allclose(slope, [0.0, 2.0, 0.0, 0.0], rtol=1e-6, atol=1e-7)


def test_cispo_keeps_every_gradient():
    """The weight is bounded on both sides and has no gradient of its own: the slope is −weight·A whatever the sign of A."""
    objective = replace(CISPO, clip_low=0.2, ratio_cap=3.0, reduce="sequence_mean")
    ratios, advantages = [5.0, 2.0, 0.5, 5.0], [-1.0, -1.0, 2.0, 1.0]
    value, slope = of_ratios(objective, ratios, advantages)
    weights = np.clip(ratios, 0.8, 3.0) * advantages
    np.testing.assert_allclose(slope, -weights, rtol=1e-6)
    np.testing.assert_allclose(value, -(weights * (np.log(ratios) - 0.5)).sum(), rtol=1e-5)


@pytest.mark.parametrize("kl", ["token_reverse", "token_reverse_weighted", "token_forward"])
def test_no_distance_makes_a_kl_push_away_from_its_anchor(kl):
    """Also where exponentials are held finite. On-policy, k2 and the weighted k3 have the slope log π/π_ref at any distance."""
    distance = jnp.array([-1e4, -25.0, -15.0, -5.0, -0.1, 0.1, 5.0, 15.0, 25.0, 1e4])[:, None]
    objective, nothing = Objective(ratio="token", kl=kl), jnp.zeros(len(distance))

    def loss(logps):
        mask = jnp.ones(logps.shape, bool)
        return grpo_loss_terms(logps, None, logps_at - distance, nothing, mask, beta=1.0, objective=objective).total

    logps_at = jnp.full(distance.shape, -0.5)
    slope = jax.grad(loss)(logps_at)
    assert (slope * distance >= 0).all(), slope
    inner = slice(3, 7)
    wanted = 1 - np.exp(-np.asarray(distance)[inner]) if kl == "token_forward" else distance[inner]
    np.testing.assert_allclose(slope[inner], wanted, rtol=2e-4)
    if kl != "token_forward":
        np.testing.assert_allclose(slope, distance, rtol=2e-4)


@pytest.mark.parametrize(
    ("objective", "beta", "group_size", "wanted"),
    [
        (GRPO, 1.0, 8, 1.0),
        (GRPO_TRL, 1.0, 4, 1.1547005),  # std of ddof 1: √(G/(G−1))
        (Objective(scale="none"), 2.0, 8, 2 * 8 / 7),  # the group's own mean is subtracted
        (RLOO, 2.0, 8, 2.0),  # and here it is not
        (Objective(baseline="none", scale="none"), 0.7, 3, 0.7),
    ],
)
def test_beta_effective(objective, beta, group_size, wanted):
    np.testing.assert_allclose(beta_effective(beta, objective=objective, group_size=group_size), wanted, rtol=1e-6)


def test_an_outer_division_is_the_only_one():
    """loss = total/weight, metrics are sums over weights."""
    logps, mask = jnp.array([[-1.0, -2.0], [-0.5, -9.0]]), jnp.array([[True, True], [True, False]])
    arguments = (logps, logps - 0.1, logps - 0.2, jnp.array([1.0, -0.5]), mask)
    for reduce, weight in (("token_mean", 3.0), ("sequence_mean", 2.0), ("sequence_sum", 2.0)):
        objective = replace(GRPO_TRL, reduce=reduce)
        terms = grpo_loss_terms(*arguments, beta=0.5, objective=objective)
        loss, metrics = grpo_loss(*arguments, beta=0.5, objective=objective)
        assert terms.weight == weight
        np.testing.assert_allclose(loss, terms.total / weight, rtol=1e-6)
        assert metrics.keys() == terms.metrics.keys()
        for name, (total, count) in terms.metrics.items():
            np.testing.assert_allclose(metrics[name], total / count, rtol=1e-6, err_msg=name)
        k3 = np.exp(-0.2) + 0.2 - 1
        np.testing.assert_allclose(metrics["kl/token"], k3, rtol=1e-4)
        np.testing.assert_allclose(metrics["policy/ratio"], np.exp(0.1), rtol=1e-6)


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_corrections_are_capped(correction):
    """min(π_old/π_sampler, cap) of single tokens; both levels are then the same."""
    objective = replace(GRPO, kl="none", ratio="token", correction=correction, correction_cap=1.5)
    old, mask = jnp.full((2, 1), -0.5), jnp.ones((2, 1), bool)
    sampler = old - jnp.log(jnp.array([[4.0], [0.5]]))
    terms = grpo_loss_terms(
        old, old, None, jnp.array([1.0, 3.0]), mask, beta=0.0, objective=objective, sampler_logps=sampler
    )
    np.testing.assert_allclose(terms.total, -(1.5 * 1.0 + 0.5 * 3.0), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["rollout/correction"], (1.5 + 0.5, 2.0), rtol=1e-6)


def test_corrections_weigh_every_term():
    """Token weights 1.44 and 1, of which the sequence takes the geometric mean, 1.2; surrogate, KL and bonus alike."""
    old, mask, entropy = jnp.full((1, 2), -1.0), jnp.ones((1, 2), bool), jnp.array([[0.5, 0.25]])
    sampler = old - jnp.log(jnp.array([[1.44, 1.0]]))
    for level, kl, wanted in (
        ("sequence", "sequence_reverse", 1.2 * (-2 * 2.0 + 0.7 * 0.2 - 0.3 * 0.75)),
        ("token", "token_reverse", 2.44 * (-2.0 + 0.7 * 0.005) - 0.3 * (1.44 * 0.5 + 0.25)),
    ):
        objective = replace(GRPO, ratio="token", kl=kl, correction=level, correction_cap=1.5)
        weights = {"beta": 0.7, "entropy": entropy, "entropy_bonus": 0.3}
        terms = grpo_loss_terms(
            old, old, old - 0.1, jnp.array([2.0]), mask, **weights, objective=objective, sampler_logps=sampler
        )
        np.testing.assert_allclose(terms.total, wanted, rtol=1e-6)
