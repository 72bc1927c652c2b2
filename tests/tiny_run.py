"""The smallest run that has everything: a few prompts, a tiny decoder, a few iterations."""

from functools import cache
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import default
from grpo_jax.config import validate
from grpo_jax.runs.setup import Setup, make_setup

TINY = {
    "task.arithmetic.operand_max": 3,
    "model.num_layers": 1,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "data.prompts_per_iteration": 8,
    "data.max_prompt": 5,
    "warm_start.target": 0.15,
    "warm_start.batch": 16,
    "warm_start.learning_rate": 5e-3,
    "rollout.group_size": 4,
    "rollout.max_completion": 3,
    "train.iterations": 7,
    "evaluate.interval": 3,
    "evaluate.samples": 8,
    "evaluate.final_samples": 16,
    "evaluate.batch_samples": 8,
    "evaluate.examples": 2,
    "attainable.steps": 0,
    "checkpoint.interval": 2,
}


def tiny_config(**changes: object) -> ConfigDict:
    """The tiny config; double underscores in names stand for dots."""
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(TINY | {key.replace("__", "."): value for key, value in changes.items()})
    return config.lock()


def flags(**changes: object) -> list[str]:
    """The same as command-line flags."""
    return [
        f"--config.{key}={value}"
        for key, value in (TINY | {k.replace("__", "."): v for k, v in changes.items()}).items()
    ]


@cache
def on_one_device(**changes: Any) -> tuple[ConfigDict, Setup]:
    """The tiny config, built for the first device."""
    config = tiny_config(mesh__data=1, **changes)
    return config, make_setup(config, *validate(config, num_devices=1), devices=jax.devices()[:1])


def on_mesh(mesh: dict[str, int], **changes: Any) -> tuple[ConfigDict, Setup]:
    """The tiny config, built for a mesh of eight devices."""
    config = tiny_config(**{f"mesh__{k}": v for k, v in mesh.items()}, **changes)
    return config, make_setup(config, *validate(config, num_devices=8))
