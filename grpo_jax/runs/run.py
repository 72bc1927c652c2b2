"""A run on the host: what its phases share, what it says of the machine, and how it learns that it must stop."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from grpo_jax import processes
from grpo_jax.environment import STOPS, program
from grpo_jax.runs.errors import Interrupted, Preempted
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
      signals: numbers of the signals to stop that were received so far.
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
    """Whether a signal to stop has arrived, at this process or at another; called after every piece of work."""
    processes.moved()
    return processes.stop_requested(run.signals)


def check_preempted(run: Run) -> None:
    """Raises Preempted once a signal to stop has arrived; call it where everything worth keeping is on disk."""
    if must_stop(run):
        raise stopped_by(run.signals, f"the run in {run.directory}")


def stopped_by(received: list[int], what: str) -> Preempted:
    """The exception for signals that have arrived; with several processes, jax has received SIGTERM."""
    number = signal.Signals(received[0]) if received else signal.SIGTERM
    kind = Interrupted if number == signal.SIGINT else Preempted
    return kind(f"stopped by {number.name}; the same command resumes {what}")


@contextmanager
def signals_as_flag() -> Iterator[list[int]]:
    """Collects the signals to stop instead of dying: what is under way ends and is saved. A second SIGINT ends at once."""
    received: list[int] = []

    def collect(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            os.write(2, f"{program()}: ended at once; the same command resumes from what was saved\n".encode())
            os._exit(128 + number)
        received.append(number)
        if number == signal.SIGINT:
            os.write(2, b"stopping when the work in hand is done and saved; once more ends at once\n")

    with stop_handlers(collect) as before:
        yield received
    if received and callable(before.get(received[0])):  # the run ended all the same; who started it may have more to do
        before[received[0]](received[0], None)


@contextmanager
def stop_handlers(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """Sets a handler of the signals to stop, yields those before, and restores them.

    Outside of the main thread it does nothing. Among several processes SIGTERM is left to jax, and the others stand for it.
    """
    numbers = set(STOPS)
    if processes.count() > 1:
        numbers.remove(signal.SIGTERM)
        handler = lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    before: dict[int, Any] = {}
    with suppress(ValueError):  # not in the main thread
        before |= {number: signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
