"""What the network of a run lets through, measured under π_ref before training: R² of the pull on the score features.

    1  sample    completions of π_ref in three parts, and verify them
    2  fit       on each part, the pull y = Ω_i (r − p_i) by the scores: conjugate gradients on S w ≈ y, a few steps from 0
    3  compare   each fit with the pull, and with the other fits, on the parts that it has not seen: R² (theory/explained.py)

Only gradients and scorings of the policy are needed (train/scores.py): a step costs one of each, like half an iteration of
training on as many completions. What cannot be measured is left out, with the reason; the run goes on without it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from grpo_jax.config import ATTAINABLE_LEAST as LEAST
from grpo_jax.config import ATTAINABLE_PARTS as PARTS
from grpo_jax.objective import Objective
from grpo_jax.processes import common, host, put
from grpo_jax.report.forecast import group_weights, interval_dict
from grpo_jax.report.progress import progress
from grpo_jax.rollout import PromptBatch, Rollout
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.directory import ATTAINABLE, load, save, saved_steps
from grpo_jax.runs.errors import CheckpointError
from grpo_jax.runs.measurement import counts_file, drop_counts, judged_samples
from grpo_jax.runs.run import Run, check_preempted, must_stop, say
from grpo_jax.runs.setup import put_prompts
from grpo_jax.theory.explained import explained_share, samples_needed
from grpo_jax.train.iteration import role_key
from grpo_jax.train.sharding import row_sharding

ITERATIONS = 30  # of training, that the measurement may cost where the number of samples is not set
MOVED = 0.03  # nats by which log-probabilities change in a finite difference, root mean square
NEAR, FAR = 3.0, 30.0  # factors of it that are good enough, and too much for one batch
ROUNDS = 10  # of looking for such a difference
GRADIENTS = 4  # at least, of which the white coordinates are made


class Undetermined(Exception):
    """R² cannot be found; the message says why."""


class Samples(NamedTuple):
    """Completions of some prompts, of one part.

    Attributes:
      places: [P] of the prompts among those of the regression.
      samples: which of their samples.
      prompts, rollout: P prompts with G completions each.
    """

    places: np.ndarray
    samples: slice
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


class Fit(NamedTuple):
    """A least-squares fit of a part's pull by the scores, ‖y − S w‖², after some steps of conjugate gradients from w = 0.

    Attributes:
      step: how many.
      w: the fit, in white coordinates, like the parameters.
      direction: of the next step.
      squared: gᵀ M g of the gradient that the direction was made from.
      residual: [Q, n] y − S w.
    """

    step: int
    w: Any
    direction: Any
    squared: jax.Array
    residual: np.ndarray

    def share(self, part: Part) -> float:
        """Of the part's pull, that it explains."""
        return float(1 - np.square(self.residual).sum() / np.square(part.pull).sum())


def measured_attainable(run: Run, params: Any, before: dict[str, Any]) -> dict[str, Any]:
    """R² of the network, read from the run directory; measured and stored there if it does not hold it, or in another way.

    Args:
      run: see `Run`.
      params: of the reference policy.
      before: its measurement.

    Returns:
      {"reason": why it was left out}, or {"r2": {"mean", "low", "high"}, "naive", "shares" as of `explained_share`, "prompts":
      rows of the dataset, "of": how many prompts share the network, "samples" of each, "steps", "needed": samples of each that
      may do if these did not, else None}; both with "asked", the settings that asked for it.
    """
    path, c = run.directory / ATTAINABLE, run.config
    asked = {"samples": c.attainable.samples, "steps": c.attainable.steps, "confidence": c.evaluate.confidence}
    stored = load(path)
    if stored is None or stored["asked"] != asked:
        reason = refusal(c, run.setup.recipe.objective, before)
        try:
            stored = {"reason": reason} if reason else _measure(run, params, before, asked)
        except Undetermined as undetermined:
            stored = {"reason": str(undetermined)}
        stored = save(path, stored | {"asked": asked})
        drop_counts(run)
        check_preempted(run)
    return stored


def refusal(config: Any, objective: Objective, before: dict[str, Any]) -> str | None:
    """Why R² is not measured, or None."""
    successes, trials = np.array(before["successes"]), before["trials"]
    if config.attainable.steps == 0:
        return "attainable.steps is 0"
    if config.objective.entropy_bonus or group_weights(objective, 2) is None or objective.kl_direction != "reverse":
        return "the theory knows no p† of this objective"
    solved = np.sum((successes > 0) & (successes < trials))
    if solved < 2:
        return f"{solved} of {len(successes)} prompts were solved sometimes, and not always; its interval takes two at least"
    return None


def sizes(config: Any, num_prompts: int) -> tuple[int, int]:
    """(Q, n): how many of the measured prompts, and samples of each of them in a part.

    All prompts and a third of attainable.samples; where that is not set, as many as cost `ITERATIONS` iterations, of fewer
    prompts if all would have less than `LEAST` samples. In forward passes over a completion, an iteration costs 5: one to
    sample, one of the reference, three for a gradient. Here one is to sample, four are for the white coordinates, of each step
    two score and three are for a gradient; at the end four score what a fit has not seen.
    """
    c, batch = config.attainable, config.evaluate.batch_samples
    if c.samples is not None:
        return num_prompts, c.samples // PARTS
    completions = config.data.prompts_per_iteration * config.rollout.group_size
    affordable = int(ITERATIONS * 5 * completions / (5 * c.steps + 9)) // PARTS  # of a part
    chosen = min(num_prompts, max(2, affordable // LEAST))
    n = max(LEAST, affordable // chosen)
    if n > batch:  # whole batches, and so many that there are `LEAST`
        n = max(n // batch, -(-LEAST // batch)) * batch
    return chosen, n


def _measure(run: Run, params: Any, before: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    config, steps, probed = run.config, run.config.attainable.steps, run.setup.probed
    Q, n = sizes(config, len(probed))
    chosen = np.sort(np.random.default_rng((config.seed, len(probed))).permutation(len(probed))[:Q])
    some = "every prompt" if len(probed) == Q else f"{Q} of {len(probed)} prompts"
    say(run.console, f"measuring what the network lets through: {PARTS * n} samples of {some}")
    kept = counts_file(run, params, asked).with_suffix("")
    fits, fit = np.full((PARTS, PARTS, Q, n), np.nan), None  # fits: [a, k] of part k, by the fit on part a
    with progress(run.console, "score regression", total=PARTS * (steps + 1)) as line:
        parts = [_sample(run, params, before, chosen, part, n) for part in range(PARTS)]
        if not all(part.pull.any() for part in parts):
            raise Undetermined(
                f"with {PARTS * n} samples of {some} there is a part in which no prompt both succeeded and failed; more may do "
                "(attainable.samples)"
            )
        scores = Scores(run, params)
        factors, begun = scores.white_coordinates(parts[0]), 0
        if (so_far := _kept(kept, run.setup.trained)) is not None:
            begun, fit, scores.length = so_far["part"], so_far["fit"], so_far["length"]
            fits[:begun] = np.array(so_far["fits"]).reshape(fits[:begun].shape)
        for a in range(begun, PARTS):
            fit = fit or _begin(scores, parts[a], factors)
            while fit.step < steps:
                fit = _advance(scores, parts[a], factors, fit)
                line.update(a * (steps + 1) + fit.step, f"explains {fit.share(parts[a]):.2f} of its own samples")
                if must_stop(run):
                    _keep(kept, a, fit, fits[:a], scores.length)
                    check_preempted(run)
            for k in range(PARTS):
                if k != a:
                    fits[a, k] = scores.along(fit.w, parts[k])
            line.update((a + 1) * (steps + 1), f"explains {fit.share(parts[a]):.2f} of its own samples")
            fit = None
    found = explained_share(np.stack([part.pull for part in parts]), fits, config.evaluate.confidence)
    measured = {"r2": interval_dict(found.r2, found.low, found.high), "naive": found.naive}
    measured |= {
        "shares": found.shares.tolist(),
        "prompts": probed[chosen].tolist(),
        "of": len(run.setup.visited),
    }
    needed = samples_needed(found, PARTS * n) if found.low <= 0 else None
    return measured | {"samples": PARTS * n, "steps": steps, "needed": needed}


def _sample(run: Run, params: Any, before: dict[str, Any], chosen: np.ndarray, part: int, n: int) -> Part:
    """n completions of each of the chosen measured prompts [Q], and their pull."""
    setup, batch = run.setup, run.config.data.prompts_per_iteration
    Q, key = len(chosen), role_key(run.base_key, "attainable", part)
    batches, rewards = [], np.zeros((Q, n))
    for places in np.split(np.arange(Q), range(batch, Q, batch)):
        rows, first = setup.probed[chosen[places]], 0
        prompts = put_prompts(setup, rows)[0]
        options = {"samples": n, "batch_samples": min(n, run.config.evaluate.batch_samples)}
        for judged in judged_samples(run, params, None, key, rows, **options):
            samples = slice(first, first := first + judged.rewards.shape[1])
            batches.append(Samples(places, samples, prompts, judged.rollout))
            rewards[places, samples] = judged.rewards
    # The pull at the measured p_ref, with one success and one failure more, as Ω may be infinite at 0 and 1.
    p_ref = (np.array(before["successes"])[chosen] + 1) / (before["trials"] + 2)
    weights = group_weights(setup.recipe.objective, run.config.rollout.group_size)
    assert weights is not None  # refusal
    omega = np.asarray(weights.omega(jnp.asarray(np.log(p_ref / (1 - p_ref)), jnp.float32)), float)
    return Part(batches, omega[:, None] * (rewards - rewards.mean(-1, keepdims=True)))


def _begin(scores: "Scores", part: Part, factors: Any) -> Fit:
    direction, squared = scores.run.setup.compiled.scores.whiten(factors, scores.pull_back(part, part.pull))
    return Fit(0, jax.tree.map(jnp.zeros_like, direction), direction, squared, part.pull)


def _advance(scores: "Scores", part: Part, factors: Any, fit: Fit) -> Fit:
    """One step of conjugate gradients; where nothing is left to explain, or can be, the last.

    The scores of a prompt are centred, as its pull is.
    """
    programs, steps = scores.run.setup.compiled.scores, scores.run.config.attainable.steps
    change = scores.along(fit.direction, part)
    change = change - change.mean(-1, keepdims=True)
    if not change.any():
        return fit._replace(step=steps)
    size = float(fit.squared) / np.square(change).sum()
    residual = fit.residual - size * change
    w, direction, squared, step = (
        programs.add(fit.w, jnp.float32(size), fit.direction),
        fit.direction,
        fit.squared,
        fit.step + 1,
    )
    if step < steps:
        white, now = programs.whiten(factors, scores.pull_back(part, residual))
        direction, squared = programs.add(white, now / squared, direction), now
    return Fit(step, w, direction, squared, residual)


def _keep(folder: Path, part: int, fit: Fit, fits: np.ndarray, length: float) -> None:
    """Stores how far the regression has come: the fit on this part, and what those on the parts before it say of the others."""
    checkpoints = Checkpoints(folder, keep=1)
    numbers = {
        "step": fit.step,
        "squared": float(fit.squared),
        "residual": fit.residual.tolist(),
        "length": float(length),
    }
    try:
        step = part * 1_000_000 + fit.step
        checkpoints.save(
            step,
            {"w": fit.w, "direction": fit.direction},
            numbers | {"part": part, "fits": np.nan_to_num(fits).tolist()},
        )
    finally:
        checkpoints.close()


def _kept(folder: Path, shapes: Any) -> dict[str, Any] | None:
    """What `_keep` stored; None for nothing."""
    if not common(lambda: saved_steps(folder)):
        return None
    checkpoints = Checkpoints(folder, keep=1)
    try:
        found = checkpoints.restore_latest({"w": shapes, "direction": shapes})
    except CheckpointError as error:  # it is measured from the start
        logging.warning("%s", error)
        return None
    finally:
        checkpoints.close()
    if found is None:
        return None
    _, trees, meta = found
    fit = Fit(meta["step"], trees["w"], trees["direction"], jnp.float32(meta["squared"]), np.array(meta["residual"]))
    return meta | {"fit": fit}


class Scores:
    """The scores S of a policy in what is trained of it, as products with them over all samples of a part."""

    def __init__(self, run: Run, params: Any) -> None:
        self.run, self.params, self.trained = run, params, run.setup.begin(params, run.config.seed)
        self.programs = run.setup.compiled.scores
        self.length = 1e-4 * _norm(self.trained)  # of the last step along a direction; the first is a guess

    def white_coordinates(self, part: Part) -> Any:
        """The factors of `whiten`, from gradients with random weights: what is to be found has no part in them."""
        moments, random = None, np.random.default_rng(self.run.config.seed)
        for _ in range(-(-GRADIENTS // len(part.batches))):
            weights = random.choice([-1.0, 1.0], part.pull.shape)
            weights -= weights.mean(-1, keepdims=True)
            for batch in part.batches:
                moments = self.programs.moments(self._pull_back(batch, weights), moments)
                jax.block_until_ready(moments)
        return self.programs.whitening(moments, self.trained)

    def pull_back(self, part: Part, values: np.ndarray) -> Any:
        """Sᵀ values, for values [Q, n]."""
        total = None
        for batch in part.batches:
            gradient = self._pull_back(batch, values)
            total = gradient if total is None else self.programs.add(total, jnp.float32(1.0), gradient)
            # Programs of several CPU devices may lock each other out if they are queued.
            jax.block_until_ready(total)
        return total

    def along(self, direction: Any, part: Part) -> np.ndarray:
        """S direction: [Q, n].

        The step is the last one's, made longer or shorter until log-probabilities move by about `MOVED`.

        Raises:
          Undetermined: there is no such step.
        """
        size = _norm(direction)
        changes = np.zeros(part.pull.shape)
        if not size > 0:
            return changes
        for _ in range(ROUNDS):
            step, squares, count = self.length / size, 0.0, 0
            for batch in part.batches:
                arguments = jnp.float32(step), batch.prompts, batch.rollout
                change = host(self.programs.along(self.trained, self.params, direction, *arguments)).astype(float)
                changes[batch.places, batch.samples] = change
                squares, count = squares + np.square(change).sum(), count + change.size
                moved = step * np.sqrt(squares / count)
                if not MOVED / FAR <= moved <= FAR * MOVED:
                    break  # the other batches would not make it right
            if MOVED / NEAR <= moved <= NEAR * MOVED:
                return changes
            self.length *= np.clip(MOVED / moved, 1e-3, 1e3) if np.isfinite(moved) and moved > 0 else 1e-2
        raise Undetermined("no step along the parameters moves log-probabilities by some hundredths of a nat")

    def _pull_back(self, batch: Samples, values: np.ndarray) -> Any:
        weights = values[batch.places, batch.samples].astype(np.float32)
        weights = put(weights, row_sharding(self.run.setup.mesh, len(weights)))
        return self.programs.pull_back(self.trained, self.params, batch.prompts, batch.rollout, weights)


def _norm(tree: Any) -> float:
    return float(jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree))))
