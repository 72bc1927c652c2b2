"""Products with the score features against the scores themselves, written out by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.rollout import Layout, PromptBatch, sample_groups, score_groups
from grpo_jax.train import scores
from grpo_jax.train.iteration import Recipe

CONFIG = DecoderConfig(
    vocab_size=11, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, max_length=16
)
P, G, T = 3, 4, 4


@pytest.fixture(scope="module")
def case():
    """The recipe, parameters, prompts and rollout, and the scores [P · G, parameters]."""
    policy, params = make_policy(CONFIG), init_params(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = PromptBatch(
        jnp.asarray(rng.integers(3, 11, (P, 3)), jnp.int32), jnp.ones((P, 3), bool), jnp.arange(P, dtype=jnp.int32)
    )
    rollout = sample_groups(policy, params, prompts, jax.random.key(1), group_size=G, max_completion=T, stop_ids=(2,))
    flat, unravel = ravel_pytree(params)

    def of_completions(flat):
        logps, _ = score_groups(policy, unravel(flat), prompts, rollout.completions, rollout.mask, temperature=0.7)
        return jnp.where(rollout.mask.reshape(-1, T), logps, 0.0).sum(-1)

    recipe = Recipe(policy, None, None, None, Layout(12), temperature=0.7)
    return recipe, params, prompts, rollout, np.asarray(jax.jacrev(of_completions)(flat), float), unravel


def test_both_products_are_those_of_the_scores(case):
    recipe, params, prompts, rollout, matrix, unravel = case
    rng = np.random.default_rng(2)
    u = rng.normal(size=(P, G))
    found = ravel_pytree(scores.pull_back(recipe, params, prompts, rollout, jnp.asarray(u, jnp.float32)))[0]
    np.testing.assert_allclose(found, u.ravel() @ matrix, rtol=1e-4, atol=1e-5)

    w = rng.normal(size=matrix.shape[1])
    direction = unravel(jnp.asarray(w, jnp.float32))
    wanted = matrix @ w
    step = jnp.float32(0.01 / np.abs(wanted).max())
    found = scores.along(recipe, params, direction, step, prompts, rollout)
    np.testing.assert_allclose(np.asarray(found).ravel(), wanted, atol=2e-3 * np.abs(wanted).max())


def whiten(gradients, gradient):
    moments = None
    for g in gradients:
        moments = scores.moments(g, moments)
    white, product = scores.whiten(scores.whitening(moments, gradient), gradient)
    np.testing.assert_allclose(product, ravel_pytree(white)[0] @ ravel_pytree(gradient)[0], rtol=1e-4)
    return white


def test_whitening_is_the_inverse_roots_of_both_sides(case):
    params, unravel = case[1], case[5]
    rng = np.random.default_rng(3)
    gradients = [unravel(jnp.asarray(rng.normal(size=case[4].shape[1]), jnp.float32)) for _ in range(2)]
    white = whiten(gradients, gradients[0])
    assert jax.tree.map(jnp.shape, white) == jax.tree.map(jnp.shape, params)

    g = [np.asarray(x["layers"]["gate"], float)[0] for x in gradients]

    def root(sides):
        if len(sides[0][0]) > len(sides[0]):  # the longer side of a matrix is whitened entry by entry
            sums = sum(np.square(x).sum(0) for x in sides)
            return np.diag(1 / np.sqrt(sums / sums.mean() + scores.DAMPING))
        moments = sum(x.T @ x for x in sides)
        values, vectors = np.linalg.eigh(
            moments / np.trace(moments) * len(moments) + scores.DAMPING * np.eye(len(moments))
        )
        return (vectors / np.sqrt(values)) @ vectors.T

    size = np.sqrt(sum(np.square(x).mean() for x in g))
    wanted = root([x.T for x in g]) @ g[0] @ root(g) / size
    np.testing.assert_allclose(white["layers"]["gate"][0], wanted, atol=1e-3 * np.abs(wanted).max())


def test_a_long_side_is_whitened_entry_by_entry_and_zeros_stay_finite(monkeypatch):
    monkeypatch.setattr(scores, "LARGEST", 3)
    gradient = {
        "embedding": jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32),
        "norm": jnp.zeros(4),
    }
    white = whiten([gradient], gradient)
    assert np.isfinite(ravel_pytree(white)[0]).all()
    assert not np.asarray(white["norm"]).any()
    g = np.asarray(gradient["embedding"], float)
    rows = np.square(g).sum(1)
    moments = g.T @ g
    values, vectors = np.linalg.eigh(moments / np.trace(moments) * 2 + scores.DAMPING * np.eye(2))
    wanted = (g / np.sqrt(rows / rows.mean() + scores.DAMPING)[:, None]) @ (vectors / np.sqrt(values)) @ vectors.T
    np.testing.assert_allclose(white["embedding"], wanted / np.sqrt(np.square(g).mean()), rtol=1e-3, atol=1e-4)
