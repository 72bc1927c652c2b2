"""Whether the live forecast is calibrated: many small runs, and how many ends lay inside the intervals given on the way.

    python -m experiments.live_forecast [--workdir=runs/live_forecast] [--first_seed=600] [--tasks=sums,text]

Five tasks, three of them with the verifier on the device and two with worker processes; three β and four learning rates each, of
which the lowest does not arrive and the highest is noisy; every run has a seed, a reference and prompts of its own. The runs of a
task share their compiled programs. Each is an ordinary run directory in WORKDIR/TASK, so the command resumes; table.md,
forecast.png and forecast.json are the outcome.
"""

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments.theory.figures import line, marker, new_figure, save, title
from grpo_jax.environment import prepare_environment

BETAS = (0.7, 1.0, 3.0)
RATES = (1e-4, 1e-3, 4e-3, 2e-2)
REPEATS = 2  # seeds of each

SMALL = {
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 128,
    "task.arithmetic.operand_max": 6,
    "data.prompts_per_iteration": 49,
    "data.max_prompt": 5,
    "rollout.max_completion": 3,
    "warm_start.target": 0.35,
    "warm_start.learning_rate": 2e-3,
    "optimizer.b2": 0.999,
    "train.iterations": 100,
    "evaluate.interval": 10,
    "evaluate.samples": 16,
    "evaluate.final_samples": 256,
    "evaluate.examples": 1,
    "checkpoint.interval": 1000,
}
TASKS: dict[str, dict[str, Any]] = {
    "sums": {},
    "batches": {"data.prompts_per_iteration": 16, "optimizer.schedule": "constant", "train.iterations": 80},
    "mixed": {
        "task.arithmetic.operators": "+-",
        "task.arithmetic.operand_max": 5,
        "data.prompts_per_iteration": 24,
        "warm_start.target": 0.25,
        "optimizer.schedule": "linear",
        "train.iterations": 120,
    },
    "text": {"model.stop_strings": ("=",), "train.iterations": 60, "optimizer.schedule": "constant"},
    "countdown": {
        "task.name": "countdown",
        "task.countdown.num_examples": 60,
        "task.countdown.num_numbers": 2,
        "task.countdown.max_number": 9,
        "task.countdown.max_total": 40,
        "task.countdown.prompt": "{numbers} = {total}? ",
        "data.prompts_per_iteration": 20,
        "data.max_prompt": 20,
        "rollout.max_completion": 22,
        "warm_start.target": 0.3,
        "warm_start.learning_rate": 4e-3,
        "warm_start.interval": 10,
        "train.iterations": 60,
        "evaluate.final_samples": 128,
    },
}


def points(task: str, first_seed: int) -> dict[str, dict[str, Any]]:
    """The runs of a task, by name: what each changes, with a seed of its own.

    >>> len(points("sums", 0)), list(points("text", 0))[0]
    (24, 'beta=0.7,rate=0.0001,seed=72')
    """
    seeds = itertools.count(first_seed + list(TASKS).index(task) * len(BETAS) * len(RATES) * REPEATS)
    changes = [
        {"objective.beta": beta, "optimizer.learning_rate": rate, "seed": next(seeds)}
        for beta, rate, _ in itertools.product(BETAS, RATES, range(REPEATS))
    ]
    return {f"beta={c['objective.beta']:g},rate={c['optimizer.learning_rate']:g},seed={c['seed']}": c for c in changes}


def run_task(task: str, workdir: Path, first_seed: int) -> list[dict[str, Any]]:
    """Runs what is not finished yet, and reads all: `outcome` of each run."""
    import jax
    from rich.console import Console

    from configs import default
    from grpo_jax.config import flat, validate
    from grpo_jax.files import read_json
    from grpo_jax.runs.directory import RESULT, open_run_directory
    from grpo_jax.runs.loop import run_phases
    from grpo_jax.runs.run import Run, signals_as_flag
    from grpo_jax.runs.setup import make_setup
    from grpo_jax.tasks.identity import task_identity
    from grpo_jax.tasks.workers import VerifierPool

    found = []
    with ExitStack() as stack:
        signals = stack.enter_context(signals_as_flag())
        setup, pool = None, None
        for name, changes in points(task, first_seed).items():
            directory = workdir / task / name
            if not (directory / RESULT).exists():
                config = default.get_config()
                with config.ignore_type():
                    config.update_from_flattened_dict(SMALL | TASKS[task] | changes)
                made, objective = validate(config.lock(), num_devices=jax.device_count())
                if setup is None:  # β, learning rate and seed are not compiled in
                    setup = make_setup(config, made, objective)
                    if setup.compiled.verify is None:
                        pool = stack.enter_context(VerifierPool(made.verify, num_workers=1, deadline=60.0))
                with open_run_directory(directory, flat(config) | task_identity(made)):
                    run = Run(config, setup, directory, Console(quiet=True), pool, jax.random.key(config.seed), signals)
                    run_phases(run, dropped=0)
            found.append(outcome(task, changes, read_json(directory / RESULT)))
            forecasts = "  ".join(shown(forecast, found[-1]) for forecast in found[-1]["forecasts"])
            print(
                f"{task} {name}: {forecasts}; p* {found[-1]['p_star']:.3f}, end {found[-1]['p_final']:.3f}", flush=True
            )
    return found


def outcome(task: str, changes: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What is compared of a run: its end, and the forecasts of it."""
    forecasts = [
        {key: forecast[key] for key in ("iteration", "end", "rho", "kappa")} for forecast in result["forecasts"]
    ]
    measured = {key: result[key]["mean"] for key in ("p_ref", "p_star", "p_final")}
    return {"task": task} | changes | measured | {"forecasts": forecasts, "speed": result["speed"]}


def is_inside(forecast: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether the measured end lies in the interval.

    >>> is_inside({"end": {"low": 0.5, "high": 0.7}}, {"p_final": 0.6})
    True
    """
    return bool(forecast["end"]["low"] <= run["p_final"] <= forecast["end"]["high"])


def shown(forecast: dict[str, Any], run: dict[str, Any]) -> str:
    """A forecast in words, marked where the end lay outside."""
    end = forecast["end"]
    mark = "" if is_inside(forecast, run) else " OUTSIDE"
    return f"{forecast['iteration']}: {end['mean']:.3f} [{end['low']:.3f}, {end['high']:.3f}]{mark}"


def table(runs: list[dict[str, Any]], shares: tuple[float, ...]) -> str:
    """Coverage and mean width of the intervals at each origin: of each task, each learning rate, and all runs.

    >>> end = {"mean": 0.5, "low": 0.4, "high": 0.6}
    >>> run = {"task": "sums", "optimizer.learning_rate": 1e-3, "p_final": 0.7, "forecasts": [{"end": end}]}
    >>> print(table([run, run | {"p_final": 0.55}], (0.1,)))
    | runs | number | at 10 %: inside | width | error |
    |---|---|---|---|---|
    | sums | 2 | 1 | 0.200 | 0.146 |
    | learning rate 0.001 | 2 | 1 | 0.200 | 0.146 |
    | **all** | 2 | 1 (50 %) | 0.200 | 0.146 |
    <BLANKLINE>
    """
    head = ["runs", "number"]
    for share in shares:
        head += [f"at {share:.0%}: inside".replace("%", " %"), "width", "error"]
    lines = [head, ["---"] * len(head)]
    groups = {task: [run for run in runs if run["task"] == task] for task in dict.fromkeys(run["task"] for run in runs)}
    for rate in sorted({run["optimizer.learning_rate"] for run in runs}):
        groups[f"learning rate {rate:g}"] = [run for run in runs if run["optimizer.learning_rate"] == rate]
    groups["**all**"] = runs
    for name, members in groups.items():
        cells = [name, str(len(members))]
        for k in range(len(shares)):
            ends = [run["forecasts"][k]["end"] for run in members]
            inside = sum(is_inside(run["forecasts"][k], run) for run in members)
            errors = [end["mean"] - run["p_final"] for end, run in zip(ends, members, strict=True)]
            share_inside = f" ({inside / len(members):.0%})".replace("%", " %") if members is runs else ""
            cells += [f"{inside}{share_inside}", f"{np.mean([end['high'] - end['low'] for end in ends]):.3f}"]
            cells.append(f"{np.sqrt(np.mean(np.square(errors))):.3f}")
        lines.append(cells)
    return "".join("|" + "|".join(cell if cell == "---" else f" {cell} " for cell in cells) + "|\n" for cells in lines)


def plot(runs: list[dict[str, Any]], shares: tuple[float, ...], out: Path) -> None:
    """Writes forecast.png and forecast.json: the measured ends over the forecasts, one panel for each origin."""
    figure, axes = new_figure(columns=len(shares), size=(11.0, 4.6))
    for k, (panel, share) in enumerate(zip(axes.flat, shares, strict=True)):
        panel.plot([0, 1], [0, 1], **line(0, linewidth=1.0))
        for number, task in enumerate(dict.fromkeys(run["task"] for run in runs), 1):
            members = [run for run in runs if run["task"] == task]
            ends = [run["forecasts"][k]["end"] for run in members]
            low, mean, high = (np.array([end[name] for end in ends]) for name in ("low", "mean", "high"))
            measured = [run["p_final"] for run in members]
            style = marker(number, linestyle="none", label=task)
            panel.errorbar(mean, measured, xerr=[mean - low, high - mean], elinewidth=0.6, alpha=0.8, **style)
        inside = sum(is_inside(run["forecasts"][k], run) for run in runs)
        title(panel, f"at {share:.0%} of the run: {inside} of {len(runs)} inside")
        panel.set(xlabel="forecast of the end, 95 %", ylabel="measured end", xlim=(0, 1), ylim=(0, 1))
    axes.flat[0].legend(frameon=False, loc="upper left", fontsize=8)
    caption = "Every point is a run: its success probability at the end over what was forecast from the rewards so far."
    save(figure, "forecast", {"runs": runs}, out=out, caption=caption)


def command_line() -> None:
    """Reads the flags, runs, and compares."""
    workdir = flags.DEFINE_string("workdir", "runs/live_forecast", "Where the runs go.")
    tasks = flags.DEFINE_list("tasks", list(TASKS), "Which tasks.")
    first_seed = flags.DEFINE_integer("first_seed", 600, "Seed of the first run; each has its own.")

    def main(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
        prepare_environment()
        logging.set_verbosity(logging.WARNING)
        from grpo_jax.report.live_forecast import ORIGINS

        out = Path(workdir.value)
        runs = [run for task in tasks.value for run in run_task(task, out, first_seed.value)]
        plot(runs, ORIGINS, out)
        (out / "table.md").write_text(table(runs, ORIGINS), encoding="utf-8")
        print(table(runs, ORIGINS))

    app.run(main)


if __name__ == "__main__":
    command_line()
