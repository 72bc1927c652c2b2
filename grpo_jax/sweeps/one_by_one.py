"""A sweep as runs one after the other: every combination of the values of some keys, each in a run directory of its own.

The directory of a sweep holds sweep.json (the state of every point), sweep.md (the same as a page), figure.png where β is
swept, and a run directory per point, which is the whole truth of that point: a sweep that is started again reads from them
what is done, goes on with what was interrupted, and tries once more what failed, last.

The same command may run on several hosts at a time that share the directory, and hosts may come and go: each takes the next
point whose run directory nobody holds, and takes up those of hosts that died.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from grpo_jax.files import read_json, read_sealed, write_json, write_text
from grpo_jax.processes import check_alike, common, stop_requested
from grpo_jax.report.markdown import inline
from grpo_jax.report.standing import UNFINISHED
from grpo_jax.report.sweep_figure import p_star_curve, plot_sweep, sweep_page, sweep_table
from grpo_jax.runs.directory import CHANGEABLE, CONFIG, FAILED, LOCK, RESULT, check_same, contents, saved_steps
from grpo_jax.runs.errors import DirectoryInUse, Preempted, RunDirectoryError, RunError, StartedInVain
from grpo_jax.runs.loop import train
from grpo_jax.runs.reference import share_reference
from grpo_jax.runs.run import say, stop_handlers, stopped_by, terminal
from grpo_jax.storage import holder, names, place
from grpo_jax.sweeps.points import Point, folder_name, title

SWEEP, PAGE, FIGURE = "sweep.json", "sweep.md", "figure.png"
BETA, SEED = "objective.beta", "seed"
LOOK = 5.0  # seconds between looks at points that run elsewhere
CURVE = 81  # values of β at which a predicted curve is computed


class State(NamedTuple):
    """Where a point stands: "done", "running", "interrupted", "failed" or "waiting"; in words, with why or with its result."""

    name: str
    words: str
    why: str | None = None
    result: dict[str, Any] | None = None


def run_points(
    points: Sequence[Point], workdir: str | Path, console: Console | None = None, *, run: Callable[..., Any] = train
) -> list[State]:
    """Runs the points one after the other, and writes sweep.json, sweep.md and, where β is swept, figure.png.

    Args:
      points: see `make_points`.
      workdir: of the sweep; each point's run directory lies in it.
      console: where the sweep and its runs print; the terminal by default.
      run: (config, directory, console), as `train`.

    Returns:
      The states, in the order of the points. A run that fails is one of them; the others go on.

    Raises:
      RunDirectoryError, OSError: the directory is not of this sweep, in use, or not writable.
      Preempted: SIGTERM arrived; the same sweep goes on from there.
      StartedInVain: all that failed did so at this start and at those before.
    """
    console = console or terminal()
    check_alike({folder_name(point.values): point.identity for point in points})
    workdir = place(workdir)
    common(lambda: _open_directory(workdir))

    def state_of(point: Point) -> State:
        return State(*common(lambda: read_state(point, workdir)))

    def record() -> list[State]:
        states = [state_of(point) for point in points]  # others may have run some
        common(lambda: _record(workdir, points, states))
        return states

    def attempt(i: int) -> bool:
        """Runs a point, unless it is done; whether it is left for later, because it runs elsewhere or has failed there."""
        point, directory = points[i], workdir / folder_name(points[i].values)
        state, heading = state_of(point), f"point {i + 1} of {len(points)}: {title(point.values)}"
        if state.name == "running":
            return True
        if state.name == "failed" and first and i not in failed:
            return True  # since this start began, elsewhere: here it may do
        if state.name == "done" or i in tried:
            say(console, f"{heading}: {state.words}")
            return False
        say(console, heading)
        if stop_requested([]):
            raise stopped_by([], f"the sweep in {workdir}")
        tried.add(i)
        try:
            others = [workdir / folder_name(x.values) for x in points]
            common(partial(_forget_failure, directory))
            common(partial(share_reference, directory, point.identity, others))
            run(point.config, directory, console)
        except DirectoryInUse as error:  # since a moment ago
            say(console, f"{heading}: {error}")
            tried.discard(i)
            return True
        except (Preempted, RunDirectoryError):
            record()
            raise
        except (RunError, ValueError, RuntimeError) as error:
            why = str(error) or type(error).__name__
            say(console, f"{heading} failed: {inline(why)}")
            common(partial(_write_failure, directory, why))
            ends.append(error)
            if len(ends) > 1 and not any(isinstance(end, RunError | ValueError) for end in ends[-2:]):
                record()
                raise  # two in a row, of no fault of the run: it may be this machine
        else:
            ends.append(None)
        record()
        jax.clear_caches()  # each program holds memory maps, and a process may have 65,530
        return False

    failed = {i for i, point in enumerate(points) if state_of(point).name == "failed"}  # before this start
    tried: set[int] = set()
    ends: list[Exception | None] = []  # of the runs here
    first = True
    with _stopped_by_signals(workdir):
        pending = sorted(range(len(points)), key=lambda i: i in failed)
        while pending := [i for i in pending if attempt(i)]:
            if first:
                say(console, f"waiting for {len(pending)} points that run elsewhere, or failed there")
            first = False
            if stop_requested([]):
                raise stopped_by([], f"the sweep in {workdir}")
            time.sleep(LOOK)
        states = record()
        plotted = common(lambda: _plot(workdir / FIGURE, points, states))
        page = sweep_page(_records(points, states), FIGURE if plotted else None)
        common(lambda: write_text(workdir / PAGE, page))
    _show(console, points, states)
    say(console, f"{SWEEP}, {PAGE}{f' and {FIGURE}' if plotted else ''} are in {workdir}")
    errors = [end for end in ends if end is not None]
    if errors and all(isinstance(error, StartedInVain) for error in errors):
        raise StartedInVain(f"{len(errors)} of {len(points)} points fail at every start; why is in {workdir / PAGE}")
    return states


def list_points(points: Sequence[Point], workdir: str | Path, console: Console | None = None) -> list[State]:
    """Shows the points and their states, and changes nothing; arguments, result and errors as for `run_points`."""
    console = console or terminal()
    workdir = place(workdir)
    _check_directory(workdir)
    states = [read_state(point, workdir) for point in points]
    _show(console, points, states)
    return states


def read_state(point: Point, workdir: Path) -> State:
    """The state of a point, from its run directory; raises RunDirectoryError where that belongs to another config."""
    directory = workdir / folder_name(point.values)
    there = contents(directory)
    has_begun = there > {CONFIG}
    if has_begun:
        check_same(
            directory, point.identity, changeable=CHANGEABLE, advice="Choose another directory with --workdir=PATH"
        )
        if (result := _result(directory / RESULT)) is not None:
            star = f", p* {result['p_star']['mean']:.4f}" if "p_star" in result else ""
            return State("done", f"done, p̂ {result['p_final']['mean']:.4f}{star}", result=result)
    at = f"iteration {max(saved_steps(directory / 'checkpoints'), default=0)} of {point.config.train.iterations}"
    if user := holder(directory / LOCK):
        return State("running", f"running at {at}, {user}" if has_begun else f"running, {user}")
    try:
        return State("failed", "failed", (directory / FAILED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return State("interrupted", f"interrupted at {at}") if has_begun else State("waiting", "waiting")


def _result(path: Path) -> dict[str, Any] | None:
    """Of a finished run; None where there is none, or one that a start will make anew."""
    try:
        return read_sealed(path)
    except (FileNotFoundError, ValueError):
        return None


def _open_directory(workdir: Path) -> None:
    _check_directory(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / SWEEP).exists():
        _stored_records(workdir)
    else:
        write_json(workdir / SWEEP, {"points": []})


def _check_directory(workdir: Path) -> None:
    holds = names(workdir)
    if holds and SWEEP not in holds:
        raise RunDirectoryError(
            f"{workdir} is not empty and holds no sweep (no {SWEEP}). Choose another with --workdir=PATH"
        )


def _write_failure(directory: Path, why: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / FAILED, why)


def _forget_failure(directory: Path) -> None:
    (directory / FAILED).unlink(missing_ok=True)


def _records(points: Sequence[Point], states: Sequence[State]) -> list[dict[str, Any]]:
    """What sweep.json holds of each point."""
    records = []
    for point, state in zip(points, states, strict=True):
        record: dict[str, Any] = {
            "point": title(point.values),
            "folder": folder_name(point.values),
            "values": point.values,
        }
        record |= {"state": state.name, "words": state.words, "why": state.why}
        numbers, result = ("confidence", "p_ref", "p_star", "attainable", "p_final", "difference"), state.result or {}
        records.append(record | {key: result[key] for key in ("standing", *numbers) if key in result})
    return records


def _record(workdir: Path, points: Sequence[Point], states: Sequence[State]) -> None:
    """Writes the records of these points, and keeps those of other grids in the same directory."""
    records = _records(points, states)
    mine = {record["folder"] for record in records}
    others = [record for record in _stored_records(workdir) if record["folder"] not in mine]
    write_json(workdir / SWEEP, {"points": records + others})


def _stored_records(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / SWEEP
    try:
        records = read_json(path)["points"]
        return [record for record in records if isinstance(record["folder"], str)]
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path} is not readable as the record of a sweep ({error}); remove it to start anew"
        ) from None


def _show(console: Console, points: Sequence[Point], states: Sequence[State]) -> None:
    console.print(sweep_table(_records(points, states)))
    for point, state in zip(points, states, strict=True):
        if state.why is not None:
            say(console, f"{title(point.values)} failed: {inline(state.why)}")


def _plot(path: Path, points: Sequence[Point], states: Sequence[State]) -> bool:
    """Plots the finished points where β is swept and some KL holds to the reference; whether there is a figure."""
    ended = [
        (point, state.result, title({key: x for key, x in point.values.items() if key not in (BETA, SEED)}))
        for point, state in zip(points, states, strict=True)
        if state.result is not None and point.values.get(BETA, 0) > 0
    ]
    if not ended:
        return False
    betas = [point.values[BETA] for point in points if point.values[BETA] > 0]
    over = np.geomspace(min(betas) / 1.4, max(betas) * 1.4, CURVE)
    references: dict[str, dict[int, Any]] = {}  # by label and seed: all β share one reference
    for point, result, label in ended:
        references.setdefault(label, {}).setdefault(point.config.seed, result["prompts"]["p_ref"])
    curves = []
    for label, by_seed in references.items():
        point = next(point for point, _, other in ended if other == label)
        shape = {"objective": point.objective, "group_size": point.config.rollout.group_size}
        trials = point.config.evaluate.final_samples
        each = [p_star_curve(np.array(p_ref), over, trials=trials, **shape) for p_ref in by_seed.values()]
        p_stars = [curve for curve in each if curve is not None]
        if p_stars and not point.config.objective.entropy_bonus:  # which the theory leaves out
            curves.append((label, over, np.mean(p_stars, axis=0)))
    measured = [
        {"label": label, "beta": point.values[BETA], "seed": point.config.seed}
        | {"p": result["p_final"]["mean"], "low": result["p_final"]["low"], "high": result["p_final"]["high"]}
        | ({"p_star": result["p_star"]["mean"]} if "p_star" in result else {})
        | {"arrived": result.get("standing") != UNFINISHED}
        for point, result, label in ended
    ]
    config = ended[0][0].config
    common = {
        "objective.name": config.objective.name,
        "rollout.group_size": f"G = {config.rollout.group_size}",
        "train.iterations": f"{config.train.iterations} iterations",
    }
    same = [text for key, text in common.items() if key not in points[0].values]
    plot_sweep(path, curves, measured, title=", ".join(same))
    return True


@contextmanager
def _stopped_by_signals(workdir: Path) -> Iterator[None]:
    """Turns signals to stop into `Preempted` between runs and while one starts, as they are inside of them."""
    received: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt  # which no one takes for a failure of the run

    with stop_handlers(interrupt):
        try:
            yield
        except KeyboardInterrupt:
            if not received:
                raise
            raise stopped_by(received, f"the sweep in {workdir}") from None
