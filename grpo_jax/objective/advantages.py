"""Group advantages: how the verdicts on the G completions of one prompt become weights on their log-probabilities.

Dimension key: see grpo_jax.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def group_advantages(
    rewards: jax.Array,
    *,
    baseline: str = "mean",
    scale: str = "std",
    epsilon: float | jax.Array = 1e-4,
    ddof: int = 0,
    epsilon_in: str = "variance",
) -> jax.Array:
    """Advantages of the completions of each prompt, from the rewards of its group.

    With the defaults, A_i = (r_i − mean r) / √(var r + ε), the paper's normaliser. A group whose rewards are all equal
    carries no preference: its advantages are exactly zero, decided by equality and not by a small std, for every choice below
    with a baseline, or with scale="std".

    Args:
      rewards: [..., G], real and finite; one group along the last axis.
      baseline: what is subtracted. "mean": the group's mean; "leave_one_out": the mean of the other G − 1 (RLOO);
        "none": nothing (the reward itself weighs).
      scale: what divides. "std": the group's standard deviation; "batch_std": that of all rewards, which couples the
        prompts; "mean": the group's mean reward, for rewards ≥ 0 (MaxRL), zero where it is zero; "none": one (Dr. GRPO).
      epsilon: smoothing of the std; may be traced.
      ddof: 0 divides the sum of squares by the number of rewards (the paper), 1 by one less (TRL, verl).
      epsilon_in: "variance" for √(var + ε) (the paper), "std" for √var + ε (TRL, verl).

    Returns:
      [..., G] float32.

    Raises:
      ValueError: an unknown choice, rewards that are no array of real numbers, a group smaller than 2, ``ddof`` other than 0
        or 1, or a negative ``epsilon``.

    Source: arXiv 2503.06639, §2 and Algorithm 1; arXiv 2503.20783 for scale="none".

    >>> [round(float(a), 4) for a in group_advantages(jnp.array([1.0, 0.0, 0.0, 0.0]), epsilon=0.0)]
    [1.7321, -0.5774, -0.5774, -0.5774]
    >>> group_advantages(jnp.full((8,), 0.1), epsilon=1e-8)  # float noise must not become a preference
    Array([0., 0., 0., 0., 0., 0., 0., 0.], dtype=float32)
    """
    check_normaliser(baseline=baseline, scale=scale, epsilon=epsilon, ddof=ddof, epsilon_in=epsilon_in)
    rewards = as_real(rewards)
    group_size = rewards.shape[-1] if rewards.ndim else 0
    if group_size < 2:
        raise ValueError(f"rewards need a group of at least 2 along the last axis, got shape {rewards.shape}")
    if rewards.size == 0:
        return rewards
    # The baseline.
    mean = rewards.mean(-1, keepdims=True)  # [..., 1]
    if baseline == "leave_one_out":
        centred = (rewards - mean) * (group_size / (group_size - 1))  # [..., G]
    else:
        centred = rewards - mean if baseline == "mean" else rewards
    # Groups without a preference, whose advantages are zero.
    equal = (rewards == rewards[..., :1]).all(-1, keepdims=True)  # [..., 1]
    dead = equal if baseline != "none" or scale == "std" else jnp.zeros_like(equal)
    # The scale. Dead groups get a variance or a mean of one: a zero would give nan in values and gradients.
    if scale in ("std", "batch_std"):
        if scale == "std":
            variance = jnp.square(rewards - mean).sum(-1, keepdims=True) / (group_size - ddof)
        else:
            dead = dead | (rewards == rewards.reshape(-1)[0]).all()
            variance = jnp.full_like(mean, jnp.square(rewards - rewards.mean()).sum() / (rewards.size - ddof))
        variance = jnp.where(dead, jnp.ones_like(variance), variance)  # [..., 1]
        epsilon = jnp.asarray(epsilon, jnp.float32)
        divisor = jnp.sqrt(variance + epsilon) if epsilon_in == "variance" else jnp.sqrt(variance) + epsilon
    elif scale == "mean":
        dead = dead | (mean == 0)
        divisor = jnp.where(dead, jnp.ones_like(mean), mean)
    else:
        divisor = jnp.ones_like(mean)
    return jnp.where(dead, jnp.zeros_like(centred), centred / divisor)


def as_real(rewards: Any) -> jax.Array:
    """Rewards as a float32 array; ValueError for what is no array of real numbers."""
    try:
        array = rewards if isinstance(rewards, jax.Array) else np.asarray(rewards)
    except ValueError:  # rows of different length
        array = np.asarray(None)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"rewards must be an array of numbers, [..., G], got {type(rewards).__name__}")
    if jnp.iscomplexobj(array):
        raise ValueError(f"rewards must be real, got {array.dtype}")
    return jnp.asarray(array, jnp.float32)


def check_normaliser(*, baseline: str, scale: str, epsilon: float | jax.Array, ddof: int, epsilon_in: str) -> None:
    """Raises ValueError, naming the choice, unless the group normaliser is one that `group_advantages` offers.

    >>> check_normaliser(baseline="mean", scale="stdd", epsilon=0.0, ddof=0, epsilon_in="std")
    Traceback (most recent call last):
    ValueError: scale='stdd' is not one of 'std', 'mean', 'batch_std', 'none'
    """
    check_choice("baseline", baseline, ("mean", "leave_one_out", "none"))
    check_choice("scale", scale, ("std", "mean", "batch_std", "none"))
    check_choice("epsilon_in", epsilon_in, ("variance", "std"))
    check_choice("ddof", ddof, (0, 1))
    check_not_negative("epsilon", epsilon)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError, naming them, unless the value is one of the choices.

    >>> check_choice("ddof", 2, (0, 1))
    Traceback (most recent call last):
    ValueError: ddof=2 is not one of 0, 1
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_not_negative(name: str, value: float | jax.Array) -> None:
    """Raises ValueError unless a number is finite and not negative; the values of an array, which may be traced, are not read.

    >>> check_not_negative("beta", -1.0)
    Traceback (most recent call last):
    ValueError: beta=-1.0 must be finite and not negative
    """
    if not isinstance(value, jax.Array) and not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value} must be finite and not negative")
