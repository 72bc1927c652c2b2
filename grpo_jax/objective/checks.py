"""What the loss refuses, before anything is compiled."""

import jax
import jax.numpy as jnp

from grpo_jax.objective.advantages import check_not_negative
from grpo_jax.objective.objective import Objective

Scalar = float | jax.Array | None


def check_scalar(name: str, value: Scalar) -> None:
    """Accepts None and scalar floats that are finite and not negative; the values of jax arrays are not read.

    >>> check_scalar("beta", 1)
    Traceback (most recent call last):
    TypeError: beta=1 must be a float: an integer cannot be differentiated, and recompiles
    """
    if value is None:
        return
    if isinstance(value, int) or (hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.floating)):
        raise TypeError(f"{name}={value!r} must be a float: an integer cannot be differentiated, and recompiles")
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}: use jax.vmap over several")
    check_not_negative(name, value)


def term_weight(name: str, weight: Scalar) -> Scalar:
    """The weight of a term, checked as far as it is known; None where it is the number zero."""
    check_scalar(name, weight)
    return (weight or None) if isinstance(weight, float) else weight


def check_scalars(
    objective: Objective,
    beta: Scalar,
    beta_mirror: Scalar,
    entropy_bonus: Scalar,
    clip_low: Scalar,
    clip_high: Scalar,
) -> dict[str, Scalar]:
    """The scalars of `grpo_loss` by their names, in this order and checked; None for a weight that is the number zero."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, such as grpo_jax.objective.GSPO, got {objective!r}")
    check_scalar("clip_low", clip_low)
    check_scalar("clip_high", clip_high)
    weights = {"beta": beta, "beta_mirror": beta_mirror, "entropy_bonus": entropy_bonus}
    checked = {name: term_weight(name, weight) for name, weight in weights.items()}
    return checked | {"clip_low": clip_low, "clip_high": clip_high}


def check_mask(mask: jax.Array) -> None:
    """Refuses a mask of another type than bool: a float mask may hold weights, which the loss does not read."""
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool (True counts), got {mask.dtype}")


def check_group_size(group_size: int, shape: tuple[int, ...]) -> None:
    """Refuses a group size that does not divide the rows of log-probabilities [B, T] into whole groups."""
    if not isinstance(group_size, int) or group_size < 2 or shape[0] % group_size:
        raise ValueError(
            f"group_size={group_size!r} must be an integer, at least 2 and divide the {shape[0]} rows of logps {shape}"
        )


def check_arrays(
    by_token: dict[str, jax.Array | None], advantages: jax.Array, mask: jax.Array, group_size: int | None
) -> None:
    """Refuses what is no array, has another shape than logps, or is of the wrong type; names it and both shapes.

    Args:
      by_token: name -> [B, T] or None; "logps" among them.
      advantages, mask, group_size: of `grpo_loss`.
    """
    required = {"logps": by_token["logps"], "advantages": advantages, "mask": mask}
    for name, array in (by_token | required).items():
        if not hasattr(array, "dtype") and (array is not None or name in required):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    shape = required["logps"].shape  # type: ignore[union-attr]
    if len(shape) != 2:
        raise ValueError(f"logps must be [B, T], got {shape}")
    for name, array in (by_token | {"mask": mask}).items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} must have the shape of logps {shape}, got {jnp.shape(array)}")
    for name, array in (by_token | {"advantages": advantages}).items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be real, got {array.dtype}")
    if jnp.shape(advantages) != shape[:1]:
        raise ValueError(f"advantages must be [B] = {shape[:1]} for logps {shape}, got {jnp.shape(advantages)}")
    check_mask(mask)
    if group_size is not None:
        check_group_size(group_size, shape)


def check_needs(objective: Objective, by_token: dict[str, jax.Array | None], scalars: dict[str, Scalar]) -> None:
    """Refuses a call that lacks what the objective needs, or gives a scalar that it does not read; beta may always be given."""
    holds_to_reference = objective.holds_to_reference and scalars["beta"] is not None
    if holds_to_reference and by_token["ref_logps"] is None:
        raise ValueError(f"ref_logps may be None only where nothing holds to the reference; here kl={objective.kl!r}")
    has_mirror = scalars["beta_mirror"] is not None
    if has_mirror and objective.holds_to_previous and by_token["old_logps"] is None:
        raise ValueError(
            f"old_logps is needed for anchor={objective.anchor!r}: the KL to π_old has no value without it"
        )
    if not has_mirror and objective.anchor == "previous":
        raise ValueError("beta_mirror=0 with anchor='previous': nothing would hold the policy; beta is not read there")
    if has_mirror and not objective.holds_to_previous:
        raise ValueError(
            "beta_mirror would do nothing: the objective has no KL to the previous policy; see TWO_KL_GRPO"
        )
    if scalars["entropy_bonus"] is not None and by_token["entropy"] is None:
        raise ValueError("entropy_bonus needs entropy, the second result of completion_logps")
    if objective.correction != "none" and by_token["sampler_logps"] is None:
        raise ValueError(f"sampler_logps is needed for correction={objective.correction!r}")
    clips = objective.surrogate == "clip" and objective.ratio != "none"
    for name, is_read, most in (
        ("clip_low", clips or objective.surrogate == "cispo", 1.0),
        ("clip_high", clips, float("inf")),
    ):
        width = scalars[name]
        if width is not None and not is_read:
            raise ValueError(f"{name} would do nothing: the objective does not clip there")
        if isinstance(width, float) and not 0 < width <= most:
            raise ValueError(f"{name}={width} must be positive{' and at most 1' if most == 1 else ''}")
