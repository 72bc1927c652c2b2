"""Can the network be the optimal policy? Distils π* ∝ π_ref exp(r Ω(p*)/β) into it by likelihood, and measures where it ends.

    python -m experiments.distillation --config=configs/stories.py --config.model.path=FOLDER --workdir=runs/distillation

π* is known in closed form: completions of π_ref, weighted by p*/p_ref where they succeed and by (1 − p*)/(1 − p_ref) where they
fail. So E_ref[w log π] can be climbed with fresh completions and neither exploration nor a moving target, and the KL(π*‖π) of a
batch that has not been learned from says how far it has come. A network that gets near π* could have got there by GRPO: what
kept it was its conditioning. One that stays where p† is lacks the features. Writes distillation.md and distillation.json;
starts anew each time, from the reference that the run directory holds.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from grpo_jax.config import flat, validate
from grpo_jax.files import write_json
from grpo_jax.report.forecast import make_forecast
from grpo_jax.report.ledger import ledger_of_run
from grpo_jax.report.progress import progress
from grpo_jax.runs.directory import open_run_directory
from grpo_jax.runs.measurement import judged_samples, measure
from grpo_jax.runs.reference import measured_reference, reference_params
from grpo_jax.runs.run import Run, terminal
from grpo_jax.runs.setup import make_setup, put_prompts
from grpo_jax.tasks.identity import task_identity
from grpo_jax.tasks.workers import VerifierPool
from grpo_jax.train.iteration import role_key

HEAD = "| completions | KL(π\\*‖π), not yet learned from | p̂ | KL(π‖π_ref) | useful | J | pull followed |"


def distil(run: Run, *, completions: int, rate: float, probes: int) -> dict[str, Any]:
    """The course of the distillation; see the head of this file."""
    config, setup, objective = run.config, run.setup, run.setup.recipe.objective
    before, rows, n = measured_reference(run), run.setup.probed, run.config.rollout.group_size
    setting = {"objective": objective, "group_size": n, "beta": config.objective.beta}
    successes = np.array(before["successes"])
    prediction = make_forecast(successes, before["trials"], confidence=config.evaluate.confidence, **setting)
    assert prediction is not None, "the objective has a closed-form optimum"
    p_ref, p_star = (successes + 0.5) / (before["trials"] + 1), np.asarray(prediction.p_star, float)
    of_class = np.stack([(1 - p_star) / (1 - p_ref), p_star / p_ref], axis=1)  # [Q, (failure, success)]

    reference = reference_params(run)
    steps = completions // (len(rows) * n)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.999)
    prompts = put_prompts(setup, rows)[0]

    @jax.jit
    def update(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        change, state = optimizer.update(jax.tree.map(lambda g: -g / (len(rows) * n), gradient), state, params)
        return optax.apply_updates(params, change), state

    params, state = jax.tree.map(jnp.copy, reference), optimizer.init(reference)
    course, unseen = [], []
    with progress(run.console, "distillation", total=steps) as line:
        for step in range(1, steps + 1):
            key = role_key(run.base_key, "rollout", step)
            (judged,) = judged_samples(run, reference, None, key, rows, samples=n, batch_samples=n)
            weights = np.take_along_axis(of_class, judged.rewards.astype(int), axis=1)  # [Q, n]
            ratios = np.asarray(setup.compiled.log_ratios(params, reference, prompts, judged.rollout)[0], float)
            unseen.append(float(np.mean(weights * (np.log(weights) - ratios))))
            pull = jnp.asarray(weights, jnp.float32)
            gradient = setup.compiled.scores.pull_back(params, None, prompts, judged.rollout, pull)
            params, state = update(params, state, gradient)
            if step % max(1, steps // probes) == 0 or step == steps:
                samples = config.evaluate.final_samples if step == steps else config.evaluate.samples
                found = measure(run, params, reference, step, samples=samples)
                ledger = ledger_of_run(config, objective, before, found.tally(), optimum=False)
                recent = unseen[-max(1, steps // probes) :]
                row = {"completions": step * len(rows) * n, "unseen": float(np.mean(recent))}
                row |= {"p": float(found.successes.mean() / found.trials), "ledger": ledger and ledger.means}
                course.append(row)
                line.update(step, f"KL(π*‖π) {row['unseen']:.3f} · p̂ {row['p']:.3f}")
    at_start = float(np.mean((of_class * np.log(of_class) * np.stack([1 - p_ref, p_ref], axis=1)).sum(1)))
    return {
        "p_ref": float(p_ref.mean()),
        "p_star": float(prediction.mean_p_star),
        "at_start": at_start,
        "course": course,
    }


def table(found: dict[str, Any]) -> str:
    """The course as Markdown."""
    lines = [
        f"p_ref {found['p_ref']:.3f}, p\\* {found['p_star']:.3f}, KL(π\\*‖π_ref) {found['at_start']:.3f}",
        "",
        HEAD,
    ]
    lines.append("|" + "---|" * (HEAD.count("|") - 1))
    for row in found["course"]:
        names = ("kl", "useful", "objective", "followed")
        ledger = [f"{row['ledger'][name]['mean']:.3f}" if row["ledger"] else "" for name in names]
        cells = [str(row["completions"]), f"{row['unseen']:.3f}", f"{row['p']:.3f}", *ledger]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
    """Distils, and writes and prints the table."""
    config, out = _CONFIG.value, Path(flags.FLAGS.workdir)
    task, objective = validate(config, num_devices=1)
    setup = make_setup(config, task, objective)
    on_device = setup.compiled.verify is not None
    with open_run_directory(out, flat(config) | task_identity(task)) as directory:
        pool = None if on_device else VerifierPool(task.verify, num_workers=1, deadline=config.verifier.deadline)
        run = Run(config, setup, directory, terminal(), pool, jax.random.key(config.seed), [])
        try:
            found = distil(run, completions=flags.FLAGS.completions, rate=flags.FLAGS.rate, probes=flags.FLAGS.probes)
        finally:
            if pool is not None:
                pool.close()
    write_json(out / "distillation.json", found)
    (out / "distillation.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", "configs/stories.py", "as of launch.py")
    flags.DEFINE_string("workdir", "runs/distillation", "a run directory, which may have its reference already")
    flags.DEFINE_integer("completions", 300_000, "fresh completions of the reference to learn from")
    flags.DEFINE_float("rate", 1e-4, "learning rate of Adam, falling to 0 as a cosine")
    flags.DEFINE_integer("probes", 10, "measurements on the way")
    app.run(main)
