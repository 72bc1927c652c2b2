"""Files that are read whole and written whole: JSON, JSON lines, and text that is either the old one or the new one.

What a later start goes on from is sealed: an object with a digest of itself, so that no change of it goes unnoticed.

`read_bounded` and `read_bounded_json` are for files that somebody else made, which may be of any size and hold anything.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo_jax.storage import write_bytes

SEAL = "sha256"  # the key of the digest in a sealed object


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8: whenever the power fails, the file is the old one or the new one."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, in the manner of `write_text`."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes values as JSON lines, in the manner of `write_text`."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def seal(entries: dict[str, Any], *, name: str) -> dict[str, Any]:
    """An object of JSON with its digest; ``name`` says what it is, so that no other's can take its place.

    >>> unseal(seal({"step": 3}, name="a"), name="a")
    {'step': 3}
    >>> unseal(seal({"step": 3}, name="a") | {"step": 4}, name="a")
    Traceback (most recent call last):
    ...
    ValueError: changed since it was written
    """
    entries = json.loads(json.dumps(entries))  # as it comes back
    return entries | {SEAL: _digest(entries, name)}


def unseal(value: Any, *, name: str) -> dict[str, Any]:
    """What was sealed; ValueError where that has changed, or never was."""
    if not isinstance(value, dict) or SEAL not in value:
        raise ValueError("it has no digest: changed since it was written, or by an older version of grpo_jax")
    entries = {key: x for key, x in value.items() if key != SEAL}
    if value[SEAL] != _digest(entries, name):
        raise ValueError("changed since it was written")
    return entries


def _digest(entries: dict[str, Any], name: str) -> str:
    return hashlib.sha256(json.dumps([name, entries], sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, entries: dict[str, Any]) -> None:
    """Writes an object as JSON with its digest, in the manner of `write_text`."""
    write_json(path, seal(entries, name=path.name))


def read_sealed(path: Path) -> dict[str, Any]:
    """The object of a file of `write_sealed`.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not what was written; names the file.
    """
    try:
        return unseal(read_json(path), name=path.name)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      OSError, ValueError: it cannot be read, or is not UTF-8 or not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file; ValueError naming one that is not regular (a FIFO, say) or has more than ``most``."""
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: more than {most} bytes")
    return content


def read_bounded_json(path: Path, most: int, *, unique: bool = True) -> dict[str, Any]:
    """The object of a JSON file of at most ``most`` bytes.

    Args:
      path: of the file.
      most: bytes.
      unique: whether a key that occurs twice in an object is refused; otherwise its last value counts.

    Raises:
      ValueError: from `read_bounded` and `parse_object`.
    """
    return parse_object(read_bounded(path, most), path, unique=unique)


def parse_object(text: bytes, path: Path, *, unique: bool = True) -> dict[str, Any]:
    """The object that a JSON text is; ValueError naming the file for any other value, and for what JSON does not allow.

    >>> parse_object(b'{"a": 1, "a": 2}', Path("config.json"))
    Traceback (most recent call last):
    ...
    ValueError: config.json: JSON that cannot be read: duplicate a: a key occurs twice
    """
    try:
        entries = json.loads(text, object_pairs_hook=unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: JSON that cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: its JSON is not an object")
    return entries


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``object_pairs_hook`` of `json.loads`: the object of these pairs; ValueError for a key that occurs twice.

    >>> json.loads('{"a": 1, "b": {"a": 2}}', object_pairs_hook=unique_keys)
    {'a': 1, 'b': {'a': 2}}
    """
    entries = dict(pairs)
    if len(entries) < len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate {ascii(repeated)[1:-1][:200]}: a key occurs twice")
    return entries


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
