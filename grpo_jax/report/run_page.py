"""A run in words: what is known at its start, what is predicted, the table at its end, and report.md with all of it."""

import json
from typing import Any

import numpy as np

from grpo_jax import theory
from grpo_jax.objective import Objective, beta_effective
from grpo_jax.report.evaluation_numbers import dead_share, success_bound
from grpo_jax.report.forecast import interval_dict, mean_with_interval
from grpo_jax.report.markdown import Lines, inline, interval_text, page_start
from grpo_jax.report.standing import in_words


def start_lines(config: Any, objective: Objective, *, num_prompts: int, task: str) -> Lines:
    """What a run says of its task and objective before it starts: (label, text) lines."""
    c, group_size = config.objective, config.rollout.group_size
    # A choice that is None plays no part in the objective.
    choices = {k: v for k in objective.__dataclass_fields__ if (v := getattr(objective, k)) is not None}
    lines = [
        ("task", f"{task}, {num_prompts} prompts, G = {group_size}, T = {config.rollout.max_completion}"),
        ("objective", f"{c.name} {json.dumps(choices)}"),
        ("fixed point", objective.fixed_point),
    ]
    weights = {"β": c.beta} if objective.holds_to_reference else {}
    if objective.holds_to_previous:
        weights["β_mirror"] = c.beta_mirror
    for key in ("target_success", "target_kl"):
        if c[key] is not None:
            weights.pop("β")
            lines.append(("β", f"will be chosen for objective.{key}={c[key]:g}, once the reference is measured"))
    for label, weight in weights.items():
        effective = beta_effective(weight, objective=objective, group_size=group_size)
        lines.append((label, f"{weight:g} (effective, with population statistics: {effective:.4g})"))
    if c.entropy_bonus:
        bonus = f"{c.entropy_bonus:g}: moves the end away from the fixed point, so no p* is predicted"
        lines.append(("entropy bonus", bonus))
    lines.append(("noise", noise_words(config)))
    return lines


def noise_words(config: Any) -> str:
    """What the settings say of the noise that is left at the end: completions behind an update, schedule, average.

    How large it is they do not say: for AdamW that takes the spread of each parameter's gradient (docs/networks.md).
    """
    c, rate = config.train, config.optimizer.learning_rate
    completions = config.data.prompts_per_iteration * config.rollout.group_size // c.minibatches
    end = {
        "constant": f"the rate stays at {rate:g}, and the run keeps its noise to the end",
        "linear": f"linear from {rate:g} to 0, where it dies out",
        "cosine": f"cosine from {rate:g} to 0, where it dies out",
    }[config.optimizer.schedule]
    average = f"; the last {c.average:.0%} of the iterations are averaged beside" if c.average else ""
    return f"{completions:,} completions an update; {end}{average}"


def prediction_lines(
    before: dict[str, Any], forecast: theory.Prediction | None, *, confidence: float, group_size: int
) -> Lines:
    """What is known before the first iteration: the measured p_ref, the share of dead groups, and the predicted p*."""
    successes, trials = np.array(before["successes"]), before["trials"]
    p_ref = mean_with_interval(successes, trials, confidence)
    never = f"{np.sum(successes == 0)} of {len(successes)} prompts never solved in {trials} samples each"
    lines = [
        ("measured p_ref", interval_text(p_ref, confidence)),
        (f"dead groups at G = {group_size}", f"{dead_share(successes, trials, group_size):.1%} expected; {never}"),
    ]
    if before["verdicts"]:
        lines.append(("verdicts", verdict_counts(before["verdicts"])))
    if apart := before.get("held_out"):
        of_others = mean_with_interval(np.array(apart["successes"]), apart["trials"], confidence)
        lines.append(("… of prompts held out", interval_text(of_others, confidence)))
    if not successes.any():
        bound = success_bound(0, len(successes) * trials, confidence)
        words = f"no completion succeeded, so p_ref is below {bound:.2g} and GRPO has nothing to learn from"
        lines.append(("in words", words))
    if forecast is not None:
        p_star = interval_dict(forecast.mean_p_star, forecast.mean_p_star_low, forecast.mean_p_star_high)
        lines.append(("predicted p*", interval_text(p_star, confidence)))
        lines.append(("predicted KL, nats", f"{forecast.mean_kl:.4f}"))
    return lines


def attainable_lines(measured: dict[str, Any], attainable: theory.Attainable | None, *, confidence: float) -> Lines:
    """What is known before the first iteration of where this network ends: p†, and the R² it follows from."""
    if "reason" in measured:
        return [("attainable p†", f"not measured: {measured['reason']}")]
    samples, prompts, shared = measured["samples"], len(measured["prompts"]), measured["of"]
    behind = f"{samples} samples of each prompt" if prompts == shared else f"{samples} samples of {prompts} prompts"
    if attainable is None:
        words = f"not determined: R² cannot be told from 0 with {behind}; about {measured['needed']} of each may do"
        return [("attainable p†", f"{words} (attainable.samples)")]
    p = interval_dict(attainable.mean, attainable.low, attainable.high)
    # Fewer prompts leave more of the network to each, so that their R² bounds that of all from neither side.
    bound = "at least, " if prompts == shared else f"of these alone, where {shared:,} share the network, "
    share = f"R² of the pull {interval_text(measured['r2'], confidence)}   {bound}from {behind}"
    return [("attainable p†", interval_text(p, confidence)), ("… because", share)]


def result_lines(result: dict[str, Any]) -> Lines:
    """(quantity, value) lines of a result."""
    confidence, before, after = result["confidence"], result["before"], result["after"]
    lines = [("p_ref", interval_text(result["p_ref"], confidence))]
    lines.append(("final p̂", interval_text(result["p_final"], confidence)))

    # The measurement beside the prediction, where there is one.
    expected_kl = "no prediction of p*: see the fixed point above"
    if "p_star" in result:
        difference, rms = result["difference"], result["rms"]
        expected_kl = f"{result['kl_predicted']:.4f} predicted"
        test = "no test: nothing was solved"
        if result["p_ref"]["mean"] > 0 or result["p_final"]["mean"] > 0:
            verdict = "inside" if difference["inside"] else "OUTSIDE"
            test = f"{difference['mean']:+.4f}   prediction interval ±{difference['half_width']:.4f}: {verdict}"
        lines += [
            ("predicted p*", interval_text(result["p_star"], confidence)),
            ("p̂ − p*", test),
            ("per prompt, rms p̂ − p*", f"{rms['measured']:.4f}   {rms['noise']:.4f} from sampling alone"),
        ]
        if result["folds"]:
            lines.append(("prompts across a fold", f"{result['folds']}   their p* may be either branch's"))
    if "attainable" in result:
        least, p_final = result["attainable"], result["p_final"]
        below, above = p_final["high"] < least["low"], p_final["low"] > least["high"]
        where = "p̂ is below" if below else "p̂ is above" if above else "p̂ is inside"
        lines.append(("attainable p†", f"{interval_text(least, confidence)}   {where}"))
    if apart := result.get("held_out"):
        moved = " → ".join(interval_text(apart[name], confidence) for name in ("p_ref", "p_final"))
        lines.append((f"{apart['prompts']:,} prompts held out", moved))
    lines.append(("KL(π‖π_ref), nats", f"{after['kl']:.4f} measured   {expected_kl}"))
    if skipped := result.get("skipped_updates"):
        lines.append(("skipped updates", f"{skipped:,}   their loss or gradient was not finite"))
    lines += ledger_lines(result.get("ledger", {}), confidence)

    for made in result.get("forecasts", []):
        lines.append((f"forecast at iteration {made['iteration']}", interval_text(made["end"], confidence)))

    for name, key, form in (
        ("greedy accuracy", "greedy", ".4f"),
        ("sampled accuracy, pass@1", "pass@1", ".4f"),
        ("pass@8", "pass@8", ".4f"),
        ("completion length, tokens", "length", ".1f"),
        ("truncated", "truncated", ".1%"),
    ):
        lines.append((name, f"{before[key]:{form}} before   {after[key]:{form}} after"))
    if "average" in result:
        average = result["average"]
        averaged = average["after"]
        others = f"KL {averaged['kl']:.4f}   greedy {averaged['greedy']:.4f}   pass@8 {averaged['pass@8']:.4f}"
        lines.append((f"average of the last {average['iterations']}: p̂", interval_text(average["p_final"], confidence)))
        lines.append(("of the average", others))
        ledger = average.get("ledger", {})
        if "objective" in ledger:
            lines.append(("… beyond a rest point", interval_text(ledger["beyond_rest"], confidence, "+")))
            lines.append(("… objective Φ(p̂) − β KL", interval_text(ledger["objective"], confidence, "+")))
    if after["verdicts"]:
        lines.append(("verdicts after", verdict_counts(after["verdicts"])))
    return [*lines, ("in words", in_words(result))]


def ledger_lines(ledger: dict[str, Any], confidence: float) -> Lines:
    """(quantity, value) lines: how the nats were spent, and what was climbed."""
    if not ledger:
        return []
    lines = [
        ("… useful, kl(p̂‖p_ref)", interval_text(ledger["useful"], confidence)),
        ("… within successes", interval_text(ledger["within_successes"], confidence)),
        ("… within failures", interval_text(ledger["within_failures"], confidence)),
    ]
    if "objective" in ledger:
        optimum = f"   0 at the start, {ledger['objective_optimum']:.4f} at p*"
        lines += [
            ("… beyond a rest point", interval_text(ledger["beyond_rest"], confidence, "+")),
            ("objective Φ(p̂) − β KL", interval_text(ledger["objective"], confidence, "+") + optimum),
        ]
    if "followed" in ledger:
        lines.append(("share of the pull followed", interval_text(ledger["followed"], confidence)))
    return lines


def title(result: dict[str, Any]) -> str:
    """The objective, its weights and the seed of a run.

    >>> title({"objective": "GRPO", "beta": 0.5, "beta_mirror": 0.0, "entropy_bonus": 0.0, "seed": 3})
    'GRPO at β = 0.5, seed 3'
    """
    weights = {"β": result["beta"], "β_mirror": result["beta_mirror"], "entropy bonus": result["entropy_bonus"]}
    shown = ", ".join(f"{label} = {weight:g}" for label, weight in weights.items() if weight)
    return f"{result['objective']}{' at ' if shown else ''}{shown}, seed {result['seed']}"


def page(result: dict[str, Any], header: Lines, examples: dict[str, list[dict[str, Any]]]) -> str:
    """The run as a Markdown page: header, table, figure, and samples before and after."""
    lines = page_start(
        title(result),
        header,
        result_lines(result),
        "success probability over iterations, what the KL was spent on, and prompt by prompt",
    )
    for before, after in zip(examples["before"], examples["after"], strict=True):
        lines += [f"### `{inline(before['prompt'])}` → `{inline(before['target'])}`", ""]
        for name, example in (("before", before), ("after", after)):
            for completion in example["completions"]:
                mark = "✓" if completion["reward"] else "✗"
                lines.append(f"- {name}, {mark} `{inline(completion['text'])}`")
        lines.append("")
    return "\n".join(lines)


def verdict_counts(verdicts: dict[str, int]) -> str:
    """Counts of verdicts as text.

    >>> verdict_counts({"wrong": 1200, "correct": 3})
    'correct 3, wrong 1,200'
    """
    return ", ".join(f"{name} {count:,}" for name, count in sorted(verdicts.items()))
