"""GRPO with verifiable rewards in JAX, and the theory that says in advance where β takes it (arXiv 2503.06639).

``import grpo_jax`` offers the two rooms that need nothing but jax: the objective (losses and advantages, whose names are
re-exported here) and the theory. They load on first use, so that verifier processes, which use neither, start fast.

Dimension key of all files; shapes are written [P, G, T], and [X · P, ...] where axes are merged:

    P  prompts of an iteration              D  width of the model
    G  completions of a prompt              F  width of its MLP
    B  rows, P · G                          N  query heads
    S  tokens of a prompt                   K  key-value heads
    T  tokens of a completion               H  size of a head
    V  tokens of the vocabulary             L  tokens of one call of the model

    Q  prompts that a probe measures        X  shards, the parts of a batch on different devices
    O  outcomes of a tabular policy         M  groups of a micro-batch
    n  any number that has no letter        R  packed rows of a micro-batch
                                            C  slots of a packed row
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# ruff: noqa: F403, F405
if TYPE_CHECKING:  # the types of what __getattr__ loads
    from grpo_jax import objective, theory
    from grpo_jax.objective import *

__version__ = "0.1.0"

__all__ = [
    "LossTerms",
    "Objective",
    "beta_effective",
    "completion_logps",
    "contrastive_loss",
    "group_advantages",
    "grpo_loss",
    "grpo_loss_terms",
    "objective",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")
    if name in ("objective", "theory"):
        return import_module(f"grpo_jax.{name}")
    return getattr(import_module("grpo_jax.objective"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
