"""Weak scaling: N processes of one device, each with the prompts of one, beside one process that has the N devices.

    python -m experiments.benchmarks.processes [--out=runs/processes] [--counts=1,2,4]

Seconds of an iteration, the median of the second half of each run, on the decoder of small.py and on a tiny one, whose
iterations are all overhead. The devices are CPU devices of this machine and share its cores: the ratio says what processes
cost, not what more hardware brings.
"""

import json
import shutil
import statistics
from pathlib import Path

from absl import app, flags

from tests.pods import end, start, start_pod

PROMPTS = 24  # of each device
MODELS = {
    "small.py": (),
    "tiny": tuple(
        f"--config.model.{key}={size}"
        for key, size in {
            "num_layers": 1,
            "d_model": 16,
            "d_ff": 16,
            "num_heads": 1,
            "num_kv_heads": 1,
            "head_dim": 16,
        }.items()
    ),
}
SHORT = {
    "train.iterations": 60,
    "train.iterations_per_program": 10,
    "warm_start.target": 0.02,
    "attainable.steps": 0,
    "evaluate.interval": 1000,
    "evaluate.samples": 8,
    "evaluate.final_samples": 8,
    "checkpoint.interval": 1000,
}


def seconds(workdir: Path) -> float:
    """Of an iteration of a finished run."""
    rows = [json.loads(line) for line in (workdir / "perf.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [row["time/iteration"] for row in rows if row["phase"] == "train"]
    return statistics.median(times[len(times) // 2 :])


def main(_: list[str]) -> None:
    """Prints the table."""
    out = Path(flags.FLAGS.out)
    shutil.rmtree(out, ignore_errors=True)
    print("| model | devices | prompts | one process | processes of one device | ratio |\n|---|---|---|---|---|---|")
    for model, options in MODELS.items():
        for number in map(int, flags.FLAGS.counts):
            times = []
            for processes in dict.fromkeys((1, number)):
                workdir = out / f"{model}-{number}-{processes}"
                more = SHORT | {"data.prompts_per_iteration": PROMPTS * number}
                command = ["--config=configs/small.py", f"--workdir={workdir}", *options]
                command += [f"--config.{key}={value}" for key, value in more.items()]
                if processes == 1:
                    ended = end([start("launch.py", *command, devices=number)], 3600)
                else:
                    ended = end(start_pod(command, processes=processes), 3600)
                if any(code for code, _, _ in ended):
                    raise SystemExit(ended[0][2])
                times.append(seconds(workdir))
            each = " | ".join(f"{1000 * time:.1f} ms" for time in (times[0], times[-1]))
            print(f"| {model} | {number} | {PROMPTS * number} | {each} | {times[-1] / times[0]:.2f} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/processes", "folder of the runs; emptied first")
    flags.DEFINE_list("counts", ["1", "2", "4"], "numbers of devices")
    app.run(main)
