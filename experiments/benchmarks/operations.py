"""Which operations a profile's time goes to: the trace that `jax.profiler` writes, summed by operation."""

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

AROUND = ("while", "call", "conditional")  # their time is that of what they contain


def operations(folder: Path) -> list[tuple[str, float]]:
    """(operation, seconds) of the newest trace below a folder, the longest first.

    Raises:
      FileNotFoundError: there is no trace.
    """
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"{folder} holds no trace (*.xplane.pb)")
    total: Counter[str] = Counter()
    with warnings.catch_warnings():
        # jaxlib's types draw one from Python 3.12, and where it is an error they abort the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, nanoseconds in _events(ProfileData.from_file(str(traces[-1]))):
            if not name.startswith(AROUND):
                total[name] += int(nanoseconds)
    return [(name, nanoseconds / 1e9) for name, nanoseconds in total.most_common()]


def table(seconds_of: list[tuple[str, float]], most: int = 20) -> str:
    """The longest operations as Markdown.

    >>> print(table([("fusion.1", 0.003), ("copy.2", 0.001)]), end="")
    | operation | ms | share |
    |---|---|---|
    | fusion.1 | 3.00 | 75 % |
    | copy.2 | 1.00 | 25 % |
    """
    total = sum(seconds for _, seconds in seconds_of)
    lines = ["| operation | ms | share |", "|---|---|---|"]
    lines += [
        f"| {name} | {1e3 * seconds:.2f} | {100 * seconds / total:.0f} % |" for name, seconds in seconds_of[:most]
    ]
    return "\n".join(lines) + "\n"


def _events(trace: Any) -> Iterator[tuple[str, float]]:
    """Operations and their nanoseconds: of the devices' own lines, or, on a CPU, of what names the operation it ran."""
    devices = [plane for plane in trace.planes if plane.name.startswith("/device:") and list(plane.lines)]
    for plane in devices:
        lines = [line for line in plane.lines if line.name == "XLA Ops"]
        for line in lines or [line for line in plane.lines if line.name.startswith("Stream")]:
            for event in line.events:
                stats = dict(event.stats)
                yield str(stats.get("hlo_op", event.name)), event.duration_ns
    if not devices:
        for plane in trace.planes:
            for line in plane.lines:
                for event in line.events:
                    if "hlo_op" in (stats := dict(event.stats)):
                        yield str(stats["hlo_op"]), event.duration_ns
