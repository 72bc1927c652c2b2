"""The points of a sweep: every combination of the values of some keys, each a whole config, checked before any of them runs."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from grpo_jax.config import ConfigError, flat, validate
from grpo_jax.objective import Objective
from grpo_jax.tasks.identity import task_identity

MOST = 2_000  # points of a sweep
LONGEST_NAME = 120  # bytes; file systems allow 255


class Point(NamedTuple):
    """One combination of values: {dotted key: value}, the whole config with them, its objective, and what its run
    directory is bound to.
    """

    values: dict[str, Any]
    config: Any
    objective: Objective
    identity: dict[str, Any]


def parse_grid(text: str) -> dict[str, list[str]]:
    """{dotted key: texts of its values} of a sweep as it stands on the command line.

    Semicolons separate keys, and commas values; inside brackets both are plain characters.

    Raises:
      ValueError: no key, a key twice, no value, or a bracket that is not closed.

    >>> parse_grid("objective.beta=0.1,1; model.stop_ids=(1,2),(2,)")
    {'objective.beta': ['0.1', '1'], 'model.stop_ids': ['(1,2)', '(2,)']}
    """
    grid: dict[str, list[str]] = {}
    for part in filter(None, _split(text, ";")):
        key, equals, values = (word.strip() for word in part.partition("="))
        if not (key and equals):
            raise ValueError(f"{part!r} is not of the form key=value,value,…")
        if key in grid:
            raise ValueError(f"{key} is there twice")
        grid[key] = _split(values, ",")
        if not all(grid[key]):
            raise ValueError(f"{key} has an empty value: {values!r}")
    if not grid:
        raise ValueError("names no key: write key=value,value,…; key=value,…")
    return grid


def make_points(
    config: Any,
    grid: dict[str, list[str]],
    with_value: Callable[[Any, str, str], Any],
    *,
    num_devices: int | None = None,
) -> list[Point]:
    """Every combination of the values; the last key varies fastest; each is checked as a run of its own would be.

    Args:
      config: of which the keys are changed.
      grid: {dotted key: texts of its values}.
      with_value: (config, key, text) -> a config with that value, as the command line reads it; raises where it cannot.
      num_devices: that each will have; None: those of this process.

    Raises:
      ConfigError: every conflict of every point, each with the points that have it.
      ValueError: a key that is a group of keys, or a value twice; and whatever ``with_value`` raises.
    """
    if (number := math.prod(map(len, grid.values()))) > MOST:
        raise ValueError(f"{number:,} points are more than {MOST:,}: sweep them in parts, each with a --workdir")
    for key, texts in grid.items():
        changed = [flat(with_value(config, key, text)) for text in texts]
        if key not in changed[0]:
            raise ValueError(f"{key} is a group of keys: sweep one of them")
        for i, leaves in enumerate(changed):
            if leaves[key] in [others[key] for others in changed[:i]]:
                raise ValueError(f"{key} has the value {_plain(leaves[key])} twice")
    points: list[Point] = []
    conflicts: dict[str, list[str]] = {}
    combinations = list(itertools.product(*grid.values()))
    for combination in combinations:
        chosen = config
        for key, text in zip(grid, combination, strict=True):
            chosen = with_value(chosen, key, text)
        leaves = flat(chosen)
        values = {key: leaves[key] for key in grid}
        try:
            task, objective = validate(chosen, num_devices=num_devices or jax.device_count())
        except ConfigError as error:
            for line in error.conflicts:
                conflicts.setdefault(line, []).append(title(values))
        else:
            points.append(Point(values, chosen, objective, leaves | task_identity(task)))
    if conflicts:
        count = len(combinations)
        lines = [f"{line} ({_of_points(titles, count)})" for line, titles in conflicts.items()]
        raise ConfigError(lines, title=f"this sweep of {count} points cannot run, and nothing was started:")
    return points


def title(values: dict[str, Any]) -> str:
    """Values as text.

    >>> title({"objective.beta": 1.0, "seed": 0})
    'objective.beta=1, seed=0'
    """
    return ", ".join(f"{key}={_plain(value)}" for key, value in values.items())


def folder_name(values: dict[str, Any]) -> str:
    """The name of a point's run directory: its values, and a digest of them where the name cannot hold them as they are.

    >>> folder_name({"objective.beta": 0.3, "seed": 0}), folder_name({"model.path": "a/b"})
    ('objective.beta=0.3,seed=0', 'model.path=a-b-7008cfa8')
    """
    plain = title(values).replace(", ", ",")
    safe = re.sub(r"[^\w.,=+-]+", "-", plain, flags=re.ASCII)
    if safe == plain and len(safe) <= LONGEST_NAME:
        return safe
    return f"{safe[:LONGEST_NAME]}-{hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]}"


def _split(text: str, separator: str) -> list[str]:
    """Splits at separators outside brackets; inside brackets, quotes hide brackets."""
    parts, depth, quote, escaped = [""], 0, "", False
    for character in text:
        if quote:
            quote, escaped = ("" if character == quote and not escaped else quote), character == "\\" and not escaped
        elif depth and character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
        if depth < 0:
            break
    if depth:
        raise ValueError(f"the brackets of {text!r} do not match")
    return [part.strip() for part in parts]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _of_points(titles: list[str], count: int) -> str:
    if len(titles) == count:
        return "all points"
    more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
    return f"{len(titles)} of {count} points: {'; '.join(titles[:3])}{more}"
