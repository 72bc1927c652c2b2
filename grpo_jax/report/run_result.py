"""The result of a run: what was measured before and after, what was predicted, and whether they agree."""

import math
import statistics
from typing import Any

import numpy as np

from grpo_jax import theory
from grpo_jax.report.forecast import interval_dict, mean_with_interval
from grpo_jax.report.standing import standing

PER_PROMPT = ("kl", "useful", "within_successes", "within_failures", "at_rest", "objective")  # of the ledger


def make_result(
    config: Any,
    before: dict[str, Any],
    after: dict[str, Any],
    forecast: theory.Prediction | None,
    average: dict[str, Any] | None = None,
    progressed: dict[str, Any] | None = None,
    attainable: theory.Attainable | None = None,
) -> dict[str, Any]:
    """What result.json holds, from the counts before and after training.

    Args:
      config: of the run.
      before, after: "successes" per prompt, "trials", "greedy" accuracy, "kl", "length", "truncated", "verdicts"; where there are
        prompts "held_out", their "successes" and "trials"; after training also "ledger", a `Ledger` or None.
      forecast: the prediction made from ``before``; None where the objective has none.
      average: of the averaged parameters, as ``after``, and the "iterations" they are averaged over; None without an average.
      progressed: "trend" of `standing.trend`, and "forecasts" and "speed" of `live_forecast.record`, where there are.
      attainable: p† of the network; None where it was not determined.

    Returns:
      JSON-able. The prediction interval of p̂ − p* combines two errors in quadrature, on the side of the difference: p*'s band
      (the error of p_ref) and p̂'s own interval.
    """
    confidence = config.evaluate.confidence
    counts_before, counts_after = np.array(before["successes"]), np.array(after["successes"])
    p_ref = mean_with_interval(counts_before, before["trials"], confidence)
    p_final = mean_with_interval(counts_after, after["trials"], confidence)
    prompts = {"p_ref": counts_before / before["trials"], "p_final": counts_after / after["trials"]}  # each [Q]
    result: dict[str, Any] = {
        "objective": config.objective.name,
        **{weight: config.objective[weight] for weight in ("beta", "beta_mirror", "entropy_bonus")},
        "group_size": config.rollout.group_size,
        "seed": config.seed,
        "iterations": config.train.iterations,
        "confidence": confidence,
        "p_ref": p_ref,
        "p_final": p_final,
        "before": _accuracies(before),
        "after": _accuracies(after),
    }
    if forecast is not None:
        # Mean over prompts: is the difference within the two intervals, added in quadrature?
        p_star = interval_dict(forecast.mean_p_star, forecast.mean_p_star_low, forecast.mean_p_star_high)
        difference = p_final["mean"] - p_star["mean"]
        if difference > 0:
            half_width = math.hypot(p_star["high"] - p_star["mean"], p_final["mean"] - p_final["low"])
        else:
            half_width = math.hypot(p_star["mean"] - p_star["low"], p_final["high"] - p_final["mean"])

        # Prompt by prompt: how much of the residual do the two measurements explain?
        residual = prompts["p_final"] - forecast.p_star
        noise = prompts["p_final"] * (1 - prompts["p_final"]) / after["trials"]
        z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
        noise = noise + ((forecast.p_star_high - forecast.p_star_low) / (2 * z)) ** 2

        result |= {
            "p_star": p_star,
            "difference": {"mean": difference, "half_width": half_width, "inside": abs(difference) <= half_width},
            "rms": {"measured": float(np.sqrt(np.mean(residual**2))), "noise": float(np.sqrt(np.mean(noise)))},
            "kl_predicted": float(forecast.mean_kl),
            "folds": int(forecast.fold.sum()),
            "saturating": int(forecast.saturates.sum()),
        }
        prompts |= {k: getattr(forecast, k) for k in ("p_star", "p_star_low", "p_star_high")}
    if attainable is not None:
        result["attainable"] = interval_dict(attainable.mean, attainable.low, attainable.high)
        prompts["attainable"] = attainable.prompts
    if "held_out" in after:
        result["held_out"] = {
            name: mean_with_interval(np.array(x["held_out"]["successes"]), x["held_out"]["trials"], confidence)
            for name, x in (("p_ref", before), ("p_final", after))
        } | {"prompts": len(after["held_out"]["successes"])}
    if ledger := after.get("ledger"):
        result["ledger"] = ledger.means
        prompts |= {name: ledger.prompts[name] for name in PER_PROMPT if name in ledger.prompts}
    if average is not None:
        counts = np.array(average["successes"])
        p_average = mean_with_interval(counts, average["trials"], confidence)
        result["average"] = {"iterations": average["iterations"], "p_final": p_average, "after": _accuracies(average)}
        if ledger := average.get("ledger"):
            result["average"]["ledger"] = ledger.means
        prompts["p_average"] = counts / average["trials"]
    result |= progressed or {}
    result["standing"] = standing(result, before)
    return result | {"prompts": {name: np.asarray(values).tolist() for name, values in prompts.items()}}


def pass_at_k(successes: np.ndarray, trials: int, k: int) -> np.ndarray:
    """Unbiased pass@k of each prompt: 1 − C(n − c, k) / C(n, k), for c successes in n ≥ k trials.

    Source: arXiv 2107.03374, §2.1.

    >>> pass_at_k(np.array([0, 1, 8]), 8, 8).tolist(), pass_at_k(np.array([2]), 4, 1).tolist()
    ([0.0, 1.0, 1.0], [0.5])
    """
    if not 1 <= k <= trials:
        raise ValueError(f"pass@{k} needs at least {k} trials, got {trials}")
    failures = trials - np.asarray(successes, np.float64)
    steps = np.arange(k)
    factors = np.clip((failures[..., None] - steps) / (trials - steps), 0.0, None)
    return 1.0 - factors.prod(-1)


def _accuracies(counts: dict[str, Any]) -> dict[str, Any]:
    successes = np.array(counts["successes"])
    passes = {f"pass@{k}": float(pass_at_k(successes, counts["trials"], k).mean()) for k in (1, 8)}
    return passes | {name: counts[name] for name in ("greedy", "kl", "length", "truncated", "verdicts")}
