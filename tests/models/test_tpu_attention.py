"""The kernel of decoding, run without a TPU, against plain sums over the same slots."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import DecoderConfig, attention, init_params, make_policy
from grpo_jax.models.attention import KeyValues, attend
from grpo_jax.models.tpu_attention import CachedLayer, attend_to_cache, heads_of_vectors, slots_read
from grpo_jax.rollout import PromptBatch, sample_groups
from grpo_jax.train.sharding import gather_layer, make_mesh, parameter_shardings, sharded_shapes, spread_sampling
from tests.pods import ROOT

HEADS = {  # query heads, key heads, features: the vectors of a TPU hold half a head … several heads
    "two heads in a vector": (14, 2, 64),
    "a head in a vector": (6, 2, 128),
    "four heads in a vector, two of them": (8, 8, 32),
    "none fits": (6, 3, 40),
    "one head": (4, 1, 8),
}


@pytest.fixture
def kernel(monkeypatch):
    """The kernel wherever a TPU would have it."""
    monkeypatch.setattr(attention, "attend_to_cache", partial(attend_to_cache, interpret=True))
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *given, default, **forms: forms.get("tpu", default)(*given)
    )


def random_layer(heads, rows, slots, filled, dtype="float32", layers=3, layer=1, more_rows=2, seed=0):
    """(query, layer of a cache with more rows and slots): behind the filled slots is what spoils every sum."""
    N, K, H = heads
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    keys, values = (draw(rows + more_rows, layers, K * H, slots + 5) for _ in range(2))
    for x in (keys, values):
        x[..., filled:] = np.nan
        x[:, [i for i in range(layers) if i != layer]] = np.nan
    visible = (rng.random((rows, 1, 1, slots)) < 0.7) & (np.arange(slots) < filled)
    visible[..., 0] = True
    visible[0] = False  # a row that sees nothing
    cached = CachedLayer(
        jnp.asarray(keys, dtype), jnp.asarray(values, dtype), jnp.int32(layer), jnp.int32(filled), jnp.asarray(visible)
    )
    return jnp.asarray(draw(rows, N, H), dtype), cached


def expected(query, cached, scale, softcap):
    """In float64: the highest score, the sum of exp(score − highest), and the values so weighted."""
    B, N, H = query.shape
    filled, layer, K = int(cached.filled), int(cached.layer), cached.keys.shape[2] // H
    keys, values = (np.asarray(x, np.float64)[:B, layer, :, :filled].reshape(B, K, H, -1) for x in cached[:2])
    keys, values = (np.repeat(x, N // K, 1) for x in (keys, values))  # [B, N, H, filled]
    scores = np.einsum("bnh,bnhs->bns", np.asarray(query, np.float64), keys) * scale
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    seen = np.asarray(cached.visible)[:, 0, :, :filled]
    top = np.maximum(np.where(seen, scores, -1e30).max(-1), -1e29)
    weights = np.where(seen, np.exp(np.where(seen, scores - top[..., None], 0.0)), 0.0)
    return top, weights.sum(-1), np.einsum("bns,bnhs->bnh", weights, values)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    ("slots", "filled", "softcap"),
    [(5, 1, None), (64, 64, None), (200, 140, 1.5), (192, 64, None), (192, 65, 3.0), (300, 300, None)],
)
def test_the_kernel_gives_the_sums_over_filled_slots(heads, slots, filled, softcap):
    """Of one layer and of rows in front; a block that is not full, and one that nothing fills."""
    query, cached = random_layer(heads, 3, slots, filled)
    found = attend_to_cache(query, cached, 0.25, softcap, interpret=True)
    for x, y, name in zip(found, expected(query, cached, 0.25, softcap), ("top", "total", "attended"), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("rows", [1, 7, 9])
def test_rows_come_in_blocks_of_which_the_last_may_not_be_full(rows, monkeypatch):
    heads = HEADS["two heads in a vector"]
    monkeypatch.setattr("grpo_jax.models.tpu_attention.ON_CHIP", 2**20)  # a few rows
    query, cached = random_layer(heads, rows, 256, 150)
    found = attend_to_cache(query, cached, 0.125, None, interpret=True)
    for x, y in zip(found, expected(query, cached, 0.125, None), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


def test_in_bfloat16_sums_are_float32():
    query, cached = random_layer(HEADS["two heads in a vector"], 4, 256, 200, "bfloat16")
    found = attend_to_cache(query, cached, 0.125, None, interpret=True)
    assert all(x.dtype == jnp.float32 for x in found)
    for x, y in zip(found, expected(query, cached, 0.125, None), strict=True):
        np.testing.assert_allclose(x, y, atol=0.05, rtol=0.01)


def test_attend_joins_it_with_a_prefix_and_maps_over_it(kernel):
    """With keys that two rows share; under jax.vmap, where there is no kernel, each member as alone."""
    (N, K, H), rows = HEADS["none fits"], 4
    query, cached = random_layer((N, K, H), rows, 140, 130)
    rng = np.random.default_rng(5)
    prefix = KeyValues(
        *(jnp.asarray(rng.standard_normal((2, K, H, 6)), jnp.float32) for _ in range(2)), jnp.ones((2, 1, 1, 6), bool)
    )
    plain = KeyValues(*(x[:, :, :, :130] for x in cached.slice(K)), cached.visible[..., :130])
    wanted = attend(query[:, None], [plain, prefix])
    np.testing.assert_allclose(attend(query[:, None], [cached, prefix]), wanted, atol=2e-6)

    queries, fills = jnp.stack([query, 2 * query]), jnp.array([130, 130])
    clean = cached._replace(keys=jnp.nan_to_num(cached.keys), values=jnp.nan_to_num(cached.values))
    mapped = jax.vmap(lambda q, n: attend(q[:, None], [clean._replace(filled=n), prefix]))(queries, fills)
    np.testing.assert_allclose(mapped[0], wanted, atol=2e-6)
    np.testing.assert_allclose(mapped[1], attend(2 * query[:, None], [plain, prefix]), atol=2e-6)


@pytest.mark.parametrize(
    "options", [{}, {"window": 5, "local_layers": (0,), "attention_softcap": 2.0}], ids=["plain", "window"]
)
def test_samples_do_not_depend_on_the_kernel(kernel, options):
    """Whole rollouts: rows shrink, prompts have lengths of their own, and a shared beginning; tokens equal, and their logps."""
    config = DecoderConfig(37, 3, 24, num_heads=6, num_kv_heads=2, head_dim=8, d_ff=40, max_length=300, **options)
    params = init_params(config, jax.random.key(0))
    lengths = np.array([5, 3, 4, 2])
    prompts = PromptBatch(
        jnp.asarray(np.random.default_rng(0).integers(1, 37, (4, 5)), jnp.int32),
        jnp.asarray(np.arange(5) < lengths[:, None]),
        jnp.arange(4, dtype=jnp.int32),
        shared=jnp.broadcast_to(jnp.array([7, 8, 9], jnp.int32), (4, 3)),
    )

    def sampled(config):
        sample = partial(sample_groups, make_policy(config), group_size=4, max_completion=150, stop_ids=(1, 2))
        return jax.jit(sample)(params, prompts, jax.random.key(1))

    plain, by_kernel = sampled(config), sampled(replace(config, decode_kernel=True))
    assert plain.mask.sum(-1).min() < 20 and plain.mask.sum(-1).max() > 60
    np.testing.assert_array_equal(by_kernel.completions, plain.completions)
    np.testing.assert_allclose(by_kernel.logps, plain.logps, atol=2e-5)


@pytest.mark.parametrize("gather", ["model", "layer"])
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 4}, {"fsdp": 3, "tensor": 2}], ids=str)
def test_samples_do_not_depend_on_the_mesh(kernel, axes, gather):
    """Rows spread over devices, or all on each where they are no multiple; heads over others; weights gathered layer by layer."""
    config = DecoderConfig(
        37, 2, 24, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=40, max_length=64, decode_kernel=True
    )
    params = init_params(config, jax.random.key(0))
    prompts = PromptBatch(jnp.ones((4, 3), jnp.int32), jnp.ones((4, 3), bool), jnp.arange(4, dtype=jnp.int32))
    options = {"group_size": 4, "max_completion": 40, "stop_ids": (1, 2)}
    sample = partial(sample_groups, make_policy(config), **options)
    alone = jax.jit(sample)(params, prompts, jax.random.key(1))

    mesh = make_mesh(**axes, devices=jax.devices()[: np.prod(list(axes.values()))])
    shapes = sharded_shapes(params, mesh)
    if gather == "layer":
        sample = partial(sample_groups, make_policy(config, gather=gather_layer(shapes)), **options)
    spread = spread_sampling(sample, mesh, "float32", gather=gather)
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    rollout = jax.jit(spread)(placed, prompts, jax.random.key(1))
    np.testing.assert_array_equal(rollout.completions, alone.completions)
    np.testing.assert_allclose(rollout.logps, alone.logps, atol=2e-5)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU's compiler: pip install libtpu")
def test_every_generation_compiles_every_shape():
    command = [sys.executable, "-m", "tests.models.tpu_shapes", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), timeout=300)
    assert done.stdout.count("17 shapes") == 4, done.stderr[-2000:]


def test_what_the_kernel_reads():
    assert [slots_read(n, 300) for n in (1, 64, 65, 257, 300)] == [64, 64, 128, 300, 300]
    assert [heads_of_vectors(K, H) for _, K, H in HEADS.values()] == [2, 1, 4, 3, 1]
