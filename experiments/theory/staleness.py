"""Small steps with old advantages: which delays make them oscillate, how far, and the same in a run that draws its groups.

python -m experiments.theory.staleness [--out=runs/theory]
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.theory import figures
from grpo_jax import group_advantages
from grpo_jax.theory import (
    Group,
    Weights,
    Whitened,
    critical_delay,
    critical_refresh,
    fixed_points,
    flip_window,
    stale_iterate,
    update_staleness,
)

P_REF, BETA, WHITE = 1e-3, 3.0, Whitened(1e-5)
WINDOWS: tuple[tuple[float, str, Weights], ...] = (
    (1e-4, "", WHITE),
    (1e-3, "", WHITE),
    (5e-3, "", WHITE),
    (5e-3, ", G = 8 redrawn", Group(8, dynamic_sampling=True)),
    (0.02, ", G = 8 redrawn", Group(8, dynamic_sampling=True)),
)
DELAYS = (0.0, 1.0, 3.0, 10.0)  # in relaxation times
STEP, HORIZON, SHOWN = 0.005, 400, 80  # in relaxation times
RUN_P_REF, RUN_BETA, RUN_SIZE, RUN_GROUPS, RUN_STEP = 0.005, 8.0, 8, 64, 0.05
RUN_REFRESH = (1, 20, 60, 160)  # updates from one refresh of the sampler to the next
NAMES = "which delays oscillate", "over β", "small steps, constant delay", "a run on drawn groups, refreshed sampler"
CAPTION = (
    "Ours. dL/dt = Ω(L(t−τ))/β − (L − L_ref) has the fixed points of exactly solved iterations. It oscillates about"
    " one with multiplier m < −1 for delays above τ_c = arccos(1/m)/√(m²−1), or if the sampler is refreshed less often"
    " than every T_c = ln((|m|+1)/(|m|−1)); for −1 ≤ m < 1 no delay does harm. Times are relaxation times of the KL"
    " term. Top right: τ_c at the low fixed point over its flip window; outside it every delay is stable. Bottom left:"
    " p_ref = .001, β = 3, ε = 1e-5 (m = −1.32, τ_c = 2.80). Bottom right: a policy of one logit trained on 64 drawn"
    " groups of 8 per update, redrawn until their rewards differ, p_ref = .005, β = 8 (m = −1.54, T_c = 1.55 = 30"
    " updates), by natural-gradient steps with the ratio to the sampler (coloured), beside the mean-field recursion"
    " (black)."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes staleness.png and staleness.json into ``out``."""
    numbers = compute(quick)
    figure, axes = figures.new_figure(2, 2, size=(11, 9.2))
    delays, window, paths, run = axes.flat
    for k, (name, label) in enumerate((("delay", "constant delay: τ_c"), ("refresh", "refreshed sampler: T_c"))):
        delays.plot(numbers["map"]["multiplier"], numbers["map"][name], **figures.line(k), label=label)
    delays.axvspan(-1, 1, color=figures.SHADE, zorder=0)
    delays.text(0, 5, "every delay is stable", ha="center", fontsize=8.5)
    delays.text(1.5, 5, "none is", ha="center", fontsize=8.5)
    delays.set(xlim=(-4, 2), ylim=(0, 8), xlabel="multiplier m of the exact iteration", ylabel="relaxation times")
    for k, curve in enumerate(numbers["windows"]):
        window.plot(curve["beta"], curve["delay"], **figures.line(k), label=curve["name"])
    window.set(xscale="log", xlim=(0.15, 2000), ylim=(0, 8), xlabel="β", ylabel="τ_c at the low fixed point")
    for k, path in enumerate(numbers["paths"]):
        paths.plot(
            path["time"], path["p"], **figures.line(k), label=f"τ = {path['delay']:g}: swing of L {path['swing']:.2f}"
        )
    paths.set(yscale="logit", xlabel="relaxation times", ylabel="p", ylim=(5e-4, 0.995))
    for k, path in enumerate(numbers["run"], start=1):
        name = "refreshed at every update" if path["refresh"] == 1 else f"every {path['refresh']} updates"
        run.plot(path["sampled"], color=figures.COLOURS[k], linewidth=2.4, label=name)
        run.plot(path["predicted"], color=figures.INK, linewidth=0.8)
    run.set(yscale="logit", xlabel="update", ylabel="p", ylim=(1e-3, 0.985))
    for panel, name in zip(axes.flat, NAMES, strict=True):
        figures.title(panel, name)
    delays.legend(fontsize=8, frameon=False, loc="upper left")
    window.legend(fontsize=8, frameon=False, loc="center right")
    paths.legend(fontsize=8, frameon=False, loc="upper right")
    run.legend(fontsize=8, frameon=False, loc="lower center", ncols=2)
    figures.save(figure, "staleness", numbers, out=out, caption=CAPTION)


def compute(quick: bool) -> dict[str, Any]:
    """The delay map, the delays over β, orbits at four delays, and a sampled run at four refresh intervals."""
    m = jnp.linspace(-4, -1.0001, 50 if quick else 400)
    reference = math.log(P_REF / (1 - P_REF))
    paths = []
    step = 10 * STEP if quick else STEP
    for delay in DELAYS:
        ages = jnp.full(int(HORIZON / step), round(delay / step))
        path = stale_iterate(reference, ages, beta=BETA, weights=WHITE, step=step, logits=True)
        time = step * jnp.arange(0.0, int(SHOWN / step), 10)
        swing = jnp.ptp(path[-int(SHOWN / step) :])
        paths.append({"delay": delay, "time": time, "p": jax.nn.sigmoid(path[: len(time) * 10 : 10]), "swing": swing})
    updates = 400 if quick else 800
    weights = Group(RUN_SIZE, dynamic_sampling=True)
    runs = []
    for seed, refresh in enumerate(RUN_REFRESH):
        ages = update_staleness(updates, refresh=refresh).updates
        predicted = stale_iterate(RUN_P_REF, ages, beta=RUN_BETA, weights=weights, step=RUN_STEP)
        runs.append({"refresh": refresh, "predicted": predicted, "sampled": sampled_run(ages, jax.random.key(seed))})
    multiplier = fixed_points(RUN_P_REF, beta=RUN_BETA, weights=weights)[0].multiplier
    return {
        "map": {"multiplier": m, "delay": critical_delay(m), "refresh": critical_refresh(m)},
        "windows": [
            _over_beta(f"p_ref = {p_ref:g}{name}", p_ref, weights, 12 if quick else 60)
            for p_ref, name, weights in (WINDOWS[1:2] if quick else WINDOWS)
        ],
        "paths": paths,
        "critical_delay": critical_delay(fixed_points(P_REF, beta=BETA, weights=WHITE)[0].multiplier),
        "run": runs,
        "run_multiplier": multiplier,
        "run_critical_updates": critical_refresh(multiplier) / -math.log1p(-RUN_STEP),
    }


@partial(jax.jit, static_argnames="num_groups")
def sampled_run(ages: jax.Array, key: jax.Array, num_groups: int = RUN_GROUPS) -> jax.Array:
    """The success probability of one prompt trained on drawn groups: a policy with one logit, steps of natural gradient.

    Each update draws the successes of ``num_groups`` groups from the policy of ``ages`` updates ago, as they are distributed once
    groups of equal rewards are redrawn; takes the trainer's advantages; and goes the share a of the way along the gradient of the
    surrogate mean(ρA) − β KL(π‖π_ref) over the Fisher information p(1 − p).

    Args:
      ages: [N] of the samples, in updates.
      key: of the draws.
      num_groups: groups per update; static.

    Returns:
      [N + 1] the success probability.
    """
    reference = jnp.log(jnp.asarray(RUN_P_REF / (1 - RUN_P_REF)))
    counts = jnp.arange(1.0, RUN_SIZE)
    log_choose = jnp.log(jnp.asarray([float(math.comb(RUN_SIZE, k)) for k in range(1, RUN_SIZE)]))

    def surrogate(logit: jax.Array, sampled: jax.Array, rewards: jax.Array, advantages: jax.Array) -> jax.Array:
        log_p, log_old = (_log_probability(x, rewards) for x in (logit, sampled))
        return (jnp.exp(log_p - log_old) * advantages).mean()

    def update(path: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        n, age, key = now
        logit, sampled = path[n], path[jnp.maximum(n - age, 0)]
        successes = jax.random.categorical(key, log_choose + counts * sampled, shape=(num_groups,)) + 1
        rewards = (jnp.arange(RUN_SIZE)[None] < successes[:, None]).astype(logit.dtype)  # [groups, G]
        advantages = group_advantages(rewards, epsilon=0.0).astype(logit.dtype)
        slope = jax.grad(surrogate)(logit, sampled, rewards, advantages)
        fisher = jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)
        moved = logit + RUN_STEP * (slope / fisher / RUN_BETA - (logit - reference))
        return path.at[n + 1].set(moved), None

    start = jnp.full(ages.shape[0] + 1, reference)
    keys = jax.random.split(key, ages.shape[0])
    path, _ = jax.lax.scan(update, start, (jnp.arange(ages.shape[0]), ages, keys))
    return jax.nn.sigmoid(path)


def _log_probability(logit: jax.Array, rewards: jax.Array) -> jax.Array:
    return jnp.where(rewards > 0, jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit))


def _over_beta(name: str, p_ref: float, weights: Weights, points: int) -> dict[str, Any]:
    """τ_c at the low fixed point over the flip window."""
    window = flip_window(p_ref, weights=weights)
    assert window is not None, name
    share = np.sin(np.linspace(0, np.pi / 2, points + 2)[1:-1]) ** 2  # denser at the ends, where τ_c goes to infinity
    betas = window[0] * (window[1] / window[0]) ** share
    lows = [fixed_points(p_ref, beta=beta, weights=weights)[0] for beta in betas]
    return {"name": name, "beta": betas, "delay": critical_delay(jnp.asarray([low.multiplier for low in lows]))}


if __name__ == "__main__":
    figures.run(experiment)
