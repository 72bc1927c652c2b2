"""What an evaluation measures (a checkpoint of the run, or the config's own initial model), and where it is written.

The identity of an evaluation is all that decides its numbers; another identity gets another directory.
"""

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from grpo_jax.config import averaged_iterations, flat, task_options, validate
from grpo_jax.files import read_jsonl, read_sealed
from grpo_jax.processes import common
from grpo_jax.runs.checkpoints import Checkpoints, digest
from grpo_jax.runs.directory import CONFIG, EVALUATIONS, REFERENCE, RESULT, check_same, contents, has, saved_steps
from grpo_jax.runs.errors import CheckpointError, RunDirectoryError
from grpo_jax.runs.setup import Setup, make_tokenizer
from grpo_jax.tasks import Task
from grpo_jax.tasks.identity import task_identity
from grpo_jax.train.optimizer import averaged_params
from grpo_jax.train.sharding import sharded_shapes

# Config keys in which an evaluation may differ from its run: what is measured, when the run saved, and how arrays are
# laid out. The other keys decide which parameters there are.
OF_THE_MEASUREMENT: tuple[str, ...] = (
    *("task.", "evaluate.", "data.", "rollout.", "verifier.", "mesh.", "checkpoint."),
    *(
        "train.microbatch_tokens",
        "train.row_length",
        "train.chunk_size",
        "train.iterations_per_program",
        "train.profile",
    ),
)

# Config keys that may differ when an evaluation is started again: no number depends on them.
CHANGEABLE = ("verifier.num_workers", "evaluate.interval", "evaluate.samples", "evaluate.examples")


class MeasuredPolicy(NamedTuple):
    """The policy to measure.

    Attributes:
      name: "initial", "reference", "iteration-N" or "average-N".
      iteration: N, of the measurement's key; 0 for the first two.
      params, ref_params: of the policy, and of the reference where that is another.
    """

    name: str
    iteration: int
    params: Any
    ref_params: Any | None


def stored_config(workdir: Path, config: Any) -> dict[str, Any] | None:
    """The config of the run in a directory, compared with the one given; None where there is no run.

    Raises:
      RunDirectoryError: naming every key that differs and is not of the measurement.
    """
    if not contents(workdir) > {CONFIG}:
        return None
    advice = (
        "An evaluation may differ from its run in task, evaluate, data, rollout, verifier, mesh and checkpoint, and in the "
        "keys of train that change only time and memory"
    )
    check_same(workdir, flat(config), changeable=OF_THE_MEASUREMENT, advice=advice)
    return read_sealed(workdir / CONFIG)


def find_policy(config: Any, setup: Setup, workdir: Path, checkpoint: str, *, has_run: bool) -> MeasuredPolicy:
    """Restores the policy that ``checkpoint`` names, and the reference where that is another.

    Args:
      config, setup: of the measurement.
      workdir: the run directory, locked.
      checkpoint: "latest", "reference", "average" (of the parameters, in the newest checkpoint), or the number of an iteration.
      has_run: the directory holds a run; without one, the config's initial model is the policy.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    number = int(checkpoint) if re.fullmatch("[0-9]{1,9}", checkpoint) else None
    if number is None and checkpoint not in ("latest", "reference", "average"):
        raise CheckpointError(
            f"--checkpoint={checkpoint!r} must be latest, reference, average, or the number of an iteration"
        )
    if not has_run:
        if number is not None or checkpoint == "average":
            raise CheckpointError(f"--checkpoint={checkpoint}: there is no run in {workdir}")
        return MeasuredPolicy("initial", 0, setup.initial_params(config.seed), None)
    reference = _restore(workdir / "reference", setup.shapes)
    if reference is None:
        raise CheckpointError(f"the run in {workdir} has no reference policy yet: start it again to go on with it")
    if checkpoint == "average" and not config.train.average:
        raise CheckpointError("--checkpoint=average: the run keeps no average of its parameters (train.average is 0)")
    if checkpoint == "reference":
        return MeasuredPolicy("reference", 0, reference[1], None)
    like = jax.eval_shape(setup.compiled.start, setup.trained)
    state = _restore(workdir / "checkpoints", sharded_shapes(like, setup.mesh), number)
    if state is None:
        return MeasuredPolicy("reference", 0, reference[1], None)
    done, trained, policy_params = state[0], state[1].params, partial(setup.recipe.params, ref_params=reference[1])
    if checkpoint == "average":
        begins = config.train.iterations - averaged_iterations(config)
        if done <= begins:
            raise CheckpointError(
                f"--checkpoint=average: the average begins after iteration {begins}, and the newest checkpoint is {done}"
            )
        average = averaged_params(trained, state[1].opt_state)
        return MeasuredPolicy(f"average-{done}", done, policy_params(average), reference[1])
    return MeasuredPolicy(f"iteration-{done}", done, policy_params(trained), reference[1])


def check_alphabet(config: Any, setup: Setup, stored: dict[str, Any] | None) -> None:
    """Refuses a task of other characters than the run's, for a random decoder: its token ids would change their meaning.

    Args:
      config, setup: of the measurement.
      stored: the run's config, or None.

    Raises:
      RunDirectoryError: naming both alphabets.
    """
    now = getattr(setup.tokenizer, "alphabet", None)
    task_now = {key: value for key, value in flat(config).items() if key.startswith("task.")}
    if stored is None or now is None or all(stored.get(key) == value for key, value in task_now.items()):
        return
    run_config = config.copy_and_resolve_references()
    with run_config.unlocked(), run_config.ignore_type():
        run_config.update_from_flattened_dict({key: stored[key] for key in task_now if key in stored})
    task, _ = validate(run_config, num_devices=jax.device_count(), training=False)
    then = make_tokenizer(run_config, task).alphabet  # type: ignore[attr-defined] # of characters, as the other
    if now != then:
        raise RunDirectoryError(
            f"task.*: the run's model reads and writes the characters {then!r}, and this task's are {now!r}; a random decoder "
            "is evaluated on tasks of the same characters"
        )


def identity_of(config: Any, task: Task, policy: MeasuredPolicy) -> dict[str, Any]:
    """What decides the numbers of an evaluation, as {dotted key: JSON value}; kept as its config.json."""
    groups = ("model", "data", "rollout", "evaluate", "verifier", "mesh", "seed")
    bound = {key: value for key, value in flat(config).items() if key.split(".")[0] in groups}
    bound |= {"task.name": config.task.name} | {f"task.{k}": v for k, v in sorted(task_options(config).items())}
    return bound | {
        **task_identity(task),
        "checkpoint.name": policy.name,
        "checkpoint.parameters": digest(policy.params),
    }


def reference_counts(
    workdir: Path, setup: Setup, identity: dict[str, Any], stored: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The counts of the reference on the prompts that are measured, or None where there are none.

    They are those of the run itself or of an evaluation of the reference that differs in no other prompt or sampling option,
    whichever has more samples.

    Args:
      workdir: the run directory.
      setup: of the measurement.
      identity: see `identity_of`.
      stored: the run's config, or None.

    Returns:
      {"successes": [Q], "trials", "group_size" of the run, "source": name of the directory or file they are from}.
    """
    groups = ("model.", "data.", "rollout.", "task.examples", "task.verify", "seed", "evaluate.prompts")
    deciding = {k: v for k, v in identity.items() if k.startswith(groups) and k != "rollout.group_size"}

    def same(other: dict[str, Any]) -> bool:
        return all(other.get(key) == json.loads(json.dumps(value)) for key, value in deciding.items())

    counts = []
    if stored is None:
        return None
    if same(stored) and not stored.get("evaluate.held_out") and (workdir / REFERENCE).exists():
        counts.append(read_sealed(workdir / REFERENCE) | {"source": REFERENCE})
    for path in sorted((workdir / EVALUATIONS).glob(f"*/{RESULT}")):
        other = read_sealed(path.with_name(CONFIG))
        if other["checkpoint.name"] == "reference" and same(other):
            rows = {row["index"]: row for row in read_jsonl(path.with_name("prompts.jsonl"))}
            counted = [rows[index] for index in setup.probed.tolist()]
            successes = [row["successes"] for row in counted]
            counts.append({"successes": successes, "trials": counted[0]["trials"], "source": path.parent.name})
    if not counts:
        return None
    return max(counts, key=lambda x: x["trials"]) | {"group_size": stored["rollout.group_size"]}


def choose_directory(
    evaluations: Path,
    config: Any,
    task: Task,
    policy: MeasuredPolicy,
    identity: dict[str, Any],
    stored: dict[str, Any] | None,
) -> Path:
    """The directory of an evaluation that was given no name: checkpoint-task-split, and each other task option that
    differs from the run's.

    Where that holds another evaluation, six digits of a digest of all settings are added.

    Args:
      evaluations: where it is to be.
      config, task, policy: of the measurement.
      identity: see `identity_of`.
      stored: the run's config, or None.
    """
    path = evaluations / _name(config, task, policy, stored)
    try:
        if path.is_dir() and contents(path) > {CONFIG}:
            check_same(path, identity, changeable=CHANGEABLE, advice="")
    except RunDirectoryError:
        bound = {key: value for key, value in identity.items() if key not in CHANGEABLE}
        settings = hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()
        return path.with_name(f"{path.name}-{settings[:6]}")
    return path


def _name(config: Any, task: Task, policy: MeasuredPolicy, stored: dict[str, Any] | None) -> str:
    # Left out: the task's name says it, or it is too long.
    parts, left_out = [], ("name", "source", "data_dir", "prompt", "target")
    for key, value in sorted(task_options(config).items()):
        same = stored is None or stored.get(f"task.{config.task.name}.{key}") == json.loads(json.dumps(value))
        if key == "split" or not (same or key in left_out):
            parts.append(str(value) if key == "split" else f"{key}-{value}")
    return re.sub(r"[^\w.+-]+", "_", "-".join([policy.name, task.name, *parts]))[:93]


def _restore(folder: Path, like: Any, number: int | None = None) -> tuple[int, Any] | None:
    """(step, state): the one asked for, else the newest that is intact; None where there is none."""
    steps = common(lambda: saved_steps(folder))
    if number is not None and number not in steps:
        saved = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"--checkpoint={number}: {folder} does not hold it; there are {saved}")
    if not has(folder):
        return None
    checkpoints = Checkpoints(folder, keep=None)
    try:
        if number is None:
            checkpoint = checkpoints.restore_latest(like)
            return checkpoint and checkpoint[:2]
        return number, checkpoints.restore(number, like)[0]
    except CheckpointError:
        raise
    except Exception as error:  # Orbax raises whatever a damaged file leads to
        raise CheckpointError(f"checkpoint {number} in {folder} cannot be restored: {error}") from error
    finally:
        checkpoints.close()
