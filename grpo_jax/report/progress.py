"""The progress of a long phase: a live bar on a terminal; elsewhere a plain line every ten seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from grpo_jax.processes import moved

_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Progress of one phase; see `progress`."""

    def __init__(self, bar: Progress, name: str, total: int, done: int):
        self._bar, self._name, self._total = bar, name, total
        self._said = time.monotonic()
        self._since: tuple[int, float] | None = None  # steps and time of the first update: what is before it compiles
        self._task = bar.add_task(name, total=total, completed=done, note="", rate="")

    def update(self, done: int, note: str) -> None:
        """Shows the steps done so far and a short note, such as the current success probability; a watchdog sees it, too."""
        moved()
        now, console = time.monotonic(), self._bar.console
        first, begun = self._since = self._since or (done, now)
        rate = (done - first) / max(now - begun, 1e-9)
        self._bar.update(self._task, completed=done, note=note, rate=f"{rate:.1f}/s" if rate else "")
        is_due = now - self._said >= _SECONDS_BETWEEN_LINES or done == self._total
        if is_due and not console.is_terminal:
            self._said = now
            pace = f" · {rate:.1f}/s · {(self._total - done) / rate:.0f} s left" if rate else ""
            console.print(f"{self._name} {done}/{self._total}{pace} · {note}", highlight=False)


@contextmanager
def progress(console: Console, name: str, *, total: int, done: int = 0) -> Iterator[ProgressLine]:
    """Shows the progress of a phase of ``total`` steps, of which ``done`` were done before (a resumed run)."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
    with bar if console.is_terminal else nullcontext():  # a bar that is not started prints nothing
        yield ProgressLine(bar, name, total, done)
