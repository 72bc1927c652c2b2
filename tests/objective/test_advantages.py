"""Group advantages against numbers computed by hand, and the exact zeros."""

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
    found = group_advantages(REWARDS, **choices)
    np.testing.assert_allclose(found[:2], np.array([first, second]), rtol=1e-6)


@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 64])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("epsilon", [0.0, 1e-8, 1e-4])
@pytest.mark.parametrize("choices", [{}, {"ddof": 1, "epsilon_in": "std"}, {"scale": "none"}, {"scale": "mean"}])
def test_equal_rewards_give_exact_zeros(group_size, reward, epsilon, choices):
    found = group_advantages(jnp.full((3, group_size), reward), epsilon=epsilon, **choices)
    assert (found == 0.0).all()


def test_golden_numbers_of_peers(shared):
    import json

    golden = json.loads((shared / "golden/peers_losses.json").read_text())["verl"]
    inputs, wanted = golden["advantage_inputs"], golden["advantage"]
    rewards = jnp.array(inputs["rewards"]).reshape(inputs["groups"], inputs["G"])
    for name, choices in {
        "grpo nostd": {"scale": "none"},
        "rloo": {"scale": "none", "baseline": "leave_one_out"},
        "TRL group (ddof1, +1e-4)": {"ddof": 1, "epsilon_in": "std"},
        "paper population std (ddof0, sqrt(var+1e-5))": {"epsilon": 1e-5},
        "open-instruct standard (ddof0,+1e-8)": {"epsilon": 1e-8, "epsilon_in": "std"},
        "MaxRL (prime) (r-m)/m": {"scale": "mean"},
    }.items():
        # The file prints five decimals.
        np.testing.assert_allclose(
            group_advantages(rewards, **choices).reshape(-1), wanted[name], atol=1.1e-5, err_msg=name
        )


@pytest.mark.parametrize("choices", [{"scale": "stdd"}, {"baseline": "median"}, {"ddof": 2}, {"epsilon_in": "root"}])
def test_unknown_choices_are_named(choices):
    with pytest.raises(ValueError, match=next(iter(choices))):
        group_advantages(REWARDS, **choices)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(jnp.ones((4, 1)))
