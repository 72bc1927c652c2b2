"""A run in words: what it says before its first iteration, the table at its end, and report.md with figure and samples."""

import json
from typing import Any

import numpy as np

from grpo_jax import theory
from grpo_jax.objective import Objective, beta_effective
from grpo_jax.report.evaluation_numbers import dead_share, success_bound
from grpo_jax.report.forecast import mean_with_interval
from grpo_jax.report.markdown import inline


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


def table(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(quantity, value) lines of a result."""
    percent = f"{result['confidence']:.0%}"

    def interval(x: dict[str, float]) -> str:
        return f"{x['mean']:.4f}   {percent} [{x['low']:.4f}, {x['high']:.4f}]"

    before, after = result["before"], result["after"]
    solved = result["p_ref"]["mean"] > 0 or result["p_final"]["mean"] > 0
    lines = [("p_ref", interval(result["p_ref"])), ("final p̂", interval(result["p_final"]))]
    if "p_star" in result:
        difference = result["difference"]
        lines += [
            ("predicted p*", interval(result["p_star"])),
            (
                "p̂ − p*",
                f"{difference['mean']:+.4f}   prediction interval ±{difference['half_width']:.4f}: "
                + ("inside" if difference["inside"] else "OUTSIDE")
                if solved
                else "no test: nothing was solved",
            ),
            (
                "per prompt, rms p̂ − p*",
                f"{result['rms']['measured']:.4f}   {result['rms']['noise']:.4f} from sampling alone",
            ),
        ]
        if result["folds"]:
            lines.append(("prompts across a fold", f"{result['folds']}   their p* may be either branch's"))
        lines.append(("KL(π‖π_ref), nats", f"{after['kl']:.4f} measured   {result['kl_predicted']:.4f} predicted"))
    else:
        lines.append(
            ("KL(π‖π_ref), nats", f"{after['kl']:.4f} measured   no prediction of p*: see the fixed point above")
        )
    for name, key in (("greedy accuracy", "greedy"), ("sampled accuracy, pass@1", "pass@1"), ("pass@8", "pass@8")):
        lines.append((name, f"{before[key]:.4f} before   {after[key]:.4f} after"))
    lines.append(("completion length, tokens", f"{before['length']:.1f} before   {after['length']:.1f} after"))
    lines.append(("truncated", f"{before['truncated']:.1%} before   {after['truncated']:.1%} after"))
    if after["verdicts"]:
        lines.append(("verdicts after", verdict_counts(after["verdicts"])))
    if "p_star" in result and result["difference"]["mean"] < 0 and not result["difference"]["inside"]:
        lines.append(("in words", _short_of(after["kl"] / max(result["kl_predicted"], 1e-9))))
    return lines


def verdict_counts(verdicts: dict[str, int]) -> str:
    """Counts of verdicts as text.

    >>> verdict_counts({"wrong": 1200, "correct": 3})
    'correct 3, wrong 1,200'
    """
    return ", ".join(f"{name} {count:,}" for name, count in sorted(verdicts.items()))


def _short_of(share: float) -> str:
    spent = f"the run ended below p*, with {share:.0%} of the predicted KL spent"
    if share > 0.9:
        return f"{spent}: the gradient dies near p* = 1, or the KL went into something else than success"
    return (
        f"{spent}: it has not arrived. More iterations or a larger learning rate may take it further, unless the model cannot "
        "represent the policy that the theory asks for"
    )


def report(result: dict[str, Any], header: list[tuple[str, str]], examples: dict[str, list[dict[str, Any]]]) -> str:
    """The run as a Markdown page: header, table, figure, and samples before and after."""
    weights = {"β": result["beta"], "β_mirror": result["beta_mirror"], "entropy bonus": result["entropy_bonus"]}
    shown = ", ".join(f"{label} = {weight:g}" for label, weight in weights.items() if weight)
    parts = [f"# {result['objective']}{' at ' if shown else ''}{shown}, seed {result['seed']}", ""]
    parts += [f"- **{label}**: {text}" for label, text in header]
    parts += ["", "| quantity | value |", "|---|---|"]
    parts += [f"| {name} | {value} |" for name, value in table(result)]
    parts += ["", "![success probability over iterations, and prompt by prompt](figure.png)", "", "## Samples", ""]
    for before, after in zip(examples["before"], examples["after"], strict=True):
        parts += [f"### `{inline(before['prompt'])}` → `{inline(before['target'])}`", ""]
        for name, part in (("before", before), ("after", after)):
            parts += [f"- {name}, {'✓' if c['reward'] else '✗'} `{inline(c['text'])}`" for c in part["completions"]]
        parts.append("")
    return "\n".join(parts)
