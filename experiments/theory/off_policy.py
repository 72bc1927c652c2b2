"""One step from samples of another policy: its exact gain, two lower bounds, what they cost, and how old samples are.

python -m experiments.theory.off_policy [--out=runs/theory]
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.theory import figures
from grpo_jax.theory import OffPolicyGain, off_policy_gain, update_staleness

EPSILON = 1e-5
P_SAMPLER, P_OLD = 0.2, 0.3
NAMES = "policies of one family", "any policies", "what a prompt costs", "how old the samples are"
SCHEDULES = ((1, 1), (6, 1), (1, 6), (2, 3))  # (v, i)
CAPTION = (
    "Stated by the paper (arXiv 2505.22257): a step that samples α and starts at π_k gains at least L_α(π) −"
    " 2((1−σ)/σ) TV(π, α) − 2 TV(π_k, α), and the two schedules. Ours: the gain is exactly σL_α(π) + J(α) − J(π_k),"
    " and 1 suffices in place of 2, nothing less. Top left: binary rewards, policies of one family, success .2 under α"
    " and .3 under π_k; from α on the bound with 1 is the gain itself. Top right: 400 random triples of policies over"
    " five outcomes. Bottom left: what the bound of a prompt subtracts per unit of TV(π, α) at ε = 1e-5; a prompt"
    " without variance has no gradient and 1/√ε − 1, so it is masked. Bottom right: v batches per refresh of the"
    " sampler, i updates per batch."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes off_policy.png and off_policy.json into ``out``."""
    numbers = compute(21 if quick else 201)
    figure, axes = figures.new_figure(2, 2, size=(10.5, 8.6))
    line, cloud, cost, ages = axes.flat
    for k, name in enumerate(("gain", "bound", "paper_bound")):
        label = ("gain J(π) − J(π_k)", "bound, constant 1", "bound, constant 2 (paper)")[k]
        line.plot(
            numbers["line"]["p"],
            numbers["line"][name],
            **figures.line(k, linewidth=2.4 if k == 0 else 1.5),
            label=label,
        )
        if k:
            points = numbers["cloud"]
            style = {"color": figures.COLOURS[k], "marker": figures.MARKERS[k], "markersize": 3, "linestyle": ""}
            cloud.plot(points["gain"], points[name], label=label, **style)
    line.axvline(P_SAMPLER, color=figures.PALE, linewidth=1)
    line.text(P_SAMPLER + 0.01, -2.1, "α", fontsize=9)
    line.set(xlabel="success probability of π", ylabel="gain", ylim=(-2.2, 1))
    span = (-0.8, 0.8)
    cloud.plot(span, span, color=figures.INK, linewidth=0.8)
    cloud.set(xlabel="gain", ylabel="bound", ylim=(-8, 1))
    cost.plot(numbers["cost"]["p"], numbers["cost"]["per_tv"], **figures.line(0))
    cost.set(xscale="log", yscale="log", xlabel="success probability of α", ylabel="(1 − σ)/σ")
    for k, schedule in enumerate(numbers["schedules"]):
        name = f"v = {schedule['refresh']}, i = {schedule['updates_per_batch']}"
        style = figures.marker(k, markersize=3, drawstyle="steps-post")
        ages.plot(np.asarray(schedule["updates"]) + 0.06 * k, **style, label=name)
    ages.set(xlabel="update", ylabel="age of the samples, in updates", ylim=(-0.3, 8))
    for panel, name in zip(axes.flat, NAMES, strict=True):
        figures.title(panel, name)
    for panel in (line, cloud, ages):
        panel.legend(fontsize=8, frameon=False, loc="lower right" if panel is not ages else "upper right")
    figures.save(figure, "off_policy", numbers, out=out, caption=CAPTION)


def compute(points: int) -> dict[str, Any]:
    """The gain and the bounds along one family and at random, the cost over p, and the ages of the schedules."""
    p = jnp.linspace(0.01, 0.99, points)
    old, sampler = (_coin(jnp.full(points, x)) for x in (P_OLD, P_SAMPLER))
    along = off_policy_gain(_coin(p), old, sampler, jnp.asarray([[1.0, 0.0]]), epsilon=EPSILON)
    rng = np.random.default_rng(0)
    policy, old, sampler = (jnp.log(jnp.asarray(rng.dirichlet([1.0] * 5, 400))) for _ in range(3))
    cloud = off_policy_gain(policy, old, sampler, jnp.asarray(rng.integers(0, 2, (400, 5)), float), epsilon=EPSILON)
    sampled = jnp.geomspace(1e-6, 0.5, points)
    coins = _coin(sampled)
    scale = off_policy_gain(coins, coins, coins, jnp.asarray([[1.0, 0.0]]), epsilon=EPSILON).scale
    return {
        "epsilon": EPSILON,
        "p_sampler": P_SAMPLER,
        "p_old": P_OLD,
        "line": {"p": p, **_named(along)},
        "cloud": _named(cloud),
        "cost": {"p": sampled, "per_tv": (1 - scale) / scale},
        "schedules": [
            {"refresh": v, "updates_per_batch": i, **update_staleness(18, refresh=v, updates_per_batch=i)._asdict()}
            for v, i in SCHEDULES
        ],
    }


def _coin(p: jnp.ndarray) -> jnp.ndarray:
    return jnp.log(jnp.stack([p, 1 - p], axis=-1))


def _named(step: OffPolicyGain) -> dict[str, Any]:
    exact = step.scale * step.surrogate + step.lag
    return {"gain": step.gain, "identity": exact, "bound": step.bound, "paper_bound": step.paper_bound}


if __name__ == "__main__":
    figures.run(experiment)
