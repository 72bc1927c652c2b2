"""Where β takes a trained network, for the paper's objective and for the k3 objective: two curves, one figure.

    python -m experiments.beta_sweep [--config=configs/small.py] [--seeds=0,1,2] [--out=runs/beta_sweep] [--quick]

Every β and seed of an objective trains in one program (`grpo_jax.sweeps.one_program`), the points spread over the cores (on a CPU
there is a device for each). OUT/figure.png, OUT/table.md and OUT/points.json are the outcome; the command resumes. --quick is
16 prompts, a tiny decoder and seven iterations: it shows that the parts fit.

A point is hollow where the flow of the theory, with its pace set by the first tenth of the measured rewards, has not come to p*
when the run ends: small β ask for more iterations. (Adam's steps do not shrink as the gradient does, so a run may be faster.)
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from grpo_jax.environment import prepare_environment

OBJECTIVES = {"sequence_reverse": "KL(π‖π_ref)", "token_forward": "k3, KL(π_ref‖π)"}
QUICK = {
    "task.arithmetic.operand_max": 3,
    "model.num_layers": 1,
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "data.prompts_per_iteration": 8,
    "warm_start.target": 0.15,
    "warm_start.learning_rate": 5e-3,
    "rollout.group_size": 4,
    "train.iterations": 7,
    "evaluate.samples": 8,
    "evaluate.final_samples": 16,
    "evaluate.batch_samples": 16,
}
CURVE = 81  # values of β at which a predicted curve is computed
PACE = 0.1  # share of the iterations whose rewards set the flow's pace


def main(arguments: list[str]) -> None:
    """Runs one sweep per objective, and draws them together."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    options = flags.FLAGS
    os.environ |= device_per_core()
    prepare_environment()
    logging.set_verbosity(logging.WARNING)
    from grpo_jax.config import ConfigError
    from grpo_jax.runs.errors import Preempted, RunError

    try:
        run(options)
    except (ConfigError, Preempted, RunError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(75 if isinstance(error, Preempted) else 2 if isinstance(error, ConfigError) else 1)


def run(options: flags.FlagValues) -> None:
    """The sweeps, the table and the figure; errors as `sweep`'s, or ConfigError before anything is run."""
    from grpo_jax.config import validate
    from grpo_jax.report.sweep_figure import p_star_curve, plot_sweep
    from grpo_jax.sweeps.one_program import sweep

    config = options.config
    if options.quick:
        config.update_from_flattened_dict(QUICK)
    if options.iterations is not None:
        config.train.iterations = options.iterations
    betas = [float(b) for b in options.betas or (["0.3", "3"] if options.quick else np.geomspace(0.1, 10.0, 16))]
    seeds = [int(seed) for seed in options.seeds]
    out = Path(options.out)

    chosen = {kl: config.copy_and_resolve_references() for kl in options.kls}
    for kl, one in chosen.items():
        one.objective.kl = kl
        check_predicted(one, validate(one, num_devices=1)[1])
    curves, points = [], []
    for kl, one in chosen.items():
        label, folder = f"{config.objective.name}, {OBJECTIVES[kl]}", out / kl
        results = sweep(one, folder, seeds=seeds, betas=betas)
        shape = {"objective": validate(one, num_devices=1)[1], "group_size": one.rollout.group_size}
        p_ref = np.stack([r["prompts"]["p_ref"] for r in results[:: len(betas)]])
        over = np.geomspace(min(betas), max(betas), CURVE)
        each = [p_star_curve(p, over, trials=one.evaluate.final_samples, **shape) for p in p_ref]
        p_stars = [curve for curve in each if curve is not None]  # all, as `check_predicted` has seen
        curves.append((label, over, np.mean(p_stars, axis=0)))
        arrived = arrivals(one, results, read_rewards(folder, len(seeds), len(betas)), **shape)
        points += [point(label, r, at) for r, at in zip(results, arrived, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "points.json").write_text(json.dumps(points, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(points), encoding="utf-8")
    plot_sweep(out / "figure.png", curves, points, title=f"{len(seeds)} seeds, {config.train.iterations} iterations")
    print(table(points))
    print(f"figure.png, table.md and points.json are in {out}")


def check_predicted(config: Any, objective: Any) -> None:
    """Refuses a config whose success probability the theory does not predict."""
    from grpo_jax.config import ConfigError
    from grpo_jax.report.forecast import group_weights

    conflicts = []
    if config.objective.entropy_bonus:
        conflicts.append(f"objective.entropy_bonus={config.objective.entropy_bonus}: the theory leaves it out")
    if objective.kl_direction == "none" or group_weights(objective, config.rollout.group_size) is None:
        conflicts.append(f"objective.name={config.objective.name!r} with objective.kl={config.objective.kl!r}")
    if conflicts:
        raise ConfigError(conflicts, "there is no prediction to compare with:")


def device_per_core() -> dict[str, str]:
    """Environment variables that make each core of a CPU a device, and do not split operations over threads.

    The points are the parallel work; operations that are split too cost up to twice the CPU time.
    """
    flag, flags_set = "--xla_cpu_multi_thread_eigen=", os.environ.get("XLA_FLAGS", "")
    cores = os.environ.get("JAX_NUM_CPU_DEVICES") or str(os.cpu_count() or 1)
    return {"JAX_NUM_CPU_DEVICES": cores, "XLA_FLAGS": flags_set if flag in flags_set else f"{flag}false {flags_set}"}


def point(label: str, result: dict[str, Any], arrived: bool) -> dict[str, Any]:
    """What figure and table show of a run."""
    final, difference = result["p_final"], result["difference"]
    return {
        "label": label,
        "beta": result["beta"],
        "seed": result["seed"],
        "p_ref": result["p_ref"]["mean"],
        "p": final["mean"],
        "low": final["low"],
        "high": final["high"],
        "p_star": result["p_star"]["mean"],
        "difference": difference["mean"],
        "half_width": difference["half_width"],
        "inside": difference["inside"],
        "rms": result["rms"],
        "arrived": arrived,
        "diverged": result["diverged"],
    }


def table(points: list[dict[str, Any]]) -> str:
    """The points as a Markdown table.

    >>> print(table([]))
    | objective | β | seed | p_ref | predicted p* | final p̂ | p̂ − p* | interval | inside | the flow has arrived |
    |---|---|---|---|---|---|---|---|---|---|
    <BLANKLINE>
    """
    head = ["objective", "β", "seed", "p_ref", "predicted p*", "final p̂", "p̂ − p*", "interval", "inside"]
    lines = [[*head, "the flow has arrived"], ["---"] * 10]
    for x in points:
        numbers = [f"{x['beta']:.3g}", str(x["seed"]), f"{x['p_ref']:.4f}", f"{x['p_star']:.4f}", f"{x['p']:.4f}"]
        judged = [f"{x['difference']:+.4f}", f"±{x['half_width']:.4f}", "yes" if x["inside"] else "no"]
        ended = "diverged" if x["diverged"] else "yes" if x["arrived"] else "no"
        lines.append([x["label"], *numbers, *judged, ended])
    return "".join("|" + "|".join(f" {c} " if c != "---" else c for c in line) + "|\n" for line in lines)


def read_rewards(folder: Path, seeds: int, points: int) -> np.ndarray:
    """[iterations, seeds, points] mean rewards of a sweep."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.array([row["reward/mean"] for row in rows], float).reshape(-1, seeds, points)


def arrivals(
    config: Any, results: list[dict[str, Any]], rewards: np.ndarray, *, objective: Any, group_size: int
) -> list[bool]:
    """For each result, seed by seed: whether the flow is as near to p* at the end as the measurement can tell."""
    from grpo_jax.report.forecast import group_weights

    weights, forward = group_weights(objective, group_size), objective.kl_direction == "forward"
    schedule = learning_rates(config)
    early_iterations = max(int(PACE * len(schedule)), 2)
    arrived = []
    paces = np.geomspace(1e-2, 1e6, 81)
    for number, result in enumerate(results):
        seed, at = divmod(number, rewards.shape[2])
        least = 0.5 / config.evaluate.final_samples
        p_ref = np.clip(result["prompts"]["p_ref"], least, 1 - least)
        options = {"beta": result["beta"], "weights": weights, "forward": forward}
        # The pace whose flow is nearest to the rewards of the first iterations; then where this flow is at the end.
        early = flow(p_ref, schedule[:early_iterations, None] * paces, **options)
        pace = paces[np.argmin(np.square(early - rewards[:early_iterations, seed, at, None]).sum(0))]
        end = flow(p_ref, schedule[:, None] * pace, **options)[-1, 0]
        arrived.append(bool(abs(end - result["p_star"]["mean"]) <= max(result["difference"]["half_width"], 1e-3)))
    return arrived


def flow(p_ref: np.ndarray, paces: np.ndarray, *, beta: float, weights: Any, forward: bool) -> np.ndarray:
    """[iterations, series] mean over prompts of p along dL/dn = pace·(p(1−p) Ω(p) − β ∂KL/∂L), L the log-odds.

    ``paces`` has the shape of the result. This is gradient ascent in the log-odds of a prompt that shares nothing with others.
    ∂KL/∂L is p(1−p)(L − L_ref) for KL(π‖π_ref), p − p_ref for KL(π_ref‖π).
    """
    import jax

    from grpo_jax import theory

    grid = np.linspace(-25.0, 25.0, 1001)
    with jax.enable_x64(True):
        push = np.asarray(theory.omega(grid, weights, logits=True))
    start = np.log(p_ref) - np.log1p(-p_ref)
    logit, path = np.tile(start, (paces.shape[1], 1)), []
    for pace in paces[:, :, None]:
        p = 1 / (1 + np.exp(-logit))
        path.append(p.mean(-1))
        v = p * (1 - p)
        pull = p - p_ref if forward else v * (logit - start)
        # A step never crosses the end of the grid, nor by more than a quarter: the flow is stiff where the pace is large.
        logit = np.clip(logit + np.clip(pace * (v * np.interp(logit, grid, push) - beta * pull), -0.25, 0.25), -25, 25)
    return np.array(path)


def learning_rates(config: Any) -> np.ndarray:
    """[iterations] mean of the schedule over the updates of each, as a share of the peak."""
    c, each = config.optimizer, config.train.inner_epochs * config.train.minibatches
    n = np.arange(config.train.iterations * each)
    after = np.clip((n - c.warmup_updates) / max(len(n) - c.warmup_updates, 1), 0, 1)
    decay = {"cosine": (1 + np.cos(np.pi * after)) / 2, "linear": 1 - after, "constant": np.ones(len(n))}[c.schedule]
    return np.where(n < c.warmup_updates, n / max(c.warmup_updates, 1), decay).reshape(-1, each).mean(1)


def define_flags() -> None:
    """What `main` reads."""
    config_flags.DEFINE_config_file("config", "configs/small.py", "Config file; its keys are flags.")
    flags.DEFINE_list("betas", None, "Values of β; by default 16 from 0.1 to 10, equal steps of their logarithm.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    flags.DEFINE_list("kls", list(OBJECTIVES), f"KL terms of the objectives: {', '.join(OBJECTIVES)}.")
    flags.register_validator(
        "kls", lambda kls: bool(kls) and set(kls) <= set(OBJECTIVES), message=f"must be among {', '.join(OBJECTIVES)}"
    )
    flags.DEFINE_integer("iterations", None, "Instead of the config's.", lower_bound=1)
    flags.DEFINE_string("out", "runs/beta_sweep", "Directory of the outcome.")
    flags.DEFINE_bool("quick", False, "A tiny decoder, two values of β, seven iterations.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
