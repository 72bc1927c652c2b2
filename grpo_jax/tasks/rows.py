"""Rows of JSONL files, or an error that names the file and the line. One JSON object per line, in UTF-8."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, TypeVar

from grpo_jax.files import unique_keys

T = TypeVar("T")
LINE_BYTES = 8 << 20  # of a row; the longest prompt that any model reads has some 4 MB


class Number(NamedTuple):
    """A number of a row, as the file spells it: 0.10 stays 0.10, and no digit is lost to rounding."""

    text: str


def read_rows(
    path: str | os.PathLike[str], make: Callable[[dict[str, Any]], T], start: int = 0, stop: int | None = None
) -> list[T]:
    r"""What ``make`` makes of each row: a dict of str, `Number`, bool, None, list and dict.

    A line ends at ``\n``, or ``\r\n``, and the last one wherever the file does; other ends of lines are text.

    path: file. make: function of a row, which raises ValueError for a row that it refuses. start, stop: the lines to read,
    counted from 0. Raises ValueError naming the file and the line (from 1) for what is not UTF-8 or no JSON object, for NaN
    and Infinity, for a key that occurs twice, for a line of more than `LINE_BYTES`, and for what ``make`` refuses; OSError if
    there is no such file.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
    ...     _ = file.write(b'{"a": "x", "b": 0.10}\n{"a": "y"}'), file.flush()
    ...     read_rows(file.name, dict)
    [{'a': 'x', 'b': Number(text='0.10')}, {'a': 'y'}]
    """
    made = []
    with open(path, "rb") as file:  # bytes: a line ends at "\n" only, not at what else Unicode counts as an end
        for number, line in enumerate(itertools.islice(_lines(file, path), start, stop), start + 1):
            try:
                made.append(make(_parse(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{os.fspath(path)}:{number}: {error}") from error
    return made


def count_rows(path: str | os.PathLike[str]) -> int:
    """The number of lines of a file, as `read_rows` counts them."""
    with open(path, "rb") as file:
        return sum(1 for _ in _lines(file, path))


def _lines(file: IO[bytes], path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a file; a line that is too long is never whole in memory."""
    for number in itertools.count(1):
        line = file.readline(LINE_BYTES + 1)
        if not line:
            return
        if len(line) > LINE_BYTES:
            raise ValueError(f"{os.fspath(path)}:{number}: a row of more than {LINE_BYTES:,} bytes")
        yield line


def _parse(line: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    text = line.decode("utf-8")
    if not text.strip():
        raise ValueError("an empty line; a row is an object, {...}")
    row = json.loads(text, object_pairs_hook=unique_keys, parse_int=Number, parse_float=Number, parse_constant=refuse)
    if not isinstance(row, dict):
        raise ValueError("wants an object, {...}")
    return row
