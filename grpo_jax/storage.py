"""Where files lie: in folders of this machine, or as objects of a bucket by URL (gs://bucket/run).

The one module that knows of buckets. A bucket has no append, no rename and no lock, but an object is there whole or not at all,
and can be created on condition that there is none of its name; nothing more is assumed. Paths are `pathlib.Path`, or for a
bucket `etils.epath.Path`, which Orbax takes and which has the same methods.
"""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import Any

from grpo_jax.environment import cache_folder, program

TEMPORARY = ".tmp"  # ends the names of files that are being written
BEAT, PATIENCE = 10.0, 60.0  # seconds between signs of life of who holds a folder, and after which silence is death
REFRESH = 30.0  # seconds after which lines that were appended are written to a bucket, if nothing asks earlier


def place(name: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder or file; errors as of `named`.

    >>> place("runs/../runs/small") == Path.cwd() / "runs" / "small"
    True
    """
    path = named(name)
    return path.expanduser().resolve() if is_here(path) else path


def named(name: str | os.PathLike[str]) -> Path:
    """The path of a folder or file as it is written.

    Raises:
      ValueError: a URL of something else than a bucket of Google Cloud Storage, or the package for those is missing.
    """
    text = os.fspath(name)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    bucket = rest.partition("/")[0]
    if scheme != "gs" or not bucket or any(part in (".", "..") for part in rest.split("/")):
        raise ValueError(f"{text}: a URL must be gs://BUCKET/NAME; anything else is a folder of this machine")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # plain buckets: every kind answers as one
    try:
        import fsspec
        import gcsfs  # noqa: F401
        from etils import epath
    except ImportError as error:
        raise ValueError(f"{text} needs the package {error.name}: pip install gcsfs etils") from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # an error is raised, and needs no stack trace before
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other hosts write too
    return epath.Path(f"{scheme}://{rest.rstrip('/')}")


def is_here(path: Path) -> bool:
    """Whether a path is of this machine, and not of a bucket."""
    return isinstance(path, Path)


def names(folder: Path) -> set[str]:
    """The names in a folder, without files that a kill has left half written; none where there is no such folder."""
    try:
        return {path.name for path in folder.iterdir() if not path.name.endswith(TEMPORARY)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file: whenever the power fails, it is the old one or the new one."""
    if not is_here(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def flush_folder(folder: Path) -> None:
    """Waits until the names in a folder of this machine are on disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_folder(folder: Path) -> None:
    """Removes a folder and all that it holds, if it is there."""
    if is_here(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif names(folder):
        folder.rmtree()  # type: ignore[attr-defined]  # of epath


def remove_temporaries(folder: Path) -> None:
    """Removes what kills have left half written in a folder that nobody else writes to."""
    for path in folder.iterdir() if is_here(folder) else ():
        if path.name.endswith(TEMPORARY):
            remove_folder(path) if path.is_dir() else path.unlink()


@contextmanager
def plainly_named(folder: Path) -> Iterator[Path]:
    """A folder by a path without ``* ? [``, which Orbax would take for a pattern: a link to it, where its own path has them."""
    if not (is_here(folder) and has_magic(str(folder))):
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary, "link")
        link.symlink_to(folder, target_is_directory=True)
        yield link


def copy_folder(source: Path, target: Path) -> None:
    """Copies the folder of a checkpoint, which is not there before all of it is."""
    if is_here(source) and is_here(target):
        temporary = target.with_name(f".{target.name}{TEMPORARY}")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        temporary.rename(target)
        return
    _copy_files(source, target)


def _copy_files(source: Path, target: Path) -> None:
    # In a bucket Orbax takes a checkpoint for one when it has this object, so that it comes last.
    for name in sorted(_files(source), key=lambda name: name.endswith("commit_success.txt")):
        (target / name).write_bytes((source / name).read_bytes())


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    """The names of all files below a folder, relative to it."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


class Lines:
    """A text file that grows line by line. In a bucket it is written anew, now and then and whenever it is flushed.

    Args:
      path: of the file.
      lines: its first ones, each with its line feed; what was there before is replaced.
    """

    def __init__(self, path: Path, lines: Iterable[str]):
        self._path, self._lines = path, list(lines)
        self._written, self._at = len(self._lines), time.monotonic()
        write_bytes(path, "".join(self._lines).encode())
        self._file = path.open("a", encoding="utf-8") if is_here(path) else None

    def append(self, line: str) -> None:
        """Adds a line, which ends with its line feed."""
        if self._file is not None:
            self._file.write(line)
            return
        self._lines.append(line)
        if time.monotonic() - self._at > REFRESH:
            self.flush()

    def flush(self) -> None:
        """Returns when every line is stored."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        elif self._written < len(self._lines):
            write_bytes(self._path, "".join(self._lines).encode())
            self._written = len(self._lines)
        self._at = time.monotonic()

    def close(self) -> None:
        """Ends the file: every line is then stored."""
        self.flush()
        if self._file is not None:
            self._file.close()


class Mirror:
    """A folder for who can write to this machine only: the folder itself, or one that is copied to its place in a bucket."""

    def __init__(self, folder: Path):
        self._target = folder
        self._temporary = None if is_here(folder) else tempfile.TemporaryDirectory()
        self.here = folder if self._temporary is None else Path(self._temporary.name)

    def flush(self) -> None:
        """Copies what is there."""
        if self._temporary is not None:
            _copy_files(self.here, self._target)

    def close(self) -> None:
        """Copies what is there, for the last time."""
        self.flush()
        if self._temporary is not None:
            self._temporary.cleanup()


@cache
def fetched(name: str | os.PathLike[str]) -> str:
    """A file or folder on this machine: itself, or its copy of what a bucket holds, which is made once for each version.

    Raises:
      ValueError: as of `place`, or the bucket holds nothing of this name.
    """
    source = place(name)
    if is_here(source):
        return os.fspath(name)
    is_folder = source.is_dir()
    files = list(_files(source)) if is_folder else [""] if source.exists() else []
    if not files:
        raise ValueError(f"{name}: no such file or folder")
    objects = _bucket(source)
    about = [objects.info(str(source / file if file else source)) for file in files]
    version = json.dumps([str(source), [[x["name"], x["size"], x.get("generation"), x.get("md5Hash")] for x in about]])
    home = cache_folder() / "fetched"
    folder = home / hashlib.sha256(version.encode()).hexdigest()[:16]
    if not folder.exists():
        print(f"fetching {source}, {sum(x['size'] for x in about):,} bytes", file=sys.stderr, flush=True)
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as staging:
            for file in files:
                copy = Path(staging, "new", source.name, file)
                copy.parent.mkdir(parents=True, exist_ok=True)
                objects.get_file(str(source / file if file else source), str(copy))
            try:
                Path(staging, "new").rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return str(folder / source.name)


def _bucket(path: Path) -> Any:
    """The file system of fsspec that a path of a bucket is read with."""
    from etils import epath

    return epath.backend.fsspec_backend.fs(path)


class InUse(Exception):
    """Another process holds the folder; the message says which."""


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Holds a lock, whoever else would: a file of a folder of this machine, or a folder of objects of a bucket.

    The lock of a process that died is free: at once on this machine, after `PATIENCE` in a bucket where another machine held it.

    Raises:
      InUse: another process holds it.
      OSError: it cannot be written.
    """
    with _held_file(lock) if is_here(lock) else _Lease(lock):
        yield


def holder(lock: Path) -> str | None:
    """Who holds a lock, as "process 123 of host"; None where nobody does, or has shown a sign of life for `PATIENCE`."""
    if not is_here(lock):
        return _Lease(lock).holder()
    if not lock.exists():
        return None
    with lock.open() as file:
        return None if _flock(file, fcntl.LOCK_SH) else file.read().strip() or "another process"


@contextmanager
def _held_file(lock: Path) -> Iterator[None]:
    # A link that somebody left there is not followed.
    with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as file:
        # The system drops it when the process dies, however it dies. Who only looked drops it at once.
        if not _flock(file, fcntl.LOCK_EX):
            time.sleep(0.1)
            if not _flock(file, fcntl.LOCK_EX):
                file.seek(0)
                raise InUse(file.read().strip() or "another process")
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def _flock(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Lease:
    """A lock of numbered objects: who created the one with the highest number holds it.

    An object is created only if there is none of its name, so that of two processes that reach for the next number one gets it:

        000001 {"state": "free", …}                    its process has left
        000002 {"state": "held", …, "beat": 7}         its process writes it anew every `BEAT` seconds
        000003                                         created by who saw 000002 unchanged for `PATIENCE`

    No clock of another machine is read. A process that could not write its object for three quarters of `PATIENCE` ends, before
    another may take its place; so does one that wakes up and finds a higher number.
    """

    def __init__(self, folder: Path):
        self._folder, self._objects = folder, _bucket(folder)
        self._own, self._beat, self._over = 0, 0, threading.Event()
        # Who this is: the number of a process means something in its own space of numbers alone, and for a while.
        boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        known = [boot.read_text().strip(), os.readlink(space)] if boot.exists() and space.exists() else []
        self._identity = {
            "machine": " ".join([socket.gethostname(), *known]),
            "process": os.getpid(),
            "started": _started(os.getpid()),
            "token": secrets.token_hex(4),
        }

    def __enter__(self) -> None:
        while True:
            number, holder = self._newest()
            if holder.get("state") == "held" and not self._is_dead(holder):
                self._wait_for_death(number, holder)
            try:
                self._write(number + 1, mode="create")
            except FileExistsError:
                # Another process was faster, or the answer to our own request was lost and it was sent again.
                if self._newest()[1].get("token") != self._identity["token"]:
                    continue
            self._own = number + 1
            if self._newest()[0] == self._own:
                break
            self._remove({f"{self._own:06}"})  # others have been and gone, and their numbers with them
        self._remove({name for name in names(self._folder) if name < f"{self._own:06}"})
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._renew, self._watch)]
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._write(self._own, state="free")

    def holder(self) -> str | None:
        """See `holder`; the machines' clocks must agree to within seconds for this, and for nothing else."""
        number, holder = self._newest()
        if holder.get("state") != "held" or self._is_dead(holder):
            return None
        try:
            written = self._objects.modified(str(self._folder / f"{number:06}")).timestamp()
        except FileNotFoundError:  # it has just left
            return None
        return self._words(holder) if time.time() - written < PATIENCE else None

    @staticmethod
    def _words(holder: dict[str, Any]) -> str:
        return f"process {holder.get('process')} of {str(holder.get('machine')).split(' ')[0]}"

    def _remove(self, numbers: set[str]) -> None:
        for name in numbers:
            (self._folder / name).unlink(missing_ok=True)

    def _newest(self) -> tuple[int, dict[str, Any]]:
        """The highest number, 0 where there is none, and what its object says."""
        for number in sorted((int(name) for name in names(self._folder) if name.isdigit()), reverse=True):
            try:
                return number, json.loads((self._folder / f"{number:06}").read_text())
            except FileNotFoundError:
                continue  # removed by who holds a higher one
            except ValueError:
                return number, {}
        return 0, {}

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether a holder was a process of this machine, and is no more."""
        is_ours = holder.get("machine") == self._identity["machine"] and isinstance(holder.get("process"), int)
        return is_ours and holder.get("started") != _started(holder["process"])

    def _wait_for_death(self, number: int, holder: dict[str, Any]) -> None:
        """Returns when a holder has left, or has shown no sign of life for `PATIENCE`; raises InUse where it lives."""
        who = self._words(holder)
        if holder.get("machine") == self._identity["machine"]:
            raise InUse(who)
        words = f"{who} holds {self._folder.parent}: waiting {PATIENCE:g} s for a sign of life"
        print(words, file=sys.stderr, flush=True)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, PATIENCE / 20))
            now = self._newest()
            if now != (number, holder):
                if now[1].get("state") == "held":
                    raise InUse(who)
                return

    def _write(self, number: int, *, state: str = "held", mode: str = "overwrite") -> None:
        self._beat += 1
        about, begun = self._identity | {"state": state, "beat": self._beat}, time.monotonic()
        try:
            self._objects.pipe_file(str(self._folder / f"{number:06}"), json.dumps(about).encode(), mode=mode)
        except FileNotFoundError:
            raise OSError("there is no such bucket, or none that may be written to") from None
        self._written = begun

    def _renew(self) -> None:
        while not self._over.wait(BEAT):
            try:
                number, _ = self._newest()
                if number > self._own:
                    self._end("another process has taken its place, which had no sign of life of this one")
                self._write(self._own)
            except Exception as error:  # the network may come back
                print(f"cannot renew the lock of {self._folder.parent}: {error}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        # In a thread of its own: a request may hang for minutes.
        while not self._over.wait(PATIENCE / 60):
            if time.monotonic() - self._written > 0.75 * PATIENCE:
                self._end(
                    f"it was not reached for {0.75 * PATIENCE:g} s, and another process may take this one's place soon"
                )

    def _end(self, why: str) -> None:
        print(f"{program()}: {self._folder.parent}: {why}; start again to resume", file=sys.stderr, flush=True)
        os._exit(1)


def _started(process: int) -> str | None:
    """When a process of this machine started, in the system's ticks; None where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
