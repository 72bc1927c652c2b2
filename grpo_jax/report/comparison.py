"""Two evaluations of the same prompts, prompt by prompt: what changed, and whether chance alone would do it. Loads no jax."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.report.markdown import inline

PROMPTS, RESULT = "prompts.jsonl", "result.json"
LARGEST, MOST = 2e7, 4e9  # distinct sums and additions that an exact test may take; beyond, signs are drawn
DRAWS = 100_000
CHANGED = 10  # prompts listed
# What two evaluations should share, but for what is compared.
SETTINGS = (
    *("task", "split", "verifier", "chat", "system"),
    *("samples", "temperature", "max_completion", "seed"),
)


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
    sides = [_read(path) for path in (a, b)]
    (rows_a, result_a), (rows_b, result_b) = sides
    pairs = [(row, rows_b[key]) for key, row in rows_a.items() if key in rows_b]
    only_a, only_b = len(rows_a) - len(pairs), len(rows_b) - len(pairs)
    if not pairs:
        raise ComparisonError(f"{a} and {b} have no prompt in common")
    if (only_a or only_b) and not common:
        raise ComparisonError(
            f"the prompts differ: {len(pairs)} are in both, {only_a} only in {a}, {only_b} only in {b}; "
            "--common compares those in both"
        )
    p_a, p_b = (np.array([pair[i]["successes"] / pair[i]["trials"] for pair in pairs]) for i in (0, 1))
    gained = sum(not x["greedy"] and y["greedy"] for x, y in pairs)
    lost = sum(x["greedy"] and not y["greedy"] for x, y in pairs)
    differing = [name for name in SETTINGS if result_a.get(name) != result_b.get(name)]
    return {
        "a": {"path": str(a), "success": float(p_a.mean()), "greedy": sum(x["greedy"] for x, _ in pairs) / len(pairs)},
        "b": {"path": str(b), "success": float(p_b.mean()), "greedy": sum(y["greedy"] for _, y in pairs) / len(pairs)},
        "prompts": len(pairs),
        "only_a": only_a,
        "only_b": only_b,
        "confidence": confidence,
        "difference": paired_interval(p_b - p_a, confidence),
        "p_value": sign_flip_test(_whole_differences(pairs)),
        "better": int((p_b > p_a).sum()),
        "worse": int((p_b < p_a).sum()),
        "greedy": {"gained": gained, "lost": lost, "p_value": mcnemar_test(gained, lost)},
        "settings": {name: [result_a.get(name), result_b.get(name)] for name in differing},
        "rows": [
            {"prompt": x["prompt"], "a": float(i), "b": float(j), "greedy_a": x["greedy"], "greedy_b": y["greedy"]}
            for (x, y), i, j in zip(pairs, p_a, p_b, strict=True)
        ],
    }


def paired_interval(differences: np.ndarray, confidence: float) -> dict[str, float | None]:
    """Student's interval of a mean difference over prompts like these; None for its ends where there is one prompt.

    Args:
      differences: [Q] per prompt; their variance holds the spread of prompts and the samples' own noise.
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
    """Two-sided p-value of paired differences, were each as likely to have the other sign: P(|Σ ±d| ≥ |Σ d|).

    Exact: the sum of the positive differences takes whole values, and its distribution over all 2^Q signs is built up prompt by
    prompt. Where that would take too long, 100,000 signs are drawn, with one seed for ever.

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
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    reach = 0
    for size in sizes:  # chance[t]: that the positive ones add up to t
        added = chance[: reach + 1] / 2
        chance[: reach + 1] = added
        chance[size : reach + size + 1] += added
        reach += size
    extreme = np.abs(2 * np.arange(total + 1) - total) >= observed
    return min(1.0, float(chance[extreme].sum()))


def mcnemar_test(gained: int, lost: int) -> float:
    """Two-sided exact p-value that answers gained and lost are equally likely: 2 P(Binomial(gained + lost, ½) ≤ the fewer).

    Source: Q. McNemar, Psychometrika 12 (1947), 153, in its exact form.

    >>> mcnemar_test(0, 0), mcnemar_test(5, 0)
    (1.0, 0.0625)
    """
    n, few = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)


def comparison_lines(found: dict[str, Any]) -> list[str]:
    """The comparison as text for a terminal; prompts are escaped."""
    a, b, difference, percent = found["a"], found["b"], found["difference"], f"{found['confidence']:.0%}"
    low, high = difference["low"], difference["high"]
    interval = "" if low is None else f"   {percent} [{low:+.4f}, {high:+.4f}] on prompts like these"
    greedy = found["greedy"]
    lines = [f"a         {inline(a['path'])}", f"b         {inline(b['path'])}"]
    left = (
        "" if not found["only_a"] + found["only_b"] else f"; left out: {found['only_a']} of a, {found['only_b']} of b"
    )
    lines += [
        f"prompts   {found['prompts']:,}{left}",
        *(f"note      {name} differs: {inline(f'{x} | {y}')}" for name, (x, y) in found["settings"].items()),
        f"success   {a['success']:.4f} → {b['success']:.4f}",
        f"b − a     {difference['mean']:+.4f}{interval}",
        f"test      p = {found['p_value']:.3g} (signs of the prompts' differences), {found['better']:,} prompts better, "
        f"{found['worse']:,} worse",
        f"greedy    {a['greedy']:.4f} → {b['greedy']:.4f}: {greedy['gained']:,} gained, {greedy['lost']:,} lost, "
        f"p = {greedy['p_value']:.3g} (McNemar)",
    ]
    rows = sorted(found["rows"], key=lambda row: -abs(row["b"] - row["a"]))[:CHANGED]
    if changed := [row for row in rows if row["a"] != row["b"]]:
        lines += ["", "  p(a) →  p(b)  greedy  the prompts that changed most"]
    mark = {True: "✓", False: "✗"}
    for row in changed:
        moved = f"  {row['a']:.3f} → {row['b']:.3f}  {mark[row['greedy_a']]} → {mark[row['greedy_b']]} "
        lines.append(f"{moved}  {inline(row['prompt'][-70:])}")
    return lines


def draw_comparison(path: Path, found: dict[str, Any]) -> None:
    """Writes a PNG: each prompt's success under b over that under a; prompts at one place share a larger dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from grpo_jax.report.figure import INK, MEASURED, PREDICTED

    figure = Figure(figsize=(5.6, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = Counter((row["a"], row["b"]) for row in found["rows"])
    x, y = zip(*places, strict=True)
    many = [16 * n**0.75 for n in places.values()]
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    axes.scatter(x, y, many, color=MEASURED, alpha=0.6, linewidths=0)
    means = found["a"]["success"], found["b"]["success"]
    axes.plot(*means, marker="+", markersize=14, markeredgewidth=2, color=PREDICTED, linestyle="none", label="mean")
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    axes.set(xlabel="success probability under a", ylabel="success probability under b")
    title = f"b − a = {found['difference']['mean']:+.4f}, p = {found['p_value']:.2g}, {found['prompts']:,} prompts"
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _whole_differences(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[int]:
    """Differences b − a of success, in units that make them whole."""
    units = math.lcm(*(row["trials"] for pair in pairs for row in pair))
    shares = [[row["successes"] * (units // row["trials"]) for row in pair] for pair in pairs]
    return [b - a for a, b in shares]


def _read(directory: Path) -> tuple[dict[tuple[str, str, int], dict[str, Any]], dict[str, Any]]:
    """Rows by (prompt, target, how often it came before), in order, and the result."""
    try:
        result = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        lines = (directory / PROMPTS).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
    except OSError as error:
        inside = [str(path.parent) for path in sorted(directory.glob(f"evaluations/*/{RESULT}"))]
        reason = f"there are {', '.join(inside)}" if inside else f"{error.strerror}: {error.filename}"
        raise ComparisonError(f"{directory} holds no finished evaluation ({reason})") from None
    except ValueError as error:
        raise ComparisonError(f"{directory} holds no finished evaluation ({error})") from None
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for number, row in enumerate(rows, 1):
        try:
            _check_row(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ComparisonError(f"{directory / PROMPTS}:{number}: not a row of an evaluation ({error})") from None
        key = row["prompt"], row["target"]
        found[(*key, seen[key])] = row
        seen[key] += 1
    return found, result if isinstance(result, dict) else {}


def _check_row(row: Any) -> None:
    for name, kind in (("prompt", str), ("target", str), ("successes", int), ("trials", int), ("greedy", bool)):
        if type(row[name]) is not kind:
            raise ValueError(f"{name} is not {kind.__name__}")
    if not 0 <= row["successes"] <= row["trials"] or row["trials"] < 1:
        raise ValueError(f"successes={row['successes']} of trials={row['trials']}")
