"""The average of the parameters: beside training and not in it, equal weights, exact enough in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.objective import LossTerms
from grpo_jax.train.optimizer import average_tail, averaged_params, make_optimizer
from grpo_jax.train.step import gradient_step, init_state


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make(averaged_updates, updates=6):
    options = {"schedule": "constant", "warmup_updates": 1, "b1": 0.9, "b2": 0.99, "weight_decay": 0.0}
    return make_optimizer(updates=updates, max_grad_norm=1.0, averaged_updates=averaged_updates, **options)(0.1)


def trained(optimizer, targets):
    """The states after each step towards each of some targets."""

    def squares(params, target):
        return LossTerms(((params["x"] - target) ** 2).sum(), jnp.float32(2.0), {})

    step = jax.jit(lambda state, target: gradient_step(state, target, squares, optimizer=optimizer)[0])
    states = [init_state({"x": jnp.array([1.0, -2.0])}, optimizer)]
    for target in targets:
        states.append(step(states[-1], target))
    return states[1:]


def average_after(states, done):
    state = states[done - 1]
    return averaged_params(state.params, state.opt_state)["x"]


def test_the_average_is_that_of_the_last_updates_and_changes_no_bit_of_the_run():
    targets = jnp.float32([3, -1, 4, 1, -5, 9])
    plain, averaged = trained(make(0), targets), trained(make(3), targets)
    for a, b in zip(plain, averaged, strict=True):
        np.testing.assert_array_equal(a.params["x"], b.params["x"])
    path = np.array([s.params["x"] for s in averaged], np.float64)
    for done in (1, 2, 3):  # until it begins, it is the parameters
        np.testing.assert_array_equal(average_after(averaged, done), path[done - 1])
    for done in (4, 5, 6):
        found = average_after(averaged, done)
        np.testing.assert_allclose(found, path[3:done].mean(0), rtol=2e-7)
    assert averaged_params(plain[-1].params, plain[-1].opt_state) is None
    assert jax.tree.structure(plain[-1].opt_state) == jax.tree.structure(averaged[-1].opt_state[:-1])


def test_a_step_that_is_skipped_is_not_averaged():
    """It leaves the average as it was, and its place to the next one."""
    whole, broken = (trained(make(2, updates=3), jnp.float32(t)) for t in ([3, -1, 4], [3, jnp.nan, -1, 4]))
    assert int(broken[1].skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, whole[-1].opt_state, broken[-1].opt_state)


def test_ten_thousand_updates_in_float32():
    steps = jax.random.normal(jax.random.key(0), (10_000, 50)) * 1e-3

    def one(carry, step):
        params, state = carry
        _, state = average_tail(100).update(step, state, params)
        params = optax.apply_updates(params, step)
        return (params, state), params

    start = 10 * jax.random.normal(jax.random.key(1), (50,))
    (last, state), path = jax.lax.scan(one, (start, average_tail(100).init(start)), steps)
    exact = np.asarray(path, np.float64)[100:].mean(0)
    ulp = np.spacing(np.abs(path).max(0))
    error = np.abs(np.asarray(averaged_params(last, (state,)), np.float64) - exact)
    assert (error < 2 * ulp).all()
    assert (np.ptp(np.asarray(path), axis=0) > 1e4 * ulp).all()  # the average has something to do
