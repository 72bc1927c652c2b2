"""What a run says of itself before its first iteration: what it is, what was measured, and where it should end."""

import json
from typing import Any

import numpy as np

from grpo_jax import theory
from grpo_jax.objective import Objective, beta_effective
from grpo_jax.report.monitor import mean_with_interval
from grpo_jax.report.scores import dead_share, success_bound
from grpo_jax.report.summary import verdict_counts


def header(config: Any, objective: Objective, *, num_prompts: int, task: str) -> list[tuple[str, str]]:
    """What a run says of its task and objective before it starts: (label, text) lines."""
    group_size = config.rollout.group_size
    # What the objective does not set has no say in it.
    choices = {k: v for k in objective.__dataclass_fields__ if (v := getattr(objective, k)) is not None}

    def weight(label: str, beta: float) -> tuple[str, str]:
        effective = beta_effective(beta, objective=objective, group_size=group_size)
        return label, f"{beta:g} (effective, with population statistics: {effective:.4g})"

    lines = [
        ("task", f"{task}, {num_prompts} prompts, G = {group_size}, T = {config.rollout.max_completion}"),
        ("objective", f"{config.objective.name} {json.dumps(choices)}"),
        ("fixed point", objective.fixed_point),
    ]
    if objective.holds_to_reference:
        lines.append(weight("β", config.objective.beta))
    if objective.holds_to_previous:
        lines.append(weight("β_mirror", config.objective.beta_mirror))
    if config.objective.entropy_bonus:
        bonus = f"{config.objective.entropy_bonus:g}: moves the end away from the fixed point, so no p* is predicted"
        lines.append(("entropy bonus", bonus))
    return lines


def outlook(
    before: dict[str, Any], forecast: theory.Prediction | None, *, confidence: float, group_size: int
) -> list[tuple[str, str]]:
    """What is known before the first iteration: the measured p_ref, how many groups teach nothing, and where the objective
    should take p_ref."""

    def text(mean: float, low: float, high: float) -> str:
        return f"{mean:.4f}   {confidence:.0%} [{low:.4f}, {high:.4f}]"

    successes, trials = np.array(before["successes"]), before["trials"]
    never = f"{np.sum(successes == 0)} of {len(successes)} prompts never solved in {trials} samples each"
    lines = [
        ("measured p_ref", text(*mean_with_interval(successes, trials, confidence))),
        (f"dead groups at G = {group_size}", f"{dead_share(successes, trials, group_size):.1%} expected; {never}"),
    ]
    if before["verdicts"]:
        lines.append(("verdicts", verdict_counts(before["verdicts"])))
    if not successes.any():
        bound = success_bound(0, len(successes) * trials, confidence)
        lines.append(
            ("in words", f"no completion succeeded, so p_ref is below {bound:.2g} and GRPO has nothing to learn from")
        )
    if forecast is not None:
        lines += [
            ("predicted p*", text(forecast.mean_p_star, forecast.mean_p_star_low, forecast.mean_p_star_high)),
            ("predicted KL, nats", f"{forecast.mean_kl:.4f}"),
        ]
    return lines
