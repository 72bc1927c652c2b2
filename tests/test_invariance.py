"""What must not change the loss or its gradient: padding, order, the split into parts, devices, layout; and what must be zero."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import (
    CISPO,
    DAPO,
    GPG,
    GRPO,
    GRPO_TRL,
    NAMED,
    TWO_KL_GRPO,
    completion_logps,
    group_advantages,
    grpo_loss,
    grpo_loss_terms,
)
from grpo_jax.train.sharding import make_mesh, row_sharding

B, T, G = 8, 5, 4
POINTS = NAMED | {
    "token reverse": replace(GRPO, kl="token_reverse", ratio="token"),
    "token reverse weighted": replace(GRPO_TRL, kl="token_reverse_weighted"),
    "no baseline": replace(GRPO, baseline="none", ratio="token", clip_high=None),
    "sequence KL over sequence means": replace(GRPO, reduce="sequence_mean"),
    "sequence KL of token ratios": replace(GRPO, ratio="token", reduce="token_mean"),
    "geometric mean alone": replace(GRPO, ratio="sequence"),
    "geometric mean with a KL": replace(GRPO, ratio="sequence", reduce="constant", constant_length=7),
    "geometric mean over tokens": replace(GRPO, ratio="sequence", reduce="token_mean", kl="token_forward"),
    "caps": replace(DAPO, ratio_cap=1.5, dual_clip=1.6),
    "cispo from below": replace(CISPO, clip_low=0.1, ratio_cap=1.2, kl="token_reverse_weighted"),
    "two KLs of tokens": replace(TWO_KL_GRPO, kl="token_reverse_weighted", ratio="token"),
    "two KLs of k3": replace(TWO_KL_GRPO, kl="token_forward", reduce="token_mean"),
    "token correction": replace(GRPO_TRL, correction="token", correction_cap=1.2),
    "sequence correction": replace(TWO_KL_GRPO, correction="sequence", correction_cap=1.2),
    "corrected policy gradient": replace(GPG, correction="token", correction_cap=1.2),
}
LENGTHS = np.array([5, 1, 3, 4, 2, 5, 4, 3])


def make_arrays() -> dict[str, jax.Array]:
    """Rows of a batch, with the mask on the left and arbitrary numbers beside it."""
    random = np.random.default_rng(0)
    logps = -3 * random.random((B, T))
    near = lambda scale: logps + scale * random.normal(size=(B, T))  # noqa: E731
    found = {"logps": logps, "old_logps": near(0.3), "ref_logps": near(0.5), "sampler_logps": near(0.3)}
    found |= {"entropy": random.random((B, T)), "advantages": random.normal(size=B)}
    return {k: jnp.asarray(v, jnp.float32) for k, v in found.items()} | {"mask": jnp.arange(T)[None] < LENGTHS[:, None]}


ARRAYS = make_arrays()
MASK = ARRAYS["mask"]


@partial(jax.jit, static_argnames=("names", "group_size"))
def evaluate(arrays, names=tuple(POINTS), group_size=G):
    """name -> (terms, gradients with respect to log-probabilities and entropy), every term with a weight.

    One program for all points: it compiles three times as fast as a program for each.
    """

    def total(logps, entropy, objective):
        terms = grpo_loss_terms(
            **arrays | {"logps": logps, "entropy": entropy}, **weights(objective), group_size=group_size
        )
        return terms.total, terms

    differentiate = jax.value_and_grad(total, (0, 1), has_aux=True)
    found = {name: differentiate(arrays["logps"], arrays["entropy"], POINTS[name]) for name in names}
    return {name: (terms, gradients) for name, ((_, terms), gradients) in found.items()}


def weights(objective):
    mirror = 0.2 if objective.holds_to_previous else 0.0
    return {"objective": objective, "beta": 0.3, "beta_mirror": mirror, "entropy_bonus": 0.1}


def compare(check, found, wanted):
    jax.tree_util.tree_map_with_path(lambda at, a, b: check(a, b, err_msg=jax.tree_util.keystr(at)), found, wanted)


close = partial(compare, partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6))
same = partial(compare, np.testing.assert_array_equal)


def rearranged(change, arrays=ARRAYS):
    return {k: change(v) for k, v in arrays.items()}


def of_tokens(change, arrays=ARRAYS):
    """Changes the arrays [B, T] alone."""
    return {k: change(v) if v.ndim == 2 else v for k, v in arrays.items()}


def with_gradients(change, evaluated):
    return {name: (terms, jax.tree.map(change, gradients)) for name, (terms, gradients) in evaluated.items()}


def added(parts):
    """The terms of parts summed, their gradients put one after the other."""
    terms = lambda name: jax.tree.map(lambda *t: sum(t), *(part[name][0] for part in parts))  # noqa: E731
    gradients = lambda name: jax.tree.map(lambda *g: jnp.concatenate(g), *(part[name][1] for part in parts))  # noqa: E731
    return {name: (terms(name), gradients(name)) for name in parts[0]}


@pytest.fixture(scope="module")
def usual():
    return evaluate(ARRAYS)


def test_the_points_are_where_it_matters(usual):
    """Clips decide on both sides, caps bind, and the points differ from each other."""
    metrics = {name: terms.metrics for name, (terms, _) in usual.items()}
    for name in ("GRPO", "GRPO_TRL", "DAPO", "GSPO", "MAXRL", "cispo from below"):
        assert metrics[name]["policy/clip_low"][0] > 0, name
        assert metrics[name]["policy/clip_high"][0] > 0, name
    for name in ("token correction", "sequence correction"):
        assert metrics[name]["rollout/correction"][0] < 1.2 * LENGTHS.sum(), name
    # The advantages are given, so objectives that differ by their normaliser alone are one here: so are the mirrors.
    alike = {"GRPO": 4, "MIRROR_GRPO": 2}
    totals = [float(terms.total / terms.weight) for terms, _ in usual.values()]
    assert len(set(totals)) == len(POINTS) - sum(n - 1 for n in alike.values())


def test_padding_holds_nothing(usual):
    """NaN, ±inf and huge numbers outside the mask: the same bits inside, and zeros outside."""
    junk = jnp.asarray(np.random.default_rng(1).choice([np.nan, np.inf, -np.inf, 1e30, -1e30], (B, T)), jnp.float32)
    same(evaluate(of_tokens(lambda x: x if x.dtype == bool else jnp.where(MASK, x, junk))), usual)
    for name, (_, gradients) in usual.items():
        for gradient in gradients:
            assert (jnp.where(MASK, 0, gradient) == 0).all(), name
            assert (gradient != 0).any(), name


def test_padding_may_stand_on_the_left(usual):
    to_the_right = (np.arange(T)[None] + LENGTHS[:, None]) % T
    shift = lambda x: jnp.take_along_axis(x, jnp.asarray(to_the_right), 1)  # noqa: E731
    assert not shift(MASK)[1, 0]
    close(evaluate(of_tokens(shift)), with_gradients(shift, usual))


def test_columns_of_padding_and_single_tokens():
    """T = 1 is T = 5 with four masked columns."""
    masked = evaluate(ARRAYS | {"mask": MASK & (jnp.arange(T)[None] == 0)})
    one = evaluate(of_tokens(lambda x: x[:, :1]))
    close(one, with_gradients(lambda g: g[:, :1], masked))
    # Where a completion is one token, the choices that differ by its length alone are the same.
    for name in ("sequence KL over sequence means", "sequence KL of token ratios", "geometric mean alone"):
        close(one[name], one["GRPO"])


def test_order_is_nothing(usual):
    """Rows of a group, and groups."""
    for order in ([2, 0, 3, 1, 5, 4, 7, 6], [4, 5, 6, 7, 0, 1, 2, 3]):
        permute = lambda x, order=order: x[np.array(order)]  # noqa: E731
        close(evaluate(rearranged(permute)), with_gradients(permute, usual))


def test_parts_add_up(usual):
    close(added([evaluate(rearranged(lambda x, at=at: x[at : at + G])) for at in (0, G)]), usual)


def test_parts_of_any_size_add_up():
    names = ("GRPO", "DAPO")
    wanted = evaluate(ARRAYS, names, 2)
    for cuts in ((2,), (6,), (2, 4), (2, 4, 6)):
        ends = zip((0, *cuts), (*cuts, B), strict=True)
        parts = [evaluate(rearranged(lambda x, a=a, b=b: x[a:b]), names, 2) for a, b in ends]
        close(added(parts), wanted)


def test_devices(usual):
    """Rows split over eight devices, a group over four of them."""
    names = ("GRPO", "GRPO_TRL", "DAPO", "GSPO", "CISPO", "two KLs of tokens", "sequence correction")
    split = jax.device_put(ARRAYS, row_sharding(make_mesh(data=8)))
    assert len(split["logps"].sharding.device_set) == 8
    found = evaluate(split, names)
    assert len(found["GRPO"][1][0].sharding.device_set) == 8
    close(found, {name: usual[name] for name in names})


def test_packing():
    """All tokens in one row of hidden states, without padding, scattered back to [B, T]: the same loss and gradient."""
    random = np.random.default_rng(3)
    hidden = jnp.asarray(random.normal(size=(B, T, 4)), jnp.float32)
    unembedding = jnp.asarray(random.normal(size=(4, 7)), jnp.float32)
    targets = jnp.asarray(random.integers(0, 7, (B, T)), jnp.int32)
    row, column = np.nonzero(np.asarray(MASK))

    def padded(hidden, unembedding):
        return completion_logps(hidden, unembedding, targets)

    def packed(hidden, unembedding):
        scored = completion_logps(hidden[row, column][None], unembedding, targets[row, column][None], chunk_size=4)
        return tuple(jnp.full((B, T), jnp.nan, jnp.float32).at[row, column].set(x[0]) for x in scored)

    def loss(hidden, unembedding, layout, objective):
        logps, entropy = layout(hidden, unembedding)
        return grpo_loss(**ARRAYS | {"logps": logps, "entropy": entropy}, **weights(objective), group_size=G)

    @jax.jit
    def both(*weights):
        differentiate = jax.value_and_grad(loss, (0, 1), has_aux=True)
        names = ("GRPO", "GRPO_TRL", "DAPO", "GSPO", "CISPO")
        return [{name: differentiate(*weights, way, POINTS[name]) for name in names} for way in (padded, packed)]

    wanted, found = both(hidden, unembedding)
    close(found, wanted)
    assert all((jnp.abs(gradients[0]) > 0).any() for _, gradients in wanted.values())


def test_equal_rewards_are_exact_zeros():
    """At every group size, beside a live group: the rounding of a mean must not become a preference.

    With the ε that would divide that rounding by 1e-8; tests/objective/test_advantages.py has the other normalisers.
    """
    equal = np.array([0.1, 1 / 3, 0.7, 1.0, 0.0, 1e-3, 123.4], np.float32)
    rewards = [np.concatenate([np.tile(equal[:, None], n), np.eye(1, n, dtype=np.float32)]) for n in range(2, 65)]
    rounding = [np.abs(r - r.mean(-1, keepdims=True))[:-1].max() for r in rewards]
    assert np.mean(np.array(rounding) > 0) > 0.5  # subtracting the mean alone is not enough
    normalise = partial(group_advantages, ddof=1, epsilon_in="std", epsilon=1e-8)
    program = jax.jit(lambda groups: [normalise(r) for r in groups])
    for start in range(0, len(rewards), 7):  # few sizes in a program, which compiles in more than proportional time
        for found in map(np.asarray, program(rewards[start : start + 7])):
            assert (found[:-1] == 0.0).all(), found.shape
            assert found[-1, 0] > 0


def test_equal_rewards_have_no_gradient():
    """Without KL and bonus: exactly zero, whatever the ratios."""

    @jax.jit
    def gradients(rewards):
        def loss(logps, objective):
            advantages = group_advantages(rewards, **objective.normaliser()).reshape(-1)
            return grpo_loss_terms(
                **ARRAYS | {"logps": logps, "advantages": advantages}, beta=0.0, objective=objective
            ).total

        free = {name: replace(o, kl="none", anchor="reference") for name, o in POINTS.items()}
        return {name: jax.grad(loss)(ARRAYS["logps"], objective) for name, objective in free.items()}

    for name, gradient in gradients(jnp.full((2, 4), 0.1)).items():
        assert (gradient == 0).all(), name
    for name, gradient in gradients(jnp.array([[0.1] * 4, [0.1, 0.1, 0.1, 0.2]])).items():
        assert (gradient[:4] == 0).all(), name
        assert (gradient[4:] != 0).any(), name


def test_the_mask_decides_and_not_the_token():
    """With pad == eos: the EOS that stopped a completion counts, the same id after it does not."""
    eos = 0
    targets = jnp.array([[3, 2, eos, eos, eos], [1, eos, eos, eos, eos]])
    mask = jnp.arange(T)[None] < jnp.array([[3], [2]])
    hidden, unembedding = jax.random.normal(jax.random.key(0), (2, T, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    old = jnp.full((2, T), -1.5)

    @jax.jit
    def gradients(targets, mask):
        def loss(hidden, objective):
            logps, _ = completion_logps(hidden, unembedding, targets)
            advantages = jnp.array([1.0, -1.0])
            return grpo_loss(logps, None, old, advantages, mask, beta=0.2, objective=objective, group_size=2)[0]

        return {name: jax.grad(loss)(hidden, POINTS[name]) for name in ("GRPO", "GRPO_TRL", "DAPO")}

    found = gradients(targets, mask)
    for gradient in found.values():
        np.testing.assert_array_equal((gradient != 0).any(-1), mask)
    same(gradients(jnp.where(mask, targets, 4), mask), found)
    for other in (gradients(targets.at[0, 2].set(4), mask), gradients(targets, mask.at[0, 2].set(False))):
        assert all((found[name][0, 2] != gradient[0, 2]).any() for name, gradient in other.items())


def test_empty_rows_are_harmless():
    """A completion without a token has no value, no gradient, and its numbers do not matter."""
    empty = ARRAYS | {"mask": MASK.at[0].set(False).at[G:].set(False)}
    found, first = evaluate(empty), evaluate(rearranged(lambda x: x[:G], empty))
    loud = evaluate(empty | {"advantages": ARRAYS["advantages"].at[0].set(1e6).at[G:].set(-1e6)})
    for name, (terms, gradients) in found.items():
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((terms, gradients))), name
        for gradient in gradients:
            assert (gradient[0] == 0).all(), name
            assert (gradient[G:] == 0).all(), name
            assert (gradient[1:G] != 0).any(), name
        same((loud[name][0].total, loud[name][1]), (terms.total, gradients))
        close(first[name][0].total, terms.total)


def test_nothing_but_empty_rows():
    nothing = evaluate(ARRAYS | {"mask": jnp.zeros((B, T), bool)})
    assert all(terms.total == 0 for terms, _ in nothing.values())
    assert all((gradient == 0).all() for _, gradients in nothing.values() for gradient in gradients)
    for name in ("DAPO", "GRPO"):
        loss, metrics = grpo_loss(**ARRAYS | {"mask": jnp.zeros((B, T), bool)}, **weights(POINTS[name]))
        assert loss == 0, name
        assert all(jnp.isfinite(x) for x in metrics.values()), name


@pytest.mark.parametrize("array", ["logps", "old_logps", "ref_logps", "sampler_logps"])
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_huge_log_ratios_stay_finite(far, array):
    for name, found in evaluate(ARRAYS | {array: ARRAYS[array] + far}).items():
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found)), name


def test_tokens_that_are_never_sampled():
    """Logits of −inf, as truncated sampling or a vocabulary padded to a round number leave them."""
    hidden = jax.random.normal(jax.random.key(0), (B, T, 6))
    targets = jnp.asarray(np.random.default_rng(4).integers(0, 5, (B, T)), jnp.int32)

    @jax.jit
    @jax.value_and_grad
    def loss(hidden, forbidden):
        unembed = lambda h: jnp.where(jnp.arange(6)[None, None] == 5, forbidden, h)  # noqa: E731
        logps, entropy = completion_logps(hidden, unembed, targets)
        return grpo_loss(**ARRAYS | {"logps": logps, "entropy": entropy}, **weights(GRPO), group_size=G)[0]

    never, hardly = loss(hidden, jnp.float32(-jnp.inf)), loss(hidden, jnp.float32(-1e4))
    close(never, hardly)
    assert (never[1][..., 5] == 0).all()
