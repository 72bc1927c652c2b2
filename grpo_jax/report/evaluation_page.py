"""An evaluation in words, as pages to browse, and as a figure. Model output is hostile here: nothing in it may act."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.report.figure import INK, MEASURED, PREDICTED, new_figure, save_figure
from grpo_jax.report.markdown import Lines, escaped, inline, interval_text, page_start
from grpo_jax.report.run_page import ledger_lines

NEVER = "#999999"  # colour of the prompts that were never solved
WIDTH = 112  # characters of a line of samples.txt
SHOWN = 4  # completions of a prompt on the page
LONGEST = 600  # characters of one of them


def result_lines(result: dict[str, Any]) -> Lines:
    """(quantity, value) lines of an evaluation."""
    confidence, prompts = result["confidence"], f"{result['prompts']:,}"

    def interval(numbers: dict[str, float]) -> str:
        return interval_text(numbers, confidence)

    # How often the policy succeeds.
    lines = [("success probability", f"{interval(result['success'])}   of these prompts")]
    for k, numbers in result["pass"].items():
        like = "   of prompts like these, as all that follow" if k == "1" else ""
        lines.append((f"pass@{k}", interval(numbers) + like))
    lines += [(f"maj@{k}", interval(numbers)) for k, numbers in (result["majority"] or {}).items()]
    lines.append(("greedy accuracy", interval(result["greedy"])))

    # What its completions are like.
    if kl := result["kl"]:
        error = "" if kl["half_width"] is None else f"   {confidence:.0%} ±{kl['half_width']:.4f}"
        lines.append(("KL(π‖π_ref), nats", f"{kl['mean']:.4f}{error}"))
        unknown = "not known: measure --checkpoint=reference on these prompts, then this again with --name=NAME"
        lines += ledger_lines(result["ledger"], confidence) if "ledger" in result else [("… useful", unknown)]
    completions = result["prompts"] * result["samples"]
    verdicts = [f"{name} {count:,} ({count / completions:.1%})" for name, count in result["verdicts"].items()]
    lines += [
        ("completion length, tokens", f"{result['length']:.1f}"),
        ("truncated", f"{result['truncated']:.1%}"),
        ("verdicts", ", ".join(verdicts)),
        ("prompts never solved", f"{result['never']:,} of {prompts}, in {result['samples']:,} samples each"),
        ("prompts always solved", f"{result['always']:,} of {prompts}"),
        (f"dead groups at G = {result['group_size']}", f"{result['dead_groups']:.1%} expected"),
    ]
    if result["disagreements"]:
        text = f"{result['disagreements']:,} completions: the text is right and its tokens are not, or the reverse"
        lines.append(("rewards unlike verdicts", text))
    return lines + [("in words", words) for words in _in_words(result)]


def page(
    result: dict[str, Any], header: Lines, rows: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]
) -> str:
    """The evaluation as a Markdown page: header, table, figure, and the samples of the given prompts."""
    title = f"{inline(result['checkpoint'])} on {inline(result['task'])}"
    inert = [(label, inline(text)) for label, text in header]
    lines = page_start(title, inert, result_lines(result), "success probability of the prompts, and pass@k")
    by_prompt = _by_prompt(samples)
    for row in rows:
        lines += [f"### prompt {row['index']}: {row['successes']} of {row['trials']}", ""]
        lines += [f"- {name} `{_shortened(row[name])}`" for name in ("prompt", "target")]
        for sample in by_prompt[row["index"]][: SHOWN + 1]:
            kind, mark = "greedy" if sample["greedy"] else "sample", "✓" if sample["reward"] else "✗"
            lines.append(f"- {kind} {mark} {sample['verdict']} `{_shortened(sample['text'])}`")
        lines.append("")
    return "\n".join(lines)


def samples_text(rows: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> str:
    """All samples that are stored, to be read in a pager: every line of prompt, target or model output stands behind a bar.

    Control characters are escaped and long lines folded, so that no text can act on a terminal or pass for another part.

    >>> row = {"index": 0, "successes": 1, "trials": 2, "greedy": False, "prompt": "1+1=", "target": "2"}
    >>> sample = {"index": 0, "sample": 0, "greedy": False, "verdict": "wrong", "tokens": 3, "truncated": False}
    >>> print(samples_text([row], [sample | {"text": "3" + chr(27) + "[2J" + chr(10) + "=== prompt 1"}]))
    === prompt 0: 1 of 2, greedy wrong
    prompt
      │ 1+1=
    target
      │ 2
    sample 0: wrong, 3 tokens
      │ 3\\x1b[2J
      │ === prompt 1
    <BLANKLINE>
    """
    by_prompt, lines = _by_prompt(samples), []
    for row in rows:
        greedy = "right" if row["greedy"] else "wrong"
        lines.append(f"=== prompt {row['index']}: {row['successes']} of {row['trials']}, greedy {greedy}")
        for name in ("prompt", "target"):
            lines += [name, *_behind_bars(row[name])]
        for sample in by_prompt[row["index"]]:
            name = "greedy" if sample["greedy"] else f"sample {sample['sample']}"
            cut = ", truncated" if sample["truncated"] else ""
            lines.append(f"{name}: {sample['verdict']}, {sample['tokens']} tokens{cut}")
            lines += _behind_bars(sample["text"])
        lines.append("")
    return "\n".join(lines)


def plot_evaluation(path: Path, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Writes a PNG with two panels: a histogram of the prompts' success, and pass@k, maj@k and greedy over k."""
    figure, (left, right) = new_figure((11, 4.2), ncols=2)
    _plot_prompts(left, rows, result)
    _plot_passes(right, result)
    save_figure(figure, path)


def _plot_prompts(axes: Any, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    trials, mean, never = result["samples"], result["success"]["mean"], result["never"]
    # Bar 0 holds the prompts without a success; bar i those whose share is above (i − 1)/bars and at most i/bars.
    bars = min(trials, 32)
    heights = Counter(-(-row["successes"] * bars // trials) for row in rows)
    colours = [NEVER, *[MEASURED] * bars]
    axes.bar(np.arange(bars + 1) / bars, [heights[i] for i in range(bars + 1)], width=0.85 / bars, color=colours)
    axes.axvline(mean, color=INK, linestyle=":", linewidth=1.2)
    axes.yaxis.get_major_locator().set_params(integer=True)
    grey = ", grey" if never else ""
    axes.set_title(f"mean {mean:.3f}, dotted; {never:,} of {result['prompts']:,} never solved{grey}")
    axes.set(xlabel=f"successes of {trials:,} samples, share", ylabel="prompts", xlim=(-0.05, 1.05))


def _plot_passes(axes: Any, result: dict[str, Any]) -> None:
    for key, colour, marker, label in (("pass", MEASURED, "o", "pass@k"), ("majority", PREDICTED, "s", "maj@k")):
        if by_k := result[key]:
            k = [int(name) for name in by_k]
            mean, low, high = (np.array([x[end] for x in by_k.values()]) for end in ("mean", "low", "high"))
            axes.fill_between(k, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(k, mean, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    axes.axhline(result["greedy"]["mean"], color=INK, linestyle="--", linewidth=1, label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(k) for k in result["pass"]], list(result["pass"]))
    title = inline(f"{result['checkpoint']} on {result['task']}")[:80]
    axes.set_title(title, parse_math=False)  # a file's name may hold dollars
    axes.set(xlabel="k samples", ylabel=f"share of prompts, {result['confidence']:.0%} bands", ylim=(-0.02, 1.02))
    axes.legend(frameon=False, fontsize=9)


def _in_words(result: dict[str, Any]) -> list[str]:
    """What to know of a policy that hardly ever succeeds."""
    completions, bound, size = result["prompts"] * result["samples"], result["success_bound"], result["group_size"]
    below = (
        f"of {completions:,} completions succeeded: the mean success probability of these prompts is below {bound:.2g} "
        f"({result['confidence']:.0%}, one-sided)"
    )
    words = []
    if result["successes"] == 0:
        dead = (1 - bound) ** size
        words.append(f"not one {below}, and even there {dead:.1%} or more of the groups are dead")
    elif bound < 0.02:
        words.append(f"{result['successes']:,} {below}")
    if result["dead_groups"] > 0.9 and result["success"]["mean"] < 0.5:
        learns = "GRPO learns only from groups with successes and failures"
        words.append(f"{learns}: of groups of {size} hardly any has both")
    return words


def _by_prompt(samples: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    by_prompt: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        by_prompt[sample["index"]].append(sample)
    return by_prompt


def _shortened(text: str) -> str:
    shown = inline(text[:LONGEST])
    return shown if len(text) <= LONGEST else f"{shown} … {len(text) - LONGEST:,} more characters"


def _behind_bars(text: str) -> list[str]:
    lines = [escaped(line) for line in text.split("\n")]
    return [f"  │ {line[at : at + WIDTH]}" for line in lines for at in range(0, max(len(line), 1), WIDTH)]
