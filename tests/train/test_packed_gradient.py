"""The packed gradient against the plain one: autodiff through whole rows of prompt and completion, padding and all."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from grpo_jax.models import DecoderConfig, init_params, make_policy
from grpo_jax.objective import DAPO, GRPO, GRPO_TRL, NAMED, grpo_loss_terms
from grpo_jax.rollout import Layout, Policy, PromptBatch, score_groups
from grpo_jax.train.iteration import Recipe, train_step
from grpo_jax.train.sharding import make_mesh, parameter_shardings, row_sharding
from grpo_jax.train.step import Batch, init_state

CONFIG = DecoderConfig(
    vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=32, max_length=32
)
WINDOWED = replace(CONFIG, window=3, local_layers=(1,), local_rope_theta=20.0, qk_norm=True, remat="full")
P, G, T = 8, 4, 6
BETA, SGD = jnp.float32(0.5), optax.sgd(1.0)
# Whole groups of one length, single tokens, the longest, nothing at all, and a mixture.
LENGTHS = np.array(
    [[6, 6, 6, 6], [1, 1, 1, 1], [6, 1, 3, 2], [0, 0, 0, 0], [2, 5, 0, 4], [3, 3, 3, 3], [1, 6, 6, 1], [5, 4, 3, 2]]
)


def mean_forward(params, tokens, positions, mask, cache=None, start=0, prefix=None, slots=None, segments=None):
    """A policy that looks at the mean of what it sees; compiled in a fraction of a decoder's time."""
    x = params["embedding"].at[tokens].get(mode="clip") + params["positions"].at[positions].get(mode="clip")
    seen = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & mask[:, None]
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None]
    seen = seen.astype(jnp.float32)
    total, count = seen @ x, seen.sum(-1, keepdims=True)
    if prefix is not None:
        before = jnp.where(prefix["mask"][:, :, None], prefix["x"], 0.0).sum(1, keepdims=True)
        number = prefix["mask"].sum(1, dtype=jnp.float32)[:, None, None]
        before, number = (jnp.repeat(y, len(tokens) // len(y), axis=0) for y in (before, number))
        total, count = total + before, count + number
    cache = None if cache is None else {"x": x, "mask": mask}
    return jnp.tanh(x + total / jnp.maximum(count, 1.0)), cache


POLICY = Policy(mean_forward, lambda params, hidden: hidden @ params["embedding"].T, lambda batch, length: {})
PARAMS = {name: jax.random.normal(jax.random.key(i), (16, 8)) for i, name in enumerate(("embedding", "positions"))}


def make_batch(*, old=True, reference=True, junk=0.0) -> Batch:
    random = np.random.default_rng(0)
    tokens = random.integers(3, 16, (P, 5)).astype(np.int32)
    prompts = PromptBatch(
        jnp.asarray(tokens),
        jnp.asarray(np.arange(5)[None] >= random.integers(0, 5, P)[:, None]),
        jnp.arange(P, dtype=jnp.int32),
    )
    mask = np.arange(T) < LENGTHS[:, :, None]
    near = lambda scale: jnp.asarray(np.where(mask, -2.7 + scale * random.normal(size=mask.shape), junk), jnp.float32)  # noqa: E731
    completions = np.where(mask, random.integers(0, 16, mask.shape), int(junk) % 16).astype(np.int32)
    return Batch(
        prompts,
        jnp.asarray(completions),
        jnp.asarray(mask),
        jnp.asarray(random.normal(size=(P, G)), jnp.float32),
        near(0.3),
        near(0.3) if old else None,
        near(0.5) if reference else None,
    )


def plain(batch, objective, *, policy=POLICY, params=PARAMS, beta=BETA, **weights):
    """(loss, gradient, metrics) by autodiff of the plain form."""

    def total(params):
        logps, entropy = score_groups(policy, params, batch.prompts, batch.completions, batch.mask)
        flat = lambda x: None if x is None else x.reshape(logps.shape)  # noqa: E731
        terms = grpo_loss_terms(
            logps,
            flat(batch.old_logps),
            flat(batch.ref_logps),
            batch.advantages.reshape(-1),
            flat(batch.mask),
            beta=beta,
            objective=objective,
            group_size=G,
            entropy=entropy,
            sampler_logps=flat(batch.sampler_logps),
            **weights,
        )
        return terms.total / terms.weight, terms.metrics

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return loss, gradient, {name: value / count for name, (value, count) in metrics.items()}


def packed(batch, objective, *, policy=POLICY, params=PARAMS, beta=BETA, **options):
    options = {"microbatch_tokens": 12, "row_length": 8} | options
    layout = Layout(**{name: options.pop(name) for name in Layout._fields if name in options})
    recipe = Recipe(policy, objective, None, lambda rate: SGD, layout, **options)  # nothing is sampled
    state, metrics = train_step(recipe, init_state(params, SGD), batch, beta, 1.0)
    return metrics.pop("loss/total"), jax.tree.map(jnp.subtract, params, state.params), metrics


def check(found, wanted, tolerance=1e-5):
    """Of a gradient's largest entry, and of the loss; the metrics of the plain form, each."""
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted[1]))
    assert scale > 1e-3
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * scale), found[1], wanted[1])
    for name, value in wanted[2].items():
        if name == "update/useful":  # of the layout, and not of the result
            continue
        np.testing.assert_allclose(found[2][name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def weights(objective):
    return {"beta_mirror": 0.2 if objective.holds_to_previous else 0.0, "entropy_bonus": 0.1}


@pytest.mark.parametrize("name", NAMED)
def test_packed_is_plain(name):
    """Off-policy with all terms, and on-policy with no more than the objective needs."""
    objective = NAMED[name]

    @jax.jit
    def both():
        few = {"old": objective.holds_to_previous, "reference": objective.holds_to_reference}
        cases = [
            (make_batch(), weights(objective)),
            (make_batch(**few), weights(objective) | {"entropy_bonus": 0.0}),
        ]
        return [(packed(b, objective, **w), plain(b, objective, **w)) for b, w in cases]

    for found, wanted in both():
        check(found, wanted)


HOW = {
    "a group at a time": {"microbatch_tokens": 1, "row_length": 5},
    "rows of all sizes": {"microbatch_tokens": 40, "row_length": 13},
    "all at once": {"microbatch_tokens": 10**6, "row_length": None},
    "shards": {"microbatch_tokens": 12, "shards": 4},
    "a shard for each": {"microbatch_tokens": 12, "shards": 8},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_no_way_of_packing_changes_the_result(how):
    @jax.jit
    def both():
        return [(packed(make_batch(), o, **how), plain(make_batch(), o)) for o in (GRPO, DAPO)]

    for found, wanted in both():
        check(found, wanted)


def test_the_order_of_prompts_changes_nothing():
    order = jnp.array([5, 0, 7, 2, 1, 6, 3, 4])
    one, other = (
        jax.jit(lambda b: packed(b, GRPO))(b) for b in (make_batch(), jax.tree.map(lambda x: x[order], make_batch()))
    )
    check(other, one)


def test_what_stands_outside_the_mask_changes_no_bit():
    """Whatever it is, in tokens and in log-probabilities."""
    run = jax.jit(lambda batch: packed(batch, GRPO_TRL, entropy_bonus=0.1))
    usual = run(make_batch())
    for junk in (7.0, 1e30, np.nan, -np.inf):
        batch = make_batch(junk=junk if abs(junk) < 10 else 0.0)
        names = ("old_logps", "ref_logps", "sampler_logps")
        loud = {name: jnp.where(batch.mask, getattr(batch, name), junk) for name in names}
        jax.tree.map(np.testing.assert_array_equal, run(batch._replace(**loud)), usual)


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_a_decoder(config):
    """Through its layers, windows and rotations, remat, and the prompt's keys and values."""
    given = {"policy": make_policy(config), "params": init_params(config, jax.random.key(0))}
    wanted, found = jax.jit(lambda: (plain(make_batch(), GRPO, **given), packed(make_batch(), GRPO, **given)))()
    check(found, wanted, 2e-5)


def test_a_decoder_in_bfloat16():
    """No further from the float32 gradient than the plain form; and what rows give to their prompt is summed in float32."""
    params, half = init_params(CONFIG, jax.random.key(0)), make_policy(replace(CONFIG, dtype="bfloat16"))

    @jax.jit
    def gradients():
        policies = make_policy(CONFIG), half, half
        forms = plain, plain, partial(packed, row_length=6)  # a row for most completions: many sums
        return [
            ravel_pytree(form(make_batch(), GRPO, policy=policy, params=params)[1])[0]
            for form, policy in zip(forms, policies, strict=True)
        ]

    exact, plain_error, packed_error = gradients()
    plain_error, packed_error = (float(jnp.linalg.norm(x - exact)) for x in (plain_error, packed_error))
    assert 1e-3 * float(jnp.linalg.norm(exact)) < plain_error
    assert packed_error < 1.1 * plain_error
    text = str(jax.make_jaxpr(lambda params: packed(make_batch(), GRPO, policy=half, params=params))(params))
    assert re.findall(r"(\w+)\[1,8,2,4,5\] = scatter-add\[", text) == ["f32"] * 4  # keys and values of two layers


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_devices(sizes):
    """Shards packed apart, on the devices that hold them: the gradient of one device, and no row moves to another."""
    mesh, params = make_mesh(**sizes), init_params(CONFIG, jax.random.key(0))
    given = {"policy": make_policy(CONFIG), "shards": sizes["data"] * sizes.get("fsdp", 1)}
    spread = jax.device_put(params, parameter_shardings(params, mesh))
    rows = jax.device_put(make_batch(), row_sharding(mesh))
    run = jax.jit(lambda params, batch: packed(batch, GRPO, params=params, **given))
    one, many = run(params, make_batch()), run(spread, rows)
    check(many, one)
    if sizes == {"data": 8}:
        text = run.lower(spread, rows).compile().as_text()
        assert not re.findall(r" (?:all-gather|all-to-all)(?:-start)?\(", text)
        assert re.findall(r" all-reduce(?:-start)?\(", text)


def test_points_of_a_sweep():
    """Vmapped over parameters, lengths and β, the loop over micro-batches stays one loop, as long as its longest."""
    lengths = [LENGTHS, np.minimum(LENGTHS, 2), np.full_like(LENGTHS, 6)]
    batch = make_batch()
    masks = jnp.stack([jnp.asarray(np.arange(T) < x[:, :, None]) for x in lengths])
    params = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, x[::-1]]), PARAMS)
    betas = jnp.array([0.1, 1.0, 3.0])

    def point(params, mask, beta, vmap_axis=None):
        return packed(batch._replace(mask=mask), GRPO, params=params, beta=beta, vmap_axis=vmap_axis)

    sweep = jax.vmap(partial(point, vmap_axis="points"), axis_name="points")
    found = jax.jit(sweep)(params, masks, betas)
    for i in range(3):
        alone = jax.jit(point)(*jax.tree.map(lambda x, i=i: x[i], (params, masks, betas)))
        check(jax.tree.map(lambda x, i=i: x[i], found), alone)
    loops = [e for e in jax.make_jaxpr(sweep)(params, masks, betas).jaxpr.eqns if e.primitive.name == "while"]
    shapes = [e.params["cond_jaxpr"].out_avals[0].shape for e in loops]
    assert shapes and all(shape == () for shape in shapes), "a batched predicate turns the loop into selects"
    assert all(e.params["cond_jaxpr"].in_avals[0].shape == () for e in loops)
