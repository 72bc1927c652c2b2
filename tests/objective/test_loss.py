"""The loss: clipping, masking, reductions, traced beta, refusals, and numbers of peers."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import (
    DAPO,
    GRPO,
    GRPO_TRL,
    Objective,
    beta_effective,
    completion_logps,
    grpo_loss,
    grpo_loss_terms,
)

B, T, G = 8, 5, 4
RNG = np.random.default_rng(0)
LOGPS, OLD, REF = (jnp.asarray(-RNG.random((B, T)) * 3, jnp.float32) for _ in range(3))
ADVANTAGES = jnp.asarray(RNG.normal(size=B), jnp.float32)
MASK = jnp.asarray(np.arange(T)[None] < RNG.integers(1, T + 1, B)[:, None])
OBJECTIVES = {
    "GRPO": GRPO,
    "GRPO_TRL": GRPO_TRL,
    "DAPO": DAPO,
    "token_reverse": replace(GRPO, kl="token_reverse", ratio="token"),
    "sequence_mean": replace(GRPO, reduce="sequence_mean"),
}


def terms(objective, rows=slice(None), **changes):
    arrays = {"logps": LOGPS, "old_logps": OLD, "ref_logps": REF, "advantages": ADVANTAGES, "mask": MASK} | changes
    arrays = {k: v if v is None else v[rows] for k, v in arrays.items()}
    return grpo_loss_terms(**arrays, beta=0.3, objective=objective, group_size=G)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_masked_changes_nothing(name):
    objective = OBJECTIVES[name]
    junk = lambda x: jnp.where(MASK, x, jnp.float32(jnp.nan))  # noqa: E731
    value_and_grad = jax.value_and_grad(lambda lp, **k: terms(objective, logps=lp, **k).total)
    (clean, clean_grad), (dirty, dirty_grad) = (
        value_and_grad(LOGPS),
        value_and_grad(junk(LOGPS), old_logps=junk(OLD), ref_logps=junk(REF)),
    )
    assert clean == dirty
    assert (jnp.where(MASK, clean_grad, 0) == jnp.where(MASK, dirty_grad, 0)).all()
    assert (jnp.where(MASK, 0, clean_grad) == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_add_up(name):
    whole, first, second = (terms(OBJECTIVES[name], rows) for rows in (slice(None), slice(0, G), slice(G, B)))
    summed = jax.tree.map(jnp.add, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, summed)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_of_a_group_may_be_permuted(name):
    order = np.array([2, 0, 3, 1, 5, 4, 7, 6])
    np.testing.assert_allclose(terms(OBJECTIVES[name], order).total, terms(OBJECTIVES[name]).total, rtol=1e-5)


def test_clip_by_hand():
    mask = jnp.ones((4, 1), bool)
    ratio = jnp.array([1.5, 0.5, 1.5, 0.5])
    advantages = jnp.array([1.0, 1.0, -1.0, -1.0])
    for kind in ("token", "sequence_product"):
        objective = Objective(ratio=kind, kl="none", clip_low=0.2, clip_high=0.3)
        value, slope = jax.value_and_grad(
            lambda lp, o=objective: (
                grpo_loss_terms(lp, jnp.zeros((4, 1)), None, advantages, mask, beta=0.0, objective=o).total
            )
        )(jnp.log(ratio)[:, None])
        np.testing.assert_allclose(value, -(1.3 + 0.5 - 1.5 - 0.8), rtol=1e-6)
        # Constant beyond the bound on the side that would profit; full gradient on the other side.
        np.testing.assert_allclose(slope[:, 0], [0.0, -0.5, 1.5, 0.0], rtol=1e-6, atol=1e-7)


def test_beta_is_traced_and_differentiable():
    compiled = []

    @jax.jit
    def loss(beta):
        compiled.append(beta)
        return grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, beta=beta, group_size=G)[0]

    betas = jnp.linspace(0.1, 2.0, 8)
    looped = jnp.stack([loss(b) for b in betas])
    assert len(compiled) == 1
    np.testing.assert_allclose(jax.vmap(loss)(betas), looped, rtol=1e-5)
    slope = jax.grad(loss)(jnp.float32(0.5))
    kl = grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, beta=0.5, group_size=G)[1]["kl/sequence"]
    np.testing.assert_allclose(slope, kl, rtol=1e-5)  # the loss is linear in β with slope KL


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_log_ratios_stay_finite(name):
    for far in (-1e4, 1e4):
        value, gradient = jax.value_and_grad(lambda lp: terms(OBJECTIVES[name], logps=lp).total)(LOGPS + far)
        assert jnp.isfinite(value), far
        assert jnp.isfinite(gradient).all(), far


def test_all_masked_rows_are_harmless():
    mask = MASK.at[0].set(False)
    value, gradient = jax.value_and_grad(lambda lp: terms(GRPO_TRL, logps=lp, mask=mask).total)(LOGPS)
    assert jnp.isfinite(value)
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize(
    ("case", "objective", "beta"),
    [
        ("grpo", replace(GRPO_TRL, kl="none"), 0.0),
        ("grpo beta=0.04 k3", GRPO_TRL, 0.04),
        ("bnpo", replace(DAPO, clip_high=0.2), 0.0),
        ("dapo eps_high=0.28", DAPO, 0.0),
    ],
)
def test_golden_numbers_of_trl(shared, case, objective, beta):
    golden = json.loads((shared / "golden/peers_losses.json").read_text())["trl"]
    inputs = {k: jnp.array(v) for k, v in golden["inputs"].items() if k != "eps"}
    wanted = golden["cases"][case]

    def loss(logps):
        arrays = (inputs["old_logps"], inputs["ref_logps"], inputs["advantages"], inputs["mask"].astype(bool))
        return grpo_loss(logps, *arrays, beta=beta, objective=objective)[0]

    value, gradient = jax.value_and_grad(loss)(inputs["new_logps"])
    np.testing.assert_allclose(value, wanted["loss"], atol=1e-5)
    np.testing.assert_allclose(gradient, wanted["grad"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"mask": MASK.astype(jnp.float32)}, TypeError, "mask must be bool"),
        ({"advantages": ADVANTAGES[:, None]}, ValueError, "advantages"),
        ({"ref_logps": REF[:, 1:]}, ValueError, "ref_logps"),
        ({"ref_logps": None}, ValueError, "ref_logps may be None"),
        ({"beta": 1}, TypeError, "beta=1 must be a float"),
        ({"group_size": 3}, ValueError, "group_size=3"),
    ],
)
def test_bad_arguments_are_named(changes, error, match):
    arguments = {
        "logps": LOGPS,
        "old_logps": OLD,
        "ref_logps": REF,
        "advantages": ADVANTAGES,
        "mask": MASK,
        "beta": 0.1,
    }
    with pytest.raises(error, match=match):
        grpo_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"kl": "k1"}, "zero expected gradient"),
        ({"kl": "sequence"}, "kl='sequence'"),
        ({"ratio": "tokens"}, "ratio"),
        ({"reduce": "mean"}, "reduce"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": 0.0}, "clip_high"),
        ({"epsilon": float("nan")}, "epsilon"),
    ],
)
def test_impossible_objectives_are_refused(choice, match):
    with pytest.raises(ValueError, match=match):
        Objective(**choice)


def test_beta_effective():
    assert beta_effective(1.0, objective=GRPO, group_size=8) == 1.0
    np.testing.assert_allclose(beta_effective(1.0, objective=GRPO_TRL, group_size=4), 1.1547005)
    np.testing.assert_allclose(beta_effective(2.0, objective=Objective(scale="none"), group_size=8), 2 * 8 / 7)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
def test_chunked_logps_are_plain_logps(chunk_size):
    hidden = jnp.asarray(RNG.normal(size=(3, 7, 6)), jnp.float32)
    unembedding = jnp.asarray(RNG.normal(size=(6, 11)), jnp.float32)
    targets = jnp.asarray(RNG.integers(0, 11, (3, 7)), jnp.int32)

    def chunked(h, w):
        logps, entropy = completion_logps(h, w, targets, temperature=0.7, chunk_size=chunk_size)
        return (jnp.sin(logps) + entropy).sum()

    def plain(h, w):
        full = jax.nn.log_softmax(h @ w / 0.7)
        chosen = jnp.take_along_axis(full, targets[..., None], -1)[..., 0]
        return (jnp.sin(chosen) - (jnp.exp(full) * full).sum(-1)).sum()

    for a, b in zip(
        *(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(hidden, unembedding)) for f in (chunked, plain)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_never_sampled_tokens_of_probability_zero():
    unembedding = lambda h: jnp.where(jnp.arange(4)[None, None] == 3, -jnp.inf, h)  # noqa: E731
    hidden = jnp.zeros((1, 2, 4))
    value, gradient = jax.value_and_grad(
        lambda h: sum(x.sum() for x in completion_logps(h, unembedding, jnp.zeros((1, 2), jnp.int32)))
    )(hidden)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)  # −log 3 + log 3, twice
    assert jnp.isfinite(gradient).all()
