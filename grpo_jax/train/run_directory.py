"""The run directory: one process at a time, one config for ever, and files that are written whole or not at all."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_jax.train.errors import RunDirectoryError

CONFIG, RESULT, REFERENCE = "config.json", "result.json", "reference.json"

# Keys that may differ when a run is started again: they say how often to look and save, never what is computed.
CHANGEABLE = ("checkpoint.interval", "checkpoint.keep", "verifier.num_workers")


@contextmanager
def open_run_directory(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Creates or reopens a run directory, locked for this process, that belongs to this config.

    Args:
      path: of the directory.
      config: {dotted key: JSON value}; written to config.json by the first start, compared by every later one.

    Yields:
      The absolute path.

    Raises:
      RunDirectoryError: the path is not a directory or not writable, holds something else, belongs to another config (every
        key that differs is named; a start that failed before it made anything binds nobody), or is in use by another process.
        Nothing has been changed then.
    """
    path = path.expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = {p.name for p in path.iterdir()} - {"lock", f".{CONFIG}.tmp"}
        if names and CONFIG not in names:
            raise RunDirectoryError(
                f"{path} is not empty and is not a run directory (no {CONFIG}). Choose another with --workdir=PATH"
            )
        lock = (path / "lock").open("a+")
    except OSError as error:
        raise RunDirectoryError(
            f"cannot use {path} as run directory: {error.strerror or error}. Choose another with --workdir=PATH"
        ) from error
    with lock:
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the system drops it when the process dies, however it dies
        except OSError as error:
            lock.seek(0)
            raise RunDirectoryError(f"{path} is in use by process {lock.read().strip() or '?'}") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        if names > {CONFIG}:
            _compare(path, config)
        else:
            write_json(path / CONFIG, config)
        yield path


def _compare(path: Path, config: dict[str, Any]) -> None:
    try:
        stored = read_json(path / CONFIG)
    except ValueError as error:
        raise RunDirectoryError(f"{path / CONFIG} is not readable as JSON ({error})") from error
    config = json.loads(json.dumps(config))  # as it would come back: tuples are lists
    keys = sorted(set(stored) | set(config))
    differing = [k for k in keys if k not in CHANGEABLE and stored.get(k) != config.get(k)]
    if differing:
        lines = [f"  - {k}: {stored.get(k)!r} there, {config.get(k)!r} now" for k in differing]
        raise RunDirectoryError(
            "\n".join([f"{path} belongs to another config:", *lines, "Choose another directory with --workdir=PATH"])
        )


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either the old one or the whole new one, also after a power cut."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text through a temporary file and a rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
