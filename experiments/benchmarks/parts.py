"""Where the time of a GRPO iteration goes, part by part.

python -m experiments.benchmarks.parts [--quick] [--vocabularies=1024,32000] [--lengths=fixed,ragged] [--repeats=7]

Each part is timed as what it adds to a program: prompts are prefilled by one program and completed by another, an update is
compiled without its gradient, without its optimizer, and whole. All work on one rollout, and the programs take turns. XLA's own
trace would not do: on a CPU it lacks most of the time of large products.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from absl import app, flags

from experiments.benchmarks import cases, ours, race
from experiments.benchmarks.cases import Case
from grpo_jax.rollout import Layout
from grpo_jax.rollout.sampling import prefill
from grpo_jax.rollout.scoring import score_packed
from grpo_jax.train.step import init_state

PARTS = {  # what a part adds: the programs whose times are added, and subtracted
    "prompts": (("prefill",), ()),
    "decoding": (("sample",), ("prefill",)),
    "log-probabilities": (("score",), ()),
    "their gradient": (("gradient",), ("score",)),
    "clipping and AdamW": (("update",), ("gradient",)),
    "what joins them": (("iteration",), ("sample", "update")),
}


def measure(case: Case, repeats: int) -> dict[str, float]:
    """Median seconds of every program, each compiled and warm."""
    with tempfile.TemporaryDirectory() as name:
        cases.write(case, Path(name))
        setup = ours.load(case, name)
    policy, params, prompts, *_ = setup
    optimizer, key = ours.adamw(), jax.random.key(0)
    rollout = jax.jit(setup.sample)(params, prompts, key)
    rewards, state = ours.odd(rollout), init_state(params, optimizer)

    def fill(params: Any) -> Any:
        return prefill(policy, policy.prepare(params, case.prompt_length + case.completion), prompts)

    def score(params: Any) -> jax.Array:
        layout = Layout(ours.MICROBATCH_TOKENS)
        return score_packed(policy, params, prompts, rollout.completions, rollout.mask, layout=layout)

    def learn(optimizer: optax.GradientTransformation, state: Any) -> Any:
        return ours.learner(setup, optimizer)(state, None, prompts, rollout, rewards, key)

    nothing = optax.set_to_zero()
    programs: dict[str, Callable[[], Any]] = {
        "prefill": partial(jax.jit(fill), params),
        "sample": partial(jax.jit(setup.sample), params, prompts, key),
        "score": partial(jax.jit(score), params),
        "gradient": partial(jax.jit(partial(learn, nothing)), init_state(params, nothing)),
        "update": partial(jax.jit(partial(learn, optimizer)), state),
        "iteration": partial(jax.jit(ours.whole(setup, ours.learner(setup, optimizer))), state, key),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[name] += [time.perf_counter() - start] if number else []
    return {name: statistics.median(values) for name, values in times.items()}


def split(seconds: dict[str, float]) -> dict[str, float]:
    """The seconds of each part; their sum is that of the iteration.

    >>> found = split(dict(prefill=1.0, sample=3.0, score=2.0, gradient=5.0, update=6.0, iteration=9.5))
    >>> found["decoding"], found["their gradient"], sum(found.values())
    (2.0, 3.0, 9.5)
    """
    total = lambda names: sum(seconds[name] for name in names)  # noqa: E731
    return {part: total(added) - total(without) for part, (added, without) in PARTS.items()}


def table(parts_of: dict[str, dict[str, float]]) -> str:
    """Of the parts of each case, seconds and share, as Markdown.

    >>> print(table({"ragged 1024": dict(zip(PARTS, (1.0, 2.0, 2.0, 4.0, 0.5, 0.5)))}), end="")
    | part | ragged 1024 |
    |---|---|
    | prompts | 1.00 s, 10 % |
    | decoding | 2.00 s, 20 % |
    | log-probabilities | 2.00 s, 20 % |
    | their gradient | 4.00 s, 40 % |
    | clipping and AdamW | 0.50 s, 5 % |
    | what joins them | 0.50 s, 5 % |
    | iteration | 10.00 s |
    """
    whole = {case: sum(parts.values()) for case, parts in parts_of.items()}
    lines = [f"| part | {' | '.join(parts_of)} |", "|---|" + "---|" * len(parts_of)]
    for part in PARTS:
        cells = [f"{parts[part]:.2f} s, {100 * parts[part] / whole[case]:.0f} %" for case, parts in parts_of.items()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| iteration | {' | '.join(f'{seconds:.2f} s' for seconds in whole.values())} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Prints the table and writes parts.json."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")  # as the races'
    options, rows, parts_of = flags.FLAGS, [], {}
    for vocabulary in map(int, options.vocabularies):
        for lengths in options.lengths:
            case = Case("iteration", vocabulary, lengths == "ragged")
            case = cases.quick(case) if options.quick else case
            seconds = measure(case, 2 if options.quick else options.repeats)
            parts_of[case.name.removeprefix("iteration ")] = split(seconds)
            rows.append({"case": case._asdict(), "seconds": seconds, "parts": split(seconds)})
    print(table(parts_of), end="")
    race.write_json(options.out, "parts", rows)


if __name__ == "__main__":
    race.define_case_flags()
    flags.adopt_module_key_flags(race)
    app.run(main)
