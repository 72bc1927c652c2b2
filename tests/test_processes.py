"""Several processes: what main decides for all, how they fail together, and a run of two that is the run of one, bit by bit."""

import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from grpo_jax import processes
from tests.pods import ROOT, end, free_port, start, start_pod
from tests.tiny_run import flags

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from grpo_jax import processes as p

own = int(sys.argv[2])
p.initialize(coordinator=sys.argv[1], number=2, own=own, timeout=60)
found = {"count": p.count(), "main": p.is_main(), "everyone": p.everyone(["x" * 100 * own, own])[1]}

def caught(f):
    try:
        return f()
    except Exception as error:
        return [type(error).__name__, str(error)]

class Strange(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

def fail(kind, *words):
    raise kind(*words)

def only(number, f):
    return lambda: f() if own == number else "fine"

found["common"] = p.common(lambda: {"decided": own, "nested": p.common(lambda: p.together(lambda: own))})
found["common fails"] = caught(lambda: p.common(lambda: fail(FileNotFoundError, "gone")))
found["one fails"] = caught(lambda: p.together(only(1, lambda: fail(ValueError, "of 1"))))
found["strange"] = caught(lambda: p.together(only(1, lambda: fail(Strange, 1, 2))))
found["strange"] = found["strange"] if own == 0 else None
found["together"] = p.together(lambda: own) == own
found["alike"] = caught(lambda: p.check_alike({"a": 1, "b": own, "c": None}))

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
x = p.put(np.arange(16.0).reshape(8, 2), rows)
found["host"] = p.host(2 * x).tolist()
mine = p.own_rows(x)
found["mine"], found["values"] = mine.tolist(), p.of_rows(x, mine).tolist()
found["whole"] = p.own_rows(p.put(np.arange(3), NamedSharding(mesh, PartitionSpec()))).tolist()
found["leaders"] = [d.process_index for d in p.devices_of_all()]
found["stop"] = p.stop_requested([])
print("FOUND", json.dumps(found))
p.leave(5)
"""


def test_what_two_processes_agree_on():
    port = free_port()
    pod = [start("-c", SCRIPT, f"127.0.0.1:{port}", str(own), devices=2) for own in (0, 1)]
    found = []
    for code, out, err in end(pod, 120):
        assert code == 5, err
        found.append(json.loads(out.split("FOUND ")[1]))
    own = [{name: one.pop(name) for name in ("main", "mine", "values", "whole", "strange")} for one in found]
    assert found[0] == found[1]
    assert found[0] == {
        "count": 2,
        "everyone": ["x" * 100, 1],
        "common": {"decided": 0, "nested": 0},
        "common fails": ["FileNotFoundError", "gone"],
        "one fails": ["ValueError", "of 1"],
        "together": True,
        "alike": ["ValueError", "process 1 was started with other settings: b is 0 in process 0 and 1 there"],
        "host": [[4.0 * i, 4.0 * i + 2] for i in range(8)],
        "leaders": [0, 1],
        "stop": False,
    }
    assert own[0]["strange"] == ["RuntimeError", "Strange: 1 and 2"]  # a class that takes more than a message
    assert [one["main"] for one in own] == [True, False]
    assert [one["mine"] for one in own] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert own[1]["values"] == [[2.0 * i, 2.0 * i + 1] for i in range(4, 8)]
    assert sorted(own[0]["whole"] + own[1]["whole"]) == [0, 1, 2]  # what both hold, one of them works on


def run_flags(workdir: Path, **changes: object) -> list[str]:
    return ["--config=configs/default.py", f"--workdir={workdir}", *flags(**changes)]


def outcome(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names}


FILES = ("metrics.jsonl", "reference.json", "samples.json", "result.json")


def after_rows(workdir: Path, rows: int, act) -> threading.Thread:
    """Acts once the metrics file of a run has so many rows."""

    def wait() -> None:
        path, until = workdir / "metrics.jsonl", time.monotonic() + 240
        while time.monotonic() < until:
            if path.exists() and path.read_bytes().count(b"\n") >= rows:
                act()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one_also_when_it_is_stopped_and_killed(tmp_path):
    many = {
        "train__iterations": 300,
        "train__iterations_per_program": 5,
        "checkpoint__interval": 20,
        "evaluate__interval": 100,
    }
    ((code, _, err),) = end([start("launch.py", *run_flags(tmp_path / "one", **many), devices=2)])
    assert code == 0, err
    command = run_flags(tmp_path / "pod", **many)

    # SIGTERM to one: both save and stop at the same point.
    pod = start_pod(command)
    watching = after_rows(tmp_path / "pod", 20, lambda: pod[1].send_signal(signal.SIGTERM))
    ended = end(pod)
    watching.join()
    assert [code for code, _, _ in ended] == [75, 75], ended
    for _, _, err in ended:
        assert err.strip().splitlines()[-1] == (
            f"launch.py: stopped by SIGTERM; the same command resumes the run in {tmp_path / 'pod'}"
        )
    assert not re.sub(r"\[Gloo\] .*", "", ended[1][1]).strip()  # main alone speaks
    stopped = len((tmp_path / "pod" / "metrics.jsonl").read_text().splitlines())
    assert 20 <= stopped < 290

    # kill -9 of one: the other ends soon, and not with 0.
    pod = start_pod(command)
    watching = after_rows(tmp_path / "pod", stopped + 40, pod[1].kill)
    begun = time.monotonic()
    ended = end(pod)
    watching.join()
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] not in (0, 75), ended[0]
    assert time.monotonic() - begun < 240

    # One process goes on from there, and the end is that of the run that was never broken.
    ((code, out, err),) = end([start("launch.py", *command, devices=2)])
    assert code == 0, err
    assert "resuming after iteration" in out
    assert outcome(tmp_path / "pod", FILES) == outcome(tmp_path / "one", FILES)


@pytest.mark.slow
def test_two_processes_judge_texts_and_evaluate_as_one_does(tmp_path):
    changes = {"model__stop_strings": "('1',)", "verifier__num_workers": 1, "train__iterations": 3}
    measured = ("prompts.jsonl", "samples.jsonl", "samples.txt", "result.json")
    for name, starts in (
        ("one", lambda command: [start("launch.py", *command, devices=2)]),
        ("pod", start_pod),
    ):
        for mode in ("train", "evaluate"):
            ended = end(starts([*run_flags(tmp_path / name, **changes), f"--mode={mode}"]))
            assert not any(code for code, _, _ in ended), ended
    assert outcome(tmp_path / "pod", FILES) == outcome(tmp_path / "one", FILES)
    (one, pod) = (next((tmp_path / name / "evaluations").iterdir()) for name in ("one", "pod"))
    assert one.name == pod.name
    assert outcome(pod, measured) == outcome(one, measured)


@pytest.mark.slow
def test_two_processes_that_share_weights_repeat_themselves(tmp_path):
    mesh = {"mesh__fsdp": 4, "model__d_model": 32, "train__iterations": 5}
    for name in ("a", "b"):
        ended = end(start_pod(run_flags(tmp_path / name, **mesh), devices=2))
        assert not any(code for code, _, _ in ended), ended
    assert outcome(tmp_path / "a", FILES) == outcome(tmp_path / "b", FILES)


SWEEP = """
import sys
import jax
from rich.console import Console
from grpo_jax import processes
from grpo_jax.sweeps import one_program
from tests.tiny_run import tiny_config

workdir, coordinator, own = sys.argv[1:]
if coordinator:
    processes.initialize(coordinator=coordinator, number=2, own=int(own), timeout=60)
one_program.devices_of_all = jax.devices  # so that the references of both are made on two devices
config = tiny_config(warm_start__target=0.01)
one_program.sweep(config, workdir, seeds=(0, 3), betas=(0.3, 1.0, 3.0, 9.0), console=Console(quiet=True))
processes.leave(0)
"""


@pytest.mark.slow
def test_a_sweep_as_one_program_on_two_processes_is_that_of_one(tmp_path):
    at = f"127.0.0.1:{free_port()}"
    started = [start("-c", SWEEP, str(tmp_path / "one"), "", "", devices=2)]
    started += [start("-c", SWEEP, str(tmp_path / "pod"), at, str(own)) for own in (0, 1)]
    ended = end(started)
    assert not any(code for code, _, _ in ended), ended
    files = ("metrics.jsonl", "result.json", "seed-3/reference.json")
    assert outcome(tmp_path / "pod", files) == outcome(tmp_path / "one", files)


DAMAGED = """
import sys
import jax
from pathlib import Path
from grpo_jax import processes
from grpo_jax.runs.checkpoints import Checkpoints

workdir, coordinator, own = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
processes.initialize(coordinator=coordinator, number=2, own=own, timeout=60)
w = jax.random.normal(jax.random.key(0), (2, 4096))  # each process has a row of it
state = {"w": processes.put(w, jax.NamedSharding(jax.make_mesh((2,), "x"), jax.P("x")))}
checkpoints = Checkpoints(workdir, keep=None)
for step in (1, 2):
    checkpoints.save(step, state, {"step": step})
found = []
for path in sorted((workdir / "2").rglob("*")):
    if processes.is_main() and path.is_file() and path.stat().st_size > 10_000 and "process_1" in str(path):
        found.append(path.name)
        path.write_bytes(path.read_bytes()[:100])
step, _, meta = processes.common(lambda: None) or checkpoints.restore_latest(state)
print("FOUND", len(found), step, meta["step"], sorted(path.name for path in workdir.iterdir()))
processes.leave(0)
"""


def test_damage_that_one_process_sees_makes_all_take_the_older_checkpoint(tmp_path):
    at = f"127.0.0.1:{free_port()}"
    ended = end([start("-c", DAMAGED, str(tmp_path / "c"), at, str(own)) for own in (0, 1)], 120)
    for own, (code, out, err) in enumerate(ended):
        assert code == 0, err
        assert f"FOUND {1 - own} 1 1 ['1', '2.corrupt']" in out


def test_processes_that_do_not_come_or_come_twice_are_named():
    """In all that came, in one line each, before jax is asked."""
    for numbers, words in ((((0, 2)), "these did not come in time: 1"), ((0, 1, 1), "says that it is process 1")):
        at, errors = f"127.0.0.1:{free_port()}", []

        def call(own: int, at: str = at, errors: list[str] = errors) -> None:
            with pytest.raises(RuntimeError) as error:
                processes.call_roll(at, 3, own, timeout=2)
            errors.append(str(error.value))

        threads = [threading.Thread(target=call, args=(own,)) for own in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == len(numbers)
        assert sum(words in error for error in errors) >= 2
    with pytest.raises(RuntimeError, match=r"process 1 of 2: nobody answers, is process 0 at 127.0.0.1:\d+\?"):
        processes.call_roll(f"127.0.0.1:{free_port()}", 2, 1, timeout=0.1)
    with pytest.raises(RuntimeError, match="must be HOST:PORT"):
        processes.call_roll("8476", 2, 1, timeout=0.1)


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "12"}, False),
    ],
)
def test_one_process_on_a_host_takes_all_its_gpus(monkeypatch, variables, alone):
    for name in ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes._is_alone_on_host() == alone


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--num_processes=2",), "go together"),
        (("--processes=auto", "--process_id=0"), "give one of them"),
        (("--coordinator=a:1", "--num_processes=2", "--process_id=2"), "must be below"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, given, words):
    ((code, _, err),) = end(
        [start("launch.py", "--config=configs/small.py", f"--workdir={tmp_path / 'x'}", *given)], 60
    )
    assert code == 2
    assert words in err
    assert not (tmp_path / "x").exists()


def test_processes_of_different_settings_and_a_folder_that_is_not_shared_are_refused(tmp_path):
    ended = end(start_pod(run_flags(tmp_path / "a"), each=[[], ["--config.objective.beta=3"]]), 120)
    assert [code for code, _, _ in ended] == [1, 1]
    for _, _, err in ended:
        assert err.strip().endswith("other settings: objective.beta is 1.0 in process 0 and 3.0 there")
    assert not (tmp_path / "a").exists()
    ended = end(start_pod(run_flags(tmp_path / "a"), each=[[], [f"--workdir={tmp_path / 'b'}"]]), 120)
    assert [code for code, _, _ in ended] == [2, 2]
    assert all("is not shared by all processes" in err.strip().splitlines()[-1] for _, _, err in ended)


LEAVE = """
import sys, time
from grpo_jax import processes
from orbax.checkpoint import multihost

own, port = map(int, sys.argv[1:])
processes.initialize(coordinator=f"127.0.0.1:{port}", number=2, own=own, timeout=60, heartbeat=10)
processes.everyone("here")
barrier = multihost.get_barrier_sync_fn()

def barrier_and_a_nap(**arguments):
    barrier(**arguments)
    time.sleep(2 * own)

multihost.get_barrier_sync_fn = lambda: barrier_and_a_nap
processes.leave(7)
"""


def test_a_process_that_is_slow_to_leave_ends_with_its_own_code():
    port = str(free_port())
    ended = end([start("-c", LEAVE, str(own), port) for own in range(2)], 120)
    assert [code for code, _, _ in ended] == [7, 7], ended


def test_only_one_module_knows_of_processes():
    words = re.compile(
        r"process_index|process_count|is_fully_addressable|multihost|addressable_shards|jax\.distributed"
    )
    knowing = [
        str(path.relative_to(ROOT))
        for path in [*(ROOT / "grpo_jax").rglob("*.py"), ROOT / "launch.py"]
        if words.search(path.read_text(encoding="utf-8"))
    ]
    assert knowing == ["grpo_jax/processes.py"]


WATCHED = """
import sys, time
from grpo_jax import processes as p
limit = float(sys.argv[1]) or None
with p.watched(limit):
    time.sleep(0.1)
time.sleep(0.6)
with p.watched(None):
    time.sleep(0.6)
def hang():
    with p.watched(limit):
        time.sleep(3)
hang()
print("ended")
"""


HANGING_PHASE = """
import sys, time
from pathlib import Path
from rich.console import Console
import jax
from grpo_jax.runs import loop, measurement
from tests.tiny_run import tiny_config
phase, folder = sys.argv[1], Path(sys.argv[2])
def hang_here(*_, **__):
    time.sleep(300)
judge = measurement.judged_samples
if phase == "measurement":
    count = iter(range(100))
    measurement.judged_samples = lambda *a, **k: hang_here() if next(count) == 3 else judge(*a, **k)
else:
    loop.measured_attainable = hang_here
loop.train(tiny_config(train__watchdog=25.0), folder, Console(quiet=True))
print("ended")
"""


@pytest.mark.parametrize("phase", ["measurement", "attainable"])
def test_a_phase_that_hangs_ends_the_run_and_shows_where(phase, tmp_path):
    ((code, out, err),) = end([start("-c", HANGING_PHASE, phase, str(tmp_path / "run"))], 150)
    assert code == 76 and "ended" not in out, (code, err[-2000:])
    assert "nothing has moved for 25 s" in err and "hang_here" in err


def test_a_process_of_several_that_hangs_ends_and_shows_where():
    (code, out, err), (alone, said, _) = end([start("-c", WATCHED, "0.5"), start("-c", WATCHED, "0")], 60)
    assert (code, out) == (76, "")
    assert "in hang" in err and "nothing has moved for 0.5 s" in err
    assert (alone, said) == (0, "ended\n")
