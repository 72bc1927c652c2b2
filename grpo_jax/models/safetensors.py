"""What lies in an untrusted checkpoint folder: JSON, and the tensors of its safetensors files, located but not yet read.

The header is parsed here rather than by the safetensors package because that accepts duplicate names and headers of any
cost; every size is compared with the file's before it is believed.
"""

import math
import os
import re
import reprlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.files import parse_object, read_bounded_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSOR_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
JSON_LIMIT = 2 << 20  # bytes of one JSON text; the header of a 400-billion-parameter Llama has 0.2 MB
FILES_LIMIT = 500  # files of weights, all open at once; a 400-billion-parameter Llama has 191
CHUNK = 1 << 20  # bytes read at a time
CONVERT = (
    "Convert the weights where you trust them: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
)


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file, unread.

    Attributes:
      name: of the tensor; never used as a path.
      file: where it lies, open, so that a folder which is saved to meanwhile is still read as it was.
      dtype: float32, float16 or bfloat16.
      shape: as in the file, [out, in] for a matrix.
      offset: bytes from the start of the file.
    """

    name: str
    file: IO[bytes]
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, into: np.ndarray, start: tuple[int, ...]) -> None:
        """Fills ``into`` (float32, any strides) with the block of the tensor that begins at ``start``, and reads no more.

        Plain reads rather than a memory map: its pages would count as memory in use, and a file that is cut short would
        kill the process. Raises ValueError for that, and for a value that is not finite.
        """
        if into.ndim == 1:
            into, start = into[None], (0, *start)
        count, width, stride = *into.shape, self.shape[-1]
        step = max(1, CHUNK // (width * self.dtype.itemsize))
        for first in range(0, count, step):
            rows = range(first, min(first + step, count))
            begins = [(start[0] + i) * stride + start[1] for i in rows]
            # Whole rows lie one after the other, and are one read; parts of rows are a read each.
            spans = [(begins[0], len(rows) * width)] if width == stride else [(begin, width) for begin in begins]
            data = b"".join([self._pread(*span) for span in spans])
            values = np.frombuffer(data, self.dtype).astype(np.float32).reshape(len(rows), width)
            if not np.isfinite(values).all():
                raise ValueError(f"{self.file.name}: {printable([self.name])} holds values that are not finite")
            into[rows.start : rows.stop] = values

    def equals(self, other: "StoredTensor") -> bool:
        """Whether the other tensor has the same type, shape and bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        size, step = math.prod(self.shape), CHUNK // self.dtype.itemsize
        spans = ((begin, min(step, size - begin)) for begin in range(0, size, step))
        return all(self._pread(*span) == other._pread(*span) for span in spans)

    def _pread(self, begin: int, count: int) -> bytes:
        size = count * self.dtype.itemsize
        data = os.pread(self.file.fileno(), size, self.offset + begin * self.dtype.itemsize)
        if len(data) != size:
            raise ValueError(f"{self.file.name}: cut short while {printable([self.name])} was read")
        return data


def open_tensors(folder: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json lists, by name.

    Their files are open until ``files`` is closed. Raises ValueError naming the file that is missing, damaged, outside the
    folder, or not what the index says.

    >>> open_tensors(Path("nowhere"), ExitStack())
    Traceback (most recent call last):
    ...
    ValueError: nowhere: neither model.safetensors nor model.safetensors.index.json is there
    """
    if (folder / SINGLE).exists():
        return _read_header(plain_file(folder, SINGLE), files)
    if not (folder / INDEX).exists():
        foreign = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        hint = f"; {printable(sorted(foreign))} can run code when opened. {CONVERT}" if foreign else ""
        raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")
    index = plain_file(folder, INDEX)
    weight_map = read_bounded_json(index, JSON_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map is not a map of tensor names to file names")
    shards = sorted(set(weight_map.values()))
    if len(shards) > FILES_LIMIT:
        raise ValueError(f"{index}: {len(shards)} files of weights are more than {FILES_LIMIT}")
    stored: dict[str, StoredTensor] = {}
    for path in [plain_file(folder, shard) for shard in shards]:
        tensors = _read_header(path, files)
        if strangers := [name for name in tensors if weight_map.get(name) != path.name]:
            raise ValueError(f"{path}: {printable(strangers)} not listed for this file in {index.name}")
        stored |= tensors
    return stored


def plain_file(folder: Path, name: str) -> Path:
    """A regular file directly inside the folder; ValueError for anything else, before it is opened.

    Links are not followed out of the folder, with one exception: a snapshot in Hugging Face's cache,
    models--ORG--NAME/snapshots/REVISION, consists of links to the files in the blobs folder of the same model.

    >>> plain_file(Path("folder"), "../secret")
    Traceback (most recent call last):
    ...
    ValueError: folder: '../secret' is not the plain name of a file in this folder
    """
    if not re.fullmatch(r"[A-Za-z0-9._+-]{1,200}", name) or name in (".", ".."):
        raise ValueError(f"{folder}: {name[:200]!r} is not the plain name of a file in this folder")
    path = folder / name
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; nothing is downloaded, so name the folder of a model that is here")
    if not path.exists():
        cache = folder / "snapshots"
        hint = f"; name one of the folders in {cache}" if cache.is_dir() else ""
        raise ValueError(f"{path}: no such file{hint}")
    inside, real = folder.resolve(), path.resolve()
    if real.parent != inside and not _is_blob(inside, real):
        raise ValueError(f"{path}: a link to outside the folder is not followed; copy the folder with its contents")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    return path


def printable(names: list[str], shown: int = 5) -> str:
    """The first names, safe to print, and how many more there are.

    >>> printable(["a", "b", "c"], shown=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(ascii(name)[1:-1][:200] for name in names[:shown]) + more


def _is_blob(snapshot: Path, target: Path) -> bool:
    """Both are resolved, so that neither a link called blobs nor one on the way there leads elsewhere."""
    model = snapshot.parent.parent
    in_cache = model.name.startswith("models--") and snapshot.parent.name == "snapshots"
    return (
        in_cache and target.parent == model / "blobs" and bool(re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", target.name))
    )


def _read_header(path: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header of that length, then the data without gaps."""
    file = files.enter_context(path.open("rb", buffering=0))
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{path}: not a safetensors file, or cut short (a renamed pickle? {CONVERT})")
    if length > JSON_LIMIT:
        fault = f"a header of {length} bytes is more than {JSON_LIMIT}"
        raise ValueError(f"{path}: {fault}; not a model's safetensors file")
    header = parse_object(os.pread(file.fileno(), length, 8), path)
    header.pop("__metadata__", None)

    # In the order of the data, each tensor must begin where the one before it ends, and the last end where the file does.
    start = end = 8 + length
    stored = {}
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            dtype, shape, offsets = (
                TENSOR_DTYPES.get(entry["dtype"]),
                tuple(entry["shape"]),
                tuple(entry["data_offsets"]),
            )
            if dtype is None:
                kind = reprlib.repr(entry["dtype"])
                raise ValueError(f"{path}: {printable([name])} has type {kind}; supported: {', '.join(TENSOR_DTYPES)}")
            whole = len(shape) <= 2 and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
            if not whole or offsets != (end - start, end - start + math.prod(shape) * dtype.itemsize):
                raise ValueError(f"{path}: the place of {printable([name])} does not fit its shape or its neighbours")
            stored[name] = StoredTensor(name, file, dtype, shape, end)
            end = start + offsets[1]
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{path}: the header has an entry without dtype, shape and data_offsets") from None
    if end != size:
        raise ValueError(f"{path}: {size} bytes where its header describes {end}; the file is damaged or cut short")
    return stored
