"""Checks of a run's configuration: every conflict at once, with the numbers, before anything is compiled."""

import math
from pathlib import Path
from typing import Any

from grpo_jax.data import make_task
from grpo_jax.models.config import DTYPES, REMATS, DecoderConfig
from grpo_jax.objective import Objective, named_objective
from grpo_jax.tasks import Task

_SCHEDULES = ("cosine", "linear", "constant")
_TOKENIZERS = ("characters", "bytes")


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists every one of ``conflicts``."""

    def __init__(self, conflicts: list[str], title: str = "this config cannot run:") -> None:
        super().__init__("\n".join([title, *(f"  - {line}" for line in conflicts)]))
        self.conflicts = conflicts


def validate(config: Any, *, num_devices: int, training: bool = True) -> tuple[Task, Objective]:
    """Checks the whole config and returns what it names.

    Args:
      config: the resolved `ml_collections.ConfigDict`.
      num_devices: of this run.
      training: whether iterations follow; a measurement alone may have fewer prompts than they need.

    Raises:
      ConfigError: with one line per conflict, naming keys and numbers.
    """
    found: list[str] = []
    for key, value in flat(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{key}={value} must be finite")

    def at_least(least: float, *keys: str) -> None:
        for key in keys:
            value = config[key.split(".")[0]][key.split(".")[1]] if "." in key else config[key]
            if value is not None and not value >= least:
                found.append(f"{key}={value} must be at least {least}")

    def positive(*keys: str) -> None:
        for key in keys:
            group, name = key.split(".")
            if not config[group][name] > 0:
                found.append(f"{key}={config[group][name]} must be positive")

    at_least(0, "seed", "warm_start.max_steps", "optimizer.warmup_updates", "optimizer.weight_decay")
    at_least(0, "evaluate.examples", "evaluate.kept_samples")
    at_least(2, "rollout.group_size")
    at_least(1, "rollout.max_completion", "data.prompts_per_iteration", "data.max_prompt", "warm_start.interval")
    at_least(
        1, "warm_start.samples", "warm_start.batch", "evaluate.interval", "evaluate.samples", "evaluate.final_samples"
    )
    at_least(
        1, "evaluate.prompts", "evaluate.batch_samples", "train.iterations", "train.inner_epochs", "train.minibatches"
    )
    at_least(1, "train.microbatch_tokens", "train.row_length", "train.iterations_per_program", "train.chunk_size")
    at_least(1, "train.max_skipped", "checkpoint.interval", "checkpoint.keep", "rollout.top_k")
    at_least(1, "verifier.num_workers", "mesh.fsdp", "mesh.tensor")
    positive("rollout.temperature", "optimizer.learning_rate", "optimizer.max_grad_norm")
    positive("warm_start.learning_rate", "verifier.deadline")
    for key in ("b1", "b2"):
        if not 0 <= config.optimizer[key] < 1:
            found.append(f"optimizer.{key}={config.optimizer[key]} must be in [0, 1)")
    for key, value in (
        ("warm_start.target", config.warm_start.target),
        ("evaluate.confidence", config.evaluate.confidence),
    ):
        if not 0 < value < 1:
            found.append(f"{key}={value} must be inside (0, 1)")
    top_p, min_p = config.rollout.top_p, config.rollout.min_p
    if top_p is not None and not 0 < top_p <= 1:
        found.append(f"rollout.top_p={top_p} must be in (0, 1]")
    if min_p is not None and not 0 <= min_p <= 1:
        found.append(f"rollout.min_p={min_p} must be in [0, 1]")
    longest, row = config.rollout.max_completion, config.train.row_length
    if row is not None and row < longest:
        found.append(f"train.row_length={row} is less than one completion of rollout.max_completion={longest}")
    for key, value, choices in (
        ("optimizer.schedule", config.optimizer.schedule, _SCHEDULES),
        ("model.dtype", config.model.dtype, DTYPES),
        ("model.remat", config.model.remat, REMATS),
        ("model.tokenizer", config.model.tokenizer, _TOKENIZERS),
        ("data.too_long", config.data.too_long, ("error", "drop")),
    ):
        if value not in choices:
            found.append(f"{key}={value!r} is not one of {', '.join(choices)}")
    if config.seed >= 2**32:
        found.append(f"seed={config.seed} must be below 2**32")

    if not all(type(i) is int for i in config.model.stop_ids):
        found.append(f"model.stop_ids={tuple(config.model.stop_ids)} must be token ids, such as (1, 2)")
    if not all(isinstance(text, str) and text for text in config.model.stop_strings):
        found.append(f"model.stop_strings={tuple(config.model.stop_strings)} must be texts, none of them empty")
    if config.model.path is None:
        _attempt(found, "model", lambda: DecoderConfig(vocab_size=1, max_length=1, **decoder_options(config)))
    objective = _attempt(found, "objective", lambda: named_objective(**_description(config)))
    if objective is not None:
        found += _weight_conflicts(config, objective)
    task = _attempt(found, "task", lambda: make_task(config.task.name, **task_options(config)))
    if not found:
        found += _divisions(config, num_devices, training)
    if task is not None:
        found += _model_conflicts(config)
        if training:
            found += _training_conflicts(config, task)
    if found or task is None or objective is None:
        raise ConfigError(found)
    return task, objective


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of every leaf, tuples as they are.

    >>> flat({"a": 1, "b": {"c": (2, 3)}})
    {'a': 1, 'b.c': (2, 3)}
    """
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return leaves


def task_options(config: Any) -> dict[str, Any]:
    """The options of the config's task that are set."""
    options = config.task.get(config.task.name, {})
    return {key: value for key, value in options.items() if value is not None} if hasattr(options, "items") else {}


def decoder_options(config: Any) -> dict[str, Any]:
    """The fields of a random decoder's `DecoderConfig` that the config chooses."""
    excluded = ("path", "stop_ids", "stop_strings", "tokenizer")
    return {key: value for key, value in config.model.items() if key not in excluded}


def _description(config: Any) -> dict[str, Any]:
    """The weights of the terms are arguments of the loss, not part of the objective's description."""
    weights = ("beta", "beta_mirror", "entropy_bonus")
    return {key: choice for key, choice in config.objective.items() if key not in weights}


def _weight_conflicts(config: Any, objective: Objective) -> list[str]:
    found = []
    for key, held, anchor in (
        ("beta", objective.holds_to_reference, "the reference"),
        ("beta_mirror", objective.holds_to_previous, "the previous policy"),
    ):
        weight = config.objective[key]
        if held and not weight > 0:
            found.append(f"objective.{key}={weight} must be positive: it weighs the objective's KL to {anchor}")
        if not held and weight != 0:
            found.append(
                f"objective.{key}={weight} would do nothing: the objective has no KL to {anchor}; set it to 0.0"
            )
    if config.objective.entropy_bonus < 0:
        found.append(f"objective.entropy_bonus={config.objective.entropy_bonus} must not be negative")
    if objective.holds_to_previous and config.train.inner_epochs == 1:
        found.append(
            "train.inner_epochs=1 with a KL to the previous policy, which is 0 when a prompt is first visited: set 2 or more"
        )
    steps = config.train.inner_epochs * config.train.minibatches
    if objective.ratio == "none" and steps > 1:
        found.append(
            f"objective.ratio='none' is for data from the current policy, and train.inner_epochs · train.minibatches = {steps} "
            "steps on one rollout are not: set both to 1"
        )
    return found


def _attempt(found: list[str], group: str, make: Any) -> Any:
    try:
        return make()
    except (ValueError, TypeError, OSError, ImportError) as error:
        found.append(f"{group}: {error}")
    except (Exception, SystemExit) as error:  # a user's own module may fail in any way when it is imported
        found.append(f"{group}: {type(error).__name__}: {error}")
        return None


def _divisions(config: Any, num_devices: int, training: bool) -> list[str]:
    found = []
    prompts, minibatches = config.data.prompts_per_iteration, config.train.minibatches
    fsdp, tensor, data = config.mesh.fsdp, config.mesh.tensor, config.mesh.data
    if data == -1:
        data = num_devices // (fsdp * tensor)
    if data < 1 or data * fsdp * tensor != num_devices:
        found.append(
            f"mesh.data={config.mesh.data} · mesh.fsdp={fsdp} · mesh.tensor={tensor} does not make the {num_devices} device(s)"
        )
    elif training and prompts % (minibatches * data * fsdp):
        found.append(
            f"data.prompts_per_iteration={prompts} is not divisible by train.minibatches={minibatches} · "
            f"{data * fsdp} devices along mesh.data and mesh.fsdp"
        )
    samples, most = config.evaluate.final_samples, config.evaluate.batch_samples
    for key in ("samples", "final_samples"):
        if config.evaluate[key] > most and config.evaluate[key] % most:
            found.append(f"evaluate.{key}={config.evaluate[key]} is not a multiple of evaluate.batch_samples={most}")
    if not training:
        return found
    if samples < config.evaluate.samples:
        found.append(f"evaluate.final_samples={samples} is below evaluate.samples={config.evaluate.samples}")
    if samples < 8:
        found.append(f"evaluate.final_samples={samples} must be at least 8, for pass@8")
    return found


def _model_conflicts(config: Any) -> list[str]:
    found = []
    if config.data.chat and config.model.path is None:
        found.append("data.chat=True needs a model folder with a chat template: set model.path")
    for key in ("system", "enable_thinking"):
        if config.data[key] is not None and not config.data.chat:
            found.append(f"data.{key}={config.data[key]!r} would do nothing: set data.chat to True")
    if config.model.path is not None and not Path(config.model.path).is_dir():
        found.append(f"model.path={config.model.path!r} is not a folder")
    return found


def _training_conflicts(config: Any, task: Task) -> list[str]:
    found = []
    for key in ("top_k", "top_p", "min_p"):
        if config.rollout[key] is not None:
            found.append(
                f"rollout.{key}={config.rollout[key]} cannot be trained with: the loss scores the whole distribution, so the "
                f"sampled policy and the trained one would differ. Leave it unset; --mode=evaluate accepts it"
            )
    longest, most, row = config.rollout.max_completion, config.train.microbatch_tokens, config.train.row_length
    if most < longest:
        found.append(f"train.microbatch_tokens={most} is less than one completion of rollout.max_completion={longest}")
    if row is not None and most < row:
        found.append(f"train.row_length={row} is more than train.microbatch_tokens={most}")
    rows = len(task.examples)
    if config.data.prompts_per_iteration > rows:
        found.append(
            f"data.prompts_per_iteration={config.data.prompts_per_iteration} exceeds the {rows} prompts of task {task.name!r}: "
            "an iteration would hold a prompt twice"
        )
    if config.model.path is None:
        if task.demonstrations is None:
            found.append(
                f"task {task.name!r} has no demonstrations for a warm start: set model.path to a pretrained model"
            )
        elif config.warm_start.max_steps == 0:
            found.append(
                "a random model without a warm start never succeeds: set model.path, or warm_start.max_steps > 0"
            )
    elif config.warm_start.max_steps and task.demonstrations is None:
        found.append(
            f"warm_start.max_steps={config.warm_start.max_steps}, but task {task.name!r} has no demonstrations: set 0"
        )
    return found
