"""Runs a config under several seeds and tabulates prediction against measurement.

    python -m experiments.seeds --config=configs/small.py --seeds=0,1,2,3,4 --workdir=runs/seeds

Each seed is a run of its own in WORKDIR/SEED, so the command resumes; WORKDIR/table.md and WORKDIR/seeds.json are the outcome.
"""

import json
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.runs import result_of

_CONFIG = flags.DEFINE_string("config", "configs/small.py", "Config file, as for launch.py.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Seeds to run.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/seeds", "Where the runs go.")
_OVERRIDES = flags.DEFINE_multi_string(
    "set", [], "Further flags of launch.py, such as --set=--config.objective.beta=0.5"
)


def main(arguments: list[str]) -> None:
    """Runs every seed, one after the other."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    workdir = Path(_WORKDIR.value)
    results = []
    for seed in _SEEDS.value:
        options = f"--config.seed={seed}", *_OVERRIDES.value
        results.append(result_of(_CONFIG.value, workdir / seed, *options))
    (workdir / "seeds.json").write_text(json.dumps(results), encoding="utf-8")
    (workdir / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, one row per seed.

    >>> print(table([]))
    | seed | p_ref | predicted p* | final p̂ | p̂ − p* | interval | inside | rms per prompt (noise) | KL (predicted) | greedy |
    |---|---|---|---|---|---|---|---|---|---|
    <BLANKLINE>
    """
    head = ["seed", "p_ref", "predicted p*", "final p̂", "p̂ − p*", "interval", "inside"]
    head += ["rms per prompt (noise)", "KL (predicted)", "greedy"]
    lines = [head, ["---"] * len(head)]
    for r in results:
        difference, star = r["difference"], r["p_star"]
        lines.append(
            [
                str(r["seed"]),
                f"{r['p_ref']['mean']:.4f}",
                f"{star['mean']:.4f} [{star['low']:.4f}, {star['high']:.4f}]",
                f"{r['p_final']['mean']:.4f} [{r['p_final']['low']:.4f}, {r['p_final']['high']:.4f}]",
                f"{difference['mean']:+.4f}",
                f"±{difference['half_width']:.4f}",
                "yes" if difference["inside"] else "no",
                f"{r['rms']['measured']:.4f} ({r['rms']['noise']:.4f})",
                f"{r['after']['kl']:.4f} ({r['kl_predicted']:.4f})",
                f"{r['before']['greedy']:.2f} → {r['after']['greedy']:.2f}",
            ]
        )
    return "".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|\n" for line in lines)


if __name__ == "__main__":
    app.run(main)
