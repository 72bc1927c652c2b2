"""One compilation serves a sweep: β, β_mirror, the entropy bonus and the clip widths are traced, mapped, differentiated."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.objective import CISPO, GRPO, GRPO_TRL, MIRROR_GRPO, TWO_KL_GRPO, grpo_loss
from grpo_jax.objective.loss import _grpo_loss

B, T, G = 8, 5, 4
RANDOM = np.random.default_rng(0)
LOGPS = jnp.asarray(-2 * RANDOM.random((B, T)), jnp.float32)
ARRAYS = {
    "logps": LOGPS,
    "old_logps": LOGPS + jnp.asarray(0.3 * RANDOM.normal(size=(B, T)), jnp.float32),
    "ref_logps": LOGPS + jnp.asarray(0.5 * RANDOM.normal(size=(B, T)), jnp.float32),
    "advantages": jnp.asarray(RANDOM.normal(size=B), jnp.float32),
    "mask": jnp.arange(T)[None] < jnp.asarray(RANDOM.integers(1, T + 1, B))[:, None],
    "entropy": jnp.asarray(RANDOM.random((B, T)), jnp.float32),
    "group_size": G,
}
CASES = {  # traced argument: (objective, the others, eight values)
    "beta": (GRPO, {}, np.linspace(0.1, 2.0, 8)),
    "beta of k3": (GRPO_TRL, {}, np.linspace(0.1, 2.0, 8)),
    "beta_mirror": (MIRROR_GRPO, {}, np.linspace(0.1, 2.0, 8)),
    "beta_mirror of two": (TWO_KL_GRPO, {}, np.linspace(0.1, 2.0, 8)),
    "entropy_bonus": (GRPO, {}, np.linspace(0.01, 0.3, 8)),
    "clip_low": (replace(GRPO, ratio="token"), {}, np.linspace(0.05, 0.15, 8)),
    "clip_high": (replace(GRPO, ratio="token"), {}, np.linspace(0.05, 0.15, 8)),
    "clip_low of cispo": (CISPO, {"beta": 0.0}, np.linspace(0.05, 0.15, 8)),
}


def loss(case, value, **changes):
    objective, others, _ = CASES[case]
    arguments = ARRAYS | {"beta": 0.3, "objective": objective} | others | changes
    return grpo_loss(**arguments | {case.split(" of ")[0]: value})[0]


@pytest.mark.parametrize("case", CASES)
def test_one_compilation_for_eight_values(case):
    """Python numbers too, without a jit of the caller's."""
    values = CASES[case][2]
    before = _grpo_loss._cache_size()
    looped = [loss(case, float(v)) for v in values]
    assert _grpo_loss._cache_size() == before + 1
    assert len({float(x) for x in looped}) == 8
    traces = []

    @jax.jit
    def of_array(value):
        traces.append(value)
        return loss(case, value)

    np.testing.assert_allclose([of_array(v) for v in jnp.asarray(values, jnp.float32)], looped, rtol=1e-6)
    assert len(traces) == 1
    mapped = jax.vmap(lambda v: loss(case, v))(jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(mapped, looped, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case != "clip_low of cispo"])  # whose weight is a constant
def test_derivatives_are_differences(case):
    """The loss is linear in the weights of its terms, and piecewise linear in the clip widths."""
    at, step = jnp.float32(CASES[case][2][3]), 1e-3
    slope = jax.grad(lambda v: loss(case, v))(at)
    np.testing.assert_allclose(
        slope, (loss(case, at + step) - loss(case, at - step)) / (2 * step), rtol=2e-3, atol=2e-4
    )
    assert slope != 0


def test_slope_in_beta_is_the_kl():
    metrics = grpo_loss(**ARRAYS, beta=0.5)[1]
    np.testing.assert_allclose(jax.grad(lambda b: loss("beta", b))(0.5), metrics["kl/sequence"], rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda b: loss("beta_mirror", b))(0.5), metrics["kl/previous"], atol=1e-7)


def test_gradients_of_a_mapped_sweep_are_those_of_the_loop():
    betas = jnp.array([0.1, 1.0, 10.0])
    gradient = jax.grad(lambda logps, beta: loss("beta", beta, logps=logps))
    mapped = jax.jit(jax.vmap(gradient, (None, 0)))(LOGPS, betas)
    np.testing.assert_allclose(mapped, jnp.stack([gradient(LOGPS, b) for b in betas]), rtol=1e-4, atol=1e-6)


def test_schedules_inside_a_scan():
    """β and the clip width of an optax schedule, descended in one program, against the loop."""
    beta, width = optax.linear_schedule(1.0, 0.1, 5), optax.cosine_decay_schedule(0.4, 5)

    def step(logps, n):
        options = {"beta": beta(n), "clip_high": width(n) + 0.1, "objective": replace(GRPO, ratio="token")}
        value, gradient = jax.value_and_grad(lambda x: grpo_loss(**ARRAYS | options | {"logps": x})[0])(logps)
        return logps - 0.5 * gradient, value

    scanned, values = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(5.0)))(LOGPS)
    logps, looped = LOGPS, []
    for n in range(5):
        logps, value = step(logps, float(n))
        looped.append(value)
    np.testing.assert_allclose(values, looped, rtol=1e-4)
    np.testing.assert_allclose(scanned, logps, rtol=1e-4, atol=1e-6)


def test_a_weight_of_zero_drops_its_term():
    """The number 0 needs no reference; the traced 0 computes the term and weighs it by nothing."""
    without = grpo_loss(**ARRAYS | {"ref_logps": None}, beta=0.0)[0]
    np.testing.assert_allclose(loss("beta", jnp.float32(0)), without, rtol=1e-6)
