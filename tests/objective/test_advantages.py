"""Group advantages against numbers computed by hand, and the exact zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import group_advantages

REWARDS = jnp.array([[1.0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("choices", "first", "second"),
    [
        ({"epsilon": 0.0}, [3**0.5] + [-(3**-0.5)] * 3, [3**-0.5] * 3 + [-(3**0.5)]),
        ({"epsilon": 0.0, "ddof": 1}, [1.5, -0.5, -0.5, -0.5], [0.5, 0.5, 0.5, -1.5]),
        (
            {"ddof": 1, "epsilon_in": "std"},
            [0.75 / 0.5001] + [-0.25 / 0.5001] * 3,
            [0.25 / 0.5001] * 3 + [-0.75 / 0.5001],
        ),
        ({"scale": "none"}, [0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75]),
        ({"scale": "none", "baseline": "leave_one_out"}, [1, -1 / 3, -1 / 3, -1 / 3], [1 / 3] * 3 + [-1]),
        ({"scale": "mean"}, [3, -1, -1, -1], [1 / 3] * 3 + [-1]),
        ({"scale": "none", "baseline": "none"}, [1, 0, 0, 0], [1, 1, 1, 0]),
    ],
)
def test_values(choices, first, second):
    advantages = group_advantages(REWARDS, **choices)
    np.testing.assert_allclose(advantages[:2], np.array([first, second]), rtol=1e-6)


@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 64])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"ddof": 1, "epsilon_in": "std"},
        {"scale": "none"},
        {"scale": "mean"},
        {"baseline": "leave_one_out"},
        {"baseline": "none"},
        {"scale": "batch_std"},
    ],
)
def test_equal_rewards_give_exact_zeros(group_size, choices):
    rewards = jnp.repeat(jnp.array([[0.0], [1.0], [0.1], [1 / 3]]), group_size, axis=1)
    for epsilon in (0.0, 1e-8, 1e-4):
        assert (group_advantages(rewards, epsilon=epsilon, **choices) == 0.0).all(), epsilon


@pytest.mark.parametrize("choices", [{"ddof": 1}, {"baseline": "leave_one_out"}, {"epsilon_in": "std", "ddof": 1}])
def test_batch_std_is_of_all_rewards(choices):
    """By numpy; a group without a preference stays silent in a batch that has one, and a batch of equal rewards is silent."""
    advantages = group_advantages(REWARDS, scale="batch_std", epsilon=0.0, **choices)
    rewards = np.asarray(REWARDS, np.float64)
    centred = rewards - rewards.mean(-1, keepdims=True)
    factor = 4 / 3 if "baseline" in choices else 1.0
    np.testing.assert_allclose(advantages, factor * centred / rewards.std(ddof=choices.get("ddof", 0)), rtol=1e-6)
    assert (advantages[2:] == 0).all()
    assert (group_advantages(jnp.full((3, 7), 0.1), scale="batch_std", epsilon=0.0, **choices) == 0).all()


@pytest.mark.parametrize(
    "rewards", [[True, False, False], [1, 0, 0], np.array([1, 0, 0]), jnp.array([1, 0, 0], jnp.int8)]
)
def test_verdicts_of_any_type(rewards):
    np.testing.assert_array_equal(group_advantages(rewards), group_advantages(jnp.array([1.0, 0, 0])))


def test_gradients_through_epsilon_and_rewards_are_finite():
    """Also beside groups whose std is zero, whose gradient is zero."""

    def square(rewards, epsilon, place):
        return jnp.square(group_advantages(rewards, epsilon=epsilon, epsilon_in=place)).sum()

    for place in ("variance", "std"):
        slope, by_epsilon = jax.grad(square, (0, 1))(REWARDS, jnp.float32(0.01), place)
        assert (slope[2:] == 0).all()
        wanted = jax.grad(square, (0, 1))(REWARDS[:2], jnp.float32(0.01), place)
        np.testing.assert_allclose(slope[:2], wanted[0], rtol=1e-5)
        np.testing.assert_allclose(by_epsilon, wanted[1], rtol=1e-5)
        step = (square(REWARDS, 0.011, place) - square(REWARDS, 0.009, place)) / 0.002
        np.testing.assert_allclose(by_epsilon, step, rtol=5e-3)
