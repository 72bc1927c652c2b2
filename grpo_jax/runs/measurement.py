"""Measuring the success probability of every prompt: sampled, greedy, pass@k, and the KL paid for it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.rollout import PromptBatch, Rollout
from grpo_jax.runs.setup import Program, put_prompts
from grpo_jax.tasks import Verdict
from grpo_jax.tasks.workers import VerifierPool


class Probe(NamedTuple):
    """Counts of one measurement over the Q probed prompts.

    Attributes:
      successes: [Q] int64.  trials: of each prompt.
      kl: mean log π/π_ref over completions, an estimate of E_q KL(π‖π_ref) in nats; None without a reference.
      length: mean tokens of a completion.  truncated: share that never stopped.
      verdicts: counts by verdict, of a verifier on the host.
      examples: prompt, completion and reward of a few samples.
    """

    successes: np.ndarray
    trials: int
    kl: float | None
    length: float
    truncated: float
    verdicts: dict[str, int]
    examples: list[dict[str, Any]]


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


def probe(
    program: Program,
    pool: VerifierPool | None,
    params: Any,
    ref_params: Any | None,
    key: jax.Array,
    *,
    samples: int,
    batch_samples: int,
    batch_prompts: int,
    examples: int = 0,
    greedy: bool = False,
) -> Probe:
    """Draws ``samples`` completions of every probed prompt and counts successes.

    Sample j of a prompt has the same key whatever the batches are.

    Args:
      program, pool: of the run; the pool is None for a verifier on the device.
      params, ref_params: policy and reference; without a reference no KL is measured.
      key: of this measurement.
      samples: per prompt.
      batch_samples, batch_prompts: samples per prompt, and prompts, drawn at a time.
      examples: prompts of which four samples are kept as text.
      greedy: take the most probable tokens; use with samples=1.
    """
    rows = len(program.probed)
    shown = program.probed[np.linspace(0, rows - 1, min(examples, rows)).astype(int)]
    successes, sums = np.zeros(rows, np.int64), np.zeros(3)
    verdicts: Counter[str] = Counter()
    kept: list[dict[str, Any]] = []
    sizes = {"samples": samples, "batch_samples": batch_samples}
    for places in np.split(np.arange(rows), range(batch_prompts, rows, batch_prompts)):
        block = program.probed[places]
        for number, drawn in enumerate(_draws(program, params, ref_params, key, block, greedy=greedy, **sizes)):
            rollout, log_ratio = drawn.rollout, 0.0 if drawn.log_ratio is None else drawn.log_ratio
            rewards, counts = judge(program, pool, drawn.prompts, rollout, drawn.answers, drawn.answer_mask)
            verdicts.update(counts)
            successes[places] += rewards.sum(-1).astype(np.int64)
            lengths, truncated = rollout.mask.sum(-1), rollout.truncated
            sums += [np.asarray(x, np.float64).sum() for x in (log_ratio, lengths, truncated)]
            if number == 0 and examples:
                kept += _texts(program, rollout, rewards, block, shown)
    kl, length, truncated_share = (sums / (rows * samples)).tolist()
    return Probe(successes, samples, None if ref_params is None else kl, length, truncated_share, dict(verdicts), kept)


def draw_completions(
    program: Program,
    pool: VerifierPool,
    params: Any,
    ref_params: Any | None,
    key: jax.Array,
    block: np.ndarray,
    *,
    samples: int,
    batch_samples: int,
    batch_prompts: int,
    greedy: bool = False,
) -> list[list[Completion]]:
    """``samples`` completions of each prompt of a block, each with text and verdict; the same samples as `probe` counts.

    Args:
      program: of the run.
      pool: of the verifier on the host; one on the device says which completions are right, but not what is wrong with others.
      params, ref_params: policy and reference; without a reference there is no log-ratio.
      key: of this measurement.
      block: rows of the dataset, at most ``batch_prompts``: a smaller block is filled up with rows drawn for nothing, so that
        one compiled program serves them all.
      samples: per prompt.
      batch_samples, batch_prompts: samples per prompt, and prompts, drawn at a time.
      greedy: take the most probable tokens; use with samples=1.

    Returns:
      One list of completions per row of the block.
    """
    found: list[list[Completion]] = [[] for _ in block]
    group_size, grade, filled = min(samples, batch_samples), program.functions.grade, np.resize(block, batch_prompts)
    targets = [program.task.examples[i].target for i in block.tolist() for _ in range(group_size)]
    sizes = {"samples": samples, "batch_samples": batch_samples}
    for drawn in _draws(program, params, ref_params, key, filled, greedy=greedy, **sizes):
        graded = None if grade is None else grade(drawn.rollout, drawn.answers, drawn.answer_mask)
        arrays = drawn.rollout, drawn.log_ratio, graded
        rollout, log_ratios, grades = jax.tree.map(lambda x: np.asarray(x)[: len(block)] if x.ndim else x, arrays)
        lengths, truncated = (x.reshape(-1).tolist() for x in (rollout.mask.sum(-1), rollout.truncated))
        texts = decode(program, rollout)
        for row, (text, verdict) in enumerate(zip(texts, pool.verify(texts, targets, truncated), strict=True)):
            at = divmod(row, group_size)
            reward = verdict.reward if grades is None else float(grades[at])
            ratio = None if log_ratios is None else float(log_ratios[at])
            found[at[0]].append(Completion(text, verdict, reward, lengths[row], truncated[row], ratio))
    return found


def judge(
    program: Program,
    pool: VerifierPool | None,
    prompts: PromptBatch,
    rollout: Rollout,
    answers: jax.Array,
    answer_mask: jax.Array,
) -> tuple[np.ndarray, dict[str, int]]:
    """Rewards [P, G] float32 of a rollout and the counts of verdicts: on the device, or in the worker processes."""
    if pool is None:
        assert program.functions.grade is not None
        return np.asarray(program.functions.grade(rollout, answers, answer_mask), np.float32), {}
    texts = decode(program, rollout)
    group_size = rollout.mask.shape[1]
    targets = [program.task.examples[i].target for i in np.asarray(prompts.index) for _ in range(group_size)]
    verdicts = pool.verify(texts, targets, np.asarray(rollout.truncated).reshape(-1).tolist())
    rewards = np.array([verdict.reward for verdict in verdicts], np.float32).reshape(-1, group_size)
    return rewards, dict(Counter(str(verdict) for verdict in verdicts))


def decode(program: Program, rollout: Rollout) -> list[str]:
    """Texts of all completions, row by row, without the stop token; a stop string stays."""
    length = rollout.mask.shape[-1]
    rows, mask = (np.asarray(x).reshape(-1, length) for x in (rollout.completions, rollout.mask))
    lengths = mask.sum(-1)
    last = np.take_along_axis(rows, np.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    # The stop token is inside the mask, as the last token of a completion that was not truncated.
    lengths = lengths - np.isin(last, program.stop_ids)
    return [program.tokenizer.decode(row[:n]) for row, n in zip(rows.tolist(), lengths.tolist(), strict=True)]


class _Drawn(NamedTuple):
    prompts: PromptBatch
    answers: jax.Array
    answer_mask: jax.Array
    rollout: Rollout
    log_ratio: jax.Array | None  # [P, G] log π/π_ref


def _draws(
    program: Program,
    params: Any,
    ref_params: Any | None,
    key: jax.Array,
    block: np.ndarray,
    *,
    samples: int,
    batch_samples: int,
    greedy: bool,
) -> Iterator[_Drawn]:
    """The samples of a block of prompts, ``batch_samples`` at a time; π = π_ref has no KL, and is not asked for it."""
    prompts, answers, answer_mask = put_prompts(program, block)
    group_size = min(samples, batch_samples)
    for first in range(0, samples, group_size):
        rollout = program.functions.draw(
            params, prompts, key, group_size=group_size, greedy=greedy, first_sample=jnp.int32(first)
        )
        moved = ref_params is not None and ref_params is not params
        log_ratio = program.functions.sequence_kl(params, ref_params, prompts, rollout) if moved else None
        yield _Drawn(prompts, answers, answer_mask, rollout, log_ratio)


def _texts(
    program: Program, rollout: Rollout, rewards: np.ndarray, block: np.ndarray, shown: np.ndarray
) -> list[dict[str, Any]]:
    few = min(4, rewards.shape[1])
    places = np.flatnonzero(np.isin(block, shown))
    part = rollout._replace(completions=rollout.completions[places, :few], mask=rollout.mask[places, :few])
    texts = iter(decode(program, part))
    return [
        {
            "prompt": program.task.examples[block[place]].prompt,
            "target": program.task.examples[block[place]].target,
            "completions": [{"text": next(texts), "reward": float(rewards[place, g])} for g in range(few)],
        }
        for place in places.tolist()
    ]
