"""An evaluation in words, as pages to browse, and as a figure. Model output is hostile here: nothing in it may act."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.report.figure import INK, MEASURED, PREDICTED
from grpo_jax.report.markdown import inline

NEVER = "#999999"  # prompts never solved stand apart
WIDTH = 112  # characters of a line of samples.txt
SHOWN = 4  # completions of a prompt on the page
LONGEST = 600  # characters of one of them


def evaluation_table(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(quantity, value) lines of an evaluation."""
    percent, size = f"{result['confidence']:.0%}", result["group_size"]

    def interval(x: dict[str, float]) -> str:
        return f"{x['mean']:.4f}   {percent} [{x['low']:.4f}, {x['high']:.4f}]"

    lines = [("success probability", interval(result["success"]) + "   of these prompts")]
    like = {"1": "   of prompts like these, as all that follow"}
    lines += [(f"pass@{k}", interval(x) + like.get(k, "")) for k, x in result["pass"].items()]
    lines += [(f"maj@{k}", interval(x)) for k, x in (result["majority"] or {}).items()]
    lines.append(("greedy accuracy", interval(result["greedy"])))
    if result["kl"] is not None:
        width = result["kl"]["half_width"]
        error = "" if width is None else f"   {percent} ±{width:.4f}"
        lines.append(("KL(π‖π_ref), nats", f"{result['kl']['mean']:.4f}{error}"))
    done = result["prompts"] * result["samples"]
    verdicts = [f"{name} {count:,} ({count / done:.1%})" for name, count in result["verdicts"].items()]
    lines += [
        ("completion length, tokens", f"{result['length']:.1f}"),
        ("truncated", f"{result['truncated']:.1%}"),
        ("verdicts", ", ".join(verdicts)),
        (
            "prompts never solved",
            f"{result['never']:,} of {result['prompts']:,}, in {result['samples']:,} samples each",
        ),
        ("prompts always solved", f"{result['always']:,} of {result['prompts']:,}"),
        (f"dead groups at G = {size}", f"{result['dead_groups']:.1%} expected"),
    ]
    if result["disagreements"]:
        text = f"{result['disagreements']:,} completions: the text is right and its tokens are not, or the reverse"
        lines.append(("rewards unlike verdicts", text))
    return lines + [("in words", words) for words in _in_words(result)]


def evaluation_page(
    result: dict[str, Any],
    header: list[tuple[str, str]],
    rows: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]],
) -> str:
    """The evaluation as a Markdown page: header, table, figure, and the samples of the given prompts."""
    parts = [f"# {inline(result['checkpoint'])} on {inline(result['task'])}", ""]
    parts += [f"- **{label}**: {inline(text)}" for label, text in header]
    parts += ["", "| quantity | value |", "|---|---|"]
    parts += [f"| {name} | {value} |" for name, value in evaluation_table(result)]
    parts += ["", "![success probability of the prompts, and pass@k](figure.png)", "", "## Samples", ""]
    by_prompt = _by_prompt(samples)
    for row in rows:
        counts = f"{row['successes']} of {row['trials']}"
        parts += [f"### prompt {row['index']}: {counts}", "", f"- prompt `{_short(row['prompt'])}`"]
        parts.append(f"- target `{_short(row['target'])}`")
        parts += [
            f"- {'greedy' if s['greedy'] else 'sample'} {'✓' if s['reward'] else '✗'} {s['verdict']} `{_short(s['text'])}`"
            for s in by_prompt[row["index"]][: SHOWN + 1]
        ]
        parts.append("")
    return "\n".join(parts)


def samples_text(rows: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> str:
    """All samples kept, to be read in a pager: every line of prompt, target or model output stands behind a bar.

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
    by_prompt, parts = _by_prompt(samples), []
    for row in rows:
        greedy = "right" if row["greedy"] else "wrong"
        parts.append(f"=== prompt {row['index']}: {row['successes']} of {row['trials']}, greedy {greedy}")
        for name in ("prompt", "target"):
            parts += [name, *_barred(row[name])]
        for s in by_prompt[row["index"]]:
            name = "greedy" if s["greedy"] else f"sample {s['sample']}"
            cut = ", truncated" if s["truncated"] else ""
            parts += [f"{name}: {s['verdict']}, {s['tokens']} tokens{cut}", *_barred(s["text"])]
        parts.append("")
    return "\n".join(parts)


def plot_evaluation(path: Path, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Writes a PNG with two panels: how many prompts have which success, and pass@k, maj@k and greedy over k."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_prompts(left, rows, result)
    _draw_passes(right, result)
    for axes in (left, right):
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_prompts(axes: Any, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    trials = result["samples"]
    bars = min(trials, 32)
    heights = Counter(0 if row["successes"] == 0 else -(-row["successes"] * bars // trials) for row in rows)
    places = np.arange(bars + 1)
    colours = [NEVER, *[MEASURED] * bars]
    axes.bar(places / bars, [heights[i] for i in places.tolist()], width=0.85 / bars, color=colours)
    axes.axvline(result["success"]["mean"], color=INK, linestyle=":", linewidth=1.2)
    axes.yaxis.get_major_locator().set_params(integer=True)
    grey = ", grey" if result["never"] else ""
    title = (
        f"mean {result['success']['mean']:.3f}, dotted; {result['never']:,} of {result['prompts']:,} never solved{grey}"
    )
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=f"successes of {trials:,} samples, share", ylabel="prompts", xlim=(-0.05, 1.05))


def _draw_passes(axes: Any, result: dict[str, Any]) -> None:
    shown = (("pass", MEASURED, "o", "pass@k"), ("majority", PREDICTED, "s", "maj@k"))
    for key, colour, marker, label in shown:
        if found := result[key]:
            k = [int(name) for name in found]
            mean, low, high = (np.array([x[end] for x in found.values()]) for end in ("mean", "low", "high"))
            axes.fill_between(k, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(k, mean, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    axes.axhline(result["greedy"]["mean"], color=INK, linestyle="--", linewidth=1, label="greedy")
    axes.set_xscale("log", base=2)
    ticks = [int(k) for k in result["pass"]]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    title = inline(f"{result['checkpoint']} on {result['task']}")[:80]
    axes.set_title(title, fontsize=10, parse_math=False)  # a file's name may hold dollars
    axes.set(xlabel="k samples", ylabel=f"share of prompts, {result['confidence']:.0%} bands", ylim=(-0.02, 1.02))
    axes.legend(frameon=False, fontsize=9)


def _in_words(result: dict[str, Any]) -> list[str]:
    """What a policy that hardly ever succeeds must be told."""
    percent, done = f"{result['confidence']:.0%}", result["prompts"] * result["samples"]
    bound, size, words = result["success_bound"], result["group_size"], []
    if result["successes"] == 0:
        least = (1 - bound) ** size
        words.append(
            f"not one of {done:,} completions succeeded: the mean success probability of these prompts is below {bound:.2g} "
            f"({percent}, one-sided), and even there {least:.1%} or more of the groups are dead"
        )
    elif bound < 0.02:
        words.append(
            f"{result['successes']:,} of {done:,} completions succeeded: the mean success probability of these prompts is below "
            f"{bound:.2g} ({percent}, one-sided)"
        )
    if result["dead_groups"] > 0.9 and result["success"]["mean"] < 0.5:
        words.append(
            f"GRPO learns only from groups with successes and failures: of groups of {size} hardly any has both"
        )
    return words


def _by_prompt(samples: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        found[sample["index"]].append(sample)
    return found


def _short(text: str) -> str:
    shown = inline(text[:LONGEST])
    return shown if len(text) <= LONGEST else f"{shown} … {len(text) - LONGEST:,} more characters"


def _barred(text: str) -> list[str]:
    escape: Callable[[str], str] = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode()  # noqa: E731
    lines = ["".join(map(escape, line)) for line in text.split("\n")]
    return [f"  │ {line[at : at + WIDTH]}" for line in lines for at in range(0, max(len(line), 1), WIDTH)]
