"""What learns: the iteration, its gradient, the compiled forms, sharding. Names load on first use."""

from importlib import import_module
from typing import Any

_MODULES = {
    "Batch": "train.step",
    "Recipe": "train.iteration",
    "TrainState": "train.step",
    "estimate": "runs.memory",
    "evaluate": "runs.evaluation",
    "gradient_step": "train.step",
    "init_state": "train.step",
    "iteration": "train.iteration",
    "learn": "train.iteration",
    "train": "runs.loop",
    "train_step": "train.iteration",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"grpo_jax.{_MODULES[name]}"), name)
