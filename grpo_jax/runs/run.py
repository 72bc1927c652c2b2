"""What the phases of a run share on the host, and the measurement they all make."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from grpo_jax.runs.errors import Preempted, VerifierFailed
from grpo_jax.runs.measurement import Probe, probe
from grpo_jax.runs.setup import Program
from grpo_jax.tasks import Verdict
from grpo_jax.tasks.workers import VerifierPool
from grpo_jax.train.iteration import role_key


class Run(NamedTuple):
    """A run on the host.

    Attributes:
      config, program: what is run.
      directory: where it writes.
      console: where it speaks.
      pool: worker processes of a verifier on the host, or None.
      base_key: the one key from which every other is derived.
      signals: SIGTERM numbers received so far.
    """

    config: Any
    program: Program
    directory: Path
    console: Console
    pool: VerifierPool | None
    base_key: jax.Array
    signals: list[int]


def measure(run: Run, params: Any, ref_params: Any, iteration: int, *, role: str = "probe", **options: Any) -> Probe:
    """The probe after an iteration (or a step of the warm start), with the interval's samples unless told otherwise."""
    c = run.config.evaluate
    sizes = {
        "samples": c.samples,
        "batch_samples": c.batch_samples,
        "batch_prompts": run.config.data.prompts_per_iteration,
    }
    key = role_key(run.base_key, role, iteration)
    return probe(run.program, run.pool, params, ref_params, key, **(sizes | options))


def measure_in_full(run: Run, params: Any, ref_params: Any, iteration: int) -> dict[str, Any]:
    """The measurement before and after training, as JSON: per-prompt successes, greedy accuracy, KL, lengths, samples."""
    c = run.config.evaluate
    run.console.print(f"measuring the success probability: {c.final_samples} samples of every prompt", highlight=False)
    found = measure(run, params, ref_params, iteration, samples=c.final_samples, examples=c.examples)
    check_verifier(run, found.verdicts)
    greedy = measure(run, params, ref_params, iteration, samples=1, greedy=True)
    return found._asdict() | {"successes": found.successes.tolist(), "greedy": float(greedy.successes.mean())}


def check_verifier(run: Run, verdicts: dict[str, int]) -> None:
    """Raises VerifierFailed where no completion was judged: a broken verifier must not pass for a hopeless policy."""
    failed = {name: count for name, count in verdicts.items() if name in (Verdict.crash, Verdict.timeout)}
    if run.pool is not None and failed and len(failed) == len(verdicts):
        counts = ", ".join(f"{name} {count:,}" for name, count in failed.items())
        reason = f"; the first crash: {run.pool.first_crash}" if run.pool.first_crash else ""
        raise VerifierFailed(f"the verifier judged none of {sum(failed.values()):,} completions ({counts}){reason}")


def machine_lines(run: Run) -> list[tuple[str, str]]:
    """What computes, and what is computed: (label, text) lines."""
    model, program = run.config.model, run.program
    num_params = sum(leaf.size for leaf in jax.tree.leaves(program.shapes))
    return [
        ("devices", f"{jax.device_count()} × {jax.devices()[0].device_kind}, mesh {dict(program.mesh.shape)}"),
        ("model", f"{model.path or 'random decoder'}, {num_params:,} parameters, {model.dtype}"),
    ]


def show(console: Console, lines: list[tuple[str, str]]) -> None:
    """Prints (label, text) lines as a table."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in lines:
        grid.add_row(label, text.replace("[", r"\["))
    console.print(grid)


def check_preempted(run: Run) -> None:
    """Raises Preempted once SIGTERM has arrived; call it where everything worth keeping is on disk."""
    if run.signals:
        raise Preempted(f"stopped by signal {run.signals[0]}; the same command resumes the run in {run.directory}")


@contextmanager
def sigterm_as_flag() -> Iterator[list[int]]:
    """Collects SIGTERM instead of dying, so that the iteration under way ends and is saved."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread: signals are its owner's business
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
    if received and callable(before):  # a run that ended all the same; who started it may have more to do
        before(received[0], None)
