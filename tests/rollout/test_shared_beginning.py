"""Prompts with a shared beginning, which is run once for all: the same samples, scores and gradients as without."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.data.prompts import PromptSet, prompt_batch
from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.rollout import Layout, sample_groups, score_groups, score_packed
from grpo_jax.train.iteration import Recipe
from grpo_jax.train.scores import pull_back

CONFIG = DecoderConfig(
    vocab_size=13, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, max_length=64
)
WINDOWED = replace(CONFIG, window=4, local_layers=(1,), local_rope_theta=20.0)
SHARED, T, G = 20, 5, 3


def prompts(num_shared):
    """Three prompts of 21, 23 and 24 tokens that begin alike, padded on the left."""
    rng = np.random.default_rng(0)
    beginning, lengths = rng.integers(3, 13, SHARED), (1, 3, 4)
    tokens, mask = np.zeros((3, 26), np.int32), np.zeros((3, 26), bool)
    for row, own in enumerate(lengths):
        ids = [*beginning, *rng.integers(3, 13, own)]
        tokens[row, 26 - len(ids) :], mask[row, 26 - len(ids) :] = ids, True
    return prompt_batch(PromptSet(tokens, mask, tokens[:, :1], mask[:, :1], num_shared), np.arange(3))


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_a_shared_beginning_changes_nothing_but_the_work(config):
    policy, params = make_policy(config), init_params(config, jax.random.key(1))
    whole, apart = prompts(0), prompts(SHARED)
    assert apart.tokens.shape == (3, 6)
    assert whole.lengths().tolist() == apart.lengths().tolist() == [21, 23, 24]
    options = {"group_size": G, "max_completion": T, "stop_ids": (2,), "pad_id": 0}
    rollout, same = (
        jax.jit(lambda p: sample_groups(policy, params, p, jax.random.key(5), **options))(p) for p in (whole, apart)
    )
    np.testing.assert_array_equal(rollout.completions, same.completions)
    np.testing.assert_allclose(rollout.logps, same.logps, atol=2e-5)

    given = rollout.completions, rollout.mask
    plain = score_groups(policy, params, whole, *given)[0].reshape(rollout.mask.shape)
    for score in (
        lambda p: score_groups(policy, params, p, *given)[0].reshape(rollout.mask.shape),
        lambda p: score_packed(policy, params, p, *given, layout=Layout(20)),
    ):
        np.testing.assert_allclose(*(jnp.where(rollout.mask, x, 0.0) for x in (score(apart), plain)), atol=2e-5)

    recipe = Recipe(policy, None, None, None, Layout(20))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, G)), jnp.float32)
    wanted = pull_back(recipe, params, whole, rollout, weights)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(x).max())),
        wanted,
        pull_back(recipe, params, apart, rollout, weights),
    )
