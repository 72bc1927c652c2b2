"""The end of a run in words: the table on the console, and report.md with the figure and the samples."""

from typing import Any


def table(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(quantity, value) lines of a result."""
    percent = f"{result['confidence']:.0%}"

    def interval(x: dict[str, float]) -> str:
        return f"{x['mean']:.4f}   {percent} [{x['low']:.4f}, {x['high']:.4f}]"

    before, after = result["before"], result["after"]
    solved = result["p_ref"]["mean"] > 0 or result["p_final"]["mean"] > 0
    lines = [("p_ref", interval(result["p_ref"])), ("final p̂", interval(result["p_final"]))]
    if "p_star" in result:
        difference = result["difference"]
        lines += [
            ("predicted p*", interval(result["p_star"])),
            (
                "p̂ − p*",
                f"{difference['mean']:+.4f}   prediction interval ±{difference['half_width']:.4f}: "
                + ("inside" if difference["inside"] else "OUTSIDE")
                if solved
                else "no test: nothing was solved",
            ),
            (
                "per prompt, rms p̂ − p*",
                f"{result['rms']['measured']:.4f}   {result['rms']['noise']:.4f} from sampling alone",
            ),
        ]
        if result["folds"]:
            lines.append(("prompts across a fold", f"{result['folds']}   their p* may be either branch's"))
        lines.append(("KL(π‖π_ref), nats", f"{after['kl']:.4f} measured   {result['kl_predicted']:.4f} predicted"))
    else:
        lines.append(
            ("KL(π‖π_ref), nats", f"{after['kl']:.4f} measured   no prediction of p*: see the fixed point above")
        )
    for name, key in (("greedy accuracy", "greedy"), ("sampled accuracy, pass@1", "pass@1"), ("pass@8", "pass@8")):
        lines.append((name, f"{before[key]:.4f} before   {after[key]:.4f} after"))
    lines.append(("completion length, tokens", f"{before['length']:.1f} before   {after['length']:.1f} after"))
    lines.append(("truncated", f"{before['truncated']:.1%} before   {after['truncated']:.1%} after"))
    if after["verdicts"]:
        lines.append(("verdicts after", verdict_counts(after["verdicts"])))
    if "p_star" in result and result["difference"]["mean"] < 0 and not result["difference"]["inside"]:
        lines.append(("in words", _short_of(after["kl"] / max(result["kl_predicted"], 1e-9))))
    return lines


def verdict_counts(verdicts: dict[str, int]) -> str:
    """Counts of verdicts as text.

    >>> verdict_counts({"wrong": 1200, "correct": 3})
    'correct 3, wrong 1,200'
    """
    return ", ".join(f"{name} {count:,}" for name, count in sorted(verdicts.items()))


def _short_of(share: float) -> str:
    spent = f"the run ended below p*, with {share:.0%} of the predicted KL spent"
    if share > 0.9:
        return f"{spent}: the gradient dies near p* = 1, or the KL went into something else than success"
    return (
        f"{spent}: it has not arrived. More iterations or a larger learning rate may take it further, unless the model cannot "
        "represent the policy that the theory asks for"
    )


def report(result: dict[str, Any], header: list[tuple[str, str]], examples: dict[str, list[dict[str, Any]]]) -> str:
    """The run as a Markdown page: header, table, figure, and samples before and after."""
    weights = {"β": result["beta"], "β_mirror": result["beta_mirror"], "entropy bonus": result["entropy_bonus"]}
    shown = ", ".join(f"{label} = {weight:g}" for label, weight in weights.items() if weight)
    parts = [f"# {result['objective']}{' at ' if shown else ''}{shown}, seed {result['seed']}", ""]
    parts += [f"- **{label}**: {text}" for label, text in header]
    parts += ["", "| quantity | value |", "|---|---|"]
    parts += [f"| {name} | {value} |" for name, value in table(result)]
    parts += ["", "![success probability over iterations, and prompt by prompt](figure.png)", "", "## Samples", ""]
    for before, after in zip(examples["before"], examples["after"], strict=True):
        parts += [f"### `{inline(before['prompt'])}` → `{inline(before['target'])}`", ""]
        for name, part in (("before", before), ("after", after)):
            parts += [f"- {name}, {'✓' if c['reward'] else '✗'} `{inline(c['text'])}`" for c in part["completions"]]
        parts.append("")
    return "\n".join(parts)


def inline(text: str) -> str:
    """Model output as one line of Markdown code: control characters escaped, so that nothing in it acts."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text).replace("`", "ˋ")
