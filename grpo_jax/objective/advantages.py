"""Group advantages: how the verdicts on the G completions of one prompt become weights on their log-probabilities."""

import jax
import jax.numpy as jnp

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "mean", "batch_std", "none")
EPSILON_PLACES = ("variance", "std")


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
    that has a baseline.

    Args:
      rewards: [..., G], real and finite; one group along the last axis.
      baseline: what is subtracted. "mean": the group's mean; "leave_one_out": the mean of the other G − 1 (RLOO);
        "none": nothing (the reward itself weighs).
      scale: what divides. "std": the group's standard deviation; "batch_std": that of all rewards given, which couples the
        prompts; "mean": the group's mean reward, for rewards ≥ 0 (MaxRL), zero where it is zero; "none": one (Dr. GRPO).
      epsilon: smoothing of the std; may be traced.
      ddof: 0 divides the variance by the number of rewards (the paper), 1 by one less (TRL, verl).
      epsilon_in: "variance" for √(var + ε) (the paper), "std" for √var + ε (TRL, verl).

    Returns:
      [..., G] float32.

    Raises:
      ValueError: an unknown choice, a group smaller than 2, ``ddof`` other than 0 or 1, or a negative ``epsilon``.

    Source: arXiv 2503.06639, §2 and Algorithm 1; arXiv 2503.20783 for scale="none".

    >>> [round(float(a), 4) for a in group_advantages(jnp.array([1.0, 0.0, 0.0, 0.0]), epsilon=0.0)]
    [1.7321, -0.5774, -0.5774, -0.5774]
    >>> group_advantages(jnp.full((8,), 0.1), epsilon=1e-8)  # float noise must not become a preference
    Array([0., 0., 0., 0., 0., 0., 0., 0.], dtype=float32)
    """
    check_normaliser(baseline=baseline, scale=scale, epsilon=epsilon, ddof=ddof, epsilon_in=epsilon_in)
    rewards = jnp.asarray(rewards, jnp.float32)
    group_size = rewards.shape[-1] if rewards.ndim else 0
    if group_size < 2:
        raise ValueError(f"rewards need a group of at least 2 along the last axis, got shape {rewards.shape}")
    mean = rewards.mean(-1, keepdims=True)
    if baseline == "leave_one_out":
        centred = (rewards - mean) * (group_size / (group_size - 1))
    else:
        centred = rewards - mean if baseline == "mean" else rewards
    equal = (rewards == rewards[..., :1]).all(-1, keepdims=True)
    dead = equal if baseline != "none" or scale == "std" else jnp.zeros_like(equal)
    if scale in ("std", "batch_std"):
        if scale == "std":
            variance = jnp.square(rewards - mean).sum(-1, keepdims=True) / (group_size - ddof)
        else:
            dead = dead | (rewards == rewards.reshape(-1)[0]).all()
            variance = jnp.full_like(mean, jnp.square(rewards - rewards.mean()).sum() / (rewards.size - ddof))
        variance = jnp.where(dead, jnp.ones_like(variance), variance)  # keeps 0/0 and √0 out of values and gradients
        epsilon = jnp.asarray(epsilon, jnp.float32)
        divisor = jnp.sqrt(variance + epsilon) if epsilon_in == "variance" else jnp.sqrt(variance) + epsilon
    elif scale == "mean":
        dead = dead | (mean == 0)
        divisor = jnp.where(dead, jnp.ones_like(mean), mean)
    else:
        divisor = jnp.ones_like(mean)
    return jnp.where(dead, jnp.zeros_like(centred), centred / divisor)


def check_normaliser(*, baseline: str, scale: str, epsilon: float | jax.Array, ddof: int, epsilon_in: str) -> None:
    """Raises ValueError, naming the choice, unless the group normaliser is one that `group_advantages` offers.

    >>> check_normaliser(baseline="mean", scale="stdd", epsilon=0.0, ddof=0, epsilon_in="std")
    Traceback (most recent call last):
    ValueError: scale='stdd' is not one of 'std', 'mean', 'batch_std', 'none'
    """
    for name, value, choices in (
        ("baseline", baseline, BASELINES),
        ("scale", scale, SCALES),
        ("epsilon_in", epsilon_in, EPSILON_PLACES),
        ("ddof", ddof, (0, 1)),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
    if not isinstance(epsilon, jax.Array) and not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon={epsilon} must be finite and not negative")
