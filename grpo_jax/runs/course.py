"""What a live forecast must know of a run before its first iteration: the learning rates, and who is visited when."""

from typing import Any

import numpy as np

from grpo_jax.data import prompt_order
from grpo_jax.objective import Objective
from grpo_jax.report.live_forecast import Course, make_course, refusal
from grpo_jax.train.optimizer import learning_rates


def course_of(
    config: Any, objective: Objective, before: dict[str, Any], probed: np.ndarray, *, num_prompts: int
) -> Course | str:
    """The course of a run, or why it has no live forecast.

    Args:
      config, objective: of the run.
      before: the measurement of its reference.
      probed: rows of the dataset that are measured.
      num_prompts: of those that are trained on.
    """
    c, successes, trials = config.train, np.array(before["successes"]), before["trials"]
    reason = refusal(successes, trials, objective=objective, entropy_bonus=config.objective.entropy_bonus)
    if reason is not None:
        return reason
    batch, iterations = config.data.prompts_per_iteration, range(c.iterations)
    visits = None
    if len(probed) == num_prompts:
        visits = np.stack([prompt_order(config.seed, n, num_prompts=num_prompts, batch=batch) for n in iterations])
    return make_course(
        successes,
        trials,
        objective=objective,
        beta=config.objective.beta,
        group_size=config.rollout.group_size,
        pace=pace(config),
        visits=visits,
        prompts_per_iteration=batch,
        samples=config.evaluate.samples,
        final_samples=config.evaluate.final_samples,
    )


def pace(config: Any) -> np.ndarray:
    """[n + 1] iterations at the peak learning rate that 0 … n iterations are worth."""
    c, of = config.train, config.optimizer
    updates = c.inner_epochs * c.minibatches
    schedule = learning_rates(
        1.0, updates=c.iterations * updates, schedule=of.schedule, warmup_updates=of.warmup_updates
    )
    rates = np.broadcast_to(schedule(np.arange(c.iterations * updates)), c.iterations * updates)
    total = np.concatenate([[0.0], np.cumsum(rates, dtype=np.float64)])
    return total[::updates] / updates
