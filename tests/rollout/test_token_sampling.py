"""Sampling a token: against cumulative sums in float64, against sorting, and where float32 could go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.rollout.token_sampling import keep_likely, sample_tokens

LAST = np.nextafter(np.float32(1), np.float32(0))
SAMPLE = jax.jit(sample_tokens, static_argnames=("top_k", "greedy"))
KEEP = jax.jit(lambda logits, **rules: keep_likely(logits.T, **rules).T, static_argnames="top_k")


def softmax(x):
    weights = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("vocabulary", [1, 5, 128, 300, 4096])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_samples_invert_the_cumulative_distribution(vocabulary, scale):
    rng = np.random.default_rng(vocabulary)
    logits = (scale * rng.standard_normal((500, vocabulary)) + 50 * rng.standard_normal((500, 1))).astype(np.float32)
    uniform = rng.uniform(size=500).astype(np.float32)
    uniform[:3] = 0.0, 1e-30, LAST
    token, logp = (np.asarray(x) for x in SAMPLE(logits, uniform, temperature=0.7))
    probs = softmax(logits / np.float32(0.7))
    ends = probs.cumsum(-1)
    rows = np.arange(500)
    assert (token >= 0).all()
    assert (token < vocabulary).all()
    assert (uniform < ends[rows, token] + 1e-6).all()
    assert (uniform >= ends[rows, token] - probs[rows, token] - 1e-6).all()
    np.testing.assert_allclose(logp, np.log(probs[rows, token]), atol=2e-5)


def test_frequencies_are_the_probabilities():
    """200,000 even numbers: every token as often as its probability says, to one draw or two."""
    count, logits = 200_000, np.float32(np.random.default_rng(1).standard_normal(300) * 2)
    uniform = np.float32((np.arange(count) + 0.5) / count)
    tokens, _ = SAMPLE(np.broadcast_to(logits, (count, 300)), uniform)
    counts = np.bincount(np.asarray(tokens), minlength=300)
    assert np.abs(counts - count * softmax(logits[None])[0]).max() < 2


@pytest.mark.parametrize("impossible", [-np.inf, -1e30, -200.0])
def test_probability_zero_is_never_sampled(impossible):
    """Zeros before, between and behind what can be sampled, in blocks of their own and inside others."""
    logits = np.full(1000, impossible, np.float32)
    possible = [131, 132, 140, 600, 601, 897]
    logits[possible] = [0.0, -60.0, 2.0, 1.0, 2.0, -80.0]
    uniform = np.concatenate([np.float32([0.0, 1e-38, 1e-20, LAST]), np.linspace(0, LAST, 4000, dtype=np.float32)])
    tokens, logps = SAMPLE(np.broadcast_to(logits, (len(uniform), 1000)), uniform)
    assert set(np.asarray(tokens).tolist()) <= set(possible)
    assert int(tokens[0]) == 131
    assert int(tokens[3]) in (601, 897)
    assert np.isfinite(np.asarray(logps)).all()


def test_greedy_is_the_first_of_the_most_probable():
    rng = np.random.default_rng(2)
    for vocabulary in (7, 256, 1000):
        logits = rng.integers(0, 30, (200, vocabulary)).astype(np.float32)  # with many equals
        token, logp = SAMPLE(logits, np.zeros(200, np.float32), greedy=True)
        np.testing.assert_array_equal(token, logits.argmax(-1))
        np.testing.assert_allclose(logp, np.log(softmax(logits).max(-1)), atol=1e-5)


def by_sorting(logits, top_k, top_p, min_p):
    """What is kept of one row, by sorting and in float64; equals stay together."""
    allowed = np.ones(len(logits), bool)
    if top_k is not None:
        allowed &= logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
    if top_p is not None:
        probs = softmax(np.where(allowed, logits, -np.inf)[None])[0]
        before = np.array([probs[probs > p].sum() for p in probs])  # of all that are more probable
        allowed &= before < top_p
    if min_p is not None:
        probs = softmax(np.where(allowed, logits, -np.inf)[None])[0]
        allowed &= probs >= min_p * probs.max()
    return allowed


@pytest.mark.parametrize(
    "rules",
    [
        *({"top_k": k} for k in (1, 7, 999)),
        *({"top_p": p} for p in (0.01, 0.83, 1.0)),
        *({"min_p": 0.037}, {"top_k": 9, "top_p": 0.77}, {"top_k": 20, "top_p": 0.9, "min_p": 0.11}),
    ],
)
def test_what_is_kept_is_what_sorting_keeps(rules):
    rng = np.random.default_rng(3)
    with_equals = rng.integers(-3, 4, (60, 50)) * 0.75
    logits = np.concatenate([with_equals, rng.standard_normal((60, 50)) * 3]).astype(np.float32)
    logits[5, 10:] = -np.inf
    allowed = np.asarray(KEEP(logits, **rules)) > -np.inf
    possible = logits > -np.inf
    for row, mine, could in zip(logits, allowed, possible, strict=True):
        np.testing.assert_array_equal(
            mine, by_sorting(row, **({"top_k": None, "top_p": None, "min_p": None} | rules)) & could
        )


def test_what_is_kept_is_unchanged_and_drawn_by_its_own_probabilities():
    logits = np.float32(np.random.default_rng(4).standard_normal((1, 40)) * 2)
    truncated = np.asarray(KEEP(logits, top_k=6, min_p=0.05))
    np.testing.assert_array_equal(truncated[truncated > -np.inf], logits[truncated > -np.inf])
    count = 2000
    uniform = np.float32((np.arange(count) + 0.5) / count)
    tokens, logps = SAMPLE(np.repeat(logits, count, 0), uniform, top_k=6, min_p=0.05)
    counts = np.bincount(np.asarray(tokens), minlength=40)
    probs = softmax(truncated)[0]
    assert np.abs(counts - count * probs).max() < 2
    np.testing.assert_allclose(logps, np.log(probs[np.asarray(tokens)]), atol=1e-5)


def test_the_widest_rules_keep_every_token():
    logits = jnp.array([[0.0, -200.0, 3.0]])
    np.testing.assert_array_equal(keep_likely(logits.T, top_k=3, top_p=1.0, min_p=0.0), logits.T)


@pytest.mark.parametrize("rules", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}])
def test_rules_out_of_range_are_refused(rules):
    with pytest.raises(ValueError, match=next(iter(rules))):
        keep_likely(jnp.zeros((4, 1)), **rules)
