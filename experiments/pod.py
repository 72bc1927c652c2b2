"""A pod on this machine, from the start to the figure: processes, a bucket, and kills (−9) on the way.

    python -m experiments.pod [--out=runs/pod] [--hosts=4]

First one run whose mesh spans four processes, of which one is killed; what a cluster does is done here: all are started again
until they end with 0. Then a sweep of twelve points that four hosts share, of which two are killed and do not come back. Both lie
in a bucket of a real server of its protocol on this machine, and both are compared, byte by byte, with the same work that
nobody disturbed in a folder. Needs what tests/requirements.txt installs.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import app, flags

from grpo_jax.storage import names, place
from tests.buckets import NAME, bucket
from tests.pods import end, start, start_pod

CONFIG = "configs/small.py"
RUN_FILES = ("metrics.jsonl", "reference.json", "samples.json", "result.json")
GRID = "objective.beta=0.5,1,2,4; seed=0,1,2"
SHORT = ("--config.train.iterations=100", "--config.attainable.steps=0", "--config.evaluate.interval=50")
FREQUENT = "--config.checkpoint.interval=20"
HOUR = 3600.0


def command(workdir: str | Path, *more: str) -> list[str]:
    """Flags of launch.py."""
    return [f"--config={CONFIG}", f"--workdir={workdir}", FREQUENT, *more]


def when(reached: Callable[..., bool], *arguments: Any) -> None:
    """Returns when it is so; raises TimeoutError after an hour."""
    until = time.monotonic() + HOUR
    while not reached(*arguments):
        if time.monotonic() > until:
            raise TimeoutError("what is waited for does not come")
        time.sleep(0.2)


def has_iterated(workdir: Any, iterations: int, pod: list[Any]) -> bool:
    """Whether a run has come so far, or one of its processes has ended."""
    path = workdir / "metrics.jsonl"
    come = path.read_bytes().count(b"\n") if path.exists() else 0
    return come >= iterations or any(process.poll() is not None for process in pod)


def iterating(workdir: Any, number: int) -> bool:
    """Whether so many points of a sweep have begun to iterate."""
    return sum((workdir / name / "metrics.jsonl").exists() for name in names(workdir)) >= number


def pod_of(workdir: str | Path, hosts: int, kill_at: int | None) -> list[list[int]]:
    """Runs on so many processes until all end with 0; the exit codes of every start.

    Args:
      workdir: of the run.
      hosts: processes.
      kill_at: the iteration after which the last process is killed, once; None: never.
    """
    starts: list[list[int]] = []
    while not starts or any(starts[-1]):
        pod = start_pod(command(workdir), processes=hosts)
        if kill_at is not None:
            when(has_iterated, place(workdir), kill_at, pod)
            pod[-1].kill()
            kill_at = None
        ended = end(pod, HOUR)
        starts.append([code for code, _, _ in ended])
        if 2 in starts[-1] or len(starts) > 5:
            raise RuntimeError(f"{starts}: {ended[0][2]}")
    return starts


def hosts_of(workdir: str | Path, hosts: int, kills: int) -> list[int]:
    """A sweep that hosts share; the first ``kills`` of them are killed when points are under way; the exit codes."""
    started = [start("launch.py", *command(workdir, *SHORT, f"--sweep={GRID}")) for _ in range(hosts)]
    if kills:
        when(iterating, place(workdir), hosts)
        for host in started[:kills]:
            host.kill()
    ended = end(started, HOUR)
    if any(code for code, _, _ in ended[kills:]):
        raise RuntimeError(str(ended))
    return [code for code, _, _ in ended]


def same(folder: Any, other: Any, files: Iterator[str]) -> tuple[int, int]:
    """(files with the same bytes, files)."""
    equal = [(folder / name).read_bytes() == (other / name).read_bytes() for name in files]
    return sum(equal), len(equal)


@contextmanager
def in_bucket() -> Iterator[None]:
    """A bucket, which this process and those that it starts find."""
    with bucket() as environment:
        os.environ.update(environment)
        try:
            yield
        finally:
            for name in environment:
                del os.environ[name]


def main(_: list[str]) -> None:
    """Prints a table, and leaves the figures in the output folder."""
    out, hosts = Path(flags.FLAGS.out), flags.FLAGS.hosts
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = [("what", "seconds", "exit codes", "files of the same bytes")]

    def row(what: str, work: Callable[[], Any], compared: Callable[[], tuple[int, int]] | None = None) -> None:
        begun = time.monotonic()
        codes = work()
        seconds = f"{time.monotonic() - begun:.0f}"
        equal = "" if compared is None else "{} of {}".format(*compared())
        rows.append((what, seconds, str(codes), equal))
        print(f"| {' | '.join(rows[-1])} |", flush=True)

    print(f"| {' | '.join(rows[0])} |\n|---|---|---|---|")
    with in_bucket():
        run, sweep = place(f"{NAME}/run"), place(f"{NAME}/sweep")
        row(f"run on {hosts} processes", lambda: pod_of(out / "run", hosts, None))
        row(
            "the same in a bucket, one killed",
            lambda: pod_of(run, hosts, 200),
            lambda: same(run, out / "run", iter(RUN_FILES)),
        )
        row("sweep on one host", lambda: hosts_of(out / "sweep", 1, 0))
        points = [f"{name}/{file}" for name in names(out / "sweep") for file in RUN_FILES if "seed" in name]
        row(
            f"the same on {hosts} hosts in a bucket, two killed",
            lambda: hosts_of(sweep, hosts, 2),
            lambda: same(sweep, out / "sweep", iter([*points, "sweep.json", "figure.png"])),
        )
        for folder, name in ((run, "run.png"), (sweep, "sweep.png")):
            (out / name).write_bytes((folder / "figure.png").read_bytes())
    (out / "pod.md").write_text(
        "\n".join(f"| {' | '.join(line)} |" for line in [rows[0], ("---",) * 4, *rows[1:]]) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/pod", "folder of the table and the figures; emptied first")
    flags.DEFINE_integer("hosts", 4, "processes of the run, and hosts of the sweep", lower_bound=3)
    app.run(main)
