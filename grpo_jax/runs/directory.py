"""The run directory: one run at a time, one config for ever, and files that are written whole or not at all.

Of several processes of a run, main reads and writes; what it finds, or fails with, is what all of them find or fail with.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from absl import logging

from grpo_jax import processes, storage
from grpo_jax.files import read_json, read_sealed, write_json, write_sealed, write_text
from grpo_jax.runs.errors import DirectoryInUse, DirectoryUnreachable, Preempted, RunDirectoryError, StartedInVain

CONFIG, RESULT, REFERENCE, EVALUATIONS = "config.json", "result.json", "reference.json", "evaluations"
ATTAINABLE, BETA, LOCK = "attainable.json", "beta.json", "lock"
EXTENDED = "extended"  # entry of config.json, see extension.py
STARTS = "starts.json"  # which counts the starts that came to nothing
IN_VAIN, UNSAVED = 3, 20  # so many without an iteration are enough, and so many without anything new that was saved
FAILED = "failed.txt"  # why the run of a point of a sweep failed

# Keys that may differ when a run is started again: they decide when it is saved and how it is run, never what is computed.
# What attainable.json holds is measured again where attainable.* has changed; no iteration knows of it.
CHANGEABLE = (
    "checkpoint.interval",
    "checkpoint.keep",
    "verifier.num_workers",
    "train.iterations_per_program",
    "train.profile",
    "train.stop_at_collapse",
    "train.without_success",
    "train.watchdog",
    "attainable.",
)
# Keys in which a run may go on otherwise than it began, where it is told to (--extend).
EXTENDABLE = (
    "train.iterations",
    "objective.beta",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_updates",
)


@contextmanager
def open_run_directory(
    path: str | Path,
    config: dict[str, Any],
    *,
    changeable: tuple[str, ...] = CHANGEABLE,
    flag: str = "--workdir=PATH",
    prepare: Callable[[Path], None] = lambda path: None,
) -> Iterator[Path]:
    """Creates or reopens a run directory, locked for this process, that belongs to this config.

    Args:
      path: of the directory.
      config: {dotted key: JSON value}; written to config.json by the first start, compared by every later one.
      changeable: keys that may differ.
      flag: that chooses another directory; named in messages.
      prepare: is called with the path, once it is locked and before the config is compared.

    Yields:
      The absolute path.

    Raises:
      RunDirectoryError: the path is not a directory or not writable, holds something else, belongs to another config (every
        key that differs is named; a start that failed before it made anything binds nobody), or is in use by another process.
        Nothing has been changed then.
    """
    with lock_directory(path, flag=flag) as path:
        prepare(path)
        processes.common(lambda: _belong(path, config, changeable, flag))
        yield path


def is_new(path: str | Path) -> bool:
    """Whether nothing is in a run directory, or it is not there; of one that cannot be read, opening it says why."""
    try:
        return not storage.names(storage.place(path))
    except OSError:
        return False


def _belong(path: Path, config: dict[str, Any], changeable: tuple[str, ...], flag: str) -> None:
    if contents(path) > {CONFIG}:
        advice = f"Choose another directory with {flag}"
        if changeable is CHANGEABLE:
            advice += f"; where {', '.join(EXTENDABLE)} alone differ, --extend goes on with the run"
        check_same(path, config, changeable=changeable, advice=advice)
    elif _load(path / CONFIG) != json.loads(json.dumps(config)):
        (path / STARTS).unlink(missing_ok=True)  # of another config
        write_sealed(path / CONFIG, config)


@contextmanager
def lock_directory(path: str | Path, *, flag: str = "--workdir=PATH") -> Iterator[Path]:
    """Creates a directory if need be, and holds its lock; see `open_run_directory`."""
    path = storage.place(path)
    with processes.held_by_main(lambda: _lock(path, flag)):
        seen = processes.common(lambda: _lock_text(path))
        processes.together(lambda: _check_shared(path, seen, flag))
        yield path


def _lock_text(path: Path) -> str | None:
    """What stands in the lock, which names who holds it; "" for one of a bucket, which all see."""
    if not storage.is_here(path):
        return ""
    return (path / LOCK).read_text(encoding="utf-8") if (path / LOCK).exists() else None


def _check_shared(path: Path, seen: str | None, flag: str) -> None:
    if _lock_text(path) != seen:
        raise RunDirectoryError(
            f"{path} is not shared by all processes: choose a folder that each host sees, with {flag}"
        )


@contextmanager
def _lock(path: Path, flag: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            found = contents(path)
            if found and CONFIG not in found:
                raise RunDirectoryError(
                    f"{path} is not empty and is not a run directory (no {CONFIG}). Choose another with {flag}"
                )
            stack.enter_context(storage.held(path / LOCK))
            storage.remove_temporaries(path)
        except storage.InUse as error:
            raise DirectoryInUse(f"{path} is in use by {error}") from None
        except OSError as error:
            raise DirectoryUnreachable(
                f"cannot use {path} as run directory: {error.strerror or error}. Choose another with {flag}"
            ) from error
        yield


def contents(path: Path) -> set[str]:
    """Names in a run directory, without those that bind nobody: the lock, of starts and failures, the folder of evaluations."""
    return storage.names(path) - {LOCK, FAILED, STARTS, EVALUATIONS}


def saved_steps(folder: Path) -> list[int]:
    """The steps that a folder of checkpoints holds, intact or not; none where there is no such folder."""
    return sorted(int(name) for name in storage.names(folder) if name.isdigit())


def check_same(path: Path, config: dict[str, Any], *, changeable: tuple[str, ...], advice: str) -> None:
    """Compares a config with that of a run directory.

    Args:
      path: of the directory, which holds config.json.
      config: {dotted key: JSON value}.
      changeable: keys that may differ; one that ends in a dot stands for all keys that start so.
      advice: last line of the message.

    Raises:
      RunDirectoryError: naming every key that differs.
    """
    try:
        stored = read_sealed(path / CONFIG)
    except ValueError as error:
        raise RunDirectoryError(f"{error}. Put it back as it was, or choose another directory") from None
    config = json.loads(json.dumps(config))  # as it would come back: tuples are lists
    keys = sorted((set(stored) | set(config)) - {EXTENDED})
    free = tuple(key for key in changeable if key.endswith("."))
    differing = [k for k in keys if k not in changeable and not k.startswith(free) and stored.get(k) != config.get(k)]
    if differing:
        lines = [f"  - {k}: {stored.get(k)!r} there, {config.get(k)!r} now" for k in differing]
        raise RunDirectoryError("\n".join([f"{path} belongs to another config:", *lines, advice]))


@contextmanager
def counted_start(path: Path) -> Iterator[None]:
    """Counts the starts of a run that came to nothing, other than by who stopped it; see `count_iteration`.

    Raises:
      StartedInVain: `IN_VAIN` starts in a row ended before an iteration, or `UNSAVED` before anything new was saved; the message
        has what the last one failed with.
    """
    processes.common(lambda: _count_start(path))
    try:
        yield
    except (Preempted, KeyboardInterrupt):
        processes.common(lambda: (path / STARTS).unlink(missing_ok=True))
        raise
    except Exception as error:
        if processes.is_main():  # another process may have failed alone, and waits for none
            write_json(path / STARTS, read_json(path / STARTS) | {"why": str(error) or type(error).__name__})
        raise
    processes.common(lambda: (path / STARTS).unlink(missing_ok=True))


def count_iteration(path: Path) -> None:
    """Says that this start has come to an iteration."""
    if processes.is_main() and (path / STARTS).exists():
        write_json(path / STARTS, read_json(path / STARTS) | {"without_iteration": 0})


def _count_start(path: Path) -> None:
    saved = sorted(
        {*map(str, saved_steps(path / "checkpoints"))} | (storage.names(path) & {REFERENCE, ATTAINABLE, "reference"})
    )
    counts, why = {"without_iteration": 0, "unsaved": 0}, ""
    try:
        stored = read_json(path / STARTS)
        if stored["saved"] == saved:
            counts, why = {name: int(stored[name]) for name in counts}, str(stored["why"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or one that is broken: the count begins anew
    for name, most, words in (
        ("without_iteration", IN_VAIN, "an iteration"),
        ("unsaved", UNSAVED, "anything new was saved"),
    ):
        if counts[name] >= most:
            raise StartedInVain(
                f"{most} starts in a row ended before {words} in {path}, the last because: {why}\n"
                f"Remove {path / STARTS} to start it again"
            )
    counts = {name: number + 1 for name, number in counts.items()}
    write_json(path / STARTS, counts | {"saved": saved, "why": "it was killed"})


def has(path: Path) -> bool:
    """Whether a file or folder of the directory is there."""
    return processes.common(path.exists)


def load(path: Path) -> dict[str, Any] | None:
    """What `save` wrote to a file of the directory; None where there is none, or one that was changed and is put aside."""
    return processes.common(lambda: _load(path))


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return read_sealed(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        aside = path.with_name(f"{path.name}.corrupt")
        path.replace(aside)
        logging.warning("%s; kept as %s, and made anew", error, aside.name)
        return None


def save(path: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Writes a file of the directory, whole or not at all: an object as JSON with its digest. Returns what `load` will."""
    processes.common(lambda: write_sealed(path, entries))
    return json.loads(json.dumps(entries))


def digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: SHA-256} of files of a directory that are there."""

    def found() -> dict[str, str]:
        there = [name for name in names if (directory / name).exists()]
        return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in there}

    return processes.common(found)


def check_files(directory: Path, expected: dict[str, str]) -> None:
    """Raises RunDirectoryError where files are not what they were when `digests` saw them."""
    now = digests(directory, expected)
    if changed := [name for name in expected if now.get(name) != expected[name]]:
        raise RunDirectoryError(
            f"{', '.join(changed)} of the finished run in {directory}: changed since it was written. Put it back, or remove "
            f"{RESULT}, and the same command makes it anew from what is intact"
        )


def save_text(path: Path, text: str) -> None:
    """Writes a text file of the directory, whole or not at all."""
    processes.common(lambda: write_text(path, text))
