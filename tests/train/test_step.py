"""The gradient step: nothing that is not finite gets in, whatever the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.objective import LossTerms
from grpo_jax.train.step import gradient_step, init_state
from tests.train.test_iteration import PARAMS, make_batch, step


@pytest.mark.parametrize("where", ["advantages", "ref_logps"])
def test_a_nan_leaves_everything_as_it_was(where):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
        check_that_a_nan_leaves_everything_as_it_was(make_batch(), where)


def check_that_a_nan_leaves_everything_as_it_was(batch, where):
    adam = optax.adam(1e-2)
    state, _ = step(init_state(PARAMS, adam), batch, optimizer=adam)
    poisoned = batch._replace(**{where: getattr(batch, where).at[0, 0].set(jnp.nan)})
    kept, metrics = step(state, poisoned, optimizer=adam)
    jax.tree.map(np.testing.assert_array_equal, kept._replace(skipped=state.skipped), state)
    assert (int(kept.skipped), float(metrics["loss/skipped"])) == (1, 1.0)
    again, _ = step(kept, poisoned, optimizer=adam)
    assert int(again.skipped) == 2
    healed, metrics = step(again, batch, optimizer=adam)
    assert (int(healed.skipped), int(healed.updates), float(metrics["loss/skipped"])) == (0, 2, 0.0)


def test_a_step_on_any_loss_divides_once():
    """A sum of squares with a weight: the gradient of the quotient, and metrics as means."""
    optimizer, targets = optax.sgd(0.5), jnp.array([1.0, 2.0, 6.0])

    def squares(params, targets):
        errors = params["x"] - targets
        total = (errors**2).sum()
        return LossTerms(total, jnp.float32(len(targets)), {"loss/error": (jnp.abs(errors).sum(), jnp.float32(3.0))})

    state = init_state({"x": jnp.float32(0.0)}, optimizer)
    state, metrics = jax.jit(lambda s: gradient_step(s, targets, squares, optimizer=optimizer))(state)
    assert float(state.params["x"]) == pytest.approx(3.0)  # half of the gradient −6 of the mean square
    assert float(metrics["loss/total"]) == pytest.approx(41 / 3)
    assert float(metrics["loss/grad_norm"]) == pytest.approx(6.0)
    assert float(metrics["loss/error"]) == pytest.approx(3.0)
    assert (int(state.updates), int(state.skipped)) == (1, 0)
