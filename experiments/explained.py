"""How good the bound on R² is that a run measures before training: exact policies, of which R² is known.

    python -m experiments.explained [--out=runs/theory] [--quick]

Log-linear policies whose prompts share their features, as in experiments/networks.py. R² follows from enumeration. From samples
of the reference, in three parts, the pull is fitted by a few steps of conjugate gradients, and the bound is made of the fits;
"naive" is what single fits explain of other samples. A run does the same in coordinates of its own, see
grpo_jax/runs/attainable.py. explained.md is the table.
"""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments.networks import WEIGHTS, make_toy, regression
from grpo_jax.theory.explained import explained_share

PARTS, STEPS = 3, 4
PROMPTS, OUTCOMES = 25, 256
RANKS, SAMPLES, REPETITIONS = (16, 64, 256, 1024), (8, 16, 64), 200
# The largest feature over the smallest: it changes no R², and what few steps find of it.
SPREADS = (1.0, 30.0)
HEAD = (
    "| rank | features | R² | samples of each prompt | parameters over samples of a fit | naive | bound "
    "| low end below R² | R² in the interval |"
)


class Row(NamedTuple):
    """One line of the table: means over the repetitions."""

    rank: int
    spread: float
    r2: float
    samples: int
    naive: float
    bound: float
    deviation: float
    below: float
    inside: float

    def text(self) -> str:
        """As a line of Markdown."""
        each = f"{self.rank / (PROMPTS * self.samples):.2g}"
        features = "even" if self.spread == 1 else f"1 to {self.spread:g}"
        bound = f"{self.bound:.3f} ± {self.deviation:.3f}"
        cells = [f"{self.rank}", features, f"{self.r2:.3f}", f"3 × {self.samples}", each, f"{self.naive:+.3f}", bound]
        return f"| {' | '.join([*cells, f'{self.below:.3f}', f'{self.inside:.3f}'])} |"


def fit(scores: np.ndarray, pull: np.ndarray, steps: int) -> np.ndarray:
    """Conjugate gradients on ‖y − S w‖² from 0: w [D], for scores [N, D] and pull [N]."""
    w, residual = np.zeros(scores.shape[1]), pull
    gradient = direction = scores.T @ residual
    for _ in range(steps):
        change = scores @ direction
        size = gradient @ gradient / (change @ change)
        w, residual, before = w + size * direction, residual - size * change, gradient
        gradient = scores.T @ residual
        direction = gradient + (gradient @ gradient) / (before @ before) * direction
    return w


def measure(rank: int, spread: float, samples: int, repetitions: int) -> Row:
    """The bound of one policy, from repeated samples of it."""
    toy = make_toy(1, prompts=PROMPTS, outcomes=OUTCOMES, rank=rank, signal=0.5)
    r2 = float(regression(toy, WEIGHTS).r2)
    policy = np.asarray(jax.nn.softmax(toy.prior), float)  # [P, N]
    rewards, features = np.asarray(toy.rewards), np.asarray(toy.inputs) * np.geomspace(1.0, 1 / spread, rank)
    p_ref = (policy * rewards).sum(-1)
    omega = np.asarray(WEIGHTS.omega(jax.numpy.asarray(np.log(p_ref / (1 - p_ref)))))
    rng = np.random.default_rng((rank, samples))
    found = []
    for _ in range(repetitions):
        # Outcomes [K, P, n] by inverting the cumulative distribution.
        uniform = rng.random((PARTS, PROMPTS, samples))
        drawn = (uniform[..., None] > np.cumsum(policy, -1)[:, None, :-1]).sum(-1)
        at = np.arange(PROMPTS)[None, :, None]
        pull, scores = omega[:, None] * rewards[at, drawn], features[at, drawn]
        pull, scores = (x - x.mean(2, keepdims=True) for x in (pull, scores))
        w = [fit(scores[a].reshape(-1, rank), pull[a].ravel(), STEPS) for a in range(PARTS)]
        found.append(explained_share(pull, np.stack([scores @ x for x in w])))
    ends = np.array([x[:3] for x in found])
    return Row(
        rank,
        spread,
        r2,
        samples,
        float(np.mean([x.naive for x in found])),
        float(ends[:, 0].mean()),
        float(ends[:, 0].std()),
        float((ends[:, 1] <= r2).mean()),
        float(((ends[:, 1] <= r2) & (r2 <= ends[:, 2])).mean()),
    )


def main(_: list[str]) -> None:
    """Writes the table and prints it."""
    jax.config.update("jax_enable_x64", True)
    ranks, sizes, repetitions = (RANKS[:1], SAMPLES[:1], 4) if flags.FLAGS.quick else (RANKS, SAMPLES, REPETITIONS)
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    print("\n".join(lines))
    for rank, spread, samples in product(ranks, SPREADS, sizes):
        lines.append(measure(rank, spread, samples, repetitions).text())
        print(lines[-1], flush=True)
    folder = Path(flags.FLAGS.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "explained.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/theory", "folder to write to")
    flags.DEFINE_bool("quick", False, "one policy, a few repetitions")
    app.run(main)
