"""The train step, the iteration, sharding, checkpoints, evaluation and the loop."""

from grpo_jax.train.evaluate import evaluate
from grpo_jax.train.iteration import iteration, update
from grpo_jax.train.loop import train
from grpo_jax.train.memory import estimate
from grpo_jax.train.step import Batch, TrainState, gradient_step, init_state, train_step

__all__ = [
    "Batch",
    "TrainState",
    "estimate",
    "evaluate",
    "gradient_step",
    "init_state",
    "iteration",
    "train",
    "train_step",
    "update",
]
