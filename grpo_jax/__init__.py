"""GRPO with verifiable rewards in JAX, and the theory that says in advance where β takes it (arXiv 2503.06639).

``import grpo_jax`` offers the two rooms that need nothing but jax: the objective (losses and advantages, whose names are
re-exported here) and the theory. They load on first use, so that verifier processes, which use neither, start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax import objective as objective
    from grpo_jax import theory as theory
    from grpo_jax.objective import (
        LossTerms as LossTerms,
    )
    from grpo_jax.objective import (
        Objective as Objective,
    )
    from grpo_jax.objective import (
        beta_effective as beta_effective,
    )
    from grpo_jax.objective import (
        completion_logps as completion_logps,
    )
    from grpo_jax.objective import (
        contrastive_loss as contrastive_loss,
    )
    from grpo_jax.objective import (
        group_advantages as group_advantages,
    )
    from grpo_jax.objective import (
        grpo_loss as grpo_loss,
    )
    from grpo_jax.objective import (
        grpo_loss_terms as grpo_loss_terms,
    )

__version__ = "0.1.0"

_OBJECTIVE = (
    "LossTerms",
    "Objective",
    "beta_effective",
    "completion_logps",
    "contrastive_loss",
    "group_advantages",
    "grpo_loss",
    "grpo_loss_terms",
)
__all__ = [*_OBJECTIVE, "objective", "theory"]


def __getattr__(name: str) -> Any:
    if name in ("objective", "theory"):
        return import_module(f"grpo_jax.{name}")
    if name in _OBJECTIVE:
        return getattr(import_module("grpo_jax.objective"), name)
    raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
