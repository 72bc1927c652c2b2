"""What the loss refuses, before anything is compiled."""

import jax
import jax.numpy as jnp

from grpo_jax.objective.objective import Objective

Weight = float | jax.Array | None


def check_scalar(name: str, value: float | jax.Array | None) -> None:
    """Refuses what is no scalar float, and a number that is not finite or negative; of an array the value is not looked at.

    >>> check_scalar("beta", -1.0)
    Traceback (most recent call last):
    ValueError: beta=-1.0 must be finite and not negative
    """
    if value is None:
        return
    if isinstance(value, int) or (hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.floating)):
        raise TypeError(f"{name}={value!r} must be a float: an integer cannot be differentiated, and recompiles")
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}: use jax.vmap over several")
    if not isinstance(value, jax.Array) and not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value} must be finite and not negative")


def term_weight(name: str, weight: float | jax.Array | None) -> float | jax.Array | None:
    """The weight of a term, checked as far as it is known; None where it is the number zero."""
    check_scalar(name, weight)
    return (weight or None) if isinstance(weight, float) else weight


def check_objective(objective: Objective) -> None:
    """Refuses what is no `Objective`, such as its name."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, such as grpo_jax.objective.GSPO, got {objective!r}")


def check_arrays(
    given: dict[str, jax.Array | None], advantages: jax.Array, mask: jax.Array, group_size: int | None
) -> None:
    """Refuses what is no array, of another shape than logps, or of the wrong kind; naming it and both shapes."""
    needed = {"logps": given["logps"], "advantages": advantages, "mask": mask}
    for name, array in (given | needed).items():
        if not hasattr(array, "dtype") and (array is not None or name in needed):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    shape = needed["logps"].shape  # type: ignore[union-attr]
    if len(shape) != 2:
        raise ValueError(f"logps must be [B, T], got {shape}")
    for name, array in (given | {"mask": mask}).items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} must have the shape of logps {shape}, got {jnp.shape(array)}")
    for name, array in (given | {"advantages": advantages}).items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be real, got {array.dtype}")
    if jnp.shape(advantages) != shape[:1]:
        raise ValueError(f"advantages must be [B] = {shape[:1]} for logps {shape}, got {jnp.shape(advantages)}")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool (True counts), got {mask.dtype}")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 2 or shape[0] % group_size):
        raise ValueError(
            f"group_size={group_size!r} must be an integer, at least 2 and divide the {shape[0]} rows of logps {shape}"
        )


def check_needs(
    objective: Objective,
    given: dict[str, jax.Array | None],
    beta: Weight,
    beta_mirror: Weight,
    entropy_bonus: Weight,
    clip_low: Weight,
    clip_high: Weight,
) -> None:
    """Refuses what the objective needs and is not given, and weights and widths, but for beta, that it would not read."""
    if objective.holds_to_reference and beta is not None and given["ref_logps"] is None:
        raise ValueError(f"ref_logps may be None only where nothing holds to the reference; here kl={objective.kl!r}")
    if objective.holds_to_previous and beta_mirror is not None and given["old_logps"] is None:
        raise ValueError(
            f"old_logps is needed for anchor={objective.anchor!r}: the KL to π_old has no value without it"
        )
    if objective.anchor == "previous" and beta_mirror is None:
        raise ValueError("beta_mirror=0 with anchor='previous': nothing would hold the policy; beta is not read there")
    if not objective.holds_to_previous and beta_mirror is not None:
        raise ValueError(
            "beta_mirror would do nothing: the objective has no KL to the previous policy; see TWO_KL_GRPO"
        )
    if entropy_bonus is not None and given["entropy"] is None:
        raise ValueError("entropy_bonus needs entropy, the second result of completion_logps")
    if objective.correction != "none" and given["sampler_logps"] is None:
        raise ValueError(f"sampler_logps is needed for correction={objective.correction!r}")
    clips = objective.surrogate == "clip" and objective.ratio != "none"
    for name, width, used, most in (
        ("clip_low", clip_low, clips or objective.surrogate == "cispo", 1.0),
        ("clip_high", clip_high, clips, float("inf")),
    ):
        if width is not None and not used:
            raise ValueError(f"{name} would do nothing: the objective does not clip there")
        if isinstance(width, float) and not 0 < width <= most:
            raise ValueError(f"{name}={width} must be positive{' and at most 1' if most == 1 else ''}")
