"""Attention of one token of each row is written out by hand; here it is against the definition, at every kind of length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.attention import KeyValues, attend

ROWS, HEADS, KV_HEADS, WIDTH = 3, 4, 2, 8


def random(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def expected(query, keys, values, visible):
    """In float64, head by head."""
    out = np.zeros((ROWS, HEADS, WIDTH))
    for b, n in np.ndindex(ROWS, HEADS):
        k = n // (HEADS // KV_HEADS)
        scores = query[b, 0, n].astype(float) @ keys[b, k] / np.sqrt(WIDTH)
        weights = np.where(visible[b], np.exp(scores - scores.max()), 0.0)
        out[b, n] = values[b, k] @ weights / weights.sum()
    return out.reshape(ROWS, 1, -1)


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("length", [1, 5, 16, 37, 128, 300, 600])
def test_one_token_of_each_row(length, platform, monkeypatch):
    """Fewer keys than a vector, a rest, and more than the partial sums hold; read as a part of longer arrays."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda **forms: forms[platform]())
    query, keys, values = (
        random(*shape, seed=i)
        for i, shape in enumerate([(ROWS, 1, HEADS, WIDTH), *[(ROWS + 1, KV_HEADS, WIDTH, length + 3)] * 2])
    )
    visible = np.random.default_rng(3).random((ROWS, length)) < 0.7
    visible[:, 0] = True

    def of_part(query, keys, values):
        parts = (x[:ROWS, :, :, :length] for x in (keys, values))
        return attend(query, [KeyValues(*parts, visible[:, None, None])])

    attended = jax.jit(of_part)(query, keys, values)
    wanted = expected(query, keys[:, :, :, :length], values[:, :, :, :length], visible)
    np.testing.assert_allclose(attended, wanted, atol=2e-6)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_blocks_of_queries_give_what_all_queries_give(size):
    """With a prefix that two rows share, a mask of each query, a cap, and a last block that is not full; gradients too."""
    rows, length, prompt = 4, 7, 5
    query, keys, values, prefix_keys, prefix_values = (
        random(*shape, seed=i)
        for i, shape in enumerate(
            [
                (rows, length, HEADS, WIDTH),
                *[(rows, KV_HEADS, WIDTH, length)] * 2,
                *[(rows // 2, KV_HEADS, WIDTH, prompt)] * 2,
            ]
        )
    )
    seen = np.random.default_rng(9).random((rows, 1, length, length)) < 0.7
    prefix_seen = np.random.default_rng(8).random((rows // 2, 1, 1, prompt)) < 0.7
    near = np.random.default_rng(7).random((rows // 2, 2, length, prompt)) < 0.8

    def total(arrays, query_block, prefix_seen):
        query, *keys_values, prefix_keys, prefix_values = arrays
        blocks = [KeyValues(*keys_values, seen), KeyValues(prefix_keys, prefix_values, prefix_seen)]
        attended = attend(query, blocks, softcap=3.0, query_block=query_block)
        return (attended**2).sum(), attended

    arrays = query, keys, values, prefix_keys, prefix_values
    for visible in (prefix_seen, near):
        wanted, by_blocks = (
            jax.jit(jax.grad(total, has_aux=True), static_argnums=1)(arrays, block, visible) for block in (None, size)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), by_blocks, wanted)


def test_blocks_of_queries_sum_gradients_in_float32():
    """Of keys in bfloat16: 64 blocks of one query each add to them, and lose nothing."""
    query, keys, values = (
        jnp.asarray(random(1, *shape, seed=i), jnp.bfloat16)
        for i, shape in enumerate([(64, HEADS, WIDTH), *[(KV_HEADS, WIDTH, 64)] * 2])
    )

    def total(keys, query_block):
        return attend(query, [KeyValues(keys, values, jnp.ones((1, 1, 64, 64), bool))], query_block=query_block).sum()

    whole, by_blocks = (jax.grad(total)(keys, block).astype(jnp.float32) for block in (None, 1))
    np.testing.assert_allclose(by_blocks, whole, atol=0.004 * np.abs(whole).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_in_any_order_see_the_keys_of_their_place(dtype):
    """Five of the six rows of two prompts, shuffled: each as where all six are in order."""
    prompts, group, slots = 2, 3, 7
    query = jnp.asarray(random(prompts * group, 1, HEADS, WIDTH, seed=0), dtype)
    keys, values = (jnp.asarray(random(prompts, KV_HEADS, WIDTH, slots, seed=i), dtype) for i in (1, 2))
    visible = np.random.default_rng(3).random((prompts, group, 1, slots)) < 0.7
    visible[..., 0] = True
    block = KeyValues(keys, values, jnp.asarray(visible))
    order = jnp.array([4, 0, 5, 2, 1])
    in_order = attend(query, [block])
    found = attend(query[order], [block._replace(order=(order, prompts * group))])
    np.testing.assert_allclose(found, in_order[order], atol=1e-6)
    # What is not finite in a row stays in it.
    spoilt = attend(query[order].at[2].set(jnp.inf), [block._replace(order=(order, prompts * group))])
    assert not np.isfinite(spoilt[2]).any()
    others = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(spoilt[others], found[others])


def test_one_token_is_differentiable():
    """As two tokens are, whose products are matrices: the first sees what it sees alone."""
    query, key, value = (random(ROWS, n, m, WIDTH, seed=n) for n, m in ((2, HEADS), (21, KV_HEADS), (22, KV_HEADS)))
    keys, values = (jnp.asarray(x[:, :21].transpose(0, 2, 3, 1)) for x in (key, value))

    def total(keys, values, count):
        block = KeyValues(keys, values, jnp.ones((ROWS, 1, 1, 21), bool))
        return (attend(query[:, :count], [block])[:, 0] ** 2).sum()

    for one, two in zip(*(jax.grad(total, (0, 1))(keys, values, count) for count in (1, 2)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
