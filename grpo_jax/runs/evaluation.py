"""--mode=evaluate: measures one checkpoint on the task that the config names now, prompt by prompt; trains nothing.

An evaluation has a directory of its own inside that of the run: blocks/ while it goes on, one file per block of prompts, so
that a start after a kill continues after the last block; then prompts.jsonl, samples.jsonl, samples.txt, figure.png, report.md
and, last of all, result.json. Every random number is addressed by (seed, checkpoint, prompt, sample), so that all of them are
the same however often it was killed.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from grpo_jax.config import flat, task_options, validate
from grpo_jax.files import read_sealed, write_jsonl, write_sealed, write_text
from grpo_jax.processes import check_alike, common, host
from grpo_jax.report import evaluation_numbers, evaluation_page
from grpo_jax.report.evaluation_numbers import majority_at_k, powers_of_two
from grpo_jax.report.ledger import Tally, ledger_of_run, log_ratio_sums
from grpo_jax.report.progress import progress
from grpo_jax.runs.directory import EVALUATIONS, RESULT, load, lock_directory, open_run_directory
from grpo_jax.runs.errors import RunDirectoryError
from grpo_jax.runs.measured_policy import (
    CHANGEABLE,
    MeasuredPolicy,
    check_alphabet,
    choose_directory,
    find_policy,
    identity_of,
    reference_counts,
    stored_config,
)
from grpo_jax.runs.measurement import check_verifier, judged_samples
from grpo_jax.runs.run import Run, check_preempted, machine_lines, say, show, signals_as_flag, terminal
from grpo_jax.runs.setup import make_setup
from grpo_jax.runs.target import at_chosen_beta
from grpo_jax.storage import place, remove_folder
from grpo_jax.tasks import Task, Verdict
from grpo_jax.tasks.identity import task_identity
from grpo_jax.tasks.verifiers import import_path
from grpo_jax.tasks.workers import VerifierPool
from grpo_jax.train.iteration import role_key
from grpo_jax.train.sharding import row_shards

BLOCKS = "blocks"
TRUNCATIONS = ("top_k", "top_p", "min_p")  # of the distribution that is sampled


class Completion(NamedTuple):
    """One completion, judged.

    Attributes:
      text: without the stop token.
      verdict: of the verifier on the host.
      reward: what training gives it: that of the verifier on the device where there is one, else the verdict's.
      tokens: its length, stop token included.
      truncated: it never stopped.
      log_ratio: log π/π_ref in nats; None without a reference.
    """

    text: str
    verdict: Verdict
    reward: float
    tokens: int
    truncated: bool
    log_ratio: float | None


def evaluate(
    config: Any,
    workdir: str | Path,
    console: Console | None = None,
    *,
    checkpoint: str = "latest",
    name: str | None = None,
) -> dict[str, Any]:
    """Measures a checkpoint of a run: starts or resumes the measurement, or shows it if it is finished.

    Measured on every prompt (or the ``evaluate.prompts`` chosen): ``evaluate.final_samples`` completions at the config's
    temperature, and the greedy one. On the run's own task these are exactly the completions that the run measured. Text is
    judged by the verifier on the host, so that every verdict is counted; a reward is what training would give.

    Args:
      config: as for `train`; it may differ from the run's in task, evaluate, data, rollout, verifier, mesh and checkpoint, and
        in the keys of train that change only time and memory.
      workdir: the run directory. Where it holds no run, the config's own initial model is measured.
      console: where progress is shown; the terminal by default.
      checkpoint: "latest", "reference", "average" (see ``train.average``), or the number of an iteration that was saved.
      name: of the directory inside ``workdir``/evaluations; by default made of checkpoint, task and split, and of a
        digest of all settings where another evaluation has that name.

    Returns:
      The content of result.json: see `evaluation_numbers.summarise`. prompts.jsonl has a row per prompt, which
      ``python -m grpo_jax.theory plan --from`` reads; samples.jsonl and samples.txt the first ``evaluate.kept_samples``
      completions of each, and the greedy one.

    Raises:
      ConfigError, RunDirectoryError, CheckpointError, VerifierFailed, Preempted, ValueError: each message says what to do.
    """
    console = console or terminal()
    if name is not None and not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise RunDirectoryError(f"--name={name[:100]!r} must be letters, digits and . _ + - only: it names one folder")
    task, objective = validate(config, num_devices=jax.device_count(), training=False)
    workdir = place(workdir)
    check_alike(flat(config) | task_identity(task) | {"--checkpoint": checkpoint, "--name": name})
    with ExitStack() as stack:
        # The policy to measure, and the directory of its evaluation.
        with lock_directory(workdir):  # nothing is written to a checkpoint while it is read
            stored = common(lambda: stored_config(workdir, config))
            setup = make_setup(config, task, objective, training=False)
            check_alphabet(config, setup, stored)
            policy = find_policy(config, setup, workdir, checkpoint, has_run=stored is not None)
            config = at_chosen_beta(config, workdir)
        identity, folder = identity_of(config, setup.task, policy), workdir / EVALUATIONS
        chosen = lambda: choose_directory(folder, config, setup.task, policy, identity, stored).name  # noqa: E731
        path = folder / (name or common(chosen))
        options: dict[str, Any] = {"changeable": CHANGEABLE, "flag": "--name=NAME"}
        directory = stack.enter_context(open_run_directory(path, identity, **options))

        # Finished before?
        if (result := load(directory / RESULT)) is not None:
            common(lambda: remove_folder(directory / BLOCKS))  # left where the last step was killed
            message = f"{directory} holds a finished evaluation, measured before with these settings; --name=NAME measures again"
            say(console, f"{message}:")
            show(console, evaluation_page.result_lines(result))
            return result

        settings = {"num_workers": config.verifier.num_workers, "deadline": config.verifier.deadline}
        pool = stack.enter_context(VerifierPool(setup.task.verify, **settings))
        signals = stack.enter_context(signals_as_flag())
        run = Run(config, setup, directory, console, pool, jax.random.key(config.seed), signals)
        before = common(lambda: reference_counts(workdir, setup, identity, stored))
        return measure_and_write(run, policy, before, dropped=len(task.examples) - len(setup.task.examples))


def measure_and_write(
    run: Run, policy: MeasuredPolicy, before: dict[str, Any] | None, *, dropped: int
) -> dict[str, Any]:
    """Measures a policy and writes the files of its evaluation, result.json last.

    Args:
      run: whose directory is that of the evaluation.
      policy: see `MeasuredPolicy`.
      before: counts of the reference on the same prompts, for the ledger; None where there are none.
      dropped: examples of the task that are too long.

    Returns:
      The content of result.json.
    """
    begun = time.monotonic()
    header = _header(run, policy, dropped)
    show(run.console, header)
    _measure(run, policy)
    result = common(lambda: _write(run, policy, before, header, dropped))
    show(run.console, evaluation_page.result_lines(result))
    files = "report.md, figure.png, samples.txt, samples.jsonl and prompts.jsonl"
    say(run.console, f"{time.monotonic() - begun:.0f} s since this start; {files} are in {run.directory}")
    return result


def _write(
    run: Run, policy: MeasuredPolicy, before: dict[str, Any] | None, header: list[tuple[str, str]], dropped: int
) -> dict[str, Any]:
    """Writes the files of an evaluation from its blocks, which are then removed; the content of result.json."""
    c, directory = run.config, run.directory
    blocks = [read_sealed(path) for path in _paths(run)]  # what an unbroken and a resumed one both read
    rows, samples = ([row for block in blocks for row in block[name]] for name in ("prompts", "samples"))
    result = evaluation_numbers.summarise(rows, confidence=c.evaluate.confidence, group_size=c.rollout.group_size) | {
        "checkpoint": policy.name,
        "model": c.model.path or "random decoder",
        "task": run.setup.task.name,
        "split": task_options(c).get("split"),
        "verifier": import_path(run.setup.task.verify),
        "chat": c.data.chat,
        "system": c.data.system,
        "dropped": dropped,
        "seed": c.seed,
        "temperature": c.rollout.temperature,
        **{key: c.rollout[key] for key in TRUNCATIONS},
        "max_completion": c.rollout.max_completion,
    }
    # The ledger, where it means what it says: a cut distribution is not the one whose KL is measured.
    is_whole = all(c.rollout[key] is None for key in TRUNCATIONS)
    if before is not None and is_whole and rows[0].get("log_ratio_sums") is not None:
        counts = np.array([row["successes"] for row in rows])
        tally = Tally(counts, result["samples"], np.array([row["log_ratio_sums"] for row in rows]))
        ledger = ledger_of_run(c, run.setup.recipe.objective, before, tally, group_size=before["group_size"])
        result |= {} if ledger is None else {"ledger": ledger.means, "reference": before["source"]}
    shown = [rows[i] for i in np.linspace(0, len(rows) - 1, min(c.evaluate.examples, len(rows))).astype(int)]
    write_jsonl(directory / "prompts.jsonl", rows)
    write_jsonl(directory / "samples.jsonl", samples)
    write_text(directory / "samples.txt", evaluation_page.samples_text(rows, samples))
    evaluation_page.plot_evaluation(directory / "figure.png", rows, result)
    write_text(directory / "report.md", evaluation_page.page(result, header, shown, samples))
    write_sealed(directory / RESULT, result)
    remove_folder(directory / BLOCKS)
    return result


def _paths(run: Run) -> list[Path]:
    """Of the blocks."""
    number = math.ceil(len(run.setup.probed) / run.config.data.prompts_per_iteration)
    return [run.directory / BLOCKS / f"{i:06}.json" for i in range(number)]


def _measure(run: Run, policy: MeasuredPolicy) -> None:
    """Measures the blocks that are missing, or were changed since they were measured."""
    probed, batch = run.setup.probed, run.config.data.prompts_per_iteration
    counts: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()

    def counted(block: dict[str, Any] | None) -> tuple[dict[str, int], dict[str, int]]:
        """(counts, verdicts) of the rows of a block."""
        rows = [] if block is None else block["prompts"]
        sums = {key: sum(row[key] for row in rows) for key in ("successes", "trials")} if rows else {}
        return sums | ({"prompts": len(rows)} if rows else {}), sum(
            (Counter(row["verdicts"]) for row in rows), Counter()
        )

    paths = _paths(run)
    measured = common(lambda: [counted(load(path)) for path in paths])  # of all, and empty where there is none
    for sums, of_block in measured:
        counts.update(sums)
        verdicts.update(of_block)
    if counts:
        say(run.console, f"resuming after {counts['prompts']:,} of {len(probed):,} prompts")
    with progress(run.console, "prompts", total=len(probed), done=counts["prompts"]) as line:
        for number, (path, (done, _)) in enumerate(zip(paths, measured, strict=True)):
            if done:
                continue
            check_preempted(run)
            block = _measure_block(run, policy, probed[number * batch : (number + 1) * batch])
            sums, of_block = counted(block)
            counts.update(sums)
            verdicts.update(of_block)
            check_verifier(run, verdicts)
            common(partial(_write_block, path, block))
            line.update(counts["prompts"], f"success {counts['successes'] / counts['trials']:.3f}")


def _measure_block(run: Run, policy: MeasuredPolicy, rows: np.ndarray) -> dict[str, Any]:
    """The lines of prompts.jsonl and samples.jsonl of some prompts."""
    c, task = run.config.evaluate, run.setup.task
    sampled = judged_completions(
        run, policy, policy.ref_params, rows, samples=c.final_samples, batch_samples=c.batch_samples
    )
    greedy = judged_completions(run, policy, None, rows, samples=1, batch_samples=1, greedy=True)
    prompts, samples = [], []
    for index, completions, (greedy_one,) in zip(rows.tolist(), sampled, greedy, strict=True):
        prompts.append(_row(task, index, completions, greedy_one))
        samples.append(_sample(task, index, 0, greedy_one, greedy=True))
        samples += [_sample(task, index, j, x) for j, x in enumerate(completions[: c.kept_samples])]
    return {"prompts": prompts, "samples": samples}


def judged_completions(
    run: Run, policy: MeasuredPolicy, ref_params: Any | None, rows: np.ndarray, **options: Any
) -> list[list[Completion]]:
    """The completions of each of some prompts; ``options`` are those of `judged_samples`."""
    key = role_key(run.base_key, "probe", policy.iteration)
    # Prompts at a time: as many as an iteration has, at most the measured ones, rounded up to a multiple of the shards.
    shards = row_shards(run.setup.mesh)
    at_once = min(run.config.data.prompts_per_iteration, len(run.setup.probed))
    options["num_prompts"] = math.ceil(at_once / shards) * shards
    by_prompt: list[list[Completion]] = [[] for _ in rows]
    for judged in judged_samples(run, policy.params, ref_params, key, rows, texts=True, **options):
        assert judged.texts is not None and judged.verdicts is not None  # an evaluation has a verifier on the host
        columns: list[Any] = [judged.rewards, judged.rollout.mask.sum(-1), judged.rollout.truncated]
        rewards, tokens, truncated = (host(x).reshape(-1).tolist() for x in columns)
        ratios = [None] * len(rewards)
        if judged.log_ratios is not None:
            ratios = host(judged.log_ratios).reshape(-1).tolist()
        group_size = len(rewards) // len(rows)
        lines = zip(judged.texts, judged.verdicts, rewards, tokens, truncated, ratios, strict=True)
        for number, line in enumerate(lines):
            by_prompt[number // group_size].append(Completion(*line))
    return by_prompt


def _row(task: Task, index: int, sampled: Sequence[Completion], greedy: Completion) -> dict[str, Any]:
    """One prompt's line of prompts.jsonl."""
    ratios = [x.log_ratio for x in sampled if x.log_ratio is not None]
    rewards = np.array([x.reward for x in sampled])
    majority = common = None
    if task.answer is not None:
        answers = [_answer(task, x) for x in sampled]
        majority = {str(k): majority_at_k(answers, rewards.tolist(), k) for k in powers_of_two(len(sampled))}
        common = Counter(a[:100] for a in answers if a is not None).most_common(3)
    return {
        "index": index,
        "prompt": task.examples[index].prompt,
        "target": task.examples[index].target,
        "successes": sum(x.reward > 0 for x in sampled),
        "trials": len(sampled),
        "greedy": greedy.reward > 0,
        "greedy_verdict": greedy.verdict,
        "verdicts": dict(sorted(Counter(x.verdict for x in sampled).items())),
        "tokens": sum(x.tokens for x in sampled),
        "truncated": sum(x.truncated for x in sampled),
        "disagreements": sum(x.reward != x.verdict.reward for x in [*sampled, greedy]),
        "kl": sum(ratios) / len(ratios) if ratios else None,
        "log_ratio_sums": log_ratio_sums(rewards[None], np.array(ratios)[None])[0].tolist() if ratios else None,
        "majority": majority,
        "answers": common,
    }


def _sample(task: Task, index: int, number: int, x: Completion, *, greedy: bool = False) -> dict[str, Any]:
    """One completion's line of samples.jsonl."""
    row = {"index": index, "sample": number, "greedy": greedy, "text": x.text, "verdict": x.verdict, "reward": x.reward}
    return row | {
        "tokens": x.tokens,
        "truncated": x.truncated,
        "answer": _answer(task, x),
    }


def _answer(task: Task, x: Completion) -> str | None:
    """The answer that a completion votes for: none where the verifier found none, or the completion was cut off."""
    if task.answer is None or x.verdict not in (Verdict.correct, Verdict.wrong):
        return None
    try:
        return task.answer(x.text)
    except Exception:  # a crash here ends nothing, as in a verifier: no answer, no vote
        return None


def _write_block(path: Path, block: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_sealed(path, block)


def _header(run: Run, policy: MeasuredPolicy, dropped: int) -> list[tuple[str, str]]:
    c, setup = run.config, run.setup
    prompts = f"{len(setup.probed):,} of {len(setup.task.examples):,} prompts"
    left_out = f"; {dropped:,} more are too long for data.max_prompt and left out" if dropped else ""
    split = task_options(c).get("split")
    cut = "".join(f", {key}={c.rollout[key]:g}" for key in TRUNCATIONS if c.rollout[key] is not None)
    sampled = f"{c.evaluate.final_samples:,} samples each at temperature {c.rollout.temperature:g}{cut}"
    return [
        *machine_lines(run),
        ("checkpoint", policy.name),
        ("task", f"{setup.task.name}{f', {split}' if split else ''}: {prompts}{left_out}"),
        ("samples", f"{sampled}, and the greedy one, at most T = {c.rollout.max_completion} tokens"),
    ]
