"""The run directory: one process, one config, and nothing overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.files import read_sealed, write_json
from grpo_jax.runs.directory import count_iteration, counted_start, load, open_run_directory, save
from grpo_jax.runs.errors import Preempted, RunDirectoryError, StartedInVain

CONFIG = {"seed": 0, "mesh": (1, 2), "objective.beta": 1.0, "checkpoint.interval": 5}


def use(path, **changes):
    with open_run_directory(path, CONFIG | {k.replace("__", "."): v for k, v in changes.items()}) as directory:
        return directory


def test_created_reopened_and_written_as_json(tmp_path):
    path = tmp_path / "a run" / "größe"
    assert use(path) == path.resolve()
    assert read_sealed(path / "config.json") == CONFIG | {"mesh": [1, 2]}
    use(path)
    use(path, checkpoint__interval=7)  # says how often, not what


def test_another_config_is_refused_with_every_difference(tmp_path):
    (use(tmp_path / "run") / "metrics.jsonl").touch()
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(RunDirectoryError) as error:
        use(tmp_path / "run", seed=1, objective__beta=0.5)
    assert "seed: 0 there, 1 now" in str(error.value)
    assert "objective.beta: 1.0 there, 0.5 now" in str(error.value)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "text", ["[]", "NaN", "{}", "{", '{"seed": 0, "mesh": [1, 2], "checkpoint.interval": 5}', "\xff"]
)
def test_a_config_that_is_not_what_was_written_is_refused_in_one_line(tmp_path, text):
    """Also one of a version that wrote no digest."""
    (use(tmp_path / "run") / "metrics.jsonl").touch()
    (tmp_path / "run" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunDirectoryError, match=r"config.json: .* choose another directory") as refused:
        use(tmp_path / "run")
    assert "\n" not in str(refused.value)


def test_what_was_changed_is_put_aside_and_is_not_there(tmp_path):
    path = use(tmp_path / "run") / "result.json"
    assert load(path) is None
    assert save(path, {"p": (0.1, 2), 10: None}) == load(path) == {"p": [0.1, 2], "10": None}
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert load(path) is None, whole[place : place + 1]
        assert not path.exists() and path.with_name("result.json.corrupt").exists()
    save(path, {"p": 1})
    path.replace(path.with_name("reference.json"))  # another's, with its digest
    assert load(path.with_name("reference.json")) is None


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    use(tmp_path / "run")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / "lock").unlink()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(RunDirectoryError, match="cannot use"):
        use(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_start_that_failed_binds_nobody(tmp_path):
    use(tmp_path / "run")
    (tmp_path / "run" / ".config.json.123.tmp").touch()  # as kill −9 leaves it
    use(tmp_path / "run", seed=1)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        use(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunDirectoryError, match="--workdir"):
        use(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="Permission denied"):
        use(tmp_path / "run")


def test_an_impossible_place_is_refused():
    with pytest.raises(RunDirectoryError, match="cannot use"):
        use(Path("/proc/run"))


def test_a_second_process_is_refused_and_a_dead_one_is_not(tmp_path):
    code = "import sys,time; from pathlib import Path; from grpo_jax.runs.directory import open_run_directory as o\n"
    code += "with o(Path(sys.argv[1]), {'seed': 0}): print('in', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        with (
            pytest.raises(RunDirectoryError, match=f"in use by process {other.pid}"),
            open_run_directory(tmp_path / "run", {"seed": 0}),
        ):
            pass
        other.kill()
    with open_run_directory(tmp_path / "run", {"seed": 0}):
        pass


def test_writing_is_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_the_start_after_three_that_came_to_nothing_is_refused(tmp_path):
    run = use(tmp_path / "run")

    def begin(error: BaseException | None = None) -> None:
        with counted_start(run):
            if error is not None:
                raise error

    for _ in range(2):
        with pytest.raises(ValueError):
            begin(ValueError("no room"))
    counted = json.loads((run / "starts.json").read_text())
    assert (counted["without_iteration"], counted["unsaved"], counted["why"]) == (2, 2, "no room")
    killed = counted | {"without_iteration": 3, "why": "it was killed"}  # as kill −9 leaves it
    (run / "starts.json").write_text(json.dumps(killed))
    for _ in range(2):
        with pytest.raises(
            StartedInVain, match=r"3 starts in a row .*iteration.* because: it was killed\nRemove .*starts"
        ):
            begin()
        use(tmp_path / "run")  # the same config: the count stays
    count_iteration(run)
    with pytest.raises(ValueError):
        begin(ValueError("later"))
    (run / "starts.json").write_text(json.dumps(killed | {"without_iteration": 1, "unsaved": 20}))
    with pytest.raises(StartedInVain, match="20 starts in a row ended before anything new was saved"):
        begin()
    use(tmp_path / "run", seed=1)  # another config, and nothing bound the first: the count begins anew
    assert not (run / "starts.json").exists()
    # What was saved since, who stopped it, and an end that was reached: none counts.
    for _ in range(3):
        with pytest.raises(ValueError):
            begin(ValueError("no room"))
    (run / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(Preempted):
        begin(Preempted("stopped"))
    assert not (run / "starts.json").exists()
    (run / "starts.json").write_text("{")
    begin()
    assert not (run / "starts.json").exists()
