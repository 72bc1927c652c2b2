"""One line that says how far a long phase is: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Progress of one phase; see `progress`."""

    def __init__(self, console: Console, name: str, total: int, done: int, bar: Progress | None):
        self._console, self._name, self._total, self._bar = console, name, total, bar
        self._first, self._begun, self._said = done, time.monotonic(), time.monotonic()
        self._task = None if bar is None else bar.add_task(name, total=total, completed=done, note="", rate="")

    def update(self, done: int, note: str) -> None:
        """Shows the steps done so far and a short note, such as the current success probability."""
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._begun, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note, rate=f"{rate:.1f}/s")
        elif now - self._said >= _SECONDS_BETWEEN_LINES or done == self._total:
            self._said = now
            left = (self._total - done) / max(rate, 1e-9)
            self._console.print(
                f"{self._name} {done}/{self._total} · {rate:.1f}/s · {left:.0f} s left · {note}", highlight=False
            )


@contextmanager
def progress(console: Console, name: str, *, total: int, done: int = 0) -> Iterator[ProgressLine]:
    """Shows the progress of a phase of ``total`` steps, of which ``done`` were done before (a resumed run)."""
    if not console.is_terminal:
        yield ProgressLine(console, name, total, done, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield ProgressLine(console, name, total, done, bar)
