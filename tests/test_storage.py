"""Buckets: names that are refused, files that grow, locks that outlive nobody, and a run whose bytes are those of a folder."""

import json
import os
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from grpo_jax import storage
from grpo_jax.runs.directory import lock_directory
from grpo_jax.runs.errors import RunDirectoryError
from grpo_jax.storage import InUse, Lines, Mirror, copy_folder, fetched, held, holder, place, remove_folder
from tests.buckets import NAME, bucket
from tests.pods import ROOT, end, start
from tests.tiny_run import flags

pytestmark = pytest.mark.skipif(find_spec("gcsfs") is None, reason="needs what tests/requirements.txt installs")


@pytest.fixture
def folder(monkeypatch):
    """A folder of a bucket."""
    from etils import epath

    with bucket() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        epath.backend.fsspec_backend._get_filesystem.cache_clear()  # which remembers the server of another test
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()
        yield place(f"{NAME}/folder/")


@pytest.mark.parametrize("name", ["s3://bucket/run", "gs:///run", "gs://", "file:///run", "gs://b/../c", "http://x/y"])
def test_urls_of_anything_else_are_refused_and_nothing_is_made(name):
    ((code, _, err),) = end([start("launch.py", "--config=configs/small.py", f"--workdir={name}")], 60)
    assert code == 2
    assert f"--workdir={name}: a URL must be gs://BUCKET/NAME" in err
    assert not (ROOT / name.split("/")[0]).exists()


def test_a_bucket_that_is_not_there_is_one_clear_line(folder):
    with (
        pytest.raises(
            RunDirectoryError, match="cannot use gs://none/run as run directory: Bucket does not exist: none"
        ),
        lock_directory("gs://none/run"),
    ):
        pass


def test_files_of_a_bucket(folder, tmp_path):
    assert str(folder) == f"{NAME}/folder"
    assert storage.names(folder) == set()
    remove_folder(folder)  # there is none
    storage.write_bytes(folder / "a", "é".encode())
    assert (folder / "a").read_text() == "é"
    lines = Lines(folder / "lines", ["1\n"])
    lines.append("2\n")
    assert (folder / "lines").read_text() == "1\n"
    lines.flush()
    assert (folder / "lines").read_text() == "1\n2\n"
    lines.append("3\n")
    lines.close()
    assert (folder / "lines").read_text() == "1\n2\n3\n"
    mirror = Mirror(folder / "board")
    (mirror.here / "inner").mkdir()
    (mirror.here / "inner" / "events").write_text("x")
    mirror.close()
    assert not mirror.here.exists()
    copy_folder(folder / "board", folder / "copy")
    assert (folder / "copy" / "inner" / "events").read_text() == "x"
    assert storage.names(folder) == {"a", "lines", "board", "copy"}
    remove_folder(folder / "board")
    assert storage.names(folder) == {"a", "lines", "copy"}
    here = Mirror(tmp_path / "board")
    here.close()
    assert here.here == tmp_path / "board"


def test_lines_reach_a_bucket_when_some_time_has_gone_by(folder, monkeypatch):
    monkeypatch.setattr(storage, "REFRESH", 0.0)
    lines = Lines(folder / "lines", [])
    lines.append("1\n")
    assert (folder / "lines").read_text() == "1\n"


def test_what_a_bucket_holds_is_fetched_once_for_each_version(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("model/config.json", "model/tokenizer/x.json"):
        storage.write_bytes(folder / name, name.encode())
    copy = Path(fetched(f"{folder}/model"))
    assert copy.name == "model" and (copy / "tokenizer" / "x.json").read_text() == "model/tokenizer/x.json"
    fetched.cache_clear()
    assert fetched(f"{folder}/model") == str(copy)
    storage.write_bytes(folder / "model" / "config.json", b"another")
    fetched.cache_clear()
    assert fetched(f"{folder}/model") != str(copy)
    file = Path(fetched(f"{folder}/model/config.json"))
    assert (file.name, file.read_text()) == ("config.json", "another")
    assert capfd.readouterr().err.count("fetching") == 3
    with pytest.raises(ValueError, match="no such file or folder"):
        fetched(f"{folder}/none")
    assert fetched("README.md") == "README.md"


def test_a_lock_of_a_bucket_is_held_by_one(folder, monkeypatch):
    lock = folder / "lock"
    assert holder(lock) is None
    with held(lock):
        assert holder(lock) == f"process {os.getpid()} of {os.uname().nodename}"
        with pytest.raises(InUse, match=f"process {os.getpid()} of"), held(lock):
            pass
    assert holder(lock) is None
    with held(lock):
        assert storage.names(lock) == {"000002"}  # the numbers of who has left are removed


def write_lock(lock: Path, number: int, **about: object) -> None:
    dead = {"state": "held", "machine": "other boot", "process": 1, "token": "x", "beat": 1}
    (lock / f"{number:06}").write_text(json.dumps(dead | about))


def test_the_lock_of_a_dead_process_is_taken_over(folder, monkeypatch, capfd):
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    lock = folder / "lock"
    # Of another machine: after a while without a sign of life.
    write_lock(lock, 7)
    with held(lock):
        assert storage.names(lock) == {"000008"}
    assert "process 1 of other holds" in capfd.readouterr().err
    # Of this machine: at once, also where another process has its number now.
    machine = storage._Lease(lock)._identity["machine"]
    for process in (2**22 + 1, os.getpid()):
        write_lock(lock, 20, machine=machine, process=process, started="17")
        begun = time.monotonic()
        with held(lock):
            assert time.monotonic() - begun < 0.4
    # One that lives shows it.
    write_lock(lock, 50)
    threading.Timer(0.2, write_lock, (lock, 50), {"beat": 2}).start()
    with pytest.raises(InUse, match="process 1 of other"), held(lock):
        pass
    # One that is broken holds nothing.
    (lock / "000060").write_text("{")
    with held(lock):
        pass


def test_an_answer_that_was_lost_does_not_lock_a_process_out_of_its_own_lock(folder, monkeypatch):
    lease = storage._Lease(folder / "lock")
    write = lease._write

    def unheard(number, **options):
        write(number, **options)
        if options.get("mode") == "create":
            raise FileExistsError  # of the request that was sent again

    monkeypatch.setattr(lease, "_write", unheard)
    with lease:
        assert storage.names(folder / "lock") == {"000001"}


def test_who_cannot_renew_its_lock_ends_before_another_takes_it(folder, monkeypatch, capfd):
    monkeypatch.setattr(storage, "BEAT", 0.2)
    monkeypatch.setattr(storage, "PATIENCE", 4.0)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    lease = storage._Lease(folder / "lock")
    with lease:
        write = lease._write
        monkeypatch.setattr(lease, "_write", lambda number, **options: (_ for _ in ()).throw(OSError("no network")))
        begun = time.monotonic()
        assert ended.wait(20) and 2.0 < time.monotonic() - begun < 4.0
        monkeypatch.setattr(lease, "_write", write)
    said = capfd.readouterr().err
    assert "cannot renew the lock" in said and "was not reached for 3 s" in said


def test_of_many_that_want_a_lock_one_has_it_at_a_time(folder, monkeypatch):
    inside, most, entered = [], [], []

    def want(number: int) -> None:
        for _ in range(4):
            try:
                with held(folder / "lock"):
                    inside.append(number)
                    most.append(len(inside))
                    entered.append(number)
                    time.sleep(0.01)
                    inside.remove(number)
            except InUse:
                time.sleep(0.01)

    threads = [threading.Thread(target=want, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(entered) >= 4


def test_who_was_taken_for_dead_ends_at_once(folder, monkeypatch, capfd):
    monkeypatch.setattr(storage, "BEAT", 0.1)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with held(folder / "lock"):
        write_lock(folder / "lock", 2)
        assert ended.wait(5)
    assert "another process has taken its place" in capfd.readouterr().err


FILES = ("metrics.jsonl", "reference.json", "samples.json", "result.json", "report.md", "figure.png")


@pytest.mark.slow
def test_a_run_in_a_slow_bucket_that_fails_is_that_of_a_folder_also_when_it_is_killed(tmp_path):
    def command(workdir: object) -> list[str]:
        changes = {"train__iterations": 40, "checkpoint__interval": 5, "evaluate__interval": 10}
        return ["launch.py", "--config=configs/default.py", f"--workdir={workdir}", *flags(**changes)]

    ((code, _, err),) = end([start(*command(tmp_path / "run"))])
    assert code == 0, err
    with bucket(failing=0.02, delay=0.002) as environment:
        os.environ.update(environment)
        try:
            run = start(*command(f"{NAME}/run"))
            metrics, until = place(f"{NAME}/run/metrics.jsonl"), time.monotonic() + 200
            while not (metrics.exists() and metrics.read_text().count("\n") > 10) and time.monotonic() < until:
                time.sleep(0.05)
            run.kill()
            end([run])
            storage.write_bytes(place(f"{NAME}/run/checkpoints/40/state/manifest.ocdbt"), b"a save that was killed")
            for mode in ("train", "evaluate"):
                ((code, out, err),) = end([start(*command(f"{NAME}/run"), f"--mode={mode}")])
                assert code == 0, err
                assert mode == "evaluate" or "resuming after iteration" in out
            for name in FILES:
                content = (place(f"{NAME}/run") / name).read_bytes()
                assert (
                    content.replace(b"gs://bucket", str(tmp_path).encode()) == (tmp_path / "run" / name).read_bytes()
                ), name
            assert any(name.startswith("events") for name in storage.names(place(f"{NAME}/run/tensorboard")))
        finally:
            for name in environment:
                del os.environ[name]
