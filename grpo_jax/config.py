"""Checks of a run's configuration: every conflict at once, with the numbers, before anything is compiled."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_jax.data import make_task
from grpo_jax.models.config import DTYPES, REMATS, DecoderConfig
from grpo_jax.models.families import read_config
from grpo_jax.models.lora import TARGETS
from grpo_jax.objective import Objective, named_objective
from grpo_jax.storage import fetched
from grpo_jax.tasks import Task

_AT_LEAST = {
    0: ("seed", "warm_start.max_steps", "optimizer.warmup_updates", "optimizer.weight_decay", "evaluate.examples",
        "evaluate.kept_samples", "attainable.steps", "lora.rank", "evaluate.held_out"),
    2: ("rollout.group_size",),
    1: ("rollout.max_completion", "data.prompts_per_iteration", "data.max_prompt", "warm_start.interval",
        "warm_start.samples", "warm_start.batch", "evaluate.interval", "evaluate.samples", "evaluate.final_samples",
        "evaluate.prompts", "evaluate.batch_samples", "train.iterations", "train.inner_epochs", "train.minibatches",
        "train.microbatch_tokens", "train.row_length", "train.iterations_per_program", "train.chunk_size",
        "train.max_skipped", "checkpoint.interval", "checkpoint.keep", "rollout.top_k", "verifier.num_workers",
        "mesh.fsdp", "mesh.tensor"),
}  # fmt: skip
_POSITIVE = ("rollout.temperature", "optimizer.learning_rate", "optimizer.max_grad_norm", "warm_start.learning_rate",
             "verifier.deadline", "train.watchdog", "lora.alpha")  # fmt: skip
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers of float32
MOST = 10**7
_CHOICES = {
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "model.dtype": DTYPES,
    "model.remat": REMATS,
    "model.gather": ("model", "layer"),
    "model.tokenizer": ("characters", "bytes"),
    "data.too_long": ("error", "drop"),
}

ATTAINABLE_PARTS, ATTAINABLE_LEAST = 3, 4  # parts of attainable.samples, and samples of a prompt in each, at least


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
    # The values of the keys, each by itself.
    conflicts = [*_number_conflicts(config), *_choice_conflicts(config)]

    # What the config names, made as a run would make it.
    if config.model.path is None:
        _attempt(conflicts, "model", lambda: DecoderConfig(vocab_size=1, max_length=1, **decoder_options(config)))
    objective = _attempt(conflicts, "objective", lambda: named_objective(**_description(config)))
    if objective is not None:
        conflicts += _weight_conflicts(config, objective)
    task = _attempt(conflicts, "task", lambda: make_task(config.task.name, **task_options(config)))

    # What the values mean together.
    if not conflicts:
        conflicts += _division_conflicts(config, num_devices, training)
    if task is not None:
        conflicts += _model_conflicts(config)
        if training:
            conflicts += _training_conflicts(config, task)

    if conflicts or task is None or objective is None:
        raise ConfigError(conflicts)
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
    excluded = ("path", "stop_ids", "stop_strings", "gather", "tokenizer")
    return {key: value for key, value in config.model.items() if key not in excluded}


def averaged_iterations(config: Any) -> int:
    """How many of the last iterations ``train.average`` averages over: its share of them, rounded, at least one; 0 for 0.0.

    >>> from ml_collections import ConfigDict
    >>> [averaged_iterations(ConfigDict({"train": {"iterations": 150, "average": x}})) for x in (0.0, 0.001, 0.25, 1.0)]
    [0, 1, 38, 150]
    """
    share, iterations = config.train.average, config.train.iterations
    return max(1, round(share * iterations)) if share else 0


def _description(config: Any) -> dict[str, Any]:
    """The weights of the terms are arguments of the loss, not part of the objective's description."""
    weights = ("beta", "beta_mirror", "entropy_bonus", "target_success", "target_kl")
    return {key: choice for key, choice in config.objective.items() if key not in weights}


def _attempt(conflicts: list[str], group: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, or None after its error has joined the conflicts."""
    try:
        return make()
    except (ValueError, TypeError, OSError, ImportError) as error:
        conflicts.append(f"{group}: {error}")
    except (Exception, SystemExit) as error:  # a user's own module may fail in any way when it is imported
        conflicts.append(f"{group}: {type(error).__name__}: {error}")
    return None


def _number_conflicts(config: Any) -> Iterator[str]:
    values = flat(config)
    for key, value in values.items():
        if isinstance(value, float) and not (value == 0 or SMALLEST <= abs(value) <= LARGEST):
            yield f"{key}={value} must be finite, and 0 or within what float32 holds: {SMALLEST:.2g} to {LARGEST:.2g}"
        if isinstance(value, int) and abs(value) >= 2**31 and key != "seed":
            yield f"{key}={value} must be below 2**31"

    # What is listed on the host, one by one: so many take minutes and gigabytes before anything begins.
    for key in ("train.iterations", "data.prompts_per_iteration", "rollout.group_size", "evaluate.final_samples"):
        if values[key] > MOST:
            yield f"{key}={values[key]} must be at most {MOST}"

    # Lower bounds; a key that is not set has none.
    for least, keys in _AT_LEAST.items():
        for key in keys:
            if values[key] is not None and not values[key] >= least:
                yield f"{key}={values[key]} must be at least {least}"
    for key in _POSITIVE:
        if values[key] is not None and not values[key] > 0:
            yield f"{key}={values[key]} must be positive"
    for key in ("train.watchdog", "verifier.deadline"):
        if values[key] is not None and values[key] > MOST:
            yield f"{key}={values[key]} must be at most {MOST} seconds"

    # Intervals within [0, 1].
    for key in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= values[key] < 1:
            yield f"{key}={values[key]} must be in [0, 1)"
    if not 0 <= values["train.average"] <= 1:
        yield f"train.average={values['train.average']} must be in [0, 1]: the share of the last iterations"
    for key in ("warm_start.target", "evaluate.confidence"):
        if not 0 < values[key] < 1:
            yield f"{key}={values[key]} must be inside (0, 1)"
    top_p, min_p = config.rollout.top_p, config.rollout.min_p
    if top_p is not None and not 0 < top_p <= 1:
        yield f"rollout.top_p={top_p} must be in (0, 1]"
    if min_p is not None and not 0 <= min_p <= 1:
        yield f"rollout.min_p={min_p} must be in [0, 1]"

    # A packed row holds the longest completion.
    longest, row = config.rollout.max_completion, config.train.row_length
    if row is not None and row < longest:
        yield f"train.row_length={row} is less than one completion of rollout.max_completion={longest}"


def _choice_conflicts(config: Any) -> Iterator[str]:
    values = flat(config)
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            yield f"{key}={values[key]!r} is not one of {', '.join(choices)}"
    if config.seed >= 2**32:
        yield f"seed={config.seed} must be below 2**32"
    if not all(type(i) is int for i in config.model.stop_ids):
        yield f"model.stop_ids={tuple(config.model.stop_ids)} must be token ids, such as (1, 2)"
    if not all(isinstance(text, str) and text for text in config.model.stop_strings):
        yield f"model.stop_strings={tuple(config.model.stop_strings)} must be texts, none of them empty"
    targets = tuple(config.lora.targets)
    if not targets or len(set(targets)) < len(targets) or not set(targets) <= set(TARGETS):
        yield f"lora.targets={targets} must be some of {', '.join(TARGETS)}, each once"


def _weight_conflicts(config: Any, objective: Objective) -> Iterator[str]:
    # A KL of the objective wants a weight, and a weight wants a KL.
    for key, has_kl, anchor in (
        ("beta", objective.holds_to_reference, "the reference"),
        ("beta_mirror", objective.holds_to_previous, "the previous policy"),
    ):
        weight = config.objective[key]
        if has_kl and not weight > 0:
            yield f"objective.{key}={weight} must be positive: it weighs the objective's KL to {anchor}"
        if not has_kl and weight != 0:
            yield f"objective.{key}={weight} would do nothing: the objective has no KL to {anchor}; set it to 0.0"
    targets = {key: config.objective[key] for key in ("target_success", "target_kl")}
    if given := [f"objective.{key}={target}" for key, target in targets.items() if target is not None]:
        if len(given) > 1:
            yield f"{' and '.join(given)}: choose one"
        if objective.kl_direction == "none" or not objective.is_predicted or config.objective.entropy_bonus:
            yield f"{given[0]}: the theory predicts nothing of this objective, so no β can be chosen for it"
    success, kl = targets.values()
    if success is not None and not 0 < success < 1:
        yield f"objective.target_success={success} must be inside (0, 1)"
    if kl is not None and not kl > 0:
        yield f"objective.target_kl={kl} must be positive"
    if config.objective.entropy_bonus < 0:
        yield f"objective.entropy_bonus={config.objective.entropy_bonus} must not be negative"

    # How many steps the objective allows on one rollout.
    if objective.holds_to_previous and config.train.inner_epochs == 1:
        yield (
            "train.inner_epochs=1 with a KL to the previous policy, which is 0 when a prompt is first visited: set 2 or more"
        )
    steps = config.train.inner_epochs * config.train.minibatches
    if objective.ratio == "none" and steps > 1:
        yield (
            f"objective.ratio='none' is for data from the current policy, and train.inner_epochs · train.minibatches = {steps} "
            "steps on one rollout are not: set both to 1"
        )


def _division_conflicts(config: Any, num_devices: int, training: bool) -> Iterator[str]:
    # The devices make the mesh, and share the prompts of a minibatch equally.
    prompts, minibatches = config.data.prompts_per_iteration, config.train.minibatches
    fsdp, tensor, data = config.mesh.fsdp, config.mesh.tensor, config.mesh.data
    if data == -1:
        data = num_devices // (fsdp * tensor)
    if data < 1 or data * fsdp * tensor != num_devices:
        yield (
            f"mesh.data={config.mesh.data} · mesh.fsdp={fsdp} · mesh.tensor={tensor} does not make the {num_devices} device(s)"
        )
    elif training and prompts % (parts := minibatches * data * fsdp):
        below, above = prompts // parts * parts, -(-prompts // parts) * parts
        yield (
            f"data.prompts_per_iteration={prompts} is not divisible by train.minibatches={minibatches} · "
            f"{data * fsdp} devices along mesh.data and mesh.fsdp; nearest: {f'{below} and ' if below else ''}{above}"
        )

    # Samples are drawn in equal batches; the last probe has at least as many as the others.
    samples, most = config.evaluate.final_samples, config.evaluate.batch_samples
    for key in ("samples", "final_samples"):
        if config.evaluate[key] > most and config.evaluate[key] % most:
            yield f"evaluate.{key}={config.evaluate[key]} is not a multiple of evaluate.batch_samples={most}"
    asked, parts, least = config.attainable.samples, ATTAINABLE_PARTS, ATTAINABLE_LEAST
    if asked is not None and (asked % parts or asked < least * parts):
        yield (
            f"attainable.samples={asked} must be a multiple of {parts}, and at least {least * parts}: {parts} parts of {least}"
        )
    elif asked is not None and asked // parts > most and asked // parts % most:
        yield f"attainable.samples={asked}: a third is more than evaluate.batch_samples={most}, and no multiple of it"
    if training and samples < config.evaluate.samples:
        yield f"evaluate.final_samples={samples} is below evaluate.samples={config.evaluate.samples}"
    if training and samples < 8:
        yield f"evaluate.final_samples={samples} must be at least 8, for pass@8"


def _model_conflicts(config: Any) -> Iterator[str]:
    if config.data.chat and config.model.path is None:
        yield "data.chat=True needs a model folder with a chat template: set model.path"
    for key in ("system", "enable_thinking"):
        if config.data[key] is not None and not config.data.chat:
            yield f"data.{key}={config.data[key]!r} would do nothing: set data.chat to True"
    if config.model.path is not None:
        try:
            if not config.model.path or not Path(fetched(config.model.path)).is_dir():
                yield f"model.path={config.model.path!r} is not a folder"
            else:
                read_config(fetched(config.model.path))
        except (ValueError, OSError) as error:
            yield f"model.path: {error}"


def _training_conflicts(config: Any, task: Task) -> Iterator[str]:
    # Sampling from the whole distribution, which is what the loss scores.
    for key in ("top_k", "top_p", "min_p"):
        if config.rollout[key] is not None:
            yield (
                f"rollout.{key}={config.rollout[key]} cannot be trained with: the loss scores the whole distribution, so the "
                f"sampled policy and the trained one would differ. Leave it unset; --mode=evaluate accepts it"
            )

    profile, last = tuple(config.train.profile), config.train.iterations
    if profile and not (len(profile) == 2 and 1 <= profile[0] <= profile[1] <= last):
        yield f"train.profile={profile} must be empty, or the first and the last iteration to trace, from 1 to {last}"

    # A micro-batch holds a packed row, and that a completion.
    longest, most, row = config.rollout.max_completion, config.train.microbatch_tokens, config.train.row_length
    if most < longest:
        yield f"train.microbatch_tokens={most} is less than one completion of rollout.max_completion={longest}"
    if row is not None and most < row:
        yield f"train.row_length={row} is more than train.microbatch_tokens={most}"

    # Prompts enough for an iteration.
    prompts, held_out, rows = config.data.prompts_per_iteration, config.evaluate.held_out, len(task.examples)
    if prompts > rows - held_out:
        without = f" without evaluate.held_out={held_out}" if held_out else ""
        yield (
            f"data.prompts_per_iteration={prompts} exceeds the {rows - held_out} prompts of task {task.name!r}{without}: "
            "an iteration would hold a prompt twice"
        )

    # A policy that succeeds sometimes: a pretrained one, or a random one after a warm start.
    warm_start = config.warm_start.max_steps
    if config.model.path is None and task.demonstrations is None:
        yield f"task {task.name!r} has no demonstrations for a warm start: set model.path to a pretrained model"
    elif config.model.path is None and warm_start == 0:
        yield "a random model without a warm start never succeeds: set model.path, or warm_start.max_steps > 0"
    elif warm_start and task.demonstrations is None:
        yield f"warm_start.max_steps={warm_start}, but task {task.name!r} has no demonstrations: set 0"
