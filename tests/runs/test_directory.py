"""The run directory: one process, one config, and nothing overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.files import write_json
from grpo_jax.runs.directory import count_iteration, counted_start, open_run_directory
from grpo_jax.runs.errors import Preempted, RunDirectoryError, StartedInVain

CONFIG = {"seed": 0, "mesh": (1, 2), "objective.beta": 1.0, "checkpoint.interval": 5}


def use(path, **changes):
    with open_run_directory(path, CONFIG | {k.replace("__", "."): v for k, v in changes.items()}) as directory:
        return directory


def test_created_reopened_and_written_as_json(tmp_path):
    path = tmp_path / "a run" / "größe"
    assert use(path) == path.resolve()
    assert json.loads((path / "config.json").read_text()) == CONFIG | {"mesh": [1, 2]}
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


def test_a_run_directory_from_before_a_key_is_that_of_its_old_behaviour(tmp_path):
    (use(tmp_path / "run") / "metrics.jsonl").touch()
    use(tmp_path / "run", train__average=0.0)
    with pytest.raises(RunDirectoryError, match=r"train\.average: 0\.0 there, 0\.5 now"):
        use(tmp_path / "run", train__average=0.5)


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
