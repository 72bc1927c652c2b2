"""The bound on R² from fits on separate parts, where the truth is known: Gaussian scores with a linear pull and noise."""

import numpy as np
import pytest

from grpo_jax.theory import Mean, attainable_point, predict, predict_attainable
from grpo_jax.theory.explained import Explained, explained_share, samples_needed
from grpo_jax.theory.weights import Group

K = 3


def parts(rng, *, Q, n, dimensions, r2, ridge):
    """pull [K, Q, n] and ridge fits [K, K, Q, n] of it, of K parts; a share r2 of the pull is linear in the scores."""
    w = rng.normal(size=dimensions)
    w *= np.sqrt(r2 / (w @ w))
    scores = rng.normal(size=(K, Q, n, dimensions))
    scores -= scores.mean(2, keepdims=True)
    pull = scores @ w + np.sqrt(1 - r2) * rng.normal(size=(K, Q, n))
    pull -= pull.mean(-1, keepdims=True)
    fits = np.full((K, K, Q, n), np.nan)
    for a in range(K):
        s = scores[a].reshape(-1, dimensions)
        found = s.T @ np.linalg.solve(s @ s.T + ridge * np.eye(len(s)), pull[a].ravel())
        for k in range(K):
            if k != a:
                fits[a, k] = scores[k] @ found
    return pull, fits


def test_it_finds_the_share_where_single_fits_show_nothing_of_it():
    # 400 parameters and 200 samples to a fit: it explains all of its own, and its noise hides what it knows of others.
    rng = np.random.default_rng(0)
    found = [explained_share(*parts(rng, Q=25, n=8, dimensions=400, r2=0.5, ridge=50.0)) for _ in range(40)]
    assert abs(np.mean([x.r2 for x in found]) - 0.5) < 0.03
    assert np.mean([x.naive for x in found]) < 0.3
    inside = [x.low <= 0.5 <= x.high for x in found]
    assert np.mean(inside) >= 0.85
    assert abs(np.mean([np.mean(x.shares) for x in found]) - 0.5) < 0.05


def test_it_is_zero_or_near_where_there_is_nothing():
    rng = np.random.default_rng(1)
    found = [explained_share(*parts(rng, Q=25, n=8, dimensions=400, r2=0.0, ridge=50.0)) for _ in range(40)]
    assert np.mean([x.r2 for x in found]) < 0.05
    assert np.mean([x.low == 0 for x in found]) >= 0.9


def test_its_own_part_is_never_read_and_constants_of_a_prompt_do_not_matter():
    pull, fits = parts(np.random.default_rng(2), Q=6, n=5, dimensions=8, r2=0.7, ridge=1.0)
    found = explained_share(pull, fits)
    shifted = explained_share(pull + 3.0, fits + np.arange(6.0)[:, None])
    np.testing.assert_allclose(shifted[:3], found[:3], rtol=1e-9)
    np.testing.assert_allclose(explained_share(2 * pull, 5 * fits)[:3], found[:3], rtol=1e-9)
    assert np.isfinite(found.shares).all()


def test_a_prompt_without_both_outcomes_has_the_share_of_all():
    pull, fits = parts(np.random.default_rng(2), Q=6, n=5, dimensions=8, r2=0.7, ridge=1.0)
    pull[:, 2] = 0.0
    found = explained_share(pull, fits)
    assert found.shares[2] == found.r2
    assert found.shares[1] != found.r2
    with pytest.raises(ValueError, match="no prompt both succeeded and failed"):
        explained_share(0 * pull, fits)


def test_shares_of_prompts_are_nearer_to_the_truth_than_one_for_all_and_than_raw_ones():
    rng = np.random.default_rng(3)
    Q, n, r2 = 60, 8, 0.5
    errors = []
    for _ in range(20):
        # The same function of every prompt, of which prompt i has the share ρ_i in its pull.
        truth = rng.uniform(0.2, 0.8, Q)
        features = rng.normal(size=(K, Q, n))
        pull = truth[:, None] ** 0.5 * features + (1 - truth[:, None]) ** 0.5 * rng.normal(size=(K, Q, n))
        fits = np.stack([truth[:, None] ** 0.5 * features + 0.5 * rng.normal(size=(K, Q, n)) for _ in range(K)])
        found = explained_share(pull, fits)
        centred = pull - pull.mean(-1, keepdims=True)
        raw = np.mean([centred[k] * fits[a, k] for a in range(K) for k in range(K) if a != k], axis=0).sum(-1)
        raw /= np.square(centred).mean(0).sum(-1)
        errors.append([np.sqrt(np.mean((x - truth) ** 2)) for x in (found.shares, np.full(Q, r2), raw)])
    shrunk, one_for_all, raw = np.mean(errors, axis=0)
    assert shrunk < 0.85 * one_for_all
    assert shrunk < 0.85 * raw


def test_where_all_prompts_have_one_share_they_are_given_nearly_that():
    rng = np.random.default_rng(4)
    found = explained_share(*parts(rng, Q=50, n=8, dimensions=20, r2=0.5, ridge=10.0))
    assert found.shares.std() < 0.06
    assert abs(found.shares.mean() - found.r2) < 0.03


@pytest.mark.parametrize(
    ("pull", "fits", "message"),
    [
        ((2, 4, 4), (2, 2, 4, 4), "at least 3, 2 and 2"),
        ((3, 1, 4), (3, 3, 1, 4), "at least 3, 2 and 2"),
        ((3, 4, 4), (3, 2, 4, 4), r"must be \[K, Q, n\]"),
    ],
)
def test_too_little_is_refused(pull, fits, message):
    with pytest.raises(ValueError, match=message):
        explained_share(np.ones(pull), np.ones(fits))


def test_what_is_not_finite_is_refused():
    pull, fits = parts(np.random.default_rng(2), Q=6, n=5, dimensions=8, r2=0.7, ridge=1.0)
    fits[0, 1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        explained_share(pull, fits)


def test_how_many_samples_would_do():
    assert samples_needed(Explained(0.0625, 0.0, 0.25, np.zeros(1), 0.0), 24) == 24 * 9
    assert samples_needed(Explained(1e-9, 0.0, 0.2, np.zeros(1), 0.0), 24) == 96
    assert samples_needed(Explained(0.0, 0.0, 0.2, np.zeros(1), 0.0), 24) == 96


def test_the_predicted_end_of_a_network_is_the_table_at_one_and_the_reference_at_zero():
    counts, options = [5, 20, 60], {"beta": 1.0, "weights": Group(8)}
    table = predict(counts, 100, **options)
    all_, none = (predict_attainable(counts, 100, r2=Mean(x, x, x), **options) for x in (1.0, 0.0))
    np.testing.assert_allclose(all_.prompts, table.p_star, atol=2e-3)
    assert all_.mean == pytest.approx(table.mean_p_star, abs=1e-3)
    assert none.mean == pytest.approx(np.mean(counts) / 100, abs=5e-3)
    # Many trials pin the posterior to the counts, and p† to the formula.
    exact = predict_attainable([2 * 10**6, 6 * 10**6], 10**7, r2=Mean(0.4, 0.4, 0.4), **options)
    wanted = [float(attainable_point(p, beta=1.0, weights=Group(8), r2=0.4)) for p in (0.2, 0.6)]
    np.testing.assert_allclose(exact.prompts, wanted, atol=1e-3)
    wide = predict_attainable([2 * 10**6, 6 * 10**6], 10**7, r2=Mean(0.4, 0.3, 0.6), **options)
    assert wide.low < exact.low < exact.high < wide.high
    with pytest.raises(ValueError, match="must be in"):
        predict_attainable(counts, 100, r2=Mean(0.4, -0.1, 0.6), **options)
    # Each prompt at its own share, which the mean does not know of.
    each = predict_attainable(counts, 100, r2=Mean(0.4, 0.3, 0.5), shares=[1.4, 0.4, -0.2], **options)
    at_one = predict_attainable(counts, 100, r2=Mean(0.4, 0.3, 0.5), **options)
    assert each[:3] == at_one[:3]
    np.testing.assert_allclose(each.prompts[0], all_.prompts[0], atol=3e-3)
    np.testing.assert_allclose(each.prompts[1], at_one.prompts[1], atol=3e-3)
    np.testing.assert_allclose(each.prompts[2], none.prompts[2], atol=3e-3)
    with pytest.raises(ValueError, match="one finite number for each of 3 prompts"):
        predict_attainable(counts, 100, r2=Mean(0.4, 0.3, 0.5), shares=[0.5, np.nan, 0.5], **options)
