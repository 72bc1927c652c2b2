"""The paper's contrastive form is the clipped surrogate of the group's advantages: value, gradient, and the theory's weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import theory
from grpo_jax.objective import Objective, contrastive_loss, group_advantages, grpo_loss

G, T = 5, 4
SUCCESSES = [0, 1, 4, 5, 2]  # of the five groups
RANDOM = np.random.default_rng(0)
REWARDS = jnp.asarray(np.concatenate([RANDOM.permutation(np.arange(G) < k) for k in SUCCESSES]), jnp.float32)
B = len(REWARDS)
LENGTHS = RANDOM.integers(1, T + 1, B)
LENGTHS[7] = 0  # and a completion without tokens
MASK = jnp.asarray(np.arange(T)[None] < LENGTHS[:, None])
LOGPS = jnp.asarray(-2 * RANDOM.random((B, T)), jnp.float32)
OLD = jnp.asarray(LOGPS + 0.2 * RANDOM.normal(size=(B, T)), jnp.float32)
JUNK = lambda x: jnp.where(MASK, x, jnp.nan)  # noqa: E731
NORMALISERS = [
    {"baseline": baseline, "scale": scale, "ddof": ddof, "epsilon_in": place}
    for baseline, scale in itertools.product(("mean", "leave_one_out", "none"), ("std", "mean", "none"))
    for ddof, place in (itertools.product((0, 1), ("variance", "std")) if scale == "std" else ((0, "variance"),))
]
CLIPS = {"unclipped": (None, None), "clipped": (0.2, 0.3), "below": (0.1, None), "above": (None, 0.1)}


def ratios():
    return jnp.exp(jnp.where(MASK, LOGPS - OLD, 0.0).sum(-1))


def test_the_cases_are_on_both_sides_of_the_clip():
    beyond = (ratios() < 0.8, ratios() > 1.3)
    for reward, side in itertools.product((0, 1), beyond):
        assert ((reward == REWARDS) & side).any()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("old", [OLD, None], ids=["off-policy", "on-policy"])
def test_contrastive_is_grpo_without_kl(clip, old):
    """For every normaliser; junk outside the mask."""
    low, high = CLIPS[clip]

    @jax.jit
    def both(logps):
        results = []
        for normaliser in NORMALISERS:
            objective = Objective(**normaliser, epsilon=0.01, kl="none", clip_low=low, clip_high=high)

            def grpo(logps, objective=objective):
                advantages = group_advantages(REWARDS.reshape(-1, G), **objective.normaliser()).reshape(-1)
                old_logps = None if old is None else JUNK(old)
                return grpo_loss(logps, old_logps, None, advantages, MASK, beta=0.0, objective=objective)[0]

            def contrast(logps, objective=objective):
                clips = {"clip_low": low, "clip_high": high}
                old_logps = None if old is None else JUNK(old)
                return contrastive_loss(
                    logps, old_logps, REWARDS, MASK, group_size=G, **objective.normaliser(), **clips
                )

            results.append((jax.value_and_grad(grpo)(logps), jax.value_and_grad(contrast)(logps)))
        return results

    values = set()
    for normaliser, ((value, gradient), (other, other_gradient)) in zip(NORMALISERS, both(JUNK(LOGPS)), strict=True):
        np.testing.assert_allclose(other, value, atol=1e-6, rtol=1e-5, err_msg=str(normaliser))
        np.testing.assert_allclose(other_gradient, gradient, atol=1e-6, rtol=1e-5, err_msg=str(normaliser))
        assert jnp.abs(gradient).max() > 1e-3
        values.add(round(float(jnp.abs(gradient).sum()), 5))
    assert len(values) == len(NORMALISERS)  # no two normalisers are the same by an oversight


@pytest.mark.parametrize("weights", [theory.Whitened(0.01), theory.WhitenedStd(0.01), theory.MeanOnly()], ids=str)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_rows_are_the_terms_of_the_theory(weights, clip):
    """Where a group's share of successes stands for p: −mean of `theory.contrastive_term` over the rows."""
    choices = {
        theory.Whitened: {},
        theory.WhitenedStd: {"epsilon_in": "std"},
        theory.MeanOnly: {"scale": "none"},
    }[type(weights)]
    rows = slice(
        G, 3 * G
    )  # groups with one and with all but one success; row 7, without tokens, is left out by its mask
    p = jnp.repeat(jnp.array([1 / G, (G - 1) / G]), G)
    term = theory.contrastive_term(ratios()[rows], REWARDS[rows], p, weights=weights, clip=clip)
    wanted = -jnp.where(MASK[rows].any(-1), term, 0.0).mean()
    loss = contrastive_loss(
        LOGPS[rows],
        OLD[rows],
        REWARDS[rows],
        MASK[rows],
        group_size=G,
        epsilon=0.01,
        clip_low=clip,
        clip_high=clip,
        **choices,
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_weights_by_hand():
    """One success in four: ω⁺ = √3 and ω⁻ = 1/√3 without smoothing, on rows that are single tokens of ratio 1."""
    slopes = jax.grad(contrastive_loss)(
        jnp.zeros((4, 1)), None, jnp.array([1, 0, 0, 0]), jnp.ones((4, 1), bool), group_size=4, epsilon=0.0
    )
    np.testing.assert_allclose(slopes[:, 0] * 4, [-(3**0.5)] + [3**-0.5] * 3, rtol=1e-6)


@pytest.mark.parametrize("kind", [bool, np.int8, jnp.int32, jnp.bfloat16])
def test_verdicts_of_any_type(kind):
    options = {"group_size": G, "clip_low": 0.2, "clip_high": 0.2}
    wanted = contrastive_loss(LOGPS, OLD, REWARDS, MASK, **options)
    assert contrastive_loss(LOGPS, OLD, REWARDS.astype(kind), MASK, **options) == wanted


def test_one_group_more_changes_no_other():
    """Rows of other groups enter through the division alone."""
    gradient = jax.grad(contrastive_loss)
    whole = gradient(LOGPS, OLD, REWARDS, MASK, group_size=G)
    part = gradient(LOGPS[G : 2 * G], OLD[G : 2 * G], REWARDS[G : 2 * G], MASK[G : 2 * G], group_size=G)
    np.testing.assert_allclose(whole[G : 2 * G] * B, part * G, rtol=1e-5, atol=1e-7)
    for group, successes in enumerate(SUCCESSES):
        assert (whole[group * G : (group + 1) * G] == 0).all() == (successes in (0, G))
