"""Measuring a policy: completions of chosen prompts, judged, and what is counted of them.

There is one way to sample and judge, `judged_samples`. The success probability before, during and after training is counted
from it (`measure`), and an evaluation keeps its texts and verdicts (`grpo_jax.runs.evaluation`). Sample j of a prompt has
a random key of its own, so it is the same sample however the work is cut into batches.

Dimension key: see grpo_jax.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.processes import common, everyone, host, moved, of_rows, own_rows, together
from grpo_jax.report.ledger import POWERS, Tally, log_ratio_sums
from grpo_jax.rollout import Rollout
from grpo_jax.runs.checkpoints import digest
from grpo_jax.runs.completions import first_completions
from grpo_jax.runs.directory import load, save
from grpo_jax.runs.errors import VerifierFailed
from grpo_jax.runs.run import Run, check_preempted, must_stop, say
from grpo_jax.runs.setup import Setup, put_prompts
from grpo_jax.storage import names, remove_folder
from grpo_jax.tasks import Verdict
from grpo_jax.tasks.workers import VerifierPool
from grpo_jax.train.iteration import role_key

COUNTS = "measuring-"  # how the names begin of files and folders that keep what a measurement has counted


class Judged(NamedTuple):
    """Completions of P prompts, and what the verifiers say of them.

    Attributes:
      rollout: P prompts with G completions each.
      rewards: [P, G] float32, as training gives them: of the verifier on the device where there is one.
      texts, verdicts: row by row, of the verifier on the host; None without one, and texts where they are not asked for.
      log_ratios: [P, G] log π/π_ref in nats; None without a reference, and where it is the policy itself.
      token_log_ratios: [P, G, T] the same of each token.
    """

    rollout: Rollout
    rewards: np.ndarray
    texts: list[str] | None
    verdicts: list[Verdict] | None
    log_ratios: jax.Array | None = None
    token_log_ratios: jax.Array | None = None

    def verdict_counts(self) -> Counter[str]:
        """How often each verdict was given; empty without a verifier on the host."""
        return Counter(str(verdict) for verdict in self.verdicts or [])


class Measurement(NamedTuple):
    """Counts over the Q measured prompts.

    Attributes:
      successes: [Q] int64.  trials: of each prompt.
      kl: mean log π/π_ref over completions, an estimate of E_q KL(π‖π_ref) in nats; None without a reference.
      log_ratio_sums: [Q, 2, 4], see `Tally`; None without a reference.
      length: mean tokens of a completion.  truncated: share that never stopped.
      verdicts: counts by verdict, of a verifier on the host.
      examples: prompt, completion and reward of a few samples.
      completions: token by token, of the rows that are asked for, see `first_completions`.
    """

    successes: np.ndarray
    trials: int
    kl: float | None
    length: float
    truncated: float
    verdicts: dict[str, int]
    examples: list[dict[str, Any]]
    log_ratio_sums: np.ndarray | None = None
    completions: Sequence[dict[str, Any]] = ()

    def record(self, greedy: float | None) -> dict[str, Any]:
        """As JSON, with the accuracy of the greedy completions."""
        names = [name for name in self._fields if name not in ("log_ratio_sums", "completions")]
        return {name: getattr(self, name) for name in names} | {"successes": self.successes.tolist(), "greedy": greedy}

    def tally(self) -> Tally | None:
        """What the ledger is made from; None without a reference."""
        return None if self.log_ratio_sums is None else Tally(self.successes, self.trials, self.log_ratio_sums)


def measure(
    run: Run,
    params: Any,
    ref_params: Any,
    iteration: int,
    *,
    role: str = "probe",
    samples: int | None = None,
    batch_samples: int | None = None,
    examples: int = 0,
    kept: Sequence[int] = (),
    greedy: bool = False,
    may_stop: bool = False,
) -> Measurement:
    """Counts the successes of every measured prompt.

    Args:
      run: see `Run`.
      params, ref_params: policy and reference; without a reference no KL is measured.
      iteration: after which it is measured (or the step of the warm start); with ``role`` it decides the random numbers.
      role: see `role_key`.
      samples: per prompt; ``evaluate.samples`` by default.
      batch_samples: per prompt, sampled at a time; those of the config by default.
      examples: prompts of which four samples are kept as text.
      kept: rows of the dataset of which the first completions are kept token by token.
      greedy: take the most probable tokens; use with samples=1.
      may_stop: raise `Preempted` between two batches once a signal has arrived; what was counted, then and in the end, is kept
        in the run directory until `drop_counts`, and the next start goes on from it.
    """
    setup, c = run.setup, run.config.evaluate
    samples, batch_samples = samples or c.samples, batch_samples or c.batch_samples
    key, num_prompts = role_key(run.base_key, role, iteration), len(setup.probed)
    shown = setup.probed[np.linspace(0, num_prompts - 1, min(examples, num_prompts)).astype(int)]

    successes, sums = np.zeros(num_prompts, np.int64), np.zeros(3)  # sums: log-ratios, tokens, truncated completions
    powers = np.zeros((num_prompts, 2, POWERS))  # sums of powers of the log-ratios of failures and of successes
    verdicts: Counter[str] = Counter()
    texts: list[dict[str, Any]] = []
    completions: list[dict[str, Any]] = []
    batch, each = run.config.data.prompts_per_iteration, math.ceil(samples / batch_samples)

    # What an earlier start has counted of the same measurement.
    of = {"role": role, "iteration": iteration, "samples": [samples, batch_samples], "kept": len(kept)}
    counted = counts_file(run, params, of) if may_stop else None
    done, so_far = 0, None if counted is None else load(counted)
    if so_far is not None:
        done, texts, completions = so_far["batches"], so_far["texts"], so_far["completions"]
        successes, sums, powers = (np.array(so_far[name]) for name in ("successes", "sums", "powers"))
        verdicts.update(so_far["verdicts"])

    def keep(path: Path) -> None:
        counts = {"successes": successes.tolist(), "sums": sums.tolist(), "powers": powers.tolist()}
        save(path, counts | {"verdicts": dict(verdicts), "texts": texts, "completions": completions, "batches": done})

    for number, places in enumerate(np.split(np.arange(num_prompts), range(batch, num_prompts, batch))):
        rows, skipped = setup.probed[places], min(max(done - number * each, 0), each)
        batches = judged_samples(
            run,
            params,
            ref_params,
            key,
            rows,
            samples=samples,
            batch_samples=batch_samples,
            greedy=greedy,
            skip=skipped,
        )
        for of_these, judged in enumerate(batches, start=skipped):
            rollout, against_itself = judged.rollout, np.zeros_like(judged.rewards)
            log_ratios = against_itself if judged.log_ratios is None else host(judged.log_ratios)
            successes[places] += judged.rewards.sum(-1).astype(np.int64)
            powers[places] += log_ratio_sums(judged.rewards, log_ratios)
            summed = log_ratios, host(rollout.mask.sum(-1)), host(rollout.truncated)
            sums += [x.astype(np.float64).sum() for x in summed]
            verdicts.update(judged.verdict_counts())
            if of_these == 0 and examples:
                texts += _examples(setup, judged, rows, shown)
            if of_these == 0 and len(kept):
                completions += first_completions(setup, judged, rows, kept)
            moved()
            done = number * each + of_these + 1
            if counted is not None and must_stop(run):
                keep(counted)
                check_preempted(run)
    if counted is not None:
        keep(counted)
    kl, length, truncated = (sums / (num_prompts * samples)).tolist()
    measured_kl = (None, None) if ref_params is None else (kl, powers)
    counts = successes, samples, measured_kl[0], length, truncated, dict(verdicts), texts
    return Measurement(*counts, log_ratio_sums=measured_kl[1], completions=completions)


def measure_in_full(
    run: Run, params: Any, ref_params: Any, iteration: int, *, kept: Sequence[int] = ()
) -> tuple[dict[str, Any], Tally | None]:
    """The measurement before and after training, as JSON, with what its ledger is made from.

    It has per-prompt successes, greedy accuracy, KL, lengths and samples, the "completions" of rows that are ``kept``, and the
    successes of prompts that are "held_out", where there are such.
    """
    c = run.config.evaluate
    say(run.console, f"measuring the success probability: {c.final_samples} samples of every prompt")
    options: dict[str, Any] = {"samples": c.final_samples, "examples": c.examples, "kept": kept, "may_stop": True}
    sampled = measure(run, params, ref_params, iteration, **options)
    check_verifier(run, sampled.verdicts)
    greedy = measure(run, params, ref_params, iteration, samples=1, greedy=True)
    measured = sampled.record(float(greedy.successes.mean()))
    measured |= {"completions": sampled.completions} if len(kept) else {}
    if len(run.setup.held_out):
        measured |= {"held_out": measure_held_out(run, params, iteration, samples=c.final_samples)}
    return measured, sampled.tally()


def measure_held_out(run: Run, params: Any, iteration: int, *, samples: int | None = None) -> dict[str, Any]:
    """Successes of the prompts that are held out: {"successes" of each, "trials"}.

    Args:
      run, params, iteration: as for `measure`.
      samples: of each, of a measurement that may be stopped and goes on; None: ``evaluate.samples``.
    """
    apart = run._replace(setup=run.setup._replace(probed=run.setup.held_out))
    counted = measure(apart, params, None, iteration, role="held_out", samples=samples, may_stop=samples is not None)
    return {"successes": counted.successes.tolist(), "trials": counted.trials}


def completions_before(run: Run, params: Any, ref_params: Any, kept: Sequence[int]) -> list[dict[str, Any]]:
    """The first completions that the reference's measurement drew of some rows, with log π/π_ref of the policy ``params``.

    Drawn again from the same random keys, in the programs of the measurements.
    """
    setup, c = run.setup, run.config.evaluate
    options: dict[str, Any] = {"samples": min(c.final_samples, c.batch_samples), "batch_samples": c.batch_samples}
    options["num_prompts"] = min(run.config.data.prompts_per_iteration, len(setup.probed))
    key, rows, completions = role_key(run.base_key, "probe", 0), np.asarray(kept, int), []
    for some in np.split(rows, range(options["num_prompts"], len(rows), options["num_prompts"])) if len(rows) else ():
        (judged,) = judged_samples(run, ref_params, params, key, some, **options)
        completions += first_completions(setup, judged, some, kept, sign=-1)
        moved()
    return completions


def counts_file(run: Run, params: Any, of: dict[str, Any]) -> Path:
    """The file that keeps what a measurement has counted, named by the policy and by what else it is a measurement ``of``."""
    what = json.dumps(of | {"policy": digest(params)}, sort_keys=True)
    return run.directory / f"{COUNTS}{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def drop_counts(run: Run) -> None:
    """Removes what measurements have kept, once what is made of them is stored."""

    def drop() -> None:
        for name in names(run.directory):
            if name.startswith(COUNTS):
                path = run.directory / name
                path.unlink(missing_ok=True) if name.endswith(".json") else remove_folder(path)

    common(drop)


def check_verifier(run: Run, verdicts: dict[str, int]) -> None:
    """Raises VerifierFailed where no completion was judged, so that a broken verifier is not reported as a success of 0."""
    failures = {name: count for name, count in verdicts.items() if name in (Verdict.crash, Verdict.timeout)}
    if run.pool is not None and failures and len(failures) == len(verdicts):
        counts = ", ".join(f"{name} {count:,}" for name, count in failures.items())
        reason = f"; the first crash: {run.pool.first_crash}" if run.pool.first_crash else ""
        raise VerifierFailed(f"the verifier judged none of {sum(failures.values()):,} completions ({counts}){reason}")


def judged_samples(
    run: Run,
    params: Any,
    ref_params: Any,
    key: jax.Array,
    rows: np.ndarray,
    *,
    samples: int,
    batch_samples: int,
    greedy: bool = False,
    num_prompts: int | None = None,
    texts: bool = False,
    skip: int = 0,
) -> Iterator[Judged]:
    """``samples`` completions of each prompt, ``batch_samples`` at a time.

    Args:
      run: see `Run`.
      params, ref_params: policy and reference; without a reference there are no log-ratios.
      key: of the measurement.
      rows: of the dataset.
      samples, batch_samples: per prompt.
      greedy: take the most probable tokens; use with samples=1.
      num_prompts: the batch is filled up to so many prompts, so that a smaller last batch is not compiled anew; what was added is
        dropped.
      texts: whether they are kept.
      skip: batches that are left out at the beginning.
    """
    setup = run.setup
    prompts, answers, answer_mask = put_prompts(setup, rows if num_prompts is None else np.resize(rows, num_prompts))
    group_size = min(samples, batch_samples)
    measures_kl = ref_params is not None and ref_params is not params  # measured against itself, the KL is 0
    for first in range(skip * group_size, samples, group_size):
        options = {"group_size": group_size, "greedy": greedy, "first_sample": jnp.int32(first)}
        rollout = setup.compiled.sample_probe(params, prompts, key, **options)  # [P, G, T]
        ratios = setup.compiled.log_ratios(params, ref_params, prompts, rollout) if measures_kl else (None, None)
        arrays = rollout, answers, answer_mask, *ratios
        if len(rows) < len(prompts.index):
            arrays = jax.tree.map(lambda x: x[: len(rows)] if x.ndim else x, arrays)
        judged = judge(setup, run.pool, rows, *arrays[:3], texts=texts)
        yield judged._replace(log_ratios=arrays[3], token_log_ratios=arrays[4])


def judge(
    setup: Setup,
    pool: VerifierPool | None,
    rows: np.ndarray,
    rollout: Rollout,
    answers: jax.Array,
    answer_mask: jax.Array,
    *,
    texts: bool = False,
) -> Judged:
    """The rewards of a rollout: on the device where the task verifies there, else in the worker processes.

    Each process of the run judges the rows of its own devices, and all learn the verdicts.

    Args:
      setup: of the run.
      pool: worker processes, which judge the texts; None where the verifier on the device is enough.
      rows: [P] of the dataset.
      rollout, answers, answer_mask: of these rows.
      texts: whether they are kept.
    """
    verify, group_size = setup.compiled.verify, rollout.mask.shape[1]
    rewards = None if verify is None else host(verify(rollout, answers, answer_mask)).astype(np.float32)
    if pool is None:
        assert rewards is not None
        return Judged(rollout, rewards, None, None)

    own = own_rows(rollout.mask)

    def judge_own() -> list[tuple[str, str]]:
        """(text, verdict) of the completions of the own rows."""
        completions, mask, truncated = (of_rows(x, own) for x in (rollout.completions, rollout.mask, rollout.truncated))
        written = decode(setup, completions, mask)
        targets = [setup.task.examples[i].target for i in rows[own].tolist() for _ in range(group_size)]
        verdicts = pool.verify(written, targets, truncated.reshape(-1).tolist())
        return list(zip(written, verdicts, strict=True))

    judged = together(judge_own)
    by_row: dict[int, list[Any]] = {}
    for numbers, pairs in everyone([own.tolist(), judged if texts else [(None, verdict) for _, verdict in judged]]):
        by_row |= {row: pairs[i * group_size : (i + 1) * group_size] for i, row in enumerate(numbers)}
    in_order = [pair for row in sorted(by_row) for pair in by_row[row]]
    verdicts = [Verdict(verdict) for _, verdict in in_order]
    if rewards is None:
        rewards = np.array([verdict.reward for verdict in verdicts], np.float32).reshape(-1, group_size)
    return Judged(rollout, rewards, [text for text, _ in in_order] if texts else None, verdicts)


def decode(setup: Setup, completions: np.ndarray, mask: np.ndarray) -> list[str]:
    """Texts of completions [..., T], row by row, without the stop token; a stop string stays."""
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (completions, mask))  # [B, T]
    lengths = mask.sum(-1)  # [B]
    last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]  # [B]
    # The stop token is inside the mask, as the last token of a completion that was not truncated.
    lengths = lengths - np.isin(last, setup.stop_ids)
    return [setup.tokenizer.decode(row[:n]) for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def _examples(setup: Setup, judged: Judged, rows: np.ndarray, shown: np.ndarray) -> list[dict[str, Any]]:
    """Prompt, target and the first four completions of those rows that are shown."""
    few = min(4, judged.rewards.shape[1])
    places, rollout = np.flatnonzero(np.isin(rows, shown)), judged.rollout
    texts = iter(decode(setup, *(host(x[places, :few]) for x in (rollout.completions, rollout.mask))))
    return [
        {
            "prompt": setup.task.examples[rows[place]].prompt,
            "target": setup.task.examples[rows[place]].target,
            "completions": [{"text": next(texts), "reward": float(judged.rewards[place, g])} for g in range(few)],
        }
        for place in places.tolist()
    ]
