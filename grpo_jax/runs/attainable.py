"""What the network of a run lets through, measured under π_ref before training: R² of the pull on the score features.

    1  sample    completions of π_ref in three parts, and verify them
    2  fit       on each part, the pull y = Ω_i (r − p_i) by the scores: conjugate gradients on S w ≈ y, a few steps from 0
    3  compare   each fit with the pull, and with the other fits, on the parts that it has not seen: R² (theory/explained.py)

Only gradients and scorings of the policy are needed (train/scores.py): a step costs one of each, like half an iteration of
training on as many completions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.files import read_json, write_json
from grpo_jax.objective import Objective
from grpo_jax.report.forecast import group_weights
from grpo_jax.report.progress import progress
from grpo_jax.rollout import PromptBatch, Rollout
from grpo_jax.runs.directory import ATTAINABLE
from grpo_jax.runs.measurement import judged_samples
from grpo_jax.runs.run import Run, check_preempted, say
from grpo_jax.runs.setup import put_prompts
from grpo_jax.theory.explained import explained_share, samples_needed
from grpo_jax.train.iteration import role_key

PARTS = 3
LEAST = 4  # samples of a prompt in a part
ITERATIONS = 30  # of training, that the measurement may cost where the number of samples is not set
MOVED = 0.03  # nats by which log-probabilities change in a finite difference, root mean square


class Samples(NamedTuple):
    """Completions of some prompts, of one part.

    Attributes:
      places: [P] of the prompts among those of the regression.
      first: number of the first sample.
      prompts, rollout: P prompts with G completions each.
    """

    places: np.ndarray
    first: int
    prompts: PromptBatch
    rollout: Rollout


class Part(NamedTuple):
    """A part of the samples.

    Attributes:
      batches: what was sampled.
      pull: [Q, n] y of each sample.
    """

    batches: list[Samples]
    pull: np.ndarray


def measured_attainable(run: Run, params: Any, before: dict[str, Any]) -> dict[str, Any]:
    """R² of the network, read from the run directory; measured and stored there if it does not hold it.

    Args:
      run: see `Run`.
      params: of the reference policy.
      before: its measurement.

    Returns:
      {"reason": why it was left out}, or {"r2": {"mean", "low", "high"}, "naive", "shares" as of `explained_share`, "prompts":
      rows of the dataset, "samples" of each, "steps", "needed": samples of each that may do if these did not, else None}.
    """
    path = run.directory / ATTAINABLE
    if not path.exists():
        reason = refusal(run.config, run.setup.recipe.objective, before)
        write_json(path, {"reason": reason} if reason else _measure(run, params, before))
        check_preempted(run)
    return read_json(path)


def refusal(config: Any, objective: Objective, before: dict[str, Any]) -> str | None:
    """Why R² is not measured, or None."""
    successes, trials = np.array(before["successes"]), before["trials"]
    if config.attainable.steps == 0:
        return "attainable.steps is 0"
    if config.objective.entropy_bonus or group_weights(objective, 2) is None or objective.kl_direction != "reverse":
        return "the theory knows no p† of this objective"
    solved = np.sum((successes > 0) & (successes < trials))
    if solved < 2:
        return f"{solved} of {len(successes)} prompts were solved sometimes, and not always: R² needs two at least"
    return None


def sizes(config: Any, num_prompts: int) -> tuple[int, int]:
    """(Q, n): how many of the measured prompts, and samples of each of them in a part.

    All prompts and a third of attainable.samples; where that is not set, as many as cost `ITERATIONS` iterations, of fewer
    prompts if all would have less than `LEAST` samples. In forward passes over a completion, an iteration costs 5: one to
    sample, one of the reference, three for a gradient. Here one is to sample, and of each step two score and three are for a
    gradient; at the end four score what a fit has not seen.
    """
    c, most = config.attainable, config.evaluate.batch_samples
    if c.samples is not None:
        return num_prompts, c.samples // PARTS
    completions = config.data.prompts_per_iteration * config.rollout.group_size
    affordable = int(ITERATIONS * completions / (c.steps + 1)) // PARTS  # of a part
    chosen = min(num_prompts, max(2, affordable // LEAST))
    return chosen, min(max(LEAST, affordable // chosen), most)


def _measure(run: Run, params: Any, before: dict[str, Any]) -> dict[str, Any]:
    config, steps = run.config, run.config.attainable.steps
    Q, n = sizes(config, len(run.setup.probed))
    # Prompts that are sometimes solved come first: the others say nothing of R². The seed chooses among them.
    successes = np.array(before["successes"])
    order = np.random.default_rng((config.seed, len(successes))).permutation(len(successes))
    useful = (successes > 0) & (successes < before["trials"])
    chosen = np.sort(order[np.argsort(~useful[order], kind="stable")][:Q])
    some = "every prompt" if len(successes) == Q else f"{Q} of {len(successes)} prompts"
    say(run.console, f"measuring what the network lets through: {PARTS * n} samples of {some}")
    with progress(run.console, "score regression", total=PARTS * (steps + 1)) as line:
        parts = [_sample(run, params, before, chosen, part, n) for part in range(PARTS)]
        factors, fits = None, np.full((PARTS, PARTS, Q, n), np.nan)
        for a, part in enumerate(parts):
            direction, factors, share = _fit(run, params, part, factors, line, a * (steps + 1))
            for k in range(PARTS):
                if k != a:
                    fits[a, k] = _along(run, params, direction, parts[k])
            line.update((a + 1) * (steps + 1), f"explains {share:.2f} of its own samples")
    found = explained_share(np.stack([part.pull for part in parts]), fits, config.evaluate.confidence)
    measured = {"r2": {"mean": found.r2, "low": found.low, "high": found.high}, "naive": found.naive}
    shares = [None if np.isnan(share) else share for share in found.shares.tolist()]
    needed = samples_needed(found, PARTS * n) if found.low <= 0 else None
    measured |= {"shares": shares, "prompts": run.setup.probed[chosen].tolist()}
    return measured | {"samples": PARTS * n, "steps": steps, "needed": needed}


def _sample(run: Run, params: Any, before: dict[str, Any], chosen: np.ndarray, part: int, n: int) -> Part:
    """n completions of each of the chosen measured prompts [Q], and their pull."""
    setup, batch = run.setup, run.config.data.prompts_per_iteration
    Q, key = len(chosen), role_key(run.base_key, "attainable", part)
    batches, rewards = [], np.zeros((Q, n))
    for places in np.split(np.arange(Q), range(batch, Q, batch)):
        rows, first = setup.probed[chosen[places]], 0
        options = {"samples": n, "batch_samples": min(n, run.config.evaluate.batch_samples)}
        for judged in judged_samples(run, params, None, key, rows, **options):
            size = judged.rewards.shape[1]
            batches.append(Samples(places, first, put_prompts(setup, rows)[0], judged.rollout))
            rewards[places, first : first + size] = judged.rewards
            first += size
    # The pull at the measured p_ref, with one success and one failure more, as Ω may be infinite at 0 and 1.
    p_ref = (np.array(before["successes"])[chosen] + 1) / (before["trials"] + 2)
    weights = group_weights(setup.recipe.objective, run.config.rollout.group_size)
    assert weights is not None  # refusal
    omega = np.asarray(weights.omega(jnp.asarray(np.log(p_ref / (1 - p_ref)), jnp.float32)), float)
    return Part(batches, omega[:, None] * (rewards - rewards.mean(-1, keepdims=True)))


def _fit(run: Run, params: Any, part: Part, factors: Any | None, line: Any, done: int) -> tuple[Any, Any, float]:
    """Conjugate gradients on ‖y − S w‖² from w = 0, in white coordinates: w, the factors, and the share that it explains.

    The scores of a prompt are centred, as its pull is. The factors are made of the first part's gradients.
    """
    programs, steps = run.setup.compiled.scores, run.config.attainable.steps
    residual, total = part.pull, np.square(part.pull).sum()
    gradient, moments = _pull_back(run, params, part, residual, with_moments=factors is None)
    factors = programs.whitening(moments, params) if factors is None else factors
    white, squared = programs.whiten(factors, gradient)
    direction, fit = white, None
    for step in range(1, steps + 1):
        change = _along(run, params, direction, part)
        change = change - change.mean(-1, keepdims=True)
        size = float(squared) / np.square(change).sum()
        residual = residual - size * change
        explained = 1 - np.square(residual).sum() / total
        fit = programs.add(
            jax.tree.map(jnp.zeros_like, direction) if fit is None else fit, jnp.float32(size), direction
        )
        line.update(done + step, f"explains {explained:.2f} of its own samples")
        if step < steps:
            gradient, _ = _pull_back(run, params, part, residual)
            (white, now), before = programs.whiten(factors, gradient), squared
            direction, squared = programs.add(white, now / before, direction), now
        check_preempted(run)
    return fit, factors, explained


def _pull_back(run: Run, params: Any, part: Part, values: np.ndarray, *, with_moments: bool = False) -> tuple[Any, Any]:
    """Sᵀ values over all samples of a part, and the moments of its batches' gradients where they are wanted."""
    programs, total, moments = run.setup.compiled.scores, None, None
    for batch in part.batches:
        size = batch.rollout.mask.shape[1]
        weights = jnp.asarray(values[batch.places, batch.first : batch.first + size], jnp.float32)
        gradient = programs.pull_back(params, batch.prompts, batch.rollout, weights)
        moments = programs.moments(gradient, moments) if with_moments else None
        total = gradient if total is None else programs.add(total, jnp.float32(1.0), gradient)
        # Programs of several CPU devices may lock each other out if they are queued.
        jax.block_until_ready(total)
    return total, moments


def _along(run: Run, params: Any, direction: Any, part: Part) -> np.ndarray:
    """S direction: [Q, n], over all samples of a part."""
    programs = run.setup.compiled.scores

    def change(batch: Samples, step: float) -> np.ndarray:
        changed = programs.along(params, direction, jnp.float32(step), batch.prompts, batch.rollout)
        return np.asarray(changed, float)

    # A first guess at the step, from the sizes of both, is put right by what it does to one batch.
    guess = 1e-3 * _norm(params) / _norm(direction)
    moved = np.sqrt(np.square(change(part.batches[0], guess)).mean())
    step = MOVED / moved if moved > 0 else guess
    changes = np.zeros(part.pull.shape)
    for batch in part.batches:
        size = batch.rollout.mask.shape[1]
        changes[batch.places, batch.first : batch.first + size] = change(batch, step)
    return changes


def _norm(tree: Any) -> float:
    return float(jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree))))
