"""How many dimensions of adapters success needs: rank → what they let through → where a run ends.

    python -m experiments.ranks [--config=configs/small.py] [--ranks=1,2,4,8,16,32,64] [--out=runs/ranks]

One sweep over lora.rank, with the reference and its measurement shared, and one run that trains all parameters. Writes ranks.png,
its numbers and ranks.md. R² is that of the adapters before training, when only B moves the policy: features that A learns on the
way are not in it. The command goes on where it was stopped.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.runs import band, result_of
from experiments.theory import figures
from grpo_jax.files import read_json

HEAD = "| trained | R² | p† | p̂ | KL | useful |"
CAPTION = (
    "{config}: low-rank adapters on all matrices of the layers, and at the right end all parameters. Left: the share of the"
    " reward's pull that they explain under the reference, before training. Right: success predicted for a table (p*, dashed),"
    " predicted from that share (p†), and measured after training (p̂), with their intervals."
)


def row(name: str, result: dict[str, Any], measured: dict[str, Any]) -> str:
    """A line of the table."""
    ledger = result["ledger"]
    cells = [name, band(measured.get("r2")), band(result.get("attainable")), band(result["p_final"])]
    cells += [f"{ledger[part]['mean']:.3f}" for part in ("kl", "useful")]
    return f"| {' | '.join(cells)} |"


def draw(folder: Path, config: str, names: list[str], results: list[dict[str, Any]], r2: list[Any]) -> None:
    """Writes ranks.png and ranks.json."""
    figure, ((shares, success),) = figures.new_figure(1, 2, size=(9, 4))
    places = range(len(names))

    def interval(panel: Any, k: int, values: list[Any], label: str) -> None:
        known = [
            (at, value) for at, value in zip(places, values, strict=True) if isinstance(value, dict) and "mean" in value
        ]
        means = [value["mean"] for _, value in known]
        errors = [[abs(value[end] - value["mean"]) for _, value in known] for end in ("low", "high")]
        panel.errorbar([at for at, _ in known], means, yerr=errors, capsize=2, label=label, **figures.marker(k))

    interval(shares, 0, r2, "R²")
    interval(success, 1, [result.get("attainable") for result in results], "p†, predicted for these adapters")
    interval(success, 2, [result["p_final"] for result in results], "p̂, measured after training")
    success.axhline(
        results[0]["p_star"]["mean"], color=figures.INK, linestyle="--", linewidth=1, label="p*, of a table"
    )
    figures.title(shares, "R² of the pull, before training")
    figures.title(success, "success probability")
    for panel in (shares, success):
        panel.set_xticks(places, names)
        panel.set_xlabel("rank", fontsize=9)
    success.legend(fontsize=8, frameon=False)
    kept = ("attainable", "p_final", "p_star")
    numbers = {"names": names, "r2": r2, "results": [{key: result.get(key) for key in kept} for result in results]}
    figures.save(figure, "ranks", numbers, out=folder, caption=CAPTION.format(config=Path(config).name))


def main(_: list[str]) -> None:
    """Runs what is missing, writes the table and draws the figure."""
    options = flags.FLAGS
    folder, ranks = Path(options.out), [int(rank) for rank in options.ranks]
    result_of(options.config, folder / "all", f"--config.optimizer.learning_rate={options.whole_rate}")
    sweep = f"--sweep=lora.rank={','.join(map(str, ranks))}"
    rate = f"--config.optimizer.learning_rate={options.rate}"
    of_ranks = folder / "adapters"
    command = [sys.executable, "launch.py", f"--config={options.config}", f"--workdir={of_ranks}", sweep, rate]
    subprocess.run(command, check=True)
    runs = {f"{rank}": of_ranks / f"lora.rank={rank}" for rank in ranks} | {"all": folder / "all"}
    results = [read_json(run / "result.json") for run in runs.values()]
    measured = [read_json(run / "attainable.json") for run in runs.values()]
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    lines += [row(name, *of_run) for name, *of_run in zip(runs, results, measured, strict=True)]
    (folder / "ranks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(folder, options.config, list(runs), results, [of_run.get("r2") for of_run in measured])
    print("\n".join(lines))


if __name__ == "__main__":
    flags.DEFINE_string("config", "configs/small.py", "of the runs")
    flags.DEFINE_list("ranks", ["1", "2", "4", "8", "16", "32", "64"], "of the adapters")
    flags.DEFINE_float("rate", 3e-3, "learning rate with adapters")
    flags.DEFINE_float("whole_rate", 3e-4, "learning rate of all parameters")
    flags.DEFINE_string("out", "runs/ranks", "folder of the runs, the table and the figure")
    app.run(main)
