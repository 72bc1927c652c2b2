"""Rows that have ended cost nothing and change nothing: the same samples however they are decoded."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.rollout import PromptBatch, sample_groups, score_groups
from grpo_jax.rollout.compaction import Stage, choose_stages

CONFIG = DecoderConfig(
    vocab_size=13, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, max_length=48
)
POLICY, PARAMS = make_policy(CONFIG), init_params(CONFIG, jax.random.key(1))
STOPS, T, P, G = (2, 5), 14, 8, 3
B = P * G
KEY = jax.random.key(5)
OPTIONS = {"group_size": G, "max_completion": T, "stop_ids": STOPS}
WHOLE = (Stage(B, (T,)),)


def batch() -> PromptBatch:
    rng = np.random.default_rng(0)
    mask = np.arange(6)[None] >= rng.integers(0, 4, P)[:, None]
    tokens = np.where(mask, rng.integers(3, 13, (P, 6)), 0).astype(np.int32)
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(P, dtype=jnp.int32) * 3)


def sample(params=PARAMS, key=KEY, prompts=None, policy=POLICY, **options):
    prompts = batch() if prompts is None else prompts
    return jax.jit(partial(sample_groups, policy, **(OPTIONS | options)))(params, prompts, key)


def same(a, b):
    for name in ("completions", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.logps, b.logps, atol=2e-5)


@pytest.fixture(scope="module")
def rollout():
    rollout = sample(stages=WHOLE)
    lengths = np.asarray(rollout.mask.sum(-1)).ravel()
    assert len(set(lengths.tolist())) > 8  # what follows is about ragged lengths
    assert 0 < np.asarray(rollout.truncated).sum() < B / 2
    return rollout


def work(lengths, stages):
    """Row-steps: all rows at the first token, then in every step the smallest stage that holds the live ones."""
    total = B
    for position in range(1, lengths.max()):
        live = (lengths > position).sum()
        total += min(stage.rows for stage in stages if stage.rows >= live)
    return total


MANY = (Stage(B, (3, T)), Stage(11, (6, T)), Stage(2, (T - 1,)))


@pytest.mark.parametrize("stages", [WHOLE, MANY, (Stage(B, (1, 2, T)), Stage(23, (T,)), Stage(1, (T,)))])
def test_stages_change_no_sample(rollout, stages):
    other = sample(stages=stages)
    same(other, rollout)
    lengths = np.asarray(rollout.mask.sum(-1)).ravel()
    expected = lengths.sum() / work(lengths, stages)
    np.testing.assert_allclose(other.useful, expected, rtol=1e-6)


def test_the_stages_that_are_chosen_change_no_sample():
    stages = choose_stages(B, 40)
    assert len(stages) == 3
    same(sample(max_completion=40), sample(max_completion=40, stages=(Stage(B, (40,)),)))


def test_compaction_saves_half_of_the_work(rollout):
    assert rollout.useful < 0.5 < sample(stages=MANY).useful


def test_logps_are_the_trainers(rollout):
    sampled = sample(stages=MANY)
    logps, _ = score_groups(POLICY, PARAMS, batch(), sampled.completions, sampled.mask)
    np.testing.assert_allclose(sampled.logps, jnp.where(sampled.mask, logps.reshape(P, G, T), 0.0), atol=1e-5)


def test_order_of_prompts_changes_no_sample(rollout):
    order = np.random.default_rng(1).permutation(P)
    moved = sample(prompts=jax.tree.map(lambda x: x[order], batch()), stages=MANY)
    same(moved, jax.tree.map(lambda x: x if x.ndim == 0 else x[order], rollout))


@pytest.mark.parametrize("options", [{"greedy": True}, {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05}])
def test_every_way_of_drawing_is_unchanged_by_stages(options):
    same(sample(stages=MANY, **options), sample(stages=WHOLE, **options))


def test_truncated_distributions_draw_from_the_most_probable(rollout):
    few = sample(top_k=3, stages=WHOLE)
    logps, _ = score_groups(POLICY, PARAMS, batch(), few.completions, few.mask)
    gain = np.asarray(few.logps - logps.reshape(few.logps.shape))[np.asarray(few.mask)]
    assert (gain > 0).all()  # every token is likelier among three than among all


def test_a_completion_ends_where_a_sequence_is_complete():
    """Of the tokens (10, 8) or (4, 4, 4): an automaton in the sampler against a search in what is sampled without it."""
    sequences = [(10, 8), (4, 4, 4)]
    prefixes = [(), (10,), (4,), (4, 4)]  # state s: the longest of them that is the end of the text
    table = np.zeros((5, 13), np.uint8)
    for state, prefix in enumerate(prefixes):
        for token in range(13):
            text = (*prefix, token)
            ends = any(text[-len(s) :] == s for s in sequences)
            longest = max((p for p in prefixes if text[len(text) - len(p) :] == p), key=len)
            table[state, token] = 4 if ends else prefixes.index(longest)
    free, bound = sample(stop_ids=(2,), stages=WHOLE), sample(stop_ids=(2,), stop_table=table, stages=MANY)
    cut = 0
    for row in np.ndindex(P, G):
        tokens = np.asarray(free.completions[row])[np.asarray(free.mask[row])].tolist()
        ends = [i + 1 for i in range(len(tokens)) if any(tuple(tokens[: i + 1][-len(s) :]) == s for s in sequences)]
        end = min(ends, default=len(tokens))
        cut += end < len(tokens)
        assert np.asarray(bound.completions[row])[np.asarray(bound.mask[row])].tolist() == tokens[:end]
        assert bool(bound.truncated[row]) == (not ends and bool(free.truncated[row]))
    assert cut > 2


def test_devices_change_no_sample(rollout):
    """Eight devices, each with a prompt and its own loops."""
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
    stages = (Stage(G, (4, T)), Stage(1, (T,)))

    def of_device(params, prompts, key):
        rollout = sample_groups(POLICY, params, prompts, key, **OPTIONS, stages=stages)
        return rollout._replace(useful=rollout.useful[None])

    spread = jax.shard_map(of_device, mesh=mesh, in_specs=(whole, rows, whole), out_specs=rows, check_vma=False)
    sampled = jax.jit(spread)(PARAMS, batch(), KEY)
    same(sampled, rollout)
    assert len(set(np.asarray(sampled.useful).tolist())) > 1


def test_members_of_a_vmap_run_in_step():
    """Three keys at once give what each gives alone, and no step copies a cache."""
    keys = jax.random.split(KEY, 3)

    def members(vmap_axis, keys):
        sample_member = partial(sample_groups, POLICY, PARAMS, batch(), **OPTIONS, stages=MANY, vmap_axis=vmap_axis)
        return jax.vmap(sample_member, axis_name="seed")(keys)

    together = jax.jit(partial(members, "seed"))(keys)
    for i, key in enumerate(keys):
        same(jax.tree.map(lambda x, i=i: x[i], together), sample(key=key, stages=WHOLE))
    cache = "x".join(map(str, (3, *POLICY.init_cache(B, T)["k"][0].shape)))
    choice = re.compile(rf"stablehlo\.select .*tensor<{cache}xf32>")  # between two caches
    programs = {step: jax.jit(partial(members, step)).lower(keys).as_text() for step in ("seed", None)}
    assert not choice.search(programs["seed"])
    assert choice.search(programs[None])


def test_parameters_are_prepared_once():
    calls = []

    def prepare(params, length):
        calls.append(length)
        return jax.tree.map(lambda x: 2 * x, params)

    same(sample(policy=POLICY._replace(prepare=prepare)), sample(params=jax.tree.map(lambda x: 2 * x, PARAMS)))
    assert calls == [6 + T]  # the longest text


@pytest.mark.parametrize("stages", [(Stage(B - 1, (T,)),), (Stage(B, (T,)), Stage(B, (T,))), (Stage(B, (T - 2,)),)])
def test_stages_that_do_not_fit_are_refused(stages):
    with pytest.raises(ValueError, match="stages"):
        sample_groups(POLICY, PARAMS, batch(), KEY, **OPTIONS, stages=stages)


def test_one_token_and_one_row():
    one = jax.tree.map(lambda x: x[:1], batch())
    alone = sample(prompts=one, group_size=1, max_completion=1)
    assert alone.completions.shape == (1, 1, 1)
    assert float(alone.useful) == 1.0


def test_two_stages_need_the_memory_of_all():
    """What the estimate of a run's memory rests on; one stage needs less, since nothing is moved."""
    policy = make_policy(replace(CONFIG, max_length=80))

    def memory(stages):
        program = jax.jit(partial(sample_groups, policy, **(OPTIONS | {"max_completion": 64}), stages=stages))
        return program.lower(PARAMS, batch(), KEY).compile().memory_analysis().temp_size_in_bytes

    stages = choose_stages(B, 64)
    assert len(stages) > 2
    two = memory(tuple(Stage(stage.rows, (64,)) for stage in stages[:2]))
    assert memory((Stage(B, (64,)),)) < two == pytest.approx(memory(stages), rel=0.02)
