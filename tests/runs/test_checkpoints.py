"""Checkpoints: exact round trips, and every kind of damage on disk."""

import gc
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.runs.checkpoints import Checkpoints, checksums, host_sums
from grpo_jax.runs.errors import CheckpointError

# After a failed restore Orbax leaves coroutines behind that were never awaited; the exception itself has reached us.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def collect_unfinished_reads():
    """Orbax leaves coroutines behind when a read fails; collected later, they would fail another file's test."""
    yield
    gc.collect()


def state(seed: float):
    weights = jnp.asarray(np.random.default_rng(int(seed)).normal(size=(64, 33)), jnp.float32)
    return {"weights": weights, "half": weights.astype(jnp.bfloat16), "count": jnp.int32(seed)}


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"iteration": step})
    checkpoints.close()
    return tmp_path / "c"


def latest(directory, messages=None):
    checkpoints = Checkpoints(directory, keep=2, report=(messages if messages is not None else []).append)
    try:
        return checkpoints.restore_latest(state(0))
    finally:
        checkpoints.close()


def test_round_trip_is_exact_and_old_steps_go(saved):
    step, found, meta = latest(saved)
    assert (step, meta) == (3, {"iteration": 3})
    jax.tree.map(np.testing.assert_array_equal, found, state(3))
    assert found["half"].dtype == jnp.bfloat16
    assert checksums(found) == checksums(state(3)) != checksums(state(2))
    assert sorted(p.name for p in saved.iterdir() if p.name.isdigit()) == ["2", "3"]


def test_nothing_there_is_none(tmp_path):
    assert latest(tmp_path / "new") is None


def data_files(step):
    return sorted((p for p in step.rglob("*") if p.is_file() and "/d/" in str(p)), key=lambda p: -p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda step: [flip(p) for p in data_files(step)[:1]],
    "a data file gone": lambda step: data_files(step)[0].unlink(),
    "a data file cut": lambda step: data_files(step)[0].write_bytes(data_files(step)[0].read_bytes()[:100]),
    "a data file empty": lambda step: data_files(step)[0].write_bytes(b""),
    "metadata garbled": lambda step: (step / "state" / "_METADATA").write_text("{"),
    "meta garbled": lambda step: [p.write_text("{") for p in (step / "meta").rglob("*") if p.is_file()],
    "state gone": lambda step: shutil.rmtree(step / "state"),
    "emptied": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_to_the_step_before(saved, damage):
    DAMAGE[damage](saved / "3")
    messages = []
    step, found, _ = latest(saved, messages)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, found, state(2))
    assert (saved / "3.corrupt").is_dir()  # put aside, not deleted
    assert len(messages) == 1
    assert "checkpoint 3 is damaged" in messages[0]


def test_every_flipped_bit_of_the_meta_falls_back(saved):
    (path,) = (p for p in (saved / "3" / "meta").rglob("metadata") if p.is_file())
    whole = path.read_bytes()
    places = np.random.default_rng(0).choice(8 * len(whole), 60, replace=False)
    for place in places.tolist():
        path.write_bytes(whole[: place // 8] + bytes([whole[place // 8] ^ (1 << place % 8)]) + whole[place // 8 + 1 :])
        assert latest(saved)[0] == 2, whole[place // 8 - 9 : place // 8 + 9]
        (saved / "3.corrupt").rename(saved / "3")
    path.write_bytes(whole)
    assert latest(saved)[0] == 3


def test_a_step_under_the_name_of_another_falls_back(saved):
    shutil.copytree(saved / "3", saved / "30")
    assert latest(saved)[0] == 3


@pytest.mark.parametrize("name", ["run[1]", "[bold]x", "a*", "what?", "größe ; $x"])
def test_odd_paths_work_also_beside_one_that_they_would_match(tmp_path, name):
    for folder in ("run1", "ab", "whatx", name):
        checkpoints = Checkpoints(tmp_path / folder, keep=2)
        checkpoints.save(len(folder), state(len(folder)), {})
        checkpoints.close()
    step, found, _ = latest(tmp_path / name)
    assert step == len(name)
    jax.tree.map(np.testing.assert_array_equal, found, state(step))


def test_a_step_that_is_there_is_neither_overwritten_nor_put_aside(saved):
    checkpoints = Checkpoints(saved, keep=2)
    for step in (2, 3):
        with pytest.raises(CheckpointError, match="it is there already"):
            checkpoints.save(step, state(7), {})
    checkpoints.close()
    step, found, _ = latest(saved)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, found, state(3))


def test_a_save_that_is_read_back_as_something_else_is_none(saved, monkeypatch):
    checkpoints = Checkpoints(saved, keep=2)
    save = checkpoints._manager.save

    def damaged(step, **arguments):
        done = save(step, **arguments)
        DAMAGE["a flipped bit"](saved / str(step))
        return done

    monkeypatch.setattr(checkpoints._manager, "save", damaged)
    with pytest.raises(CheckpointError, match="checkpoint 4 could not be written"):
        checkpoints.save(4, state(4), {})
    checkpoints.close()
    assert latest(saved)[0] == 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_said_in_one_line_and_leaves_what_was_saved(small_disk, capfd):
    checkpoints, weights = (
        Checkpoints(small_disk / "c", keep=None),
        jnp.asarray(np.random.default_rng(0).normal(size=(64, 200))),
    )
    with pytest.raises(CheckpointError, match=r"could not be written to .*: .*No space left on device") as full:
        for step in range(1, 20):
            checkpoints.save(step, {"w": weights}, {})
    checkpoints.close()
    gc.collect()
    assert "\n" not in str(full.value)
    assert "Traceback" not in capfd.readouterr().err
    assert sorted(path.name for path in (small_disk / "c").iterdir()) == [str(i) for i in range(1, step)]
    found = Checkpoints(small_disk / "c", keep=None)
    assert found.restore_latest({"w": weights})[0] == step - 1
    found.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_the_sums_of_the_host_are_those_of_the_devices(dtype):
    values = jnp.asarray(np.random.default_rng(1).normal(size=(7, 300)), dtype)
    (described,) = checksums({"x": values}).values()
    assert described.endswith("".join(f"{n:08x}" for n in host_sums(np.asarray(values)).tolist()))


def test_an_empty_directory_of_a_later_step_is_not_the_latest(saved):
    (saved / "17").mkdir()
    assert latest(saved)[0] == 3


def test_leftovers_of_a_killed_save_are_ignored(saved):
    (saved / "4.orbax-checkpoint-tmp").mkdir()
    assert latest(saved)[0] == 3


def test_all_damaged_is_an_error_and_not_a_fresh_start(saved):
    for step in ("2", "3"):
        DAMAGE["a flipped bit"](saved / step)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        latest(saved)


def test_a_run_goes_on_after_falling_back(saved):
    """The step put aside is forgotten: it can be saved again, and it does not count among those kept."""
    DAMAGE["a flipped bit"](saved / "3")
    checkpoints = Checkpoints(saved, keep=2, report=lambda message: None)
    assert checkpoints.restore_latest(state(0))[0] == 2
    checkpoints.save(3, state(3), {"iteration": 3})
    checkpoints.close()
    assert latest(saved)[0] == 3
    assert sorted(p.name for p in saved.iterdir() if p.name.isdigit()) == ["2", "3"]


def test_what_cannot_be_restored_stays_where_it_is(saved):
    """No intact step: an error, now and at every later start, and nothing is renamed."""
    for step in ("2", "3"):
        DAMAGE["a flipped bit"](saved / step)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="--workdir"):
            latest(saved)
    assert sorted(p.name for p in saved.iterdir() if p.name.isdigit()) == ["2", "3"]


def test_saving_an_older_step_is_an_error(saved):
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(CheckpointError, match="is there already"):
        checkpoints.save(2, state(2), {})
    checkpoints.close()
