"""Runs of launch.py, each in a process of its own, which an experiment compares."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def result_of(config: str, workdir: Path, *options: str) -> dict[str, Any]:
    """The result of a run, which is started, resumed, or only read if it is finished.

    Args:
      config: config file, as for launch.py.
      workdir: the run directory.
      *options: further flags of launch.py.

    Returns:
      What result.json holds.

    Raises:
      subprocess.CalledProcessError: the run failed; it has said why.
    """
    print(f"{workdir}: {config} {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, "launch.py", f"--config={config}", f"--workdir={workdir}", *options], check=True)
    return json.loads((workdir / "result.json").read_text(encoding="utf-8"))


def band(interval: dict[str, float] | None, digits: int = 3) -> str:
    """A mean with its interval, as tables have it.

    >>> band({"mean": 0.5, "low": 0.25, "high": 0.75}, digits=2), band(None)
    ('0.50 [0.25, 0.75]', 'not determined')
    """
    if interval is None:
        return "not determined"
    mean, low, high = (f"{interval[end]:.{digits}f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
