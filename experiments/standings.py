"""A run of each kind: arrived, not arrived, limited by the network, shaken by noise, collapsed, and hopeless.

    python -m experiments.standings --workdir=runs/standings

Each is a run of its own in WORKDIR, made to be what its name says, so the command resumes. The report of each must say the
same in its own words: they follow from the ledger, and know nothing of this file. About two minutes on 2 CPU cores.

The runs "limited" and "noise" train a decoder of 592 parameters, which cannot move one sum without the others. The hopeless run
is one whose reference solves everything; one that solves nothing is told the same.
"""

from pathlib import Path

from absl import app, flags

from experiments.runs import result_of
from grpo_jax.report import standing

_WORKDIR = flags.DEFINE_string("workdir", "runs/standings", "Where the runs go.")

SMALL = ("--config.evaluate.final_samples=256", "--config.evaluate.interval=50")
NARROW = (
    *SMALL,
    "--config.model.num_layers=1",
    "--config.model.d_model=8",
    "--config.model.num_heads=1",
    "--config.model.num_kv_heads=1",
    "--config.model.head_dim=8",
    "--config.model.d_ff=8",
    "--config.warm_start.target=0.12",
    "--config.warm_start.learning_rate=5e-3",
    "--config.train.iterations=400",
)
SOLVED = (
    *SMALL,
    "--config.train.iterations=20",
    "--config.task.arithmetic.operand_max=1",
    "--config.data.prompts_per_iteration=4",
    "--config.warm_start.batch=4",
    "--config.warm_start.interval=400",
    "--config.warm_start.learning_rate=1e-2",
    "--config.warm_start.target=0.99",
)
CASES = {
    standing.ARRIVED: (*SMALL, "--config.train.iterations=200"),
    standing.UNFINISHED: (*SMALL, "--config.train.iterations=20"),
    standing.LIMITED: (*NARROW, "--config.optimizer.learning_rate=1e-3"),
    standing.NOISY: (*NARROW, "--config.optimizer.learning_rate=3e-2", "--config.optimizer.schedule=constant"),
    standing.COLLAPSED: (*SMALL, "--config.train.iterations=20", "--config.optimizer.learning_rate=0.3"),
    standing.HOPELESS: SOLVED,
}
"""Flags of each run, by the word that its report must find."""


def main(arguments: list[str]) -> None:
    """Makes the runs and says which word each report found."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    workdir = Path(_WORKDIR.value)
    table = ["| made to be | its report says | p_ref | p̂ | p* | |", "|---|---|---|---|---|---|"]
    missed: list[str] = []
    for word, options in CASES.items():
        result = result_of("configs/small.py", workdir / word.replace(" ", "-"), *options)
        p_ref, p_final, p_star = (f"{result[name]['mean']:.3f}" for name in ("p_ref", "p_final", "p_star"))
        sentence = standing.in_words(result)
        table.append(f"| {word} | {result['standing']} | {p_ref} | {p_final} | {p_star} | {sentence} |")
        missed += [word] * (result["standing"] != word)
    text = "\n".join(table) + "\n"
    (workdir / "standings.md").write_text(text, encoding="utf-8")
    print(text)
    if missed:
        raise SystemExit(f"not found by their reports: {', '.join(missed)}")


if __name__ == "__main__":
    app.run(main)
