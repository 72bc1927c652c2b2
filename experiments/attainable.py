"""Where networks end, beside what was said of them before training: p* of a table, p† of the network, p̂ of the run.

    python -m experiments.attainable [--out=runs/attainable] [--long]

Decoders of several widths on single-digit sums, each warm-started to about 20 % and trained at β = 1; --long adds the main job
and countdown. R² is measured with more samples and steps than a run takes by default. attainable.md is the table; runs that
are there already are read.
"""

from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from experiments.runs import band, result_of
from grpo_jax.files import read_json

HEAD = "| run | R² | p_ref | p\\* | p† | p̂ | KL | useful |"
SMALL, COUNTDOWN = "configs/small.py", "configs/countdown.py"


class Case(NamedTuple):
    """A run: its name in the table, config, and flags beyond it."""

    name: str
    config: str
    flags: dict[str, Any]

    def result(self, folder: Path) -> dict[str, Any]:
        """What result.json holds, with what was measured of the network."""
        options = [f"--config.{key}={value}" for key, value in self.flags.items()]
        workdir = folder / self.name.replace(" ", "-").replace(",", "")
        return result_of(self.config, workdir, *options) | {"measured": read_json(workdir / "attainable.json")}


def of_width(width: int, *, warm_rate: float = 3e-3, rate: float = 1e-3, steps: int = 12) -> Case:
    """A decoder of one layer on sums, the learning rates of its warm start and of GRPO, and steps of R²."""
    sizes = {"d_model": width, "d_ff": 2 * width, "num_heads": 1, "num_kv_heads": 1, "head_dim": width, "num_layers": 1}
    options: dict[str, Any] = {f"model.{key}": size for key, size in sizes.items()}
    options |= {"warm_start.target": 0.2, "warm_start.max_steps": 20000, "warm_start.learning_rate": warm_rate}
    options |= {"optimizer.learning_rate": rate, "evaluate.final_samples": 512}
    return Case(f"sums, width {width}", SMALL, options | {"attainable.samples": 192, "attainable.steps": steps})


WIDTHS = [of_width(width) for width in (4, 8, 16, 32, 64)]
WIDTHS.append(
    of_width(256, warm_rate=1e-3, rate=2e-4, steps=48)
)  # the rates of the others make it learn nothing, or noise
MORE = {"attainable.samples": 192, "attainable.steps": 24}
LONG = [
    Case("small", SMALL, MORE),
    Case("countdown", COUNTDOWN, MORE),
]


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    ledger = result["ledger"]
    cells = [name, band(result["measured"].get("r2")), f"{result['p_ref']['mean']:.3f}", band(result["p_star"])]
    cells += [band(result.get("attainable")), band(result["p_final"])]
    cells += [f"{ledger['kl']['mean']:.3f}", f"{ledger['useful']['mean']:.3f}"]
    return f"| {' | '.join(cells)} |"


def main(_: list[str]) -> None:
    """Runs what is missing, and writes and prints the table."""
    folder = Path(flags.FLAGS.out)
    cases = [*WIDTHS, *(LONG if flags.FLAGS.long else [])]
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for case in cases:
        lines.append(row(case.name, case.result(folder)))
        (folder / "attainable.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/attainable", "folder of the runs and the table")
    flags.DEFINE_bool("long", False, "the main job and countdown, too")
    app.run(main)
