"""What learns: the iteration, its gradient, the compiled forms, sharding.

`train`, `evaluate` and `estimate` live one floor up, in grpo_jax.runs. They are re-exported here, where people look for them,
and load on first use, because all else needs only jax and optax.
"""

from importlib import import_module
from typing import Any

from grpo_jax.train.iteration import Recipe, iteration, learn, train_step
from grpo_jax.train.step import Batch, TrainState, gradient_step, init_state

_UPSTAIRS = {"estimate": "memory", "evaluate": "evaluation", "train": "loop"}
__all__ = [
    "Batch",
    "Recipe",
    "TrainState",
    "estimate",
    "evaluate",
    "gradient_step",
    "init_state",
    "iteration",
    "learn",
    "train",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name not in _UPSTAIRS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"grpo_jax.runs.{_UPSTAIRS[name]}"), name)
