"""The splits of a dataset on disk: JSONL and Parquet files, and datasets that tensorflow-datasets has prepared.

Nothing here touches the network or loads TensorFlow. JSONL files, and whole splits of them, need the standard library alone;
all else needs the extra ``data``.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.tasks.rows import count_rows, read_rows

Make = Callable[[dict[str, Any]], Any]
"""What becomes of a row; raises ValueError for one that it refuses."""

_FILE = re.compile(r"(?P<split>.+?)(-\d{5}-of-(?P<shards>\d{5}))?\.(?P<kind>jsonl|ndjson|parquet)")
_TFDS_NAME = re.compile(r"[a-zA-Z]\w*(/[\w.,=+-]+)?(:[\d.*]+)?", re.ASCII)


class Split(NamedTuple):
    """Rows of a dataset in a fixed order: ``read(make, start, stop)`` lists what ``make`` makes of each."""

    num_rows: int
    read: Callable[[Make, int, int], list[Any]]


def open_splits(
    source: str | os.PathLike[str], fields: tuple[str, ...], data_dir: str | os.PathLike[str] | None = None
) -> dict[str, Split]:
    """The splits of a source, by name.

    Args:
      source: a .jsonl, .ndjson or .parquet file, whose only split is called train; a folder of them, each named for its
        split, such as test.jsonl or train-00000-of-00002.parquet; a folder that tensorflow-datasets has prepared; or the name
        of such a dataset, such as ``ag_news_subset`` or ``glue/cola:2.0.0``.
      fields: the columns to read, where they can be read alone.
      data_dir: where tensorflow-datasets keeps what it has prepared; None: its own place.

    Raises:
      ValueError: there is no such source, or it cannot be read; says what to do.
      ImportError: it needs the extra ``data``, which is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "test.jsonl").write_bytes(b"{}\\n{}")
    ...     {name: split.num_rows for name, split in open_splits(folder, ()).items()}
    {'test': 2}
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not (match := _FILE.fullmatch(path.name)):
            raise ValueError(f"{path}: is neither .jsonl, .ndjson nor .parquet")
        return {"train": _file(path, match["kind"], fields)}
    if (path / "dataset_info.json").is_file():
        return _prepared(path)
    if path.is_dir():
        return _folder(path, fields)
    if _FILE.fullmatch(path.name) or not _TFDS_NAME.fullmatch(os.fspath(source)):
        raise ValueError(f"{path}: no such file or folder")
    return _prepared(_find_prepared(os.fspath(source), data_dir))


def read_split(splits: dict[str, Split], spec: str, make: Make) -> list[Any]:
    """What ``make`` makes of every row of a split, or of slices of splits as tensorflow-datasets writes them.

    Args:
      splits: by name.
      spec: ``train``, ``train[:10%]``, ``test[7:9]``, ``train[:-500]``, ``train+test``, ``all``.
      make: function of a row.

    Raises:
      ValueError: for a split that is not there, a slice beyond its end, no rows, or a row that is broken or refused.
      ImportError: a slice needs the extra ``data``, which is not installed.

    >>> digits = Split(10, lambda make, start, stop: [make({"digit": i}) for i in range(start, stop)])
    >>> [row["digit"] for row in read_split({"train": digits}, "train[8:]+train[:20%]", dict)]
    [8, 9, 0, 1]
    """
    pieces = [(spec, 0, splits[spec].num_rows)] if spec in splits else _slices(splits, spec)
    made = [row for name, start, stop in pieces for row in splits[name].read(make, start, stop)]
    if not made:
        raise ValueError(f"split {spec!r} has no rows")
    return made


@contextmanager
def data_extra(what: str) -> Iterator[None]:
    """Around imports of packages of the extra ``data``; ImportError says what needs them, and how to get them.

    >>> with data_extra("this file"):
    ...     import no_such_package
    Traceback (most recent call last):
    ...
    ImportError: this file needs the package no_such_package: pip install 'grpo_jax[data]' (in a checkout '.[data]')
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs the package {error.name}: pip install 'grpo_jax[data]' (in a checkout '.[data]')"
        ) from None


def _slices(splits: dict[str, Split], spec: str) -> list[tuple[str, int, int]]:
    with data_extra(f"split {spec!r}"):
        import tensorflow_datasets as tfds

    sizes = {name: tfds.core.SplitInfo(name, [split.num_rows], 0) for name, split in splits.items()}
    try:
        pieces = tfds.core.ReadInstruction.from_spec(spec).to_absolute(sizes)
    except (ValueError, NotImplementedError) as error:
        there = ", ".join(f"{name} ({split.num_rows} rows)" for name, split in splits.items())
        if list(splits) == ["train"]:
            there += "; the rows of a single file are its split train, whatever its name"
        raise ValueError(f"split {spec!r}: {' '.join(str(error).split())} There are: {there}") from None
    slices = []
    for piece in pieces:
        start = piece.from_ or 0
        stop = splits[piece.splitname].num_rows if piece.to is None else piece.to
        slices.append((piece.splitname, start, max(start, stop)))
    return slices


def _file(path: Path, kind: str, fields: tuple[str, ...]) -> Split:
    return _parquet(path, fields) if kind == "parquet" else Split(count_rows(path), partial(read_rows, path))


def _folder(folder: Path, fields: tuple[str, ...]) -> dict[str, Split]:
    files: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(path.name):
            files.setdefault(match["split"], []).append(path.name)
            kinds.setdefault(match["split"], match["kind"])
    if not files:
        raise ValueError(f"{folder}: holds no .jsonl, .ndjson or .parquet file, nor a prepared dataset")
    splits = {}
    for name, names in files.items():
        parts = [f"{name}-{i:05}-of-{len(names):05}.{kinds[name]}" for i in range(len(names))]
        if names not in ([f"{name}.{kinds[name]}"], parts):
            raise ValueError(
                f"{folder}: split {name!r} wants one file, or all parts of one; there are: {', '.join(names)}"
            )
        splits[name] = _joined([_file(folder / part, kinds[name], fields) for part in names])
    return splits


def _joined(parts: list[Split]) -> Split:
    def read(make: Make, start: int, stop: int) -> list[Any]:
        made, first = [], 0
        for part in parts:
            made += part.read(make, min(max(start - first, 0), part.num_rows), min(max(stop - first, 0), part.num_rows))
            first += part.num_rows
        return made

    return parts[0] if len(parts) == 1 else Split(sum(part.num_rows for part in parts), read)


def _parquet(path: Path, fields: tuple[str, ...]) -> Split:
    with data_extra(str(path)):
        import pyarrow
        from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from None

    def read(make: Make, start: int, stop: int) -> list[Any]:
        names = file.schema_arrow.names
        if wrong := [field for field in fields if names.count(field) != 1]:
            raise ValueError(f"{path}: wants one column {wrong[0]!r}; there are {names[:20]}")
        try:
            table = file.read(columns=list(dict.fromkeys(fields))).slice(start, stop - start)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot be read as Parquet: {error}") from None
        columns = {name: table.column(name) for name in table.column_names}
        # A number in its own width: 0.1 of 32 bits would become 0.10000000149011612 as a Python float.
        floats = {
            name: column for name, column in columns.items() if column.type in (pyarrow.float16(), pyarrow.float32())
        }
        narrow = {name: column.type.to_pandas_dtype() for name, column in floats.items()}

        def value(name: str, cell: Any) -> Any:
            return narrow[name](cell) if name in narrow and cell is not None else cell

        def row(i: int) -> Any:
            return make({name: value(name, column[i].as_py()) for name, column in columns.items()})

        return [_naming(f"{path}[{start + i}]", row, i) for i in range(table.num_rows)]

    return Split(file.metadata.num_rows, read)


def _find_prepared(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    with data_extra(f"{name}, no file or folder here but perhaps a dataset of tensorflow-datasets,"):
        from tensorflow_datasets.core.read_only_builder import builder_from_files

    try:
        return builder_from_files(name, data_dir=data_dir and os.path.expanduser(data_dir)).data_dir
    except Exception as error:  # whatever its builder's code may raise
        raise ValueError(
            f"{name}: neither a file nor a folder, and tensorflow-datasets finds no such prepared dataset in "
            f"{data_dir or 'its data_dir (~/tensorflow_datasets)'}: {' '.join(str(error).split())[:300]}\n"
            "Where there is network, prepare it by the following (some need tensorflow for that), and set data_dir:\n"
            f"import tensorflow_datasets as tfds; tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        ) from None


def _prepared(folder: str | Path) -> dict[str, Split]:
    with data_extra(f"{folder}, a dataset of tensorflow-datasets,"):
        import tensorflow_datasets as tfds
        from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # the metadata may hold anything
        raise ValueError(f"{folder}: cannot be read as a prepared dataset: {error}") from None
    kind = builder.info.file_format.value if builder.info.file_format else "no known format"
    # TensorFlow alone reads tfrecord, and tensorflow-datasets loses rows when it writes parquet.
    if kind != "array_record":
        raise ValueError(f"{folder}: is stored as {kind}; prepare it again with file_format='array_record'")

    def read(split: str, make: Make, start: int, stop: int) -> list[Any]:
        info, where = builder.info.splits[split], f"{folder}, {split}"
        stored = len(_naming(where, ArrayRecordDataSource, [os.fspath(file) for file in info.filepaths]))
        if stored != info.num_examples:
            raise ValueError(f"{where}: has {stored} rows, not {info.num_examples}; prepare it again")
        rows = _naming(where, builder.as_data_source, split)
        return [_naming(f"{where}[{i}]", lambda i: make(rows[i]), i) for i in range(start, stop)]

    return {
        str(name): Split(split.num_examples, partial(read, str(name))) for name, split in builder.info.splits.items()
    }


def _naming(where: str, make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make`` returns; its errors as a ValueError that says where."""
    try:
        return make(*arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (RuntimeError, OSError, IndexError) as error:  # what array_record raises for damaged and missing files
        raise ValueError(f"{where}: cannot be read: {error}; prepare it again") from None
