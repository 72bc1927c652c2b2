"""A run on the host: what its phases share, what it says of the machine, and how it learns that it must stop."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from grpo_jax import processes
from grpo_jax.runs.errors import Preempted
from grpo_jax.runs.setup import Setup
from grpo_jax.tasks.workers import VerifierPool


class Run(NamedTuple):
    """A run on the host.

    Attributes:
      config, setup: what is run.
      directory: where it writes.
      console: where it prints.
      pool: worker processes of a verifier on the host, or None.
      base_key: the one key from which every other is derived.
      signals: SIGTERM numbers received so far.
    """

    config: Any
    setup: Setup
    directory: Path
    console: Console
    pool: VerifierPool | None
    base_key: jax.Array
    signals: list[int]


def machine_lines(run: Run) -> list[tuple[str, str]]:
    """What computes, and what is computed: (label, text) lines."""
    model, setup = run.config.model, run.setup
    num_params = sum(leaf.size for leaf in jax.tree.leaves(setup.shapes))
    return [
        ("devices", f"{jax.device_count()} × {jax.devices()[0].device_kind}, mesh {dict(setup.mesh.shape)}"),
        ("model", f"{model.path or 'random decoder'}, {num_params:,} parameters, {model.dtype}"),
    ]


def terminal() -> Console:
    """The console where a run prints by default; as wide as the terminal, or 120 characters in a file. Main alone speaks."""
    return Console(width=None if sys.stdout.isatty() else 120, quiet=not processes.is_main())


def say(console: Console, text: str) -> None:
    """Prints a line as it is: brackets are no markup, and numbers get no colour."""
    console.print(text, markup=False, highlight=False)


def show(console: Console, lines: list[tuple[str, str]]) -> None:
    """Prints (label, text) lines as a table."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in lines:
        grid.add_row(label, text.replace("[", r"\["))
    console.print(grid)


def must_stop(run: Run) -> bool:
    """Whether SIGTERM has arrived, at this process or at another."""
    return processes.stop_requested(run.signals)


def check_preempted(run: Run) -> None:
    """Raises Preempted once SIGTERM has arrived; call it where everything worth keeping is on disk."""
    if must_stop(run):
        raise Preempted(f"stopped by SIGTERM; the same command resumes the run in {run.directory}")


@contextmanager
def sigterm_as_flag() -> Iterator[list[int]]:
    """Collects SIGTERM instead of dying, so that what is under way ends and is saved."""
    received: list[int] = []
    with sigterm_handler(lambda number, frame: received.append(number)) as before:
        yield received
    if received and callable(before):  # the run ended all the same; who started it may have more to do
        before(received[0], None)


@contextmanager
def sigterm_handler(handler: Callable[[int, Any], None]) -> Iterator[Any]:
    """Sets a SIGTERM handler, yields the previous one, and restores it.

    Outside of the main thread it does nothing and yields None, and so it does among several processes, which have jax's own.
    """
    if processes.count() > 1:
        yield None
        return
    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not in the main thread
        yield None
        return
    try:
        yield before
    finally:
        signal.signal(signal.SIGTERM, before)
