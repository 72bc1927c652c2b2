"""Attention of one token of each row is written out by hand; here it is against the definition, at every kind of length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.attention import attend

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
        return attend(query, [(keys[:ROWS, :, :, :length], values[:ROWS, :, :, :length], visible[:, None, None])])

    attended = jax.jit(of_part)(query, keys, values)
    wanted = expected(query, keys[:, :, :, :length], values[:, :, :, :length], visible)
    np.testing.assert_allclose(attended, wanted, atol=2e-6)


def test_one_token_is_differentiable():
    """As two tokens are, whose products are matrices: the first sees what it sees alone."""
    query, key, value = (random(ROWS, n, m, WIDTH, seed=n) for n, m in ((2, HEADS), (21, KV_HEADS), (22, KV_HEADS)))
    keys, values = (jnp.asarray(x[:, :21].transpose(0, 2, 3, 1)) for x in (key, value))

    def total(keys, values, count):
        return (attend(query[:, :count], [(keys, values, jnp.ones((ROWS, 1, 1, 21), bool))])[:, 0] ** 2).sum()

    for one, two in zip(*(jax.grad(total, (0, 1))(keys, values, count) for count in (1, 2)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
