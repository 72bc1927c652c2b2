"""How often the predicted interval of the mean p* holds the truth, and how far off the prediction is on average.

    python -m experiments.coverage

100 prompts have success probabilities drawn from a Beta distribution, are sampled n times each, and are predicted from the
counts alone. The truth is the mean of `flow_point` of the probabilities themselves. "Mapped" maps the estimate k/n and the
ends of its Wilson interval to p*, and adds the errors in quadrature; "averaged" is `theory.predict`, which averages p* over
what the counts allow. The run's test is that of result.json: p̂ of a policy that is exactly at p*, measured by n samples
too, lies within the two intervals added in quadrature. coverage.md and coverage.json are the outcome.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from grpo_jax import theory
from grpo_jax.theory.posteriors import Mean, posterior_of
from grpo_jax.theory.prediction import ends_of

CONFIDENCE, PROMPTS = 0.95, 100


class Case(NamedTuple):
    """Prompts with p_ref ~ Beta(a, b), or half of them at each of ``two``, trained with groups of ``size`` at ``beta``."""

    a: float
    b: float
    size: int
    beta: float
    two: tuple[float, float] | None = None

    def draw(self, rng: np.random.Generator, repetitions: int) -> np.ndarray:
        """[repetitions, PROMPTS] success probabilities."""
        shape = repetitions, PROMPTS
        return rng.choice(self.two, shape) if self.two else rng.beta(self.a, self.b, shape)

    def label(self) -> str:
        """What stands in the first column.

        >>> Case(1.0, 3.0, 8, 1.0).label(), Case(0.0, 0.0, 8, 1.0, (0.1, 0.6)).label()
        ('Beta(1, 3); 8, 1', '.1 or .6; 8, 1')
        """
        drawn = " or ".join(f"{p:g}".lstrip("0") for p in self.two) if self.two else f"Beta({self.a:g}, {self.b:g})"
        return f"{drawn}; {self.size}, {self.beta:g}"


CASES = [
    Case(0.5, 0.8, 8, 1.0),
    Case(0.5, 0.8, 16, 0.5),
    Case(1.0, 3.0, 8, 1.0),
    Case(1.0, 3.0, 16, 0.5),
    Case(0.3, 3.0, 16, 0.5),
]
# None of these had a part in any choice: other shapes and groups, and prompts of two kinds, which no Beta distribution is.
OTHERS = [Case(2.0, 2.0, 8, 1.0), Case(0.2, 0.6, 64, 1.0), Case(0.0, 0.0, 8, 1.0, (0.1, 0.6))]
TRIALS = (16, 64, 256, 1024)


class Cell(NamedTuple):
    """Of many repetitions: coverage of the interval and mean error, mapped and averaged, and how often the run's test passes."""

    mapped: float
    mapped_bias: float
    averaged: float
    averaged_bias: float
    inside: float


def measure(case: Case, trials: int, repetitions: int, seed: int) -> Cell:
    """One cell of the table.

    Args:
      case: how prompts are drawn and trained.
      trials: samples of each of them, before and after.
      repetitions: how often.
      seed: of the draws.

    Returns:
      A `Cell`.
    """
    rng = np.random.default_rng([seed, trials])
    weights = theory.Group(case.size)
    p_ref = case.draw(rng, repetitions)
    counts = rng.binomial(trials, p_ref)
    every = np.arange(trials + 1)
    with jax.enable_x64(True):
        ends = np.stack([every / trials, *theory.wilson_interval(every, trials, CONFIDENCE)])
        star, table = (np.asarray(theory.flow_point(p, beta=case.beta, weights=weights)) for p in (p_ref, ends))
        averaged = []
        for row in counts:
            posterior = posterior_of(row, np.full(row.shape, trials))
            found = ends_of(posterior, beta=case.beta, weights=weights, confidence=CONFIDENCE, kl="reverse")
            averaged.append(found.p_star)
    mapped = [_quadrature(*table[:, row]) for row in counts]
    after = rng.binomial(trials, star)
    low, high = (np.asarray(end) for end in theory.wilson_interval(every, trials, CONFIDENCE))
    final = [_quadrature(row / trials, low[row], high[row]) for row in after]
    truth = star.mean(-1)
    return Cell(
        float(np.mean([x.low <= t <= x.high for x, t in zip(mapped, truth, strict=True)])),
        float(np.mean([x.mean for x in mapped] - truth)),
        float(np.mean([x.low <= t <= x.high for x, t in zip(averaged, truth, strict=True)])),
        float(np.mean([x.mean for x in averaged] - truth)),
        float(np.mean([passes(x, p) for x, p in zip(averaged, final, strict=True)])),
    )


def passes(star: Mean, final: Mean) -> bool:
    """Whether the difference of two means lies within their intervals, added in quadrature, as in result.json.

    >>> passes(Mean(0.7, 0.69, 0.71), Mean(0.714, 0.704, 0.724)), passes(Mean(0.7, 0.69, 0.71), Mean(0.72, 0.71, 0.73))
    (True, False)
    """
    difference = final.mean - star.mean
    if difference > 0:
        return difference <= math.hypot(star.high - star.mean, final.mean - final.low)
    return -difference <= math.hypot(star.mean - star.low, final.high - final.mean)


def table(cells: dict[str, dict[int, Cell]]) -> str:
    """The cells as Markdown, one row per case.

    >>> print(table({"Beta(1, 3); 8, 1": {16: Cell(0.42, -0.037, 0.95, -0.001, 0.96)}}))
    | p_ref; G, β | n = 16 |
    |---|---|
    | Beta(1, 3); 8, 1 | .42 (−.037) → **.95** (−.001), .96 |
    <BLANKLINE>
    """
    lines = [["p_ref; G, β", *(f"n = {n}" for n in next(iter(cells.values())))]]
    lines += [["---"] * len(lines[0])]
    for label, row in cells.items():
        shown = [
            f"{_short(x.mapped)} ({_signed(x.mapped_bias)}) → **{_short(x.averaged)}** ({_signed(x.averaged_bias)}), "
            f"{_short(x.inside)}"
            for x in row.values()
        ]
        lines.append([label, *shown])
    return "".join("|" + "|".join(f" {x} " if x != "---" else x for x in row) + "|\n" for row in lines)


def _quadrature(estimates: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> Mean:
    """`theory.mean_interval` of the mean."""
    mean, count = float(estimates.mean()), len(estimates)
    down, up = (float(np.sqrt(np.square(x - estimates).sum())) / count for x in (lows, highs))
    return Mean(mean, mean - down, mean + up)


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")


def _signed(bias: float) -> str:
    return f"{'−' if round(bias, 3) < 0 else '+'}{abs(bias):.3f}".replace("0.", ".", 1)


def command_line() -> None:
    """Reads the flags and measures every cell."""
    repetitions = flags.DEFINE_integer("repetitions", 200, "Of each cell; coverage is then known to about .015.")
    seed = flags.DEFINE_integer("seed", 0, "Of the draws.")
    out = flags.DEFINE_string("out", "runs/coverage", "Where coverage.md and coverage.json go.")

    def main(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
        cells: dict[str, dict[int, Cell]] = {}
        for case in (*CASES, *OTHERS):
            start = time.monotonic()
            cells[case.label()] = {n: measure(case, n, repetitions.value, seed.value) for n in TRIALS}
            print(f"{case.label()}: {time.monotonic() - start:.0f} s", flush=True)
        numbers: dict[str, Any] = {label: {n: x._asdict() for n, x in row.items()} for label, row in cells.items()}
        folder = Path(out.value)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "coverage.json").write_text(
            json.dumps({"repetitions": repetitions.value, "seed": seed.value, "cells": numbers}, indent=1) + "\n",
            encoding="utf-8",
        )
        (folder / "coverage.md").write_text(table(cells), encoding="utf-8")
        print(table(cells))

    app.run(main)


if __name__ == "__main__":
    command_line()
