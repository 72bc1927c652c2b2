"""What a run directory tells, finished or not, as JSON that pages are made of.

A finished run has its result. Of one that is on its way, p* and p† are predicted anew from the measurement of the reference, and
everything else is what the metrics say so far.
"""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax import theory
from grpo_jax.files import read_jsonl, read_sealed
from grpo_jax.objective import named_objective
from grpo_jax.report import run_page
from grpo_jax.report.forecast import interval_dict, make_attainable, make_forecast, mean_with_interval
from grpo_jax.report.metrics_log import METRICS, PROBES, read_metrics

COMPLETIONS = "completions.jsonl"  # of a finished run: before and after, prompt by prompt
SEALED = {name: f"{name}.json" for name in ("reference", "attainable", "beta", "result")}
FILES = ("config.json", *SEALED.values(), METRICS, PROBES, COMPLETIONS)  # all that is read
MOST_POINTS = 300  # of the curve of rewards
DIGITS = 6
WEIGHTS = ("beta", "beta_mirror", "entropy_bonus")
OF_PROMPTS = ("p_ref", "p_star", "attainable", "p_final", "kl")
PARTS = ("useful", "within_successes", "within_failures")  # of the KL
OF_PROBES = {
    "mean": "success/mean",
    "low": "success/low",
    "high": "success/high",
    "kl": "kl/sequence",
    "useful": "ledger/useful",
    "at_rest": "ledger/at_rest",
}


def read_run(folder: Path, result: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run as JSON.

    Args:
      folder: the run directory.
      result: what its result.json is going to hold; None: what it holds, if it is there.

    Returns:
      "name", "title", "config", "iterations", "done", "confidence", "examples" (digest of the task's), "extended".
      "standing", "words": None on the way.  "lines": (label, text).  "intervals": of "p_ref", "p_star", "attainable", "p_final",
      "p_now" and "forecast", as far as they are known.  "ledger": means of `PARTS`.  "probes", "rewards": columns over
      iterations.  "forecasts": as in result.json.  "prompts": columns of `OF_PROMPTS`, none before the reference is measured.
      "samples": for each measured prompt "index", "prompt", "target", "before", "during", "after".

    Raises:
      ValueError: it is no run directory, or a file of it is damaged; names it.
      OSError: it cannot be read.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: not a run directory (no config.json)")
    config = read_sealed(folder / "config.json")
    if "train.iterations" not in config:
        raise ValueError(f"{folder}: not the directory of a run, but of an evaluation or a sweep")
    known = {name: read_sealed(folder / file) for name, file in SEALED.items() if (folder / file).exists()}
    if result is None:
        result = known.get("result")
    rows = read_metrics(folder / METRICS)
    config |= {"objective.beta": known["beta"]["beta"]} if "beta" in known else {}
    settings = {"objective": config["objective.name"], "seed": config["seed"]}
    settings |= {weight: config[f"objective.{weight}"] for weight in WEIGHTS}
    story: dict[str, Any] = {
        "name": folder.name,
        "title": run_page.title(settings),
        "config": {key: value for key, value in config.items() if key != "extended"},
        "iterations": config["train.iterations"],
        "done": max((row["iteration"] for row in rows if row["phase"] == "train"), default=0),
        "confidence": config["evaluate.confidence"],
        "examples": config.get("task.examples"),
        "extended": config.get("extended", []),
    }
    probes = [row for row in rows if row["phase"] == "probe"]
    if result is not None:
        end = {"iteration": result["iterations"], "kl": result["after"]["kl"], **result["p_final"]}
        end |= {name: result.get("ledger", {}).get(name, {}).get("mean") for name in ("useful", "at_rest")}
        story |= _outcome(result) | {"probes": _columns(probes, end)}
    else:
        before = known.get("reference")
        story |= _expected(config, before, known.get("attainable")) | {"probes": _columns(probes, None)}
        if probes and "ledger/useful" in probes[-1]:
            story["ledger"] = {name: probes[-1][f"ledger/{name}"] for name in PARTS}
        for name, group in (("p_now", "success"), ("forecast", "forecast")):
            if probes and f"{group}/mean" in probes[-1]:
                story["intervals"][name] = {end: probes[-1][f"{group}/{end}"] for end in ("mean", "low", "high")}
    story["rewards"] = thinned([(row["iteration"], row["reward/mean"]) for row in rows if row["phase"] == "train"])
    number = len(story["prompts"].get("p_ref", []))
    samples = _samples(folder, number, known.get("reference"), finished=result is not None)
    return _finite(story) | {"samples": samples}


def _outcome(result: dict[str, Any]) -> dict[str, Any]:
    *lines, (_, words) = run_page.result_lines(result)
    return {
        "standing": result["standing"],
        "words": words,
        "lines": lines,
        "intervals": {name: result[name] for name in ("p_ref", "p_star", "attainable", "p_final") if name in result},
        "forecasts": result.get("forecasts", []),
        "ledger": {name: result["ledger"][name]["mean"] for name in PARTS} if "ledger" in result else None,
        "prompts": {name: result["prompts"][name] for name in OF_PROMPTS if name in result["prompts"]},
    }


def _expected(config: dict[str, Any], before: dict[str, Any] | None, measured: dict[str, Any] | None) -> dict[str, Any]:
    """What is known of a run before its end, as `_outcome`."""
    story: dict[str, Any] = {
        "standing": None,
        "words": None,
        "lines": [],
        "intervals": {},
        "forecasts": [],
        "ledger": None,
    }
    if before is None:
        return story | {"prompts": {}}
    successes, trials = np.array(before["successes"]), before["trials"]
    settings = {key: config[key] for key in sorted(config) if key.startswith("objective.")}
    setting = {"group_size": config["rollout.group_size"], "confidence": config["evaluate.confidence"]}
    counts = {name: before[name] for name in ("successes", "trials")}
    prediction, attainable = _predicted(json.dumps([settings, setting, counts, measured]))
    intervals: dict[str, Any] = {"p_ref": mean_with_interval(successes, trials, setting["confidence"])}
    prompts: dict[str, Any] = {"p_ref": (successes / trials).tolist()}
    lines = run_page.prediction_lines(before, prediction, **setting)
    if prediction is not None:
        ends = prediction.mean_p_star, prediction.mean_p_star_low, prediction.mean_p_star_high
        intervals["p_star"], prompts["p_star"] = interval_dict(*ends), prediction.p_star.tolist()
    if measured is not None:
        lines += run_page.attainable_lines(measured, attainable, confidence=setting["confidence"])
    if attainable is not None:
        intervals["attainable"] = interval_dict(attainable.mean, attainable.low, attainable.high)
        prompts["attainable"] = np.asarray(attainable.prompts).tolist()
    return story | {"lines": lines, "intervals": intervals, "prompts": prompts}


@lru_cache(maxsize=8)
def _predicted(known: str) -> tuple[theory.Prediction | None, theory.Attainable | None]:
    """p* and p† from a JSON text of all that they follow from, so that a page that is made anew does not wait for them again."""
    settings, setting, before, measured = json.loads(known)
    choices = {key.removeprefix("objective."): value for key, value in settings.items()}
    beta = choices["beta"]
    description = {key: value for key, value in choices.items() if key not in (*WEIGHTS, "target_success", "target_kl")}
    options = setting | {"objective": named_objective(**description), "beta": beta}
    counts = np.array(before["successes"]), before["trials"]
    prediction = None if choices["entropy_bonus"] else make_forecast(*counts, **options)
    return prediction, None if measured is None else make_attainable(*counts, measured, **options)


def _samples(folder: Path, number: int, before: dict[str, Any] | None, *, finished: bool) -> list[dict[str, Any]]:
    """The completions of each of the measured prompts; of one that is on its way, those of the reference are texts alone."""
    if finished and (folder / COMPLETIONS).exists():
        samples = [{"during": []} | row for row in read_jsonl(folder / COMPLETIONS)]
        if len(samples) != number or not all(_is_sample(x, "before", "after") for x in samples):
            raise ValueError(
                f"{folder / COMPLETIONS}: not what a run of {number} prompts has written; remove it, or put it back"
            )
    else:
        nothing: dict[str, Any] = {"prompt": None, "target": None, "before": [], "after": []}
        samples = [{"index": place} | nothing | {"during": []} for place in range(number)]
        examples = (before or {}).get("examples", [])
        for place, example in zip(np.linspace(0, number - 1, len(examples)).astype(int), examples, strict=True):
            texts = [{"pieces": [x["text"]], "log_ratios": None, "reward": x["reward"]} for x in example["completions"]]
            samples[place] |= {"prompt": example["prompt"], "target": example["target"], "before": texts}
    for row in read_jsonl(folder / PROBES, torn_end=True) if (folder / PROBES).exists() else []:
        # What somebody has changed is left out: a run that writes its page at its end does not fail for it.
        if (
            _is_sample(row, "completions")
            and isinstance(row.get("iteration"), int)
            and 0 <= row["place"] < len(samples)
        ):
            sample = samples[row["place"]]
            sample |= {name: row[name] for name in ("index", "prompt", "target")}
            sample["during"].append({"iteration": row["iteration"], "completions": row["completions"]})
    return samples


def _is_sample(row: Any, *sides: str) -> bool:
    """Whether a row is of one prompt, with completions on these ``sides``."""
    kinds = {"index": int, "place": int, "prompt": str, "target": str} | dict.fromkeys(sides, list)
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), kind) for name, kind in kinds.items())
        and all(_is_completion(x) for side in sides for x in row[side])
    )


def _is_completion(x: Any) -> bool:
    if not isinstance(x, dict):
        return False
    pieces, ratios = x.get("pieces"), x.get("log_ratios")
    return (
        isinstance(pieces, list)
        and all(isinstance(piece, str) for piece in pieces)
        and (
            ratios is None or (isinstance(ratios, list) and len(ratios) == len(pieces) and all(map(_is_known, ratios)))
        )
        and isinstance(x.get("reward"), int | float)
        and isinstance(x.get("verdict"), str | None)
        and isinstance(x.get("truncated"), bool | None)
    )


def _is_known(ratio: Any) -> bool:
    return ratio is None or (isinstance(ratio, int | float) and math.isfinite(ratio))


def _columns(probes: list[dict[str, Any]], end: dict[str, Any] | None) -> dict[str, list[Any]]:
    """The measurements over iterations, the last of them at the ``end``."""
    columns = {"iteration": [row["iteration"] for row in probes]}
    columns |= {name: [row.get(key) for row in probes] for name, key in OF_PROBES.items()}
    return {name: [*values, *([] if end is None else [end[name]])] for name, values in columns.items()}


def thinned(points: list[tuple[int, float]], most: int = MOST_POINTS) -> dict[str, list[Any]]:
    """A curve of at most ``most`` points: means of as many neighbours as that takes, at the last of their iterations.

    >>> thinned([(1, 0.0), (2, 1.0), (3, 0.5)], most=2)
    {'iteration': [2, 3], 'mean': [0.5, 0.5]}
    """
    step = math.ceil(len(points) / most) or 1
    blocks = [[point for point in points[at : at + step] if point[1] is not None] for at in range(0, len(points), step)]
    blocks = [block for block in blocks if block]
    means = [sum(value for _, value in block) / len(block) for block in blocks]
    return {"iteration": [block[-1][0] for block in blocks], "mean": means}


def _finite(value: Any) -> Any:
    """The same with `DIGITS` digits behind the point; JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return value
