"""What a live forecast knows of a run: the learning rates of its iterations, and who is visited when."""

import jax
import numpy as np
import pytest

from grpo_jax.data import prompt_order
from grpo_jax.objective import GRPO
from grpo_jax.report.live_forecast import NODES
from grpo_jax.runs.course import course_of, pace
from tests.tiny_run import tiny_config


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's schedules raise floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "minibatches"), [(0, 1), (4, 1), (4, 2)])
def test_the_pace_sums_the_learning_rates(schedule, warmup, minibatches):
    changes = {"optimizer__schedule": schedule, "optimizer__warmup_updates": warmup, "train__minibatches": minibatches}
    found = pace(tiny_config(train__iterations=20, **changes))
    updates = 20 * minibatches
    rates = []
    for n in range(updates):
        done = (n - warmup) / (updates - warmup)
        late = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[schedule]
        rates.append(n / warmup if n < warmup else late)
    assert found.shape == (21,)
    assert found[0] == 0
    np.testing.assert_allclose(np.diff(found), np.reshape(rates, (20, minibatches)).mean(-1), atol=1e-6)


def test_batches_are_those_of_the_prompt_order_where_all_prompts_are_measured():
    config, successes = tiny_config(), np.arange(16) * 50
    before = {"successes": successes.tolist(), "trials": 1000}
    p = 1 / (1 + np.exp(-NODES))
    whole = course_of(config, GRPO, before, np.arange(16), num_prompts=16)
    for n in range(config.train.iterations):
        rows = prompt_order(config.seed, n, num_prompts=16, batch=8)
        assert whole.batches[n] @ p == pytest.approx(successes[rows].mean() / 1000, abs=5e-3)
    assert whole.spread == 0
    # Of a dataset that is measured in part, an iteration's prompts are a sample.
    part = course_of(config, GRPO, before, np.arange(16), num_prompts=200)
    assert part.spread == 1 / 8
    np.testing.assert_array_equal(part.batches[3], part.measured)


def test_a_run_with_nothing_to_forecast_says_why():
    before = {"successes": [0] * 16, "trials": 8}
    found = course_of(tiny_config(), GRPO, before, np.arange(16), num_prompts=16)
    assert found == "no completion of the reference succeeded, so the rewards have nothing to teach"
