"""A sweep as one program: the points (β, learning rate) of every seed train side by side, each whole on one device.

It needs a verifier on the device. For each seed a reference is made and measured as in a single run, with the same keys, so that
a point is the single run of its config. What the points share is stored once: the prompts, and for each seed the reference,
the order of the prompts and the random numbers. The points' axis is a mesh axis: a device holds and runs its own points, and
never talks to another.

The directory of a sweep holds config.json, seed-N/ (reference and its measurement), metrics.jsonl (``[seed][point]`` lists),
checkpoints/ and, last, result.json.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from grpo_jax.config import averaged_iterations, flat, validate
from grpo_jax.processes import check_alike, common, devices_of_all, host, put
from grpo_jax.report import forecast, run_page, run_result
from grpo_jax.report.ledger import ledger_of_run
from grpo_jax.report.metrics_log import METRICS, MetricsLog, read_metrics
from grpo_jax.report.progress import progress
from grpo_jax.report.standing import trend
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.course import pace
from grpo_jax.runs.directory import RESULT, load, open_run_directory, save
from grpo_jax.runs.loop import stretch, visits
from grpo_jax.runs.measurement import Measurement, counts_file, drop_counts
from grpo_jax.runs.memory import check_memory, format_bytes, lasting_memory
from grpo_jax.runs.reference import measured_reference, reference_params
from grpo_jax.runs.run import Run, check_preempted, machine_lines, must_stop, say, show, signals_as_flag, terminal
from grpo_jax.runs.setup import make_setup, probed_rows, put_table
from grpo_jax.runs.target import has_target
from grpo_jax.tasks.identity import task_identity
from grpo_jax.train.iteration import role_key
from grpo_jax.train.optimizer import averaged_params
from grpo_jax.train.step import TrainState
from grpo_jax.train.sweep_program import (
    POINTS,
    WHOLE,
    SweepFunctions,
    Table,
    make_sweep_functions,
    make_sweep_mesh,
)


class Plan(NamedTuple):
    """What is swept: every seed with every point; ``betas`` and ``learning_rates`` are those of the points."""

    seeds: tuple[int, ...]
    betas: tuple[float, ...]
    learning_rates: tuple[float, ...]

    def config(self, config: Any, seed_index: int, point_index: int) -> Any:
        """The config of one of the single runs that the sweep stands for."""
        changed = config.copy_and_resolve_references()
        changed.seed, changed.objective.beta = self.seeds[seed_index], self.betas[point_index]
        changed.optimizer.learning_rate = self.learning_rates[point_index]
        return changed


def sweep(
    config: Any,
    workdir: str | Path,
    *,
    seeds: Sequence[int],
    betas: Sequence[float],
    learning_rates: Sequence[float] = (),
    console: Console | None = None,
    batched: bool | None = None,
) -> list[dict[str, Any]]:
    """Runs, resumes, or reads the finished sweep of a config in a directory.

    Args:
      config: a `ml_collections.ConfigDict` with the keys of configs/default.py, for one device.
      workdir: of the sweep; created if need be.
      seeds, betas, learning_rates: every seed runs every (β, learning rate); without learning rates, the config's.
      console: where the sweep prints; the terminal by default.
      batched: the points of a device go through each operation together; else one after the other, which is faster on a CPU. By
        default together, except on a CPU.

    Returns:
      One dict per seed and point, seed by seed: what result.json of a single run holds (see `run_result.make_result`; without
      greedy accuracy and live forecasts), ``learning_rate``, and ``diverged``: updates were skipped more often in a row than
      ``train.max_skipped`` allows.

    Raises:
      ConfigError, RunDirectoryError, CheckpointError, WarmStartFailed, RunError, Preempted, ValueError: each message says what
        to do.
    """
    console = console or terminal()
    points = list(itertools.product(betas, learning_rates or (config.optimizer.learning_rate,)))
    plan = Plan(tuple(seeds), tuple(float(b) for b, _ in points), tuple(float(rate) for _, rate in points))
    if not points or not seeds or len(set(points)) < len(points) or len(set(seeds)) < len(seeds):
        raise ValueError("a sweep needs at least one seed and one β, and none of them twice")
    if has_target(config):
        raise ValueError("a sweep as one program is given its βs: unset objective.target_success and target_kl")
    for seed, point in itertools.product(range(len(seeds)), range(len(points))):
        task, objective = validate(plan.config(config, seed, point), num_devices=1)
    with ExitStack() as stack:
        swept = {"seed": list(seeds), "objective.beta": plan.betas, "optimizer.learning_rate": plan.learning_rates}
        identity = flat(config) | task_identity(task) | swept
        check_alike(identity)
        directory = stack.enter_context(open_run_directory(workdir, identity))
        if (stored := load(directory / RESULT)) is not None:
            say(console, f"{directory} holds a finished sweep")
            return stored["points"]
        # The references are made on one device, or on one of each process.
        setup = make_setup(config, task, objective, devices=devices_of_all())
        if setup.compiled.iterate is None:
            raise ValueError("a sweep as one program needs a verifier on the device: launch.py --sweep runs any config")
        if config.lora.rank or config.evaluate.held_out:
            raise ValueError(
                "a sweep as one program trains all parameters, on all prompts: lora.rank and evaluate.held_out must be 0; "
                "launch.py --sweep runs any config"
            )
        signals = stack.enter_context(signals_as_flag())
        # The run of all seeds: without worker processes, and with a key that is not used.
        run = Run(config, setup, directory, console, None, jax.random.key(0), signals)
        results = run_phases(run, plan, jax.default_backend() != "cpu" if batched is None else batched)
        results = save(directory / RESULT, {"points": results})["points"]
        drop_counts(run)
        return results


def run_phases(run: Run, plan: Plan, batched: bool) -> list[dict[str, Any]]:
    """The phases of a sweep: references, iterations of all points, measurement; the results point by point."""
    config, setup, objective = run.config, run.setup, run.setup.recipe.objective
    mesh = make_sweep_mesh(len(plan.betas))
    _show_header(run, plan, mesh)

    # A reference for each seed, made and measured as a single run does.
    runs = [_of_seed(run, seed) for seed in plan.seeds]
    for of_seed in runs:
        common(partial(of_seed.directory.mkdir, exist_ok=True))
    before = [measured_reference(of_seed) for of_seed in runs]

    # All points side by side.
    functions = make_sweep_functions(setup.recipe, mesh, batch_samples=_batch_samples(config), batched=batched)
    table = put(jax.tree.map(host, put_table(setup)), NamedSharding(mesh, WHOLE))
    states, worst = _iterate(run, plan, functions, mesh, runs, table)
    after = _measure(run, functions, mesh, runs, states.params, table)  # [seed][point]
    averages, average_params = None, averaged_params(states.params, states.opt_state)
    if average_params is not None:
        averages = _measure(run, functions, mesh, runs, average_params, table)

    # Each against its own prediction.
    rewards = np.array(
        [row["reward/mean"] for row in common(lambda: read_metrics(run.directory / METRICS))], np.float64
    )  # [n, seeds, points]
    setting = {"objective": objective, "group_size": config.rollout.group_size}
    results = []
    for seed, point in itertools.product(range(len(runs)), range(len(plan.betas))):
        successes, trials = np.array(before[seed]["successes"]), before[seed]["trials"]
        prediction = None
        if not config.objective.entropy_bonus:
            options = setting | {"beta": plan.betas[point], "confidence": config.evaluate.confidence}
            prediction = forecast.make_forecast(successes, trials, **options)
        of_point = plan.config(config, seed, point)

        def with_ledger(measured: Measurement, of_point: Any = of_point, counts: Any = before[seed]) -> dict[str, Any]:
            ledger = ledger_of_run(of_point, objective, counts, measured.tally())
            return measured.record(greedy=None) | {"ledger": ledger}

        average = None
        if averages is not None:
            average = with_ledger(averages[seed][point]) | {"iterations": averaged_iterations(config)}
        at_end = with_ledger(after[seed][point])
        progressed = {"trend": trend(rewards[:, seed, point], pace(config), config.evaluate.confidence)}
        result = run_result.make_result(of_point, before[seed], at_end, prediction, average, progressed)
        more = {"learning_rate": plan.learning_rates[point]}
        results.append(result | more | {"diverged": bool(worst[seed][point] > config.train.max_skipped)})
    return results


def _iterate(
    run: Run, plan: Plan, functions: SweepFunctions, mesh: Mesh, runs: list[Run], table: Table
) -> tuple[TrainState, np.ndarray]:
    """All iterations of all points; the states after the last, and the most updates each skipped in a row."""
    c, shape = run.config, (len(plan.seeds), len(plan.betas))
    betas, rates = (
        put(np.broadcast_to(np.array(x, np.float32), shape), NamedSharding(mesh, POINTS))
        for x in (plan.betas, plan.learning_rates)
    )  # [seeds, points]
    base_keys = _keys(mesh, [r.base_key for r in runs])  # [seeds]
    ref_params = _references(mesh, runs)

    # From the newest checkpoint, or from the references.
    checkpoints = Checkpoints(run.directory / "checkpoints", keep=c.checkpoint.keep)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, POINTS)),
        jax.eval_shape(functions.start, ref_params, betas),
    )
    n, worst, checkpoint = 0, np.zeros(shape, int), checkpoints.restore_latest(like, rows_of=run.directory)
    if checkpoint is None:
        states = functions.start(ref_params, betas)
    else:
        n, states, meta = checkpoint
        worst = np.array(meta["worst"])
        say(run.console, f"resuming after iteration {n} of {c.train.iterations}")
    if not run.setup.recipe.objective.holds_to_reference:
        ref_params = None
    log = MetricsLog(run.directory, after=n or None)
    try:
        with progress(run.console, "iterations of all points", total=c.train.iterations, done=n) as line:
            while n < c.train.iterations:
                # Iterate, and write a row for each iteration.
                count = stretch(c, n)
                index = np.stack([visits(r.config, run.setup.visited, n, count) for r in runs])
                numbers = jnp.int32(count), jnp.int32(n + 1)
                states, *results = functions.iterate(
                    states, ref_params, base_keys, index, table, *numbers, betas, rates
                )
                metrics, skipped = jax.tree.map(host, results)  # each [seeds, points, iterations]
                for i in range(count):
                    row = {name: _listed(values[..., i]) for name, values in metrics.items()}
                    log.write({"iteration": n + i + 1, "phase": "train"} | row)
                n, worst = n + count, np.maximum(worst, skipped.max(-1))
                rewards = metrics["reward/mean"][..., count - 1]
                line.update(n, f"reward {rewards.min():.3f} to {rewards.max():.3f}")
                # Save, where it is time, and when the sweep must stop.
                if n % c.checkpoint.interval == 0 or n == c.train.iterations or must_stop(run):
                    rows = log.flush()  # which the checkpoint vouches for
                    checkpoints.save(n, states, {"rows": rows, "worst": worst.tolist()})
                    if n < c.train.iterations:
                        check_preempted(run)
        return states, worst
    finally:
        log.close()
        checkpoints.close()


def _measure(
    run: Run, functions: SweepFunctions, mesh: Mesh, runs: list[Run], params: Any, table: Table
) -> list[list[Measurement]]:
    """The final measurement of every point, [seed][point]: the completions that a single run would sample, counted."""
    c = run.config
    group, batch, samples = _batch_samples(c), c.data.prompts_per_iteration, c.evaluate.final_samples
    # The measured prompts in blocks of equal size; the prompts that fill up the last block are dropped below.
    probed = [r.setup.probed for r in runs]
    num_prompts, blocks = len(probed[0]), math.ceil(len(probed[0]) / batch)
    rows = np.stack([np.resize(p, blocks * batch).reshape(blocks, batch) for p in probed]).astype(np.int32)
    keys = _keys(mesh, [role_key(r.base_key, "probe", c.train.iterations) for r in runs])
    ref_params = _references(mesh, runs)
    # What an earlier start has counted, and from there on.
    kept = counts_file(run, params, {"iteration": c.train.iterations, "samples": [samples, group]})
    done, totals = 0, []
    if (so_far := load(kept)) is not None:
        done, totals = so_far["done"], [np.array(x) for x in so_far["totals"]]
    with progress(run.console, "measuring, samples of every prompt", total=samples, done=done) as line:
        for first in range(done, samples, group):
            arrays = functions.measure(params, ref_params, keys, rows, table, jnp.int32(first))
            counts = [x.astype(np.float64 if x.dtype == np.float32 else np.int64) for x in map(host, arrays)]
            totals = [a + b for a, b in zip(totals, counts, strict=True)] if totals else counts
            done = first + group
            if done >= samples or must_stop(run):
                save(kept, {"done": done, "totals": [x.tolist() for x in totals]})
                check_preempted(run)
            line.update(done, f"success {totals[0].mean() / done:.3f}")
    successes, tokens, truncated, sums = (
        x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :num_prompts] for x in totals
    )  # [seeds, points, Q], and sums [seeds, points, Q, 2, 4]

    def of_point(seed: int, point: int) -> Measurement:
        at = seed, point
        length, share_truncated = (float(x[at].mean() / samples) for x in (tokens, truncated))
        kl = float(sums[at][..., 0].sum() / (num_prompts * samples))
        return Measurement(successes[at], samples, kl, length, share_truncated, {}, [], log_ratio_sums=sums[at])

    return [[of_point(s, p) for p in range(successes.shape[1])] for s in range(successes.shape[0])]


def _references(mesh: Mesh, runs: list[Run]) -> Any:
    """The parameters of all references, [seeds, ...], on every device."""
    references = [jax.tree.map(host, reference_params(run)) for run in runs]
    return put(jax.tree.map(lambda *x: np.stack(x), *references), NamedSharding(mesh, WHOLE))


def _batch_samples(config: Any) -> int:
    """Completions of a prompt that are sampled at a time."""
    return min(config.evaluate.final_samples, config.evaluate.batch_samples)


def _of_seed(run: Run, seed: int) -> Run:
    """The single run that makes and measures the reference of a seed."""
    config = run.config.copy_and_resolve_references()
    config.seed = seed
    setup = run.setup._replace(probed=probed_rows(config, run.setup.visited))
    directory = run.directory / f"seed-{seed}"
    return run._replace(config=config, setup=setup, directory=directory, base_key=jax.random.key(seed))


def _show_header(run: Run, plan: Plan, mesh: Mesh) -> None:
    config, setup, points = run.config, run.setup, len(plan.seeds) * len(plan.betas)
    lines = machine_lines(run)
    lines += run_page.start_lines(
        config, setup.recipe.objective, num_prompts=len(setup.task.examples), task=setup.task.name
    )
    lines = [(label, text) for label, text in lines if label not in ("devices", "β")]
    # Each seed has a reference on every device, each point a state on one.
    of_one = lasting_memory(setup.recipe, setup.shapes, setup.trained, setup.mesh)
    memory = {
        name: size * (len(plan.seeds) if name == "reference" else points // mesh.size) for name, size in of_one.items()
    }
    swept = f"{len(plan.betas)} of (β, learning rate) × {len(plan.seeds)} seeds on {mesh.size} × {jax.devices()[0].device_kind}"
    total = f"{format_bytes(sum(memory.values()))} per device are kept"
    show(run.console, [("points", swept), *lines, ("memory", total)])
    check_memory(config, memory)


def _keys(mesh: Mesh, keys: list[jax.Array]) -> jax.Array:
    data = np.stack([jax.random.key_data(key) for key in keys])
    return jax.random.wrap_key_data(put(data, NamedSharding(mesh, WHOLE)))


def _listed(values: np.ndarray) -> list[list[float | None]]:
    """[seed][point]; JSON has no NaN."""
    return [[x if math.isfinite(x) else None for x in row] for row in values.tolist()]
