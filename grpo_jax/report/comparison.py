"""Two evaluations of the same prompts, prompt by prompt: what changed, and whether it may be chance. Loads no jax."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.files import read_json, read_jsonl
from grpo_jax.report.figure import INK, MEASURED, PREDICTED, new_figure, save_figure
from grpo_jax.report.markdown import inline, interval_text

PROMPTS, RESULT = "prompts.jsonl", "result.json"
LARGEST, MOST = 2e7, 4e9  # distinct sums and additions that an exact test may take; beyond, signs are sampled
DRAWS = 100_000  # vectors of signs that are sampled
CHANGED = 10  # prompts listed
# Two evaluations should differ in none of these, unless it is what is compared.
SETTINGS = ("task", "split", "verifier", "chat", "system", "samples", "temperature", "max_completion", "seed")


class ComparisonError(ValueError):
    """Two evaluations that cannot be compared; the message is one line."""


def compare(a: Path, b: Path, *, common: bool = False, confidence: float = 0.95) -> dict[str, Any]:
    """Compares two evaluation directories prompt by prompt.

    Args:
      a, b: directories of finished evaluations (see `evaluate`).
      common: compare the prompts that both have, instead of refusing where they differ.
      confidence: of the interval.

    Returns:
      JSON-able: "a" and "b" (directory, mean success, greedy accuracy), "prompts" compared, "only_a" and "only_b" left out,
      "difference" b − a with its interval over prompts like these, "p_value" of `sign_flip_test`, "better" and "worse" prompts,
      "greedy" with the discordant counts and `mcnemar_test`, "settings" that differ, "rows" (one per prompt, in a's order).

    Raises:
      ComparisonError: a directory that holds no finished evaluation, or prompts that differ.
    """
    (rows_a, result_a), (rows_b, result_b) = _read(a), _read(b)
    pairs = [(row, rows_b[key]) for key, row in rows_a.items() if key in rows_b]
    only_a, only_b = len(rows_a) - len(pairs), len(rows_b) - len(pairs)
    if not pairs:
        raise ComparisonError(f"{a} and {b} have no prompt in common")
    if (only_a or only_b) and not common:
        raise ComparisonError(
            f"the prompts differ: {len(pairs)} are in both, {only_a} only in {a}, {only_b} only in {b}; "
            "--common compares those in both"
        )

    # What is measured of each prompt, [Q].
    p_a, p_b = (np.array([pair[i]["successes"] / pair[i]["trials"] for pair in pairs]) for i in (0, 1))
    greedy_a, greedy_b = (np.array([pair[i]["greedy"] for pair in pairs]) for i in (0, 1))
    gained, lost = int((greedy_b & ~greedy_a).sum()), int((greedy_a & ~greedy_b).sum())

    settings = {name: [result_a.get(name), result_b.get(name)] for name in SETTINGS}
    return {
        "a": {"path": str(a), "success": float(p_a.mean()), "greedy": float(greedy_a.mean())},
        "b": {"path": str(b), "success": float(p_b.mean()), "greedy": float(greedy_b.mean())},
        "prompts": len(pairs),
        "only_a": only_a,
        "only_b": only_b,
        "confidence": confidence,
        "difference": paired_interval(p_b - p_a, confidence),
        "p_value": sign_flip_test(_whole_differences(pairs)),
        "better": int((p_b > p_a).sum()),
        "worse": int((p_b < p_a).sum()),
        "greedy": {"gained": gained, "lost": lost, "p_value": mcnemar_test(gained, lost)},
        "settings": {name: [x, y] for name, (x, y) in settings.items() if x != y},
        "rows": [
            {"prompt": x["prompt"], "a": float(i), "b": float(j), "greedy_a": x["greedy"], "greedy_b": y["greedy"]}
            for (x, y), i, j in zip(pairs, p_a, p_b, strict=True)
        ],
    }


def paired_interval(differences: np.ndarray, confidence: float) -> dict[str, float | None]:
    """Student's interval of a mean difference over prompts like these; with one prompt its ends are None.

    Args:
      differences: [Q] per prompt; their variance contains the spread of prompts and the noise of the samples.
      confidence: in (0, 1).

    >>> {name: round(x, 3) for name, x in paired_interval(np.array([0.0, 0.1, 0.2]), 0.95).items()}
    {'mean': 0.1, 'low': -0.148, 'high': 0.348}
    """
    from scipy.special import stdtrit

    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    half_width = float(stdtrit(count - 1, (1 + confidence) / 2) * differences.std(ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - half_width, "high": mean + half_width}


def sign_flip_test(differences: Sequence[int]) -> float:
    """Two-sided p-value of paired differences, if each sign were as likely as the other: P(|Σ ±d| ≥ |Σ d|).

    Exact: the sum of the positive differences is a whole number, and its distribution over all 2^Q signs is built up prompt by
    prompt. Where that would take too long, 100,000 vectors of signs are sampled, always from the same seed.

    Args:
      differences: [Q] whole numbers, such as successes of b minus those of a.

    Source: R. A. Fisher, The Design of Experiments (1935), §21.

    >>> sign_flip_test([1, 1, 1, 1]), sign_flip_test([3, -3, 0])
    (0.125, 1.0)
    """
    unit = math.gcd(*differences)
    if not unit:
        return 1.0
    sizes, observed = [abs(d) // unit for d in differences if d], abs(sum(differences)) // unit
    total = sum(sizes)
    if total > LARGEST or total * len(sizes) > MOST:
        generator, steps = np.random.default_rng(0), np.array(sizes, float)
        sums = [abs(float(steps @ generator.choice((-1.0, 1.0), len(sizes)))) for _ in range(DRAWS)]
        return (1 + sum(x >= observed for x in sums)) / (1 + DRAWS)

    # chance[t]: the probability that the positive ones of the differences so far add up to t ≤ reach.
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    reach = 0
    for size in sizes:
        halves = chance[: reach + 1] / 2
        chance[: reach + 1] = halves  # this difference is negative
        chance[size : reach + size + 1] += halves  # or positive
        reach += size

    # Where the positive ones add up to t, all of them add up to 2t − total.
    extreme = np.abs(2 * np.arange(total + 1) - total) >= observed
    return min(1.0, float(chance[extreme].sum()))


def mcnemar_test(gained: int, lost: int) -> float:
    """Two-sided exact p-value, if gained and lost answers were equally likely: 2 P(Binomial(gained + lost, ½) ≤ the fewer).

    Source: Q. McNemar, Psychometrika 12 (1947), 153, in its exact form.

    >>> mcnemar_test(0, 0), mcnemar_test(5, 0)
    (1.0, 0.0625)
    """
    n, few = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)


def comparison_lines(comparison: dict[str, Any]) -> list[str]:
    """The comparison as text for a terminal; prompts are escaped."""
    a, b, greedy, difference = (comparison[key] for key in ("a", "b", "greedy", "difference"))
    left_out = like = ""
    if comparison["only_a"] + comparison["only_b"]:
        left_out = f"; left out: {comparison['only_a']} of a, {comparison['only_b']} of b"
    if difference["low"] is not None:
        like = " on prompts like these"
    lines = [
        f"a         {inline(a['path'])}",
        f"b         {inline(b['path'])}",
        f"prompts   {comparison['prompts']:,}{left_out}",
        *(f"note      {name} differs: {inline(f'{x} | {y}')}" for name, (x, y) in comparison["settings"].items()),
        f"success   {a['success']:.4f} → {b['success']:.4f}",
        f"b − a     {interval_text(difference, comparison['confidence'], sign='+')}{like}",
        f"test      p = {comparison['p_value']:.3g} (signs of the prompts' differences), "
        f"{comparison['better']:,} prompts better, {comparison['worse']:,} worse",
        f"greedy    {a['greedy']:.4f} → {b['greedy']:.4f}: {greedy['gained']:,} gained, {greedy['lost']:,} lost, "
        f"p = {greedy['p_value']:.3g} (McNemar)",
    ]

    # The prompts that changed most.
    changed = [row for row in comparison["rows"] if row["a"] != row["b"]]
    if changed:
        lines += ["", "  p(a) →  p(b)  greedy  the prompts that changed most"]
    mark = {True: "✓", False: "✗"}
    for row in sorted(changed, key=lambda row: -abs(row["b"] - row["a"]))[:CHANGED]:
        marks = f"{mark[row['greedy_a']]} → {mark[row['greedy_b']]}"
        lines.append(f"  {row['a']:.3f} → {row['b']:.3f}  {marks}   {inline(row['prompt'][-70:])}")
    return lines


def plot_comparison(path: Path, comparison: dict[str, Any]) -> None:
    """Writes a PNG: each prompt's success under b over that under a; prompts at one place share a larger dot."""
    figure, (axes,) = new_figure((5.6, 5.4))
    prompts_at = Counter((row["a"], row["b"]) for row in comparison["rows"])
    x, y = zip(*prompts_at, strict=True)
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    axes.scatter(x, y, [16 * n**0.75 for n in prompts_at.values()], color=MEASURED, alpha=0.6, linewidths=0)
    means = comparison["a"]["success"], comparison["b"]["success"]
    axes.plot(*means, marker="+", markersize=14, markeredgewidth=2, color=PREDICTED, linestyle="none", label="mean")
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    difference = f"b − a = {comparison['difference']['mean']:+.4f}, p = {comparison['p_value']:.2g}"
    axes.set_title(f"{difference}, {comparison['prompts']:,} prompts")
    axes.set(xlabel="success probability under a", ylabel="success probability under b")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    save_figure(figure, path)


def _whole_differences(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[int]:
    """Differences b − a of the success rate, in a unit that makes all of them whole numbers."""
    units = math.lcm(*(row["trials"] for pair in pairs for row in pair))
    shares = [[row["successes"] * (units // row["trials"]) for row in pair] for pair in pairs]
    return [b - a for a, b in shares]


def _read(directory: Path) -> tuple[dict[tuple[str, str, int], dict[str, Any]], dict[str, Any]]:
    """The rows by (prompt, target, number of equal ones before), in order, and the result."""
    try:
        result, rows = read_json(directory / RESULT), read_jsonl(directory / PROMPTS)
    except OSError as error:
        inside = [str(path.parent) for path in sorted(directory.glob(f"evaluations/*/{RESULT}"))]
        reason = f"there are {', '.join(inside)}" if inside else f"{error.strerror}: {error.filename}"
        raise ComparisonError(f"{directory} holds no finished evaluation ({reason})") from None
    except ValueError as error:
        raise ComparisonError(f"{directory} holds no finished evaluation ({error})") from None
    times: Counter[tuple[str, str]] = Counter()
    by_key = {}
    for number, row in enumerate(rows, 1):
        try:
            _check_row(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ComparisonError(f"{directory / PROMPTS}:{number}: not a row of an evaluation ({error})") from None
        key = row["prompt"], row["target"]
        by_key[(*key, times[key])] = row
        times[key] += 1
    return by_key, result if isinstance(result, dict) else {}


def _check_row(row: Any) -> None:
    for name, kind in {"prompt": str, "target": str, "successes": int, "trials": int, "greedy": bool}.items():
        if type(row[name]) is not kind:
            raise ValueError(f"{name} is not {kind.__name__}")
    if not 0 <= row["successes"] <= row["trials"] or row["trials"] < 1:
        raise ValueError(f"successes={row['successes']} of trials={row['trials']}")
