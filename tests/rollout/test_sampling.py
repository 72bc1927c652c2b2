"""Group sampling: what is sampled, how its randomness is addressed, and that sampler and trainer see one distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.rollout import PromptBatch, sample_groups, score_groups

CONFIG = DecoderConfig(
    vocab_size=13, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, max_length=32
)
POLICY, PARAMS = make_policy(CONFIG), init_params(CONFIG, jax.random.key(1))
STOP, T, G = 2, 7, 4
KEY = jax.random.key(5)


def batch(padding=2, side="left", rows=3, junk=0) -> PromptBatch:
    """Prompts of 3, 4 and 5 tokens, with so much padding beside the longest."""
    rng = np.random.default_rng(0)
    width = 5 + padding
    tokens, mask = np.full((3, width), junk, np.int32), np.zeros((3, width), bool)
    for row, length in enumerate((3, 4, 5)):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        tokens[row, where], mask[row, where] = rng.integers(3, 13, length), True
    return PromptBatch(jnp.asarray(tokens[:rows]), jnp.asarray(mask[:rows]), jnp.array([7, 0, 100], jnp.int32)[:rows])


def sample(prompts, key=KEY, **options):
    options = {"group_size": G, "max_completion": T, "stop_ids": (STOP,), "pad_id": 0} | options
    return jax.jit(lambda p, k: sample_groups(POLICY, PARAMS, p, k, **options))(prompts, key)


def equal(a, b):
    """The same samples; the share of useful work may differ."""
    for x, y in zip(a[:-1], b[:-1], strict=True):
        if x.dtype == jnp.float32:
            np.testing.assert_allclose(x, y, atol=2e-5)
        else:
            np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def rollout():
    return sample(batch())


def test_masks_stops_and_truncation_tell_the_same_story(rollout):
    tokens, mask, truncated = (np.asarray(x) for x in (rollout.completions, rollout.mask, rollout.truncated))
    lengths = mask.sum(-1)
    assert (mask == (np.arange(T) < lengths[..., None])).all()  # a prefix of the row
    assert (lengths >= 1).all()
    last = np.take_along_axis(tokens, lengths[..., None] - 1, -1)[..., 0]
    assert ((last == STOP) == ~truncated).all()
    assert (lengths[truncated] == T).all()
    assert (tokens[~mask] == 0).all()
    assert ((tokens == STOP).sum(-1) == ~truncated).all()  # EOS is inside the mask, once
    assert truncated.any()
    assert (~truncated).any()  # the example shows both


def test_pad_may_be_the_stop_token(rollout):
    same = sample(batch(), pad_id=STOP)
    np.testing.assert_array_equal(same.mask, rollout.mask)
    np.testing.assert_array_equal(same.truncated, rollout.truncated)
    np.testing.assert_array_equal(np.where(same.mask, same.completions, 0), rollout.completions)


def test_sampler_logps_are_trainer_logps(rollout):
    for temperature in (1.0, 0.6):
        sampled = rollout if temperature == 1.0 else sample(batch(), temperature=temperature)
        logps, _ = score_groups(
            POLICY, PARAMS, batch(), sampled.completions, sampled.mask, temperature=temperature, chunk_size=3
        )
        difference = np.where(sampled.mask, sampled.logps - logps.reshape(sampled.logps.shape), 0.0)
        assert np.abs(difference).max() < 1e-5
        assert (np.asarray(sampled.logps)[~np.asarray(sampled.mask)] == 0).all()


def test_logps_of_the_full_forward(rollout):
    """Against one plain forward of prompt and completion together, without prefix or cache."""
    prompts = batch(padding=0)
    for row in range(3):
        prompt = np.asarray(prompts.tokens[row])[np.asarray(prompts.mask[row])]
        for g in range(G):
            n = int(rollout.mask[row, g].sum())
            text = np.concatenate([prompt, np.asarray(rollout.completions[row, g])[:n]])[None]
            positions = np.arange(text.shape[1], dtype=np.int32)[None]
            hidden, _ = POLICY.forward(
                PARAMS, jnp.asarray(text, jnp.int32), jnp.asarray(positions), jnp.ones(text.shape, bool)
            )
            full = jax.nn.log_softmax(POLICY.unembed(PARAMS, hidden))[0, len(prompt) - 1 : -1]
            chosen = np.asarray(full)[np.arange(n), text[0, len(prompt) :]]
            np.testing.assert_allclose(rollout.logps[row, g, :n], chosen, atol=1e-5)


@pytest.mark.parametrize("change", [{"side": "right"}, {"padding": 0}, {"padding": 9, "junk": 12}, {"junk": -1}])
def test_padding_changes_no_sample(rollout, change):
    equal(sample(batch(**change)), rollout)


def test_batch_split_changes_no_sample(rollout):
    alone = [sample(jax.tree.map(lambda x, i=i: x[i : i + 1], batch())) for i in range(3)]
    equal([jnp.concatenate(parts) for parts in zip(*(r[:-1] for r in alone), strict=True)] + [0], rollout)
    halves = [sample(batch(), group_size=2, first_sample=first) for first in (0, 2)]
    equal([jnp.concatenate(parts, axis=1) for parts in zip(*(r[:-1] for r in halves), strict=True)] + [0], rollout)


def test_a_longer_limit_continues_the_same_completions(rollout):
    longer = sample(batch(), max_completion=T + 4)
    np.testing.assert_array_equal(np.where(rollout.mask, longer.completions[..., :T], 0), rollout.completions)


def test_every_address_has_its_own_randomness(rollout):
    rows = np.asarray(rollout.completions)[np.asarray(rollout.truncated)]  # short ones may coincide
    assert len(np.unique(rows, axis=0)) == len(rows) > 4
    assert (np.asarray(sample(batch(), jax.random.key(6)).completions) != np.asarray(rollout.completions)).any()
    twice = batch()._replace(index=jnp.array([7, 7, 7], jnp.int32), tokens=jnp.repeat(batch().tokens[:1], 3, 0))
    twice = twice._replace(mask=jnp.repeat(batch().mask[:1], 3, 0))
    same = sample(twice).completions  # the same prompt index is the same address
    np.testing.assert_array_equal(same[0], same[1])


def test_frequencies_are_the_probabilities():
    """First tokens of 20,000 samples against the softmax: a χ² test at 1e-6."""
    prompts = batch(rows=1)
    sampled = sample(prompts, group_size=20_000, max_completion=1)
    assert (sampled.truncated == (sampled.completions[..., 0] != STOP)).all()
    counts = np.bincount(np.asarray(sampled.completions).ravel(), minlength=13)
    positions = jnp.maximum(jnp.cumsum(prompts.mask.astype(jnp.int32), 1) - 1, 0)
    hidden, _ = POLICY.forward(PARAMS, prompts.tokens, positions, prompts.mask)
    probs = np.asarray(jax.nn.softmax(POLICY.unembed(PARAMS, hidden[:, -1])))[0]
    chi2 = ((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum()
    assert chi2 < 55.0  # 12 degrees of freedom: P(χ² > 55) ≈ 2e-7


def test_greedy_takes_the_most_probable_token():
    greedy = sample(batch(), greedy=True)
    assert (greedy.completions == greedy.completions[:, :1]).all()  # no randomness within a group
    colder = sample(batch(), temperature=1e-3)
    np.testing.assert_array_equal(colder.completions, greedy.completions)
