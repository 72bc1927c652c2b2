"""A run directory without a run: the files that grpo_jax.report reads, made of chosen counts and completions."""

from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import flat
from grpo_jax.files import write_jsonl, write_sealed
from grpo_jax.objective import GRPO
from grpo_jax.report import forecast, run_result
from grpo_jax.report.metrics_log import METRICS, PROBES
from grpo_jax.report.run_story import COMPLETIONS
from tests.tiny_run import tiny_config

TRIALS = 100
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'><svg onload='window.hacked = 4'>",
    "]]><!-- --><iframe srcdoc='<script>parent.hacked = 5</script>'></iframe>",
    "javascript:window.hacked=6 \u202egnp.exe\u2066 \u2028 \u2029 \u200b \x1b[2J \ud800 [[script]] \\u003c &lt;",
)


def completion(text: str, *, reward: float = 0.0, ratio: float | None = 0.5) -> dict[str, Any]:
    """A completion whose tokens are characters, every other one less probable than under the reference."""
    ratios = None if ratio is None else [ratio * (-1) ** i for i in range(len(text) + 1)]
    verdict = "correct" if reward else "wrong"
    return {"pieces": [*text, ""], "log_ratios": ratios, "reward": reward, "verdict": verdict, "truncated": False}


def write_run(
    folder: Path, *, prompts: int = 120, texts: tuple[str, ...] = HOSTILE, gain: float = 0.0, finished: bool = True
) -> Path:
    """Writes the files of a run.

    Args:
      folder: the run directory.
      prompts: how many are measured.
      texts: of the completions; prompt i has the text i of them too, and so on around.
      gain: added to the success after training.
      finished: whether it has its result.
    """
    folder.mkdir()
    config = tiny_config(train__iterations=40)
    write_sealed(folder / "config.json", flat(config) | {"task.examples": "a digest"})
    p_ref = np.linspace(0.05, 0.9, prompts)
    successes = np.round(p_ref * TRIALS).astype(int)
    shape = {"objective": GRPO, "group_size": config.rollout.group_size, "beta": 1.0}
    prediction = forecast.make_forecast(successes, TRIALS, confidence=0.95, **shape)

    def counts(successes: np.ndarray, kl: float) -> dict[str, Any]:
        example = {"prompt": texts[0], "target": "2", "completions": [{"text": texts[-1], "reward": 1.0}]}
        return {
            "successes": np.clip(successes, 0, TRIALS).astype(int).tolist(),
            "trials": TRIALS,
            "kl": kl,
            "length": 2.0,
            "truncated": 0.0,
            "verdicts": {},
            "greedy": 0.5,
            "examples": [example, example],
        }

    before, after = counts(successes, 0.0), counts(np.round((np.asarray(prediction.p_star) + gain) * TRIALS), 0.3)
    write_sealed(folder / "reference.json", before)
    rows: list[dict[str, Any]] = [forecast.probe_row(0, before, 0.95)]
    for n in range(1, 41 if finished else 21):
        rows.append({"iteration": n, "phase": "train", "reward/mean": 0.4 + 0.01 * n})
        if n % 10 == 0 and n < 40:
            probe = counts(np.round(np.asarray(prediction.p_star) * TRIALS * n / 40), 0.1)
            end = {f"forecast/{name}": value for name, value in (("mean", 0.7), ("low", 0.6), ("high", 0.8))}
            rows.append(forecast.probe_row(n, probe, 0.95) | end)
    write_jsonl(folder / METRICS, rows)
    samples = [
        {"index": i, "place": i, "prompt": f"{i}+1= {texts[i % len(texts)]}", "target": str(i + 1)}
        for i in range(prompts)
    ]
    shown = [completion(text, reward=float(i == 1), ratio=0.5 * i) for i, text in enumerate(texts)]
    during = [{"iteration": n, "phase": "probe", "completions": shown[:2]} for n in (10, 20)]
    write_jsonl(folder / PROBES, [one | samples[0] for one in during])
    if finished:
        result = run_result.make_result(config, before, after, prediction)
        write_jsonl(folder / COMPLETIONS, [sample | {"before": shown, "after": shown[::-1]} for sample in samples])
        write_sealed(folder / "result.json", result)
    return folder
