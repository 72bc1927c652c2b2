"""A real language model on the predicted curve: every run of a β sweep beside p* and p†, which were drawn before it.

    python launch.py --config=configs/smollm2_sums.py --config.model.path=FOLDER --sweep="seed=0,1;objective.beta=1,3,0.5" \\
        --workdir=runs/smollm2
    python -m experiments.language_model --sweep=runs/smollm2

Reads the finished runs of the sweep; writes language_model.png, the table language_model.md, and the numbers. Prompt by prompt,
the gain in log-odds is set against what p† says of that prompt (`attainable`), and against Ω_G(p̂)/β, which a table would gain;
slopes and intercepts are clustered by prompt and by run, as in experiments/recurrence.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.recurrence import Gains, fitted, gains_of
from experiments.runs import band
from experiments.theory.figures import INK, line, marker, new_figure, save, title
from grpo_jax.files import read_json, read_jsonl

CAPTION = (
    "{model}, {prompts} prompts, G = {group}. Left: success over iterations for {betas} (bars: 95 %), with p* of a table (dashed)"
    " and p† of this network (line and band); both were drawn before the first iteration, and"
    " nothing is fitted. Right: every prompt of every run, how far its log-odds rose over what p† says of it; the line has"
    " slope 1 and is not fitted. Bars: one standard error of the sampling."
)
HEAD = (
    "| β | seed | p_ref | p\\* of a table | R² of the pull | p† of the network | p̂ after {n} iterations | KL | useful "
    "| pull followed | its report says |"
)


def gains_of_network(result: dict[str, Any], config: dict[str, Any]) -> Gains:
    """Gains in log-odds of a finished run over those that p† predicts, of the same prompts as `gains_of`."""
    table = gains_of(result, config, end="attainable")
    prompts = result["prompts"]
    rows = result["measured"]["prompts"]
    assert len(rows) == len(prompts["p_ref"]), "p† of all prompts"
    p_ref, least = (np.clip(np.array(prompts[name]), 1e-9, 1 - 1e-9) for name in ("p_ref", "attainable"))
    trials = config["evaluate.final_samples"]
    smoothed = (p_ref * trials + 0.5) / (trials + 1)
    predicted = np.log(least / (1 - least)) - np.log(smoothed / (1 - smoothed))
    return table._replace(predicted=predicted[table.prompt])


def read_runs(sweep: Path) -> list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """(result, config, probes) of the finished runs of a sweep, or of a folder that is a run itself."""
    folders = [sweep] if (sweep / "result.json").exists() else sorted(x.parent for x in sweep.glob("*/result.json"))
    if not folders:
        raise SystemExit(f"{sweep} holds no finished run (result.json)")
    found = []
    for folder in folders:
        result = read_json(folder / "result.json") | {"measured": read_json(folder / "attainable.json")}
        if "attainable" not in result:
            raise SystemExit(f"{folder}: p† was not determined ({result['measured'].get('reason', 'too few samples')})")
        rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "probe"]
        found.append((result, read_json(folder / "config.json"), rows))
    return sorted(found, key=lambda run: (run[0]["beta"], run[0]["seed"]))


def table(runs: list[Any]) -> str:
    """The runs as Markdown."""
    head = HEAD.format(n=runs[0][0]["iterations"])
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for result, _, _ in runs:
        ledger = result["ledger"]
        cells = [f"{result['beta']:g}", f"{result['seed']}"]
        cells += [band(result["p_ref"]), band(result["p_star"]), band(result["measured"]["r2"], 2)]
        cells += [band(result["attainable"]), f"**{band(result['p_final'])}**", f"{ledger['kl']['mean']:.3f}"]
        cells += [f"{ledger['useful']['mean']:.3f}", band(ledger["followed"], 2), result["standing"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[Any], network: dict[str, float], by_run: list[Gains], out: Path) -> None:
    """Writes the figure and its numbers."""
    figure, axes = new_figure(size=(12.5, 5.2), columns=2)
    left, right = axes.flat
    betas = sorted({result["beta"] for result, _, _ in runs})
    for result, _, probes in runs:
        colour = line(betas.index(result["beta"]))["color"]
        last, seed = result["iterations"], result["seed"]
        first = seed == min(r["seed"] for r, _, _ in runs if r["beta"] == result["beta"])
        if first:
            least = result["attainable"]
            left.axhspan(least["low"], least["high"], color=colour, alpha=0.12, linewidth=0)
            left.axhline(least["mean"], color=colour, linewidth=1.2)
            left.axhline(result["p_star"]["mean"], color=colour, linewidth=1.0, linestyle="--")
        ends = [(row["iteration"], *(row[f"success/{end}"] for end in ("mean", "low", "high"))) for row in probes]
        ends.append((last, *(result["p_final"][end] for end in ("mean", "low", "high"))))
        n, mean, low, high = np.array(ends).T
        style = {"color": colour, "linewidth": 1.0, "markersize": 3.5, "marker": "os^D"[seed % 4]}
        label = f"β = {result['beta']:g}" if first else None
        left.errorbar(n, mean, [mean - low, high - mean], label=label, capsize=0, **style)
    left.axhline(runs[0][0]["p_ref"]["mean"], color=INK, linestyle=":", linewidth=1.0)
    left.set(xlabel="iteration", ylabel="success probability, mean over prompts", ylim=(0, 1))
    left.legend(frameon=False, loc="upper left")
    title(left, "dashed: p* of a table; line and band: p† of this network")

    top = 1.05 * max(float(np.max([x.measured.max(), x.predicted.max()])) for x in by_run)
    bottom = 1.05 * min(float(np.min([x.measured.min(), 0.0])) for x in by_run)
    right.plot([0, top], [0, top], **line(0, color=INK, linewidth=1.0))
    for (result, _, _), points in zip(runs, by_run, strict=True):
        k = betas.index(result["beta"])
        style = marker(k, linestyle="none")
        right.errorbar(points.predicted, points.measured, points.error, elinewidth=0.4, alpha=0.5, **style)
    right.set(
        xlabel=r"gain that $p^\dagger$ predicts, logit $p^\dagger$ − logit $p_\mathrm{ref}$",
        ylabel=r"measured gain, logit $\hat p$ − logit $p_\mathrm{ref}$",
        ylim=(bottom, top),
    )
    words = "slope {slope:.2f} [{slope_low:.2f}, {slope_high:.2f}], intercept {intercept:+.2f} "
    title(right, (words + "[{intercept_low:+.2f}, {intercept_high:+.2f}]").format(**network))
    result, config, _ = runs[0]
    words = CAPTION.format(
        model=flags.FLAGS.name or Path(config["model.path"]).name,
        prompts=len(result["prompts"]["p_ref"]),
        group=result["group_size"],
        betas="β = " + ", ".join(f"{beta:g}" for beta in betas),
    )
    numbers = {
        "fit": network,
        "runs": [
            {"beta": r["beta"], "seed": r["seed"]} | g._asdict() for (r, _, _), g in zip(runs, by_run, strict=True)
        ],
    }
    save(figure, "language_model", numbers, out=out, caption=words)


def main(_: list[str]) -> None:
    """Reads the runs, and writes figure, table and numbers."""
    sweep = Path(flags.FLAGS.sweep)
    runs = read_runs(sweep)
    by_run = [gains_of_network(result, config) for result, config, _ in runs]
    network, as_table = fitted(by_run), fitted([gains_of(*run[:2], end="attainable") for run in runs])
    text = table(runs)
    numbers = (
        "slope {slope:.3f} [{slope_low:.3f}, {slope_high:.3f}], "
        "intercept {intercept:+.3f} [{intercept_low:+.3f}, {intercept_high:+.3f}], {prompts:.0f} points"
    )
    for name, fit in (("what p† predicts", network), ("Ω(p̂)/β", as_table)):
        text += f"\nmeasured gain in log-odds over {name}: {numbers.format(**fit)}\n"
    out = Path(flags.FLAGS.out or sweep)
    draw(runs, network, by_run, out)
    (out / "language_model.md").write_text(text, encoding="utf-8")
    print(text, json.dumps(as_table))


if __name__ == "__main__":
    flags.DEFINE_string("sweep", "runs/smollm2", "folder of the sweep")
    flags.DEFINE_string("name", None, "of the model, in the figure's caption; its folder's by default")
    flags.DEFINE_string("out", None, "folder to write to; the sweep's by default")
    app.run(main)
