"""What lies in an untrusted checkpoint folder: JSON, and the tensors of its safetensors files, located but not yet read.

The header is parsed here rather than by the safetensors package because that accepts duplicate names and headers of any
cost; every size is compared with the file's before it is believed.
"""

import json
import math
import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
JSON_LIMIT = 2 << 20  # bytes of one JSON text; the header of a 400-billion-parameter Llama has 0.2 MB
CONVERT = (
    "Convert the weights where you trust them: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
)


class Stored(NamedTuple):
    """A tensor of a safetensors file, unread.

    Attributes:
      name: of the tensor; never used as a path.
      file: where it lies.
      dtype: float32, float16 or bfloat16.
      shape: as in the file, [out, in] for a matrix.
      offset: bytes from the start of the file.
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The values as float32; ValueError where one is not finite."""
        values = np.asarray(np.memmap(self.file, self.dtype, "r", self.offset, self.shape), dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{self.file}: {listed([self.name])} holds values that are not finite")
        return values


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json lists, by name.

    Raises ValueError naming the file that is missing, damaged, outside the folder, or not what the index says.

    >>> stored_tensors(Path("nowhere"))
    Traceback (most recent call last):
    ...
    ValueError: nowhere: neither model.safetensors nor model.safetensors.index.json is there
    """
    if (folder / "model.safetensors").exists():
        return _read_header(plain_file(folder, "model.safetensors"))
    if not (folder / "model.safetensors.index.json").exists():
        foreign = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        hint = f"; {listed(sorted(foreign))} can run code when opened. {CONVERT}" if foreign else ""
        raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there{hint}")
    index = plain_file(folder, "model.safetensors.index.json")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{index}: weight_map is not a map of tensor names to file names")
    stored: dict[str, Stored] = {}
    for path in [plain_file(folder, shard) for shard in sorted(set(where.values()))]:
        tensors = _read_header(path)
        if strangers := [name for name in tensors if where.get(name) != path.name]:
            raise ValueError(f"{path}: {listed(strangers)} not listed for this file in {index.name}")
        stored |= tensors
    return stored


def plain_file(folder: Path, name: str) -> Path:
    """A regular file directly inside the folder; ValueError for anything else, before it is opened.

    >>> plain_file(Path("folder"), "../secret")
    Traceback (most recent call last):
    ...
    ValueError: folder: '../secret' is not the plain name of a file in this folder
    """
    if not re.fullmatch(r"[A-Za-z0-9._+-]{1,200}", name) or name in (".", ".."):
        raise ValueError(f"{folder}: {name[:200]!r} is not the plain name of a file in this folder")
    path = folder / name
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{path}: a link to outside the folder is not followed; copy the folder with its contents")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file that is too large, not JSON, or repeats a name.

    Example: see ``grpo_jax.models.load_pretrained``.
    """
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path}: more than {JSON_LIMIT} bytes of JSON")
    return _parse_json(path, path.read_bytes())


def listed(names: list[str], shown: int = 5) -> str:
    """The first names, safe to print, and how many more there are.

    >>> listed(["a", "b", "c"], shown=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(ascii(name)[1:-1][:200] for name in names[:shown]) + more


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header of that length, then the data without gaps."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, JSON_LIMIT):
            raise ValueError(f"{path}: not a safetensors file, or cut short (a renamed pickle? {CONVERT})")
        header = _parse_json(path, file.read(length))
    header.pop("__metadata__", None)
    start = end = 8 + length
    stored = {}
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            dtype, shape, offsets = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), tuple(entry["data_offsets"])
            if dtype is None:
                kind = reprlib.repr(entry["dtype"])
                raise ValueError(f"{path}: {listed([name])} has type {kind}; supported: {', '.join(DTYPES)}")
            whole = len(shape) <= 2 and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
            if not whole or offsets != (end - start, end - start + math.prod(shape) * dtype.itemsize):
                raise ValueError(f"{path}: the place of {listed([name])} does not fit its shape or its neighbours")
            stored[name] = Stored(name, path, dtype, shape, end)
            end = start + offsets[1]
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{path}: the header has an entry without dtype, shape and data_offsets") from None
    if end != size:
        raise ValueError(f"{path}: {size} bytes where its header describes {end}; the file is damaged or cut short")
    return stored


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise ValueError(f"duplicate {listed([name for name, count in counts.items() if count > 1])}")
        return entries

    try:
        entries = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: JSON that cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: its JSON is not an object")
    return entries
