"""Tests the recurrence on trained networks: does the log-odds of every prompt rise by Ω_G(p̂)/β?

    python -m experiments.recurrence --config=configs/small.py --betas=0.5,1,2,4 --workdir=runs/recurrence

Where a run has come to rest, p_n = p_{n−1}, and the paper's logit p_n = logit p_ref + Ω(p_{n−1})/β says that the gain in
log-odds against Ω_G(p̂)/β is a line of slope 1 through 0, whatever the prompt and whatever β. Nothing is fitted to get there.
Each β is a run of its own in WORKDIR/BETA, so the command resumes; recurrence.png and recurrence.json are the outcome.

The points are not independent: all runs share the one measurement of each prompt's p_ref, and all prompts of a run share its
network, which is a little off in a way of its own. So the errors are clustered by prompt and by run (`fitted`).
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from scipy.stats import t as student

from experiments.runs import result_of
from experiments.theory.figures import INK, line, marker, new_figure, save, title
from grpo_jax import theory
from grpo_jax.objective import Objective, named_objective

LEAST = 8  # successes and failures of a prompt, before and expected after, from which its log-odds are measured

CAPTION = (
    "Every point is a prompt of a trained network: how far its log-odds of success have risen, over what the recurrence says,"
    " Ω_G(p̂)/β at its own final p̂. The line has slope 1 and is not fitted. Bars: one standard error of the sampling, before"
    " and after.\nStated by the paper: logit p_n = logit p_ref + Ω(p_{n−1})/β, for infinite groups and exact optimisation over"
    " all policies. Ours: Ω_G for groups of G, and that many small steps of a network end there too."
)


class Gains(NamedTuple):
    """Of the measured prompts of one run.

    predicted: [prompts] Ω_G(p̂)/β.
    measured: [prompts] logit p̂ − logit p_ref.
    error: [prompts] standard error of the latter, from sampling alone.
    prompt: [prompts] which prompts they are.
    """

    predicted: np.ndarray
    measured: np.ndarray
    error: np.ndarray
    prompt: np.ndarray


def gains(
    before: np.ndarray, after: np.ndarray, star: np.ndarray, *, trials: int, beta: float, weights: theory.Weights
) -> Gains:
    """Log-odds gains from counts.

    Args:
      before, after: [Q] successes under the reference and under the trained policy.
      star: [Q] predicted success probability.
      trials: of each prompt, before and after.
      beta: of the run.
      weights: its normaliser.

    Returns:
      The prompts with at least 8 successes and 8 failures, measured before and predicted after: a choice by what was
      measured after would itself bend the line. Half a success and half a failure are added to each count, which makes the
      estimate of log-odds unbiased to first order.

    >>> counts = np.array([50, 3]), np.array([80, 9]), np.array([0.8, 0.1])
    >>> shown = gains(*counts, trials=100, beta=2.0, weights=theory.MeanOnly())
    >>> shown.predicted.tolist(), shown.measured.round(3).tolist()
    ([0.5], [1.368])
    """
    logits = [np.log((counts + 0.5) / (trials - counts + 0.5)) for counts in (before, after)]
    variance = sum(1 / (counts + 0.5) + 1 / (trials - counts + 0.5) for counts in (before, after))
    with jax.enable_x64(True):
        pull = np.asarray(theory.omega(logits[1], weights, logits=True)) / beta
    rarer = np.minimum.reduce([before, trials - before, trials * star, trials * (1 - star)])
    shown = rarer >= LEAST
    return Gains(pull[shown], (logits[1] - logits[0])[shown], np.sqrt(variance)[shown], np.flatnonzero(shown))


def gains_of(result: dict[str, Any], config: dict[str, Any], *, end: str = "p_star") -> Gains:
    """`gains` of a finished run, from what its result.json and its config.json hold; ``end`` names the prediction there."""
    choices = {field.name: config.get(f"objective.{field.name}") for field in fields(Objective)}
    objective = named_objective(config["objective.name"], **choices)
    if objective.kl_direction != "reverse" or objective.anchor != "reference" or end not in result["prompts"]:
        raise ValueError(
            f"the recurrence is that of KL(π‖π_ref), and a run of {config['objective.name']} has another end"
        )
    beta, trials, prompts = config["objective.beta"], config["evaluate.final_samples"], result["prompts"]
    before, after = (np.rint(np.array(prompts[name]) * trials) for name in ("p_ref", "p_final"))
    weights = theory.Group(result["group_size"], **objective.normaliser())
    return gains(before, after, np.array(prompts[end]), trials=trials, beta=beta, weights=weights)


def fitted(runs: list[Gains], confidence: float = 0.95) -> dict[str, float]:
    """The line through the gains of several runs by weighted least squares, and how well y = x does.

    Errors are those of the jackknife in two ways: V = V_prompts + V_runs − V_points, where V of N groups is
    (N − 1)/N Σ (b without the group − b)². It is no less than either of the first two. Student's t has
    V²/(V_runs²/(runs − 1) + V_prompts²/(prompts − 1)) degrees of freedom. The jackknife is the one of the sandwiches that does
    not come out too small for as few groups as there are runs; tests/experiments/test_recurrence.py counts how often the
    interval holds. Of a single run only the prompts are left out in turn, and what its network adds is not in the interval.

    Source: A. C. Cameron, J. B. Gelbach and D. L. Miller, J. Bus. Econ. Stat. 29 (2011), 238; R. M. Bell and D. F. McCaffrey,
    Survey Methodology 28 (2002), 169 (the jackknife, and degrees of freedom).

    >>> x, prompts = np.array([0.5, 1.0, 2.0]), np.arange(3)
    >>> fit = fitted([Gains(x / b, 0.1 + 0.9 * x / b, np.full(3, 0.1), prompts) for b in (1.0, 2.0)])
    >>> round(fit["slope"], 6), round(fit["intercept"], 6), round(fit["slope_error"], 6)
    (0.9, 0.1, 0.0)
    """
    predicted, measured, error, prompt = (np.concatenate(values) for values in zip(*runs, strict=True))
    run = np.repeat(np.arange(len(runs)), [len(gains.error) for gains in runs])
    design = np.stack([predicted, np.ones_like(predicted)], axis=1) / error[:, None]
    line = np.linalg.lstsq(design, measured / error)[0]

    def jackknife(group: np.ndarray) -> tuple[np.ndarray, int]:
        """The variances of the two coefficients, and how many groups there are."""
        names = np.unique(group)
        without = [np.linalg.lstsq(design[group != k], (measured / error)[group != k])[0] for k in names]
        return (len(names) - 1) / len(names) * np.square(np.array(without) - line).sum(0), len(names)

    by_prompt, prompts = jackknife(prompt)
    variance, freedom = by_prompt, np.full(2, prompts - 1.0)
    if len(runs) > 1:
        by_run, _ = jackknife(run)
        by_point, _ = jackknife(np.arange(len(run)))
        variance = np.maximum(by_prompt + by_run - by_point, np.maximum(by_prompt, by_run))
        parts = by_run**2 / (len(runs) - 1) + by_prompt**2 / (prompts - 1)
        freedom = np.where(parts > 0, variance**2 / np.where(parts > 0, parts, 1.0), freedom)
    reach = student.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance)
    fit: dict[str, float] = {}
    for name, value, deviation, half in zip(("slope", "intercept"), line, np.sqrt(variance), reach, strict=True):
        fit |= {name: value, f"{name}_error": deviation, f"{name}_low": value - half, f"{name}_high": value + half}
    # The mean square of (y − x)/error: 1 if sampling is all that keeps the points from the line.
    fit |= {"runs": len(runs), "prompts": len(predicted), "chi_square": np.mean(((measured - predicted) / error) ** 2)}
    return {name: float(value) for name, value in fit.items()}


def plot_gains(runs: dict[str, Gains], fit: dict[str, float], out: Path) -> None:
    """Writes recurrence.png and recurrence.json."""
    figure, axes = new_figure(size=(6.6, 6.4))
    (panel,) = axes.flat
    top = 1.05 * max(float(np.max([run.measured.max(), run.predicted.max()])) for run in runs.values())
    panel.plot([0, top], [0, top], **line(0, color=INK, linewidth=1.0))
    for k, (beta, run) in enumerate(runs.items(), 1):
        style = marker(k, linestyle="none", label=f"β = {beta}")
        panel.errorbar(run.predicted, run.measured, run.error, elinewidth=0.5, alpha=0.8, **style)
    panel.set(
        xlabel=r"predicted gain, $\Omega_G(\hat p)/\beta$",
        ylabel=r"measured gain, logit $\hat p$ − logit $p_\mathrm{ref}$",
    )
    panel.legend(frameon=False, loc="upper left")
    title(
        panel,
        "slope {slope:.3f} [{slope_low:.3f}, {slope_high:.3f}], "
        "intercept {intercept:+.3f} [{intercept_low:+.3f}, {intercept_high:+.3f}]".format(**fit),
    )
    numbers: dict[str, Any] = {"fit": fit, "runs": {beta: run._asdict() for beta, run in runs.items()}}
    save(figure, "recurrence", numbers, out=out, caption=CAPTION)


def compare(config: str, betas: list[str], workdir: Path, overrides: list[str]) -> None:
    """Runs every β, one after the other, and plots all of them together."""
    runs: dict[str, Gains] = {}
    for beta in betas:
        result = result_of(config, workdir / beta, f"--config.objective.beta={beta}", *overrides)
        keys = json.loads((workdir / beta / "config.json").read_text(encoding="utf-8"))
        runs[beta] = gains_of(result, keys)
        deviation = np.mean(np.square((runs[beta].measured - runs[beta].predicted) / runs[beta].error))
        bias = np.mean(runs[beta].measured - runs[beta].predicted)
        print(f"β = {beta}: {len(runs[beta].error)} prompts, off by {bias:+.4f}, {deviation:.2f} sampling variances")
    fit = fitted([*runs.values()])
    plot_gains(runs, fit, workdir)
    print(" ".join(f"{name} {value:.4g}" for name, value in fit.items()))


def command_line() -> None:
    """Reads the flags and compares."""
    config = flags.DEFINE_string("config", "configs/small.py", "Config file, as for launch.py.")
    betas = flags.DEFINE_list("betas", ["0.5", "1", "2", "4"], "Values of β to run.")
    workdir = flags.DEFINE_string("workdir", "runs/recurrence", "Where the runs go.")
    overrides = flags.DEFINE_multi_string("set", [], "Further flags of launch.py, such as --set=--config.seed=1")

    def main(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
        compare(config.value, betas.value, Path(workdir.value), overrides.value)

    app.run(main)


if __name__ == "__main__":
    command_line()
