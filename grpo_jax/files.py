"""Files that are read whole and written whole: JSON, JSON lines, and text that is either the old one or the new one."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes text through a temporary file and a rename: whenever the power fails, the file is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, in the manner of `write_text`."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes values as JSON lines, in the manner of `write_text`."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      OSError, ValueError: it cannot be read, or is not UTF-8 or not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path, *, torn_end: bool = False) -> list[Any]:
    """The values of a file of JSON lines.

    Args:
      path: of the file.
      torn_end: drops a last line that was not written to its end, as a kill in the middle of an append leaves it.

    Raises:
      OSError, ValueError: it cannot be read, or a line is not JSON; the message has its number.
    """
    lines = path.read_bytes().split(b"\n")  # not splitlines(): a row ends at \n only
    if torn_end:
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if torn_end and number == len(lines):
                break
            raise ValueError(f"{path}:{number} is not JSON ({error})") from error
    return rows
