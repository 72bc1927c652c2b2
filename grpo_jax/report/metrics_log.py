"""Where numbers go: results go to metrics.jsonl, timings to perf.jsonl, and both to TensorBoard; samples go to probes.jsonl.

metrics.jsonl is the source of truth. It holds results only, so it is the same bit for bit, however often a run was killed and
resumed. Seconds and rates differ from run to run; they have a file of their own.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from grpo_jax.files import read_jsonl
from grpo_jax.processes import common, is_main
from grpo_jax.storage import Lines, Mirror

METRICS, PERF, PROBES, TENSORBOARD = "metrics.jsonl", "perf.jsonl", "probes.jsonl", "tensorboard"


class MetricsLog:
    """The metrics files of a run, which main writes; rows are dicts with an integer "iteration" and a "phase".

    Args:
      directory: of the run.
      after: rows of later iterations are dropped, since they will be computed again; None drops every row.
    """

    def __init__(self, directory: Path, *, after: int | None):
        self._path = directory / METRICS
        self._written = hashlib.sha256()  # of the lines of metrics.jsonl
        self._files: dict[str, Lines] = {}
        self._board: Any = None
        self._mirror: Any = None
        common(lambda: self._open(directory, after))

    def _open(self, directory: Path, after: int | None) -> None:
        from tensorboardX import SummaryWriter

        for name in (METRICS, PERF, PROBES):
            lines = [] if after is None else lines_until(directory / name, after)
            self._files[name] = Lines(directory / name, lines)
            if name == METRICS:
                self._written.update("".join(lines).encode())
        self._mirror = Mirror(directory / TENSORBOARD)
        self._board = SummaryWriter(str(self._mirror.here), purge_step=0 if after is None else after + 1)

    def write(self, row: dict[str, Any], *, file: str = METRICS) -> None:
        """Appends one row; numbers whose names have a slash also go to TensorBoard."""
        if not is_main():
            return
        line = _line(row)
        self._files[file].append(line)
        if file == METRICS:
            self._written.update(line.encode())
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float):
                self._board.add_scalar(name, value, row["iteration"])

    def flush(self) -> str:
        """Returns when every row is on disk, with the digest of those of metrics.jsonl, for a checkpoint that vouches for them.

        Raises:
          ValueError: the file does not have them, because somebody else has changed it.
        """
        return common(self._flush)

    def _flush(self) -> str:
        for file in self._files.values():
            file.flush()
        self._board.flush()
        self._mirror.flush()
        found = hashlib.sha256(self._path.read_bytes() if self._path.exists() else b"")
        if found.digest() != self._written.digest():
            raise ValueError(
                f"{self._path} was changed while the run wrote it; the same command goes on from the newest checkpoint whose "
                "rows it still has"
            )
        return found.hexdigest()

    def close(self) -> None:
        """Ends the log: every row is then on disk, and none can follow."""
        if not is_main():  # it may end because another process has failed, and so waits for none
            return
        for file in self._files.values():
            file.close()
        self._board.close()
        self._mirror.close()


def lines_until(path: Path, iteration: int) -> list[str]:
    """The first lines of a metrics file, as far as they are rows of at most this iteration; [] where there is no file."""
    lines = []
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line)
            if not (line.endswith("\n") and isinstance(row["iteration"], int) and row["iteration"] <= iteration):
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        lines.append(line)
    return lines


def rows_digest(directory: Path, iteration: int) -> str:
    """SHA-256 of the lines of metrics.jsonl up to an iteration."""
    return hashlib.sha256("".join(lines_until(directory / METRICS, iteration)).encode()).hexdigest()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, [] where there is none yet; a torn last line, which a kill can leave, is dropped.

    Raises:
      ValueError: a broken line before the last, named with its number.
    """
    return read_jsonl(path, torn_end=True) if path.exists() else []


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, sort_keys=True) + "\n"
