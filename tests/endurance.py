"""A long run with many kills: the bytes of the unbroken one, and memory, files and threads that do not grow.

    python -m tests.endurance [--iterations=10000] [--kills=100] [--workdir=FOLDER]

The tiny run, with checkpoints and measurements on the way. Takes a quarter of an hour on 2 quiet CPU cores.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.pods import ROOT, environment
from tests.tiny_run import flags

FILES = ("metrics.jsonl", "reference.json", "samples.json", "result.json")


def start(workdir: Path, iterations: int) -> subprocess.Popen[bytes]:
    """The run, which writes what it says to said.txt beside its directory."""
    many = {"train__iterations": iterations, "checkpoint__interval": 50, "evaluate__interval": 500}
    command = [sys.executable, "launch.py", "--config=configs/default.py", f"--workdir={workdir}", *flags(**many)]
    with workdir.with_name(f"{workdir.name}.txt").open("ab") as said:
        return subprocess.Popen(command, cwd=ROOT, env=environment(1), stdout=said, stderr=said)


def rows(workdir: Path) -> int:
    """Of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def held(pid: int) -> tuple[int, int, int]:
    """(resident MB, open files, threads) of a process."""
    about = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(about["VmRSS"].split()[0]) // 1024, files, int(about["Threads"])


def main() -> None:
    """Prints what is held on the way, how many kills there were, and whether the bytes are the same; exit code 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workdir", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, dice = options.workdir or Path(temporary), random.Random(0)
        unbroken, killed = folder / "unbroken", folder / "killed"

        # Unbroken, looked at now and then.
        process, marks = start(unbroken, options.iterations), [options.iterations * i // 8 for i in range(1, 8)]
        while process.poll() is None:
            if marks and rows(unbroken) >= marks[0]:
                print(f"iteration {marks.pop(0)}: MB, files, threads: {held(process.pid)}", flush=True)
            time.sleep(0.2)

        # Killed at random iterations.
        kills = 0
        for point in sorted(dice.randrange(options.iterations) for _ in range(options.kills)):
            process = start(killed, options.iterations)
            while process.poll() is None and rows(killed) < point:
                time.sleep(0.05)
            time.sleep(dice.uniform(0.0, 0.3))
            kills += process.poll() is None
            process.kill()
            process.wait()
        code = start(killed, options.iterations).wait()
        same = [name for name in FILES if (unbroken / name).read_bytes() == (killed / name).read_bytes()]
    print(f"{kills} kills; exit code {code}; {len(same)} of {len(FILES)} files have the bytes of the unbroken run")
    sys.exit(code or len(same) < len(FILES))


if __name__ == "__main__":
    main()
