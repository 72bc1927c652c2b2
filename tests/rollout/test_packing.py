"""Packing against a loop in Python, its promises for any lengths, and packed scores against plain ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.rollout import PromptBatch, score_groups
from grpo_jax.rollout.packing import Layout, first_fit, from_slots, pack, take_microbatch, to_slots
from grpo_jax.rollout.scoring import score_packed
from grpo_jax.train.sharding import make_mesh, row_sharding

CAPACITY = 7


def loop_first_fit(sizes, capacity):
    """(bin, start) of each, item by item."""
    room, found = [], {}
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((b for b, left in enumerate(room) if left >= sizes[i]), len(room))
        if place == len(room):
            room.append(capacity)
        found[i] = (place, capacity - room[place])
        room[place] -= sizes[i]
    return [found[i] for i in range(len(sizes))]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, CAPACITY), min_size=9, max_size=9))
def test_first_fit_is_that_of_a_loop(sizes):
    found = jax.jit(first_fit, static_argnums=1)(jnp.array(sizes, jnp.int32), CAPACITY)
    assert list(zip(*(x.tolist() for x in found), strict=True)) == loop_first_fit(sizes, CAPACITY)


P, G, T = 6, 3, 5


@partial(jax.jit, static_argnames="layout")
def packed_microbatches(lengths, *, layout):
    """The packing of lengths [P, G], all its micro-batches, and tokens 1 … sent there and back."""
    mask = jnp.arange(T, dtype=jnp.int32)[None, None] < lengths[:, :, None]
    packing = pack(mask, layout)
    microbatches = [take_microbatch(packing, number, T) for number in range(packing.num_microbatches)]
    tokens = [jnp.where(m.slot_tokens < 0, 0, m.slot_tokens + 1) for m in microbatches]
    back = [from_slots(x, m.token_slots) for x, m in zip(tokens, microbatches, strict=True)]
    values = jnp.arange(packing.num_groups * G * T, dtype=jnp.int32).reshape(1, -1, G, T) + 1
    there = [to_slots(jnp.repeat(values, layout.shards, 0), m.slot_tokens) for m in microbatches]
    sizes = {"rows": packing.num_rows, "length": packing.row_length}
    return packing.used, microbatches, tokens, back, there, sizes


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(0, T), min_size=P * G, max_size=P * G),
    st.sampled_from([(1, 4, 1), (8, 4, 1), (24, 4, 3), (30, 9, 2), (40, 5, 1), (1000, 12, 1), (1000, None, 2)]),
)
def test_every_token_has_one_slot(lengths, how):
    """Each once, in order and within one row; rows are of one prompt, groups whole, micro-batches beyond those in use empty."""
    tokens, row_length, shards = how
    lengths = np.array(lengths).reshape(P, G)
    used, microbatches, placed, back, there, sizes = packed_microbatches(
        jnp.asarray(lengths, jnp.int32), layout=Layout(tokens, row_length, shards)
    )
    run = np.maximum(lengths - 1, 0).reshape(shards, -1, G)
    seen = np.zeros((shards, P // shards), int)
    for number, microbatch in enumerate(microbatches):
        sources = np.asarray(microbatch.slot_tokens)
        np.testing.assert_array_equal(placed[number], there[number])
        assert sources.shape[1:] == (int(sizes["rows"]), int(sizes["length"]))
        for shard in range(shards):
            groups = np.asarray(microbatch.groups[shard])
            present = [q for q, p in enumerate(groups) if p < P // shards]
            assert number < used or not present
            for q in present:
                seen[shard, groups[q]] += 1
            wanted = [(q * G + g) * T + t for q in present for g in range(G) for t in range(run[shard, groups[q], g])]
            flat = sources[shard].ravel()
            np.testing.assert_array_equal(np.sort(flat[flat >= 0]), wanted)
            for row, inside in enumerate(sources[shard]):
                kept = inside[inside >= 0]
                if len(kept):
                    (owner,) = set(groups[kept // (G * T)])
                    assert int(microbatch.row_prompts[shard, row]) == owner
                    for completion in set(kept // T):
                        at = np.flatnonzero(inside // T == completion)
                        np.testing.assert_array_equal(inside[at] % T, np.arange(len(at)))
                        np.testing.assert_array_equal(np.diff(at), 1)
            for q in present:
                for g in range(G):
                    n, first = run[shard, groups[q], g], (q * G + g) * T + 1
                    np.testing.assert_array_equal(back[number][shard, q, g, :n], first + np.arange(n))
                    assert not back[number][shard, q, g, n:].any()
    assert (seen == 1).all()


def test_short_completions_need_fewer_microbatches():
    short, long = (jnp.broadcast_to((jnp.arange(128) < n)[None, None], (64, 8, 128)) for n in (33, 128))
    found = [pack(mask, Layout(2048, row_length=128)) for mask in (short, long)]
    assert [int(x.used) for x in found] == [8, 32]  # 64 groups of 2 or 8 rows, 16 rows in a micro-batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 4}, "6 prompts are not divisible by 4 shards"),
        ({"row_length": 3}, "row_length=3 is too short for completions of up to 5 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pack(jnp.ones((P, G, T), bool), Layout(100, **options))


CONFIG = DecoderConfig(
    16,
    2,
    16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=32,
    max_length=32,
    window=3,
    local_layers=(1,),
    remat="full",
)


@pytest.fixture(scope="module")
def scored():
    """Eight prompts, padded on the left, with completions of 0 … 6 tokens, and their plain scores."""
    policy, params, random = make_policy(CONFIG), init_params(CONFIG, jax.random.key(0)), np.random.default_rng(0)
    prompts = PromptBatch(
        jnp.asarray(random.integers(0, 16, (8, 4)), jnp.int32),
        jnp.asarray(np.arange(4)[None] >= random.integers(0, 4, 8)[:, None]),
        jnp.arange(8, dtype=jnp.int32),
    )
    completions = jnp.asarray(random.integers(0, 16, (8, 3, 6)), jnp.int32)
    mask = jnp.asarray(np.arange(6) < random.integers(0, 7, (8, 3))[:, :, None])
    options = {"temperature": 0.7}
    plain, _ = jax.jit(partial(score_groups, policy, **options))(params, prompts, completions, mask)
    return policy, params, prompts, completions, mask, jnp.where(mask, plain.reshape(mask.shape), 0.0)


@pytest.mark.parametrize(
    "how",
    [
        {"microbatch_tokens": 1, "row_length": 5},
        {"microbatch_tokens": 40, "row_length": 13},
        {"microbatch_tokens": 24, "shards": 4},
        {"microbatch_tokens": 4000, "shards": 8, "chunk_size": 2},
    ],
)
def test_packed_scores_are_plain_scores(scored, how):
    policy, params, *arrays, wanted = scored
    found = jax.jit(partial(score_packed, policy, temperature=0.7, layout=Layout(**how)))(params, *arrays)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    if how.get("shards") == 8:
        spread = jax.device_put(arrays, row_sharding(make_mesh(data=8)))
        many = jax.jit(partial(score_packed, policy, temperature=0.7, layout=Layout(**how)))(params, *spread)
        np.testing.assert_allclose(many, wanted, atol=2e-6)


def test_what_stands_outside_the_mask_changes_no_score(scored):
    policy, params, prompts, completions, mask, _ = scored
    score = jax.jit(partial(score_packed, policy, layout=Layout(24)))
    junk = jnp.where(mask, completions, 2**31 - 1)
    np.testing.assert_array_equal(score(params, prompts, junk, mask), score(params, prompts, completions, mask))


def test_completions_of_one_token(scored):
    policy, params, prompts, completions, *_ = scored
    mask = jnp.ones((8, 3, 1), bool)
    found = jax.jit(partial(score_packed, policy, layout=Layout(24), temperature=0.7))(
        params, prompts, completions[:, :, :1], mask
    )
    plain, _ = jax.jit(partial(score_groups, policy, temperature=0.7))(params, prompts, completions[:, :, :1], mask)
    np.testing.assert_allclose(found, plain.reshape(8, 3, 1), atol=2e-6)
