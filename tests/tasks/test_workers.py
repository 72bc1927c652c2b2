"""The verifier pool under everything a completion, a verifier or a machine can do to it."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hostile_verifiers
import jax.numpy as jnp
import pytest

from grpo_jax.tasks import Verdict, arithmetic, stories
from grpo_jax.tasks.workers import VerifierPool

CORRECT, WRONG, CRASH, TIMEOUT = Verdict.correct, Verdict.wrong, Verdict.crash, Verdict.timeout
obey = hostile_verifiers.obey


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    """One pool for all tests that do not depend on its numbers: after any of them it must still serve."""
    os.environ["A_SECRET"] = "token"
    with VerifierPool(obey, num_workers=2, deadline=20.0, memory_limit_bytes=1 << 30) as pool:
        yield pool
    del os.environ["A_SECRET"]


def judge(pool: VerifierPool, completions: list[str]) -> list[Verdict]:
    return pool.verify(completions, ["15"] * len(completions), [False] * len(completions))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_order_and_odd_text(pool: VerifierPool) -> None:
    texts = ["\x00", "\ud800", "\u2028\n\r\t", "Ω" * 100_000, "", '"]', "🦆", *map(str, range(500))]
    assert pool.verify(texts, texts, [False] * len(texts)) == [CORRECT] * len(texts)
    targets = [text if i % 3 else "other" for i, text in enumerate(texts)]
    assert pool.verify(texts, targets, [i % 5 == 0 for i in range(len(texts))]) == [
        CORRECT if i % 3 and i % 5 else WRONG for i in range(len(texts))
    ]
    assert judge(pool, []) == []
    with pytest.raises(ValueError, match="zip"):
        pool.verify(["1"], ["1", "2"], [False])


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("ABORT", CRASH),
        ("SEGFAULT", CRASH),
        ("EXIT", CRASH),
        ("SYS_EXIT", CRASH),
        ("MEMORY", CRASH),
        ("RAISE", CRASH),
        ("RECURSE", CRASH),
        ("RETURN None", CRASH),
        ("RETURN nan", CRASH),
        ("RETURN True", CRASH),
        ("RETURN 1.0", CRASH),
        ("RETURN str", CRASH),
        ("RETURN list", CRASH),
        ("PRINT", WRONG),
        ("READ_INPUT", WRONG),
        ("ENVIRONMENT", WRONG),
        ("TRAINER", WRONG),
        ("SLEEP 0.2", WRONG),
    ],
)
def test_one_bad_item_costs_only_itself(pool: VerifierPool, completion: str, verdict: Verdict) -> None:
    completions = ["15", "16"] * 10
    completions[7] = completion
    expected = [CORRECT, WRONG] * 10
    expected[7] = verdict
    assert judge(pool, completions) == expected


def test_files_cannot_be_written(pool: VerifierPool, tmp_path: Path) -> None:
    assert judge(pool, [f"WRITE_FILE {tmp_path / 'file'}"]) == [CRASH]
    assert (tmp_path / "file").stat().st_size == 0


def test_many_bad_items_at_once(pool: VerifierPool) -> None:
    kinds = ["15", "EXIT", "RAISE", "16", "ABORT", "RETURN nan"]
    start = time.perf_counter()
    assert judge(pool, kinds * 4) == [CORRECT, CRASH, CRASH, WRONG, CRASH, CRASH] * 4
    print(f"16 crashes, 16 workers lost: {time.perf_counter() - start:.1f} s")


def test_a_worker_killed_from_outside_costs_no_reward(pool: VerifierPool, tmp_path: Path) -> None:
    completion = f"EXIT_ONCE {tmp_path / 'mark'}"
    assert pool.verify([completion, "15"], [completion, "15"], [False, False]) == [CORRECT, CORRECT]
    assert (tmp_path / "mark").is_dir()


def test_idle_workers_killed_from_outside_cost_no_reward(pool: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a loaded host a worker that has just been replaced may still start, and be killed again, several times in a row.
    monkeypatch.setattr("grpo_jax.tasks.workers._START_ATTEMPTS", 100)
    for _ in range(5):
        assert judge(pool, ["15"] * 8) == [CORRECT] * 8
        for worker in list(pool._workers):
            worker.kill()
        assert judge(pool, ["15"]) == [CORRECT]  # each dead one would be handed the same item
        assert judge(pool, ["15", "16"] * 10) == [CORRECT, WRONG] * 10


@pytest.mark.parametrize("completion", ["HANG_IN_C", "SLEEP 1000"])
def test_hangs_end_at_the_deadline(completion: str) -> None:
    deadline, hangs, workers = 0.5, 4, 2
    with VerifierPool(obey, num_workers=workers, deadline=deadline) as pool:
        first = {worker._process.pid for worker in pool._workers}
        start = time.perf_counter()
        completions = ["15"] * 30 + [completion] * hangs + ["16"] * 30
        assert judge(pool, completions) == [CORRECT] * 30 + [TIMEOUT] * hangs + [WRONG] * 30
        seconds = time.perf_counter() - start
        print(f"{hangs} hangs, {workers} workers, deadline {deadline} s: {seconds:.1f} s")
        assert deadline <= seconds < deadline * hangs / workers + 4
        assert not any(os.path.exists(f"/proc/{pid}") for pid in first)  # killed and reaped
        assert judge(pool, ["15"]) == [CORRECT]


def test_from_a_thread_with_an_outer_alarm_after_jax() -> None:
    assert float(jnp.ones(3).sum()) == 3.0
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    results: dict[int, list[Verdict]] = {}
    try:
        with VerifierPool(obey, num_workers=2, deadline=10.0) as pool:

            def call(i: int) -> None:
                results[i] = judge(pool, ["SLEEP 1.2", "15", "EXIT", str(i)])

            threads = [threading.Thread(target=call, args=(i,)) for i in range(14, 17)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            # Workers replaced during calls from threads that are gone now must still live.
            assert judge(pool, ["15", "16"] * 20) == [CORRECT, WRONG] * 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]
    assert results == {i: [WRONG, CORRECT, CRASH, CORRECT if i == 15 else WRONG] for i in range(14, 17)}


def test_verdicts_do_not_depend_on_load() -> None:
    task = stories()
    openings = [example.prompt for example in task.examples] * 20
    targets = [f"any:{word}" for word in ("dog", "she", "zebra", "a")] * (len(openings) // 4)
    cut = [i % 2 == 0 for i in range(len(openings))]
    expected = [task.verify(*row) for row in zip(openings, targets, cut, strict=True)]
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        with VerifierPool(task.verify, num_workers=2, deadline=5.0) as pool:
            assert all(pool.verify(openings, targets, cut) == expected for _ in range(5))
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert CORRECT in expected and WRONG in expected


@pytest.mark.parametrize("busy", ["15", "HANG_IN_C", "SLEEP 1000"])
def test_no_orphans_when_the_trainer_is_killed(busy: str) -> None:
    code = (
        "import sys, hostile_verifiers\n"
        "from grpo_jax.tasks.workers import VerifierPool\n"
        "pool = VerifierPool(hostile_verifiers.obey, num_workers=2, deadline=1000.0)\n"
        "print(*(worker._process.pid for worker in pool._workers), flush=True)\n"
        "pool.verify(sys.argv[1:] * 2, ['15'] * 2, [False] * 2); input()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, busy]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        time.sleep(0.5)
        assert len(pids) == 2 and all(map(alive, pids))
        trainer.kill()
        end = time.monotonic() + 5
        while any(map(alive, pids)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not any(map(alive, pids))


def test_closing_ends_everything_at_once() -> None:
    pool = VerifierPool(obey, num_workers=2, deadline=1000.0)
    pids = [worker._process.pid for worker in pool._workers]
    errors: list[str] = []

    def call() -> None:
        try:
            judge(pool, ["HANG_IN_C"])
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.3)
    start = time.perf_counter()
    pool.close()
    thread.join()
    assert time.perf_counter() - start < 5
    assert errors == ["the verifier pool is closed"]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    pool.close()  # again, harmless
    with pytest.raises(RuntimeError, match="closed"):
        judge(pool, ["15"])


def test_a_verifier_that_cannot_be_imported_is_an_error_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragile_verifier.py").write_text("def verify(completion, target, truncated):\n    return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    verify = importlib.import_module("fragile_verifier").verify
    (tmp_path / "fragile_verifier.py").write_text("import absent_package\n")
    message = r"fragile_verifier:verify cannot start: ModuleNotFoundError: No module named 'absent_package'"
    with pytest.raises(RuntimeError, match=message):
        VerifierPool(verify, num_workers=2)
    (tmp_path / "fragile_verifier.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(RuntimeError, match="cannot start: the worker exited with code 3 before it was ready"):
        VerifierPool(verify, num_workers=2)


def test_refuses_what_workers_cannot_do() -> None:
    def local(completion: str, target: str, truncated: bool) -> Verdict:
        return Verdict.wrong

    with pytest.raises(ValueError, match="local"):
        VerifierPool(local)
    for options in ({"num_workers": 0}, {"deadline": 0.0}, {"deadline": float("nan")}, {"memory_limit_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            VerifierPool(obey, **options)  # type: ignore[arg-type]


def test_the_first_crash_is_logged_and_kept_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    reason = "RuntimeError: no such luck \\x1b[31m \\ud800"
    with VerifierPool(obey) as pool:
        assert judge(pool, ["15", "16"]) == [CORRECT, WRONG] and pool.first_crash == ""
        assert judge(pool, ["RAISE", "RETURN None"]) == [CRASH] * 2
        assert judge(pool, ["EXIT"]) == [CRASH]
        assert pool.first_crash == reason
    (record,) = caplog.records
    assert reason in record.getMessage() and pool.first_crash == reason


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("RETURN True", "it returned a bool, not a Verdict: return Verdict.correct or Verdict.wrong"),
        ("RETURN None", "it returned a NoneType, not a Verdict: return Verdict.correct or Verdict.wrong"),
        ("EXIT", "the worker exited with code 0"),
        ("ABORT", "the worker was ended by signal 6"),
    ],
)
def test_a_crash_says_what_to_mend(completion: str, reason: str) -> None:
    with VerifierPool(obey) as pool:
        assert judge(pool, [completion]) == [CRASH]
        assert pool.first_crash == reason


def test_throughput() -> None:
    start = time.perf_counter()
    with VerifierPool(arithmetic().verify, num_workers=2) as pool:
        ready = time.perf_counter()
        count = 20_000
        verdicts = pool.verify(["15", "16"] * (count // 2), ["15"] * count, [False] * count)
        seconds = time.perf_counter() - ready
    assert verdicts == [CORRECT, WRONG] * (count // 2)
    print(f"2 workers ready in {ready - start:.2f} s; {count / seconds:,.0f} items/s")
    assert count / seconds > 500


def own_spaces() -> bool:
    """Whether this system lets a process make a space of process numbers."""
    tried = "import ctypes, sys; c = ctypes.CDLL(None); sys.exit(bool(c.unshare(1 << 29) and c.unshare(3 << 28)))"
    return sys.platform == "linux" and subprocess.run([sys.executable, "-c", tried]).returncode == 0


isolated = pytest.mark.skipif(not own_spaces(), reason="the system lets nobody make a space of process numbers")


@isolated
@pytest.mark.parametrize("ending", ["closed", "killed worker"])
def test_what_a_verifier_leaves_ends_with_its_worker(ending: str) -> None:
    """In sessions of its own, orphaned, with an empty environment."""
    mark = f"{1000 + time.time() % 1000:.6f}"

    def left() -> int:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return sum(mark.encode() in line for line in lines)

    pool = VerifierPool(obey, deadline=20.0)
    assert pool.verify([f"LEAVE {mark}"], ["x"], [False]) == [Verdict.correct]
    until = time.monotonic() + 10
    while left() < 4 and time.monotonic() < until:
        time.sleep(0.05)
    assert left() >= 4
    if ending == "closed":
        pool.close()
    else:
        (worker,) = pool._workers
        os.kill(worker._process.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while left() and time.monotonic() < until:
        time.sleep(0.05)
    assert left() == 0
    pool.close()


@isolated
def test_a_verifier_can_signal_nobody_outside() -> None:
    with VerifierPool(obey) as pool:
        assert pool.verify([f"SIGNAL {os.getpid()}"], ["x"], [False]) == [Verdict.wrong]


def test_a_worker_says_how_it_ended_as_if_it_had_no_space_of_its_own() -> None:
    for completion, words in (("ABORT", "was ended by signal 6"), ("EXIT", "exited with code 0")):
        with VerifierPool(obey) as pool:
            pool.verify([completion], ["x"], [False])
            assert pool.first_crash == f"the worker {words}"
