"""The reference policy: made once by the warm start (or taken as it is), measured, and read back by every later start."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo_jax.data import prompt_order
from grpo_jax.files import read_sealed, write_sealed
from grpo_jax.processes import common
from grpo_jax.report.metrics_log import MetricsLog
from grpo_jax.report.progress import progress
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.directory import (
    ATTAINABLE,
    CHANGEABLE,
    REFERENCE,
    check_same,
    contents,
    load,
    open_run_directory,
    save,
    saved_steps,
)
from grpo_jax.runs.errors import RunDirectoryError, WarmStartFailed
from grpo_jax.runs.measurement import drop_counts, measure, measure_in_full
from grpo_jax.runs.run import Run, check_preempted, say
from grpo_jax.runs.setup import put_prompts
from grpo_jax.storage import copy_folder


def measured_reference(run: Run) -> dict[str, Any]:
    """The measurement of π_ref, read from the run directory; if it is not there, π_ref is made, measured, and both are stored.

    The parameters are stored before they are measured, so a run that is killed in between does not train them again.
    """
    measured = load(run.directory / REFERENCE)
    if measured is None:
        params = reference_params(run)
        measured = save(run.directory / REFERENCE, measure_in_full(run, params, params, 0)[0])
        drop_counts(run)
        check_preempted(run)
    return measured


# Keys that decide how a policy is trained, and nothing of its reference; the first of them nothing of its R² either.
OF_TRAINING = (
    "objective.beta", "objective.target_success", "objective.target_kl",
    "objective.beta_mirror", "objective.clip_low", "objective.clip_high", "optimizer.", "train.iterations",
    "train.average", "train.inner_epochs", "train.minibatches", "evaluate.interval", "evaluate.samples",
)  # fmt: skip
OF_PULL = ("objective.", "rollout.group_size", "lora.")


def share_reference(directory: Path, identity: dict[str, Any], others: Iterable[Path]) -> None:
    """Copies the reference and its measurements from another run to one that has not begun, if they would be the same.

    They would be where the two differ in how they train alone, since the same seed gives the same bits.

    Args:
      directory: of the run; created if need be.
      identity: its config with the digests of its data, {dotted key: JSON value}.
      others: run directories, which need not exist.
    """
    if (directory / REFERENCE).exists():
        return
    for other in others:
        if other == directory or not _is_same(other, identity, *OF_TRAINING, *OF_PULL):
            continue
        with open_run_directory(directory, identity) as path:
            if contents(path) & {"reference", REFERENCE}:
                return
            copy_folder(other / "reference", path / "reference")
            if (other / ATTAINABLE).exists() and _is_same(other, identity, *OF_TRAINING):
                write_sealed(path / ATTAINABLE, read_sealed(other / ATTAINABLE))
            write_sealed(path / REFERENCE, read_sealed(other / REFERENCE))  # last: what a later start looks for
        return


def _is_same(other: Path, identity: dict[str, Any], *free: str) -> bool:
    """Whether another run has a measured reference, and differs in these keys alone."""
    try:
        check_same(other, identity, changeable=(*CHANGEABLE, *free), advice="")
    except (RunDirectoryError, OSError):
        return False
    return (other / REFERENCE).exists()


def reference_params(run: Run) -> Any:
    """The parameters of π_ref, from the run directory; made and stored there if it does not hold them."""
    checkpoints = Checkpoints(run.directory / "reference", keep=None)
    try:
        checkpoint = checkpoints.restore_latest(run.setup.shapes)
        if checkpoint is not None:
            return checkpoint[1]
        if common(lambda: saved_steps(run.directory / "checkpoints")):
            raise RunDirectoryError(
                f"{run.directory / 'reference'} is gone, from which the checkpoints beside it were trained: put it back, or "
                "start in a new --workdir"
            )
        # A new reference: metrics of an earlier start are dropped.
        MetricsLog(run.directory, after=None).close()
        fresh = run.config.warm_start.max_steps == 0
        params = run.setup.initial_params(run.config.seed) if fresh else warm_start(run)
        checkpoints.save(0, params, {})
        return params
    finally:
        checkpoints.close()


def warm_start(run: Run) -> Any:
    """Supervised steps on the task's demonstrations until its success probability reaches the target.

    Raises:
      WarmStartFailed: it does not within the steps allowed.
    """
    c, setup, visited = run.config.warm_start, run.setup, run.setup.visited
    state = setup.compiled.warm_start(setup.initial_params(run.config.seed))
    success = 0.0
    with progress(run.console, "warm start", total=c.max_steps) as line:
        for step in range(1, c.max_steps + 1):
            batch = min(c.batch, len(visited))
            index = visited[prompt_order(run.config.seed, step - 1, num_prompts=len(visited), batch=batch)]
            state, metrics = setup.compiled.warm_start_step(state, *put_prompts(setup, index))
            if step % c.interval == 0 or step == c.max_steps:
                check_preempted(run)
                sizes = {"samples": c.samples, "batch_samples": c.samples}
                probe = measure(run, state.params, state.params, step, role="warm_start", **sizes)
                success = float(probe.successes.mean() / probe.trials)
                line.update(step, f"loss {float(metrics['loss/total']):.3f} · success {success:.3f}")
                if success >= c.target:
                    say(run.console, f"warm start: success {success:.3f} after {step} steps")
                    return state.params
    raise WarmStartFailed(
        f"warm_start.max_steps={c.max_steps} steps did not reach warm_start.target={c.target} (success {success:.3f}): "
        "raise max_steps or learning_rate, lower the target, or widen the model, in a new --workdir"
    )
