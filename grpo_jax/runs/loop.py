"""A run from start to end: reference, prediction, iterations, measurement, report."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from grpo_jax import theory
from grpo_jax.config import averaged_iterations, flat, validate
from grpo_jax.data import prompt_order
from grpo_jax.processes import check_alike, common, put, watched, watched_for_moves
from grpo_jax.report import forecast, live_forecast, run_figure, run_page, run_result, standing
from grpo_jax.report.html_page import write_page
from grpo_jax.report.ledger import ledger_of_run
from grpo_jax.report.markdown import inline
from grpo_jax.report.metrics_log import METRICS, PERF, PROBES, MetricsLog, read_metrics
from grpo_jax.report.progress import progress
from grpo_jax.report.run_story import read_run
from grpo_jax.runs import extension
from grpo_jax.runs.attainable import measured_attainable
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.completions import kept_rows, save_completions
from grpo_jax.runs.course import course_of, pace
from grpo_jax.runs.directory import (
    ATTAINABLE,
    BETA,
    REFERENCE,
    RESULT,
    check_files,
    count_iteration,
    counted_start,
    digests,
    is_new,
    open_run_directory,
    save,
    save_text,
)
from grpo_jax.runs.errors import CheckpointError, Diverged, NothingToLearn
from grpo_jax.runs.measurement import completions_before, drop_counts, judge, measure, measure_held_out, measure_in_full
from grpo_jax.runs.memory import check_memory, format_bytes, lasting_memory
from grpo_jax.runs.reference import measured_reference, reference_params
from grpo_jax.runs.run import Run, check_preempted, machine_lines, must_stop, say, show, signals_as_flag, terminal
from grpo_jax.runs.setup import make_setup, prompt_text, put_prompts, put_table
from grpo_jax.runs.target import has_target, with_chosen_beta
from grpo_jax.storage import Mirror
from grpo_jax.tasks.identity import task_identity
from grpo_jax.tasks.workers import VerifierPool
from grpo_jax.train.iteration import role_key
from grpo_jax.train.optimizer import averaged_params
from grpo_jax.train.sharding import row_sharding, sharded_shapes
from grpo_jax.train.step import TrainState


def train(config: Any, workdir: str | Path, console: Console | None = None, *, extend: bool = False) -> dict[str, Any]:
    """Runs a config in a run directory: starts or resumes it, or shows its result if it is finished.

    Args:
      config: a `ml_collections.ConfigDict` with the keys of configs/default.py.
      workdir: the run directory; created if need be.
      console: where the run prints; the terminal by default.
      extend: the config may differ from that of the directory in `extension.EXTENDABLE`, and the run then goes on with it.

    Returns:
      The content of result.json: p_ref, p_final, p_star (each mean, low, high), their difference, KL, accuracies before and
      after, and the per-prompt arrays.

    Raises:
      ConfigError, RunDirectoryError, CheckpointError, VerifierFailed, WarmStartFailed, Diverged, RunError, Preempted, ValueError:
        each message says what to do.
    """
    console = console or terminal()
    task, objective = validate(config, num_devices=jax.device_count())
    # In a new directory, what cannot be set up is refused before anything is made; a finished run needs no set-up.
    setup = make_setup(config, task, objective) if common(lambda: is_new(workdir)) else None
    with ExitStack() as stack:
        # A config only names its data and its verifier; their digests are stored too, so that a change is noticed.
        identity = flat(config) | task_identity(task)
        check_alike(identity)
        options: dict[str, Any] = {"prepare": lambda path: extension.extend(path, identity)} if extend else {}
        directory = stack.enter_context(open_run_directory(workdir, identity, **options))
        if (result := extension.finished(directory)) is not None:
            check_files(directory, result["files"])
            say(console, f"{directory} holds a finished run:")
            show(console, run_page.result_lines(result))
            return result
        signals = stack.enter_context(signals_as_flag())
        stack.enter_context(counted_start(directory))
        stack.enter_context(watched_for_moves(config.train.watchdog))
        setup = setup or make_setup(config, task, objective)
        dropped = len(task.examples) - len(setup.task.examples)
        workers = {"num_workers": config.verifier.num_workers, "deadline": config.verifier.deadline}
        on_device = setup.compiled.verify is not None
        pool = stack.enter_context(nullcontext(None) if on_device else VerifierPool(task.verify, **workers))
        run = Run(config, setup, directory, console, pool, jax.random.key(config.seed), signals)
        return run_phases(run, dropped)


class Foretold(NamedTuple):
    """What is said of a run before its iterations.

    Attributes:
      lines: shown so far, (label, text).
      extended: see `extension.extensions`.
      prediction: p* and its KL; None where the theory has none.
      attainable: p†, see `forecast.make_attainable`.
      course: of the live forecast, or why there is none.
    """

    lines: list[tuple[str, str]]
    extended: list[dict[str, Any]]
    prediction: theory.Prediction | None
    attainable: Any
    course: live_forecast.Course | str

    @property
    def seam(self) -> int:
        """The iteration from which on the run has its config of now."""
        return self.extended[-1]["after"] if self.extended else 0


def run_phases(run: Run, dropped: int) -> dict[str, Any]:
    """The phases of a run that is not finished, each of which goes on where an earlier start was stopped.

    Args:
      run: see `Run`.
      dropped: examples of the task that are too long.

    Returns:
      The content of result.json.
    """
    begun = time.monotonic()
    config, setup, console = run.config, run.setup, run.console

    # What is run, and whether it fits.
    memory = lasting_memory(setup.recipe, setup.shapes, setup.trained, setup.mesh)
    extended = extension.extensions(run.directory)
    lines = start_lines(run, dropped, memory)
    lines += [("extended", words) for words in extension.extension_words(extended)]
    show(console, lines)
    check_memory(config, memory)

    # The reference policy: made, measured, and what the theory predicts from its measurement. Where no iteration reads its
    # parameters, they are not kept; they are read again at the end.
    before = measured_reference(run)
    ref_params = reference_params(run) if setup.recipe.needs_reference else None
    check_success(config, before)
    if has_target(config):
        run = with_chosen_beta(run, before, measured_attainable(run, ref_params, before))
    foretold = foretell(run, ref_params, before, lines, extended)

    # The iterations.
    params, average_params = run_iterations(run, ref_params, before, foretold)

    # The policy at the end: measured, compared with the prediction, and shown.
    ref_params = reference_params(run) if ref_params is None else ref_params
    kept = kept_rows(run, len(setup.probed)) if config.evaluate.examples else []
    after = _measure_end(run, params, ref_params, before, kept)
    average = None
    if average_params is not None:
        over = {"iterations": averaged_iterations(config)}
        say(console, f"the same of the parameters' average over the last {over['iterations']} iterations")
        average = _measure_end(run, average_params, ref_params, before) | over
    save_completions(run, completions_before(run, params, ref_params, kept), after.get("completions", []))
    result = conclude(run, foretold, before, after, average)
    drop_counts(run)
    show(console, run_page.result_lines(result))
    seconds = time.monotonic() - begun
    say(console, f"{seconds:.0f} s since this start; report.html, report.md and figure.png are in {run.directory}")
    return result


def foretell(
    run: Run,
    ref_params: Any | None,
    before: dict[str, Any],
    lines: list[tuple[str, str]],
    extended: list[dict[str, Any]],
) -> Foretold:
    """What the theory says of the run, from the measurement of its reference and of what its network lets through; shown.

    Args:
      run: see `Run`.
      ref_params: of the reference policy.
      before: its measurement.
      lines: shown so far.
      extended: see `extension.extensions`.
    """
    config, c, objective = run.config, run.config.evaluate, run.setup.recipe.objective
    successes, trials = np.array(before["successes"]), before["trials"]
    prediction = None
    if _is_predictable(config):
        prediction = forecast.make_forecast(successes, trials, confidence=c.confidence, **_setting(run))
    expected = run_page.prediction_lines(
        before, prediction, confidence=c.confidence, group_size=config.rollout.group_size
    )
    show(run.console, expected)
    measured = measured_attainable(run, ref_params, before)
    attainable = forecast.make_attainable(successes, trials, measured, confidence=c.confidence, **_setting(run))
    limited = run_page.attainable_lines(measured, attainable, confidence=c.confidence)
    show(run.console, limited)
    course: live_forecast.Course | str = "the run was extended"
    if not extended:
        course = course_of(config, objective, before, run.setup.probed, num_prompts=len(run.setup.visited))
    if isinstance(course, str):
        say(run.console, f"no live forecast: {course}")
    return Foretold([*lines, *expected, *limited], extended, prediction, attainable, course)


def conclude(
    run: Run, foretold: Foretold, before: dict[str, Any], after: dict[str, Any], average: dict[str, Any] | None
) -> dict[str, Any]:
    """Compares what was measured with what was foretold, and writes the report and result.json, whose content it returns.

    Args:
      run: see `Run`.
      foretold: before the iterations.
      before, after: the measurements of the reference and of the policy at the end.
      average: that of the parameters' average, if one was kept.
    """
    config, c, seam = run.config, run.config.evaluate, foretold.seam
    rows = common(lambda: read_metrics(run.directory / METRICS))
    rewards = np.array([row["reward/mean"] for row in rows if row["phase"] == "train"])
    of_ledger = {} if after["ledger"] is None else after["ledger"].row()
    rows.append(forecast.probe_row(config.train.iterations, after, c.confidence) | of_ledger)
    since = pace(config)[seam:]
    progressed: dict[str, Any] = {"trend": standing.trend(rewards[seam:], since - since[0], c.confidence)}
    progressed["skipped_updates"] = skipped_updates(config, rows)
    if not isinstance(foretold.course, str):
        progressed |= live_forecast.record(foretold.course, rows, c.confidence)
    result = run_result.make_result(
        config, before, after, foretold.prediction, average, progressed, foretold.attainable
    )
    result |= {"extended": foretold.extended} if foretold.extended else {}
    probes = [row for row in rows if row["phase"] == "probe"]
    recursion = None
    if _is_predictable(config) and not foretold.extended:
        p_ref = np.array(before["successes"]) / before["trials"]
        visited = config.data.prompts_per_iteration / len(run.setup.visited)
        weights = {"beta_mirror": config.objective.beta_mirror, "visited": visited}
        recursion = forecast.exact_iterates(p_ref, config.train.iterations, **weights, **_setting(run))
    figure = run.directory / "figure.png"
    common(lambda: run_figure.plot_run(figure, rows=probes, result=result, iterates=recursion))
    samples = {"before": before["examples"], "after": after["examples"]}
    save(run.directory / "samples.json", samples)
    save_text(run.directory / "report.md", run_page.page(result, foretold.lines, samples))
    common(lambda: write_page(run.directory / "report.html", [read_run(run.directory, result)]))
    result["files"] = digests(run.directory, (METRICS, REFERENCE, ATTAINABLE, BETA, "samples.json"))
    save(run.directory / RESULT, result)  # where it is, the run is finished
    return result


def _is_predictable(config: Any) -> bool:
    """The theory leaves out an entropy bonus."""
    return not config.objective.entropy_bonus


def _setting(run: Run) -> dict[str, Any]:
    """What decides where a policy goes, beside its reference."""
    config = run.config
    return {
        "objective": run.setup.recipe.objective,
        "group_size": config.rollout.group_size,
        "beta": config.objective.beta,
    }


def check_success(config: Any, before: dict[str, Any]) -> None:
    """Raises NothingToLearn where the reference never succeeded, unless the config says to go on."""
    if any(before["successes"]) or config.train.without_success:
        return
    shown = [
        f"  {inline(example['prompt'])[:200]!s} → {inline(completion['text'])[:200]!s}"
        for example in before["examples"][:2]
        for completion in example["completions"][:1]
    ]
    verdicts = f" ({run_page.verdict_counts(before['verdicts'])})" if before["verdicts"] else ""
    tried = f"none of {before['trials'] * len(before['successes']):,} completions of the reference succeeded{verdicts}"
    advice = (
        "Groups of equal rewards teach nothing. What may help: prompts that it solves at times; a chat template (data.chat), or "
        "examples in the prompt; a verifier that reads what it writes; a longer rollout.max_completion; a warm start. "
        "--config.train.without_success=True trains all the same."
    )
    raise NothingToLearn("\n".join([f"{tried}. {advice}", *shown]))


def start_lines(run: Run, dropped: int, memory: dict[str, int]) -> list[tuple[str, str]]:
    """What a run says before it computes anything: (label, text) lines."""
    config, setup = run.config, run.setup
    lines = machine_lines(run)
    lines += run_page.start_lines(config, setup.recipe.objective, num_prompts=len(setup.visited), task=setup.task.name)
    if config.model.path is not None:
        lines.append(("first prompt", inline(prompt_text(setup, 0)[:300])))
    if config.lora.rank:
        trained, of = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (setup.trained, setup.shapes))
        lines.append(
            (
                "LoRA",
                f"rank {config.lora.rank}, on {', '.join(config.lora.targets)}: {trained:,} beside {of:,} parameters",
            )
        )
    if dropped:
        lines.append(("dropped", f"{dropped:,} examples longer than data.max_prompt or rollout.max_completion allow"))
    total = f"{format_bytes(sum(memory.values()))} per device for {', '.join(memory)}; --mode=estimate: the rest"
    return [*lines, ("memory", total)]


def run_iterations(
    run: Run,
    ref_params: Any | None,
    before: dict[str, Any],
    foretold: Foretold,
) -> tuple[Any, Any | None]:
    """All iterations, from the newest checkpoint on; the parameters after the last, and their average if one is kept.

    Args:
      run: see `Run`.
      ref_params: of the reference policy; None where no iteration reads them.
      before: its measurement, the first probe row.
      foretold: its p* is shown beside the current success probability; of a run that was extended, a checkpoint at its seam
        or later must be there.

    Raises:
      Preempted, Diverged, CheckpointError.
    """
    c, setup = run.config, run.setup
    prediction, course, seam = foretold.prediction, foretold.course, foretold.seam
    # From the newest checkpoint, or from the reference.
    checkpoints = Checkpoints(run.directory / "checkpoints", keep=c.checkpoint.keep)
    n = 0  # iterations done
    start = setup.compiled.start
    like = sharded_shapes(jax.eval_shape(start, setup.trained), setup.mesh)
    checkpoint = checkpoints.restore_latest(like, rows_of=run.directory)
    if checkpoint is None:
        state = start(setup.begin(reference_params(run) if ref_params is None else ref_params, c.seed))
    else:
        n, state, meta = checkpoint
        run = run._replace(base_key=jax.random.wrap_key_data(jnp.array(meta["base_key"], jnp.uint32)))
        say(run.console, f"resuming after iteration {n} of {c.train.iterations}")
    if n < seam:
        raise CheckpointError(
            f"no checkpoint from iteration {seam} on is intact in {run.directory}, where the run was extended"
        )
    table = put_table(setup) if setup.compiled.iterate else None
    log, trace = MetricsLog(run.directory, after=n or None), _Trace(run)
    history = common(lambda: read_metrics(run.directory / METRICS))
    kept = kept_rows(run, c.evaluate.examples, times=c.train.iterations // c.evaluate.interval)
    lost = skipped_updates(c, history)
    try:
        if n == 0:
            log.write(forecast.probe_row(0, before, c.evaluate.confidence))
        target = "" if prediction is None else f" → p* {prediction.mean_p_star:.3f}"
        success = ""
        durations: list[float] = []  # of the stretches so far, in seconds
        with progress(run.console, "iterations", total=c.train.iterations, done=n) as line:
            while n < c.train.iterations:
                # Iterate, and write a row for each iteration.
                begun = time.monotonic()
                trace.before(n + 1, n + (1 if table is None else stretch(c, n)))
                with watched(c.train.watchdog, of_several=patience(durations)):
                    state, rows, skipped = advance(run, state, ref_params, table, n)
                trace.after(n + len(rows))
                if not durations:
                    count_iteration(run.directory)
                seconds = (time.monotonic() - begun) / len(rows)
                durations.append(seconds * len(rows))
                for row, in_a_row in zip(rows, skipped, strict=True):
                    n += 1
                    history.append({"iteration": n, "phase": "train"} | row)
                    log.write(history[-1])
                    log.write({"iteration": n, "phase": "train"} | _perf(run, row, seconds), file=PERF)
                    if in_a_row > c.train.max_skipped:
                        raise Diverged(
                            f"{in_a_row} updates in a row had a non-finite loss or gradient (iteration {n}); lower "
                            f"optimizer.learning_rate, in a new --workdir. The checkpoints in {run.directory} are from before"
                        )
                # Measure, where it is time.
                if n % c.evaluate.interval == 0 and n < c.train.iterations:
                    params = setup.recipe.params(state.params, ref_params)
                    probe = measure(run, params, ref_params, n, kept=kept)
                    apart = {"held_out": measure_held_out(run, params, n)} if len(setup.held_out) else {}
                    probe_row = forecast.probe_row(n, probe._asdict() | apart, c.evaluate.confidence)
                    ledger = ledger_of_run(c, setup.recipe.objective, before, probe.tally(), optimum=False)
                    probe_row |= {} if ledger is None else ledger.row()
                    others = f" · held out {probe_row['held_out/mean']:.3f}" if apart else ""
                    success = f"p̂ {probe_row['success/mean']:.3f}{target}{others} · "
                    if not isinstance(course, str):
                        probe_row |= live_forecast.probe_metrics(course, [*history, probe_row], c.evaluate.confidence)
                        success += f"{live_forecast.words(probe_row)} · "
                        if warning := live_forecast.warning([*history, probe_row]):
                            say(run.console, warning)
                    history.append(probe_row)
                    log.write(probe_row)
                    for shown in probe.completions:
                        log.write({"iteration": n, "phase": "probe"} | shown, file=PROBES)
                    check_collapse(run, history, before, prediction)
                kl = f" · KL {row['kl/sequence']:.3f}" if "kl/sequence" in row else ""
                lost += skipped_updates(c, rows)
                line.update(
                    n, f"{success}reward {row['reward/mean']:.3f}{kl}{f' · {lost:,} updates skipped' if lost else ''}"
                )
                # Save, where it is time, and when the run must stop.
                if n % c.checkpoint.interval == 0 or n == c.train.iterations or must_stop(run):
                    vouched = log.flush()  # a checkpoint vouches for the rows before it
                    key = jax.random.key_data(run.base_key).tolist()
                    checkpoints.save(n, state, {"rows": vouched, "base_key": key})
                    if n < c.train.iterations:
                        check_preempted(run)
        check_skipped(c, lost)
        average = averaged_params(state.params, state.opt_state)
        policy_params = partial(setup.recipe.params, ref_params=ref_params)
        return policy_params(state.params), None if average is None else policy_params(average)
    finally:
        trace.close()
        log.close()
        checkpoints.close()


def advance(
    run: Run, state: TrainState, ref_params: Any | None, table: Any | None, done: int
) -> tuple[TrainState, list[dict[str, float]], list[int]]:
    """The next iterations: several as one program, or one in two halves with the worker processes between them.

    Args:
      run, state, ref_params: see `run_iterations`.
      table: all prompts on the device, with a verifier there; else None.
      done: iterations so far.

    Returns:
      (state, metrics row of each iteration, updates skipped in a row after each).
    """
    c, compiled, visited = run.config, run.setup.compiled, run.setup.visited
    beta, learning_rate = jnp.float32(c.objective.beta), jnp.float32(c.optimizer.learning_rate)

    # With a verifier on the device: up to the next point where the host is needed.
    if compiled.iterate is not None:
        count = stretch(c, done)
        index, first = visits(c, visited, done, count), jnp.int32(done + 1)  # iterations are counted from 1
        state, *results = compiled.iterate(
            state, ref_params, table, index, jnp.int32(count), run.base_key, first, beta, learning_rate
        )
        metrics, skipped = jax.device_get(results)
        rows = [{name: float(values[i]) for name, values in metrics.items()} for i in range(count)]
        return state, rows, skipped[:count].tolist()

    # With a verifier on the host: sample, verify, learn; the steps are numbered as in grpo_jax/train/iteration.py.
    # 1 prompts
    index = visited[prompt_order(c.seed, done, num_prompts=len(visited), batch=c.data.prompts_per_iteration)]
    prompts, answers, answer_mask = put_prompts(run.setup, index)
    # 2 sample
    params = run.setup.recipe.params(state.params, ref_params)
    rollout = compiled.sample(params, prompts, role_key(run.base_key, "rollout", done + 1))
    # 3 verify
    judged = judge(run.setup, run.pool, index, rollout, answers, answer_mask)
    # 4 to 8 learn
    key = role_key(run.base_key, "minibatches", done + 1)
    rewards = put(judged.rewards, row_sharding(run.setup.mesh))
    state, metrics = compiled.learn(state, ref_params, prompts, rollout, rewards, key, beta, learning_rate)
    row = {name: float(x) for name, x in metrics.items()}
    row |= {f"verdict/{name}": number for name, number in judged.verdict_counts().items()}
    return state, [row], [int(state.skipped)]


def check_collapse(
    run: Run, rows: list[dict[str, Any]], before: dict[str, Any], prediction: theory.Prediction | None
) -> None:
    """Says at a measurement that the policy has collapsed, or raises Diverged where ``train.stop_at_collapse`` is set."""
    p_ref = sum(before["successes"]) / (before["trials"] * len(before["successes"]))
    collapsed = standing.collapse(rows, p_ref, None if prediction is None else float(prediction.mean_kl))
    if collapsed is not None:
        words = f"collapse at iteration {rows[-1]['iteration']}: {collapsed}. Lower optimizer.learning_rate, in a new --workdir"
        if run.config.train.stop_at_collapse:
            raise Diverged(words)
        say(run.console, words)


def check_skipped(config: Any, lost: int) -> None:
    """Raises Diverged at the end of a run most of whose updates were skipped."""
    c = config.train
    updates = c.iterations * c.inner_epochs * c.minibatches
    if 2 * lost > updates:
        raise Diverged(
            f"{lost:,} of {updates:,} updates were skipped, their loss or gradient not finite. "
            "Lower optimizer.learning_rate, or look for weights of the model that are too large, in a new --workdir"
        )


def skipped_updates(config: Any, rows: list[dict[str, Any]]) -> int:
    """How many updates were skipped, from rows of metrics.jsonl."""
    c = config.train
    return round(sum(row.get("loss/skipped") or 0.0 for row in rows) * c.inner_epochs * c.minibatches)


def patience(durations: list[float]) -> float | None:
    """Seconds after which a stretch of iterations hangs, from those of the stretches before; None: too few to tell.

    >>> patience([9.0, 2.0, 2.0]), patience([300.0, 100.0, 90.0]), patience([1.0])
    (600.0, 2000.0, None)
    """
    return max(600.0, 20 * float(np.median(durations))) if len(durations) >= 3 else None


class _Trace:
    """The trace of ``train.profile``, of whole stretches of iterations; each process traces its own devices."""

    def __init__(self, run: Run):
        self._wanted, self._folder = tuple(run.config.train.profile), run.directory / "profile"
        self._mirror: Mirror | None = None

    def before(self, first: int, last: int) -> None:
        """Begins it, where the iterations that follow have the first of those that are wanted."""
        if self._wanted and self._mirror is None and first <= self._wanted[0] <= last:
            self._mirror = Mirror(self._folder)
            jax.profiler.start_trace(str(self._mirror.here))

    def after(self, last: int) -> None:
        """Ends it, where the last of those that are wanted has been."""
        if self._mirror is not None and last >= self._wanted[1]:
            self.close()

    def close(self) -> None:
        """Ends it, if it has begun."""
        if self._mirror is not None:
            jax.profiler.stop_trace()
            self._mirror.close()
            self._mirror = None


def stretch(config: Any, done: int) -> int:
    """Iterations that run as one program after ``done`` of them: up to the next probe, checkpoint or end."""
    intervals = config.evaluate.interval, config.checkpoint.interval
    ends = [config.train.iterations - done, *(interval - done % interval for interval in intervals)]
    return min(config.train.iterations_per_program, *ends)


def visits(config: Any, visited: np.ndarray, done: int, count: int) -> np.ndarray:
    """[n, P] int32 rows, of those that are trained on, that the ``count`` iterations after ``done`` visit; 0 beyond them."""
    batch = config.data.prompts_per_iteration
    index = np.zeros((config.train.iterations_per_program, batch), np.int32)
    for i in range(count):
        index[i] = visited[prompt_order(config.seed, done + i, num_prompts=len(visited), batch=batch)]
    return index


def _measure_end(
    run: Run, params: Any, ref_params: Any, before: dict[str, Any], kept: Sequence[int] = ()
) -> dict[str, Any]:
    """The measurement after training, with its ledger, and the completions of rows of the dataset that are kept."""
    measured, tally = measure_in_full(run, params, ref_params, run.config.train.iterations, kept=kept)
    return measured | {"ledger": ledger_of_run(run.config, run.setup.recipe.objective, before, tally)}


def _perf(run: Run, row: dict[str, float], seconds: float) -> dict[str, float]:
    tokens = row["rollout/length"] * run.config.data.prompts_per_iteration * run.config.rollout.group_size
    return {"time/iteration": seconds, "perf/tokens_per_second": tokens / seconds}
