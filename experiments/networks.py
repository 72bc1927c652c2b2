"""What on-policy GRPO climbs, and what a network lets through: exact policies with shared parameters, everything enumerated.

    python -m experiments.networks [--out=runs/theory] [--quick]

Writes climbs.png, rank.png and their numbers, and prints the tables. A policy is softmax(prior + form(θ)) over the outcomes of
each prompt, where form is a product with features (log-linear) or a small network; the parameters are shared by the prompts.
docs/networks.md derives what is measured here.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments.theory import figures
from grpo_jax.theory import (
    Group,
    Weights,
    attainable_point,
    attainable_points,
    flow_point,
    omega,
    potential,
    rest_excess,
    split_kl,
)
from grpo_jax.theory.weights import variance

GROUP = 8
WEIGHTS = Group(GROUP, epsilon=1e-4)
STEP, TOLERANCE, MOST_STEPS, RIDGE = 0.1, 1e-7, 1000, 1e-10  # of the flow to rest

BETAS = (0.5, 1.0, 3.0)
FAMILIES: dict[str, dict[str, Any]] = {  # what all its policies have, and their ranks
    "8 prompts, 1,024 outcomes": {"prompts": 8, "outcomes": 1024, "signal": 1.0, "ranks": (1, 4, 16, 64)},
    "1 prompt, 256 outcomes": {"prompts": 1, "outcomes": 256, "signal": 1.0, "ranks": (1, 4, 16, 64)},
    "16 prompts, 20 outcomes": {"prompts": 16, "outcomes": 20, "signal": 0.0, "ranks": (8, 32, 96, 200, 280)},
}
QUICK: dict[str, Any] = {"prompts": 1, "outcomes": 64, "signal": 1.0, "ranks": (2, 8)}
SEEDS = 3
PREDICTIONS = ("table", "alone", "together")
CLIMB: dict[str, Any] = {"prompts": 8, "outcomes": 64, "rank": 16, "signal": 1.0}

CLIMB_CAPTION = (
    "A log-linear policy, {prompts} prompts of {outcomes} outcomes that share {rank} parameters, β = 1, groups of 8; means over"
    " the prompts. Left: small steps without noise climb J = Φ − β KL. Middle: what the KL is spent on; dotted: what a rest"
    " point of these p would spend on all but the useful part. Right: dJ/ds along the ray from π_ref, from ℓ = log π/π_ref and"
    " the rewards alone: above 0 on the way, 0 at rest, below 0 where sampling noise has pushed beyond; dashed: −η E‖ĝ‖²/2."
)
RANK_CAPTION = (
    "Left three: success at rest over the rank of the shared features, {family}, groups of 8, {seeds} seeds each: reached by"
    " small exact steps (bars: the middle 80 % of prompts), predicted for a table (p*), and for this network, each prompt alone"
    " from its share ρ of the pull and all prompts together. Right: root mean square error per prompt of the last, over the"
    " nats that it expects to be spent without success, as a share of the entropy within successes and failures; every policy"
    " of the tables."
)


class Toy(NamedTuple):
    """Prompts with enumerated outcomes, and what their policy is made of."""

    prior: jax.Array  # [P, N] logits that no parameter moves
    rewards: jax.Array  # [P, N] 0 or 1
    inputs: jax.Array  # of the form
    start: jax.Array  # [D] θ_ref


class State(NamedTuple):
    """A policy, per prompt."""

    policy: jax.Array  # [P, N]
    log_ratio: jax.Array  # [P, N] ℓ = log π/π_ref
    logit: jax.Array  # [P] of p


class Regression(NamedTuple):
    """How the rewards regress on the scores under π_ref."""

    coupling: jax.Array  # [P, P] K
    shares: jax.Array  # [P] ρ
    r2: jax.Array  # ΩᵀKΩ/ΣΩ²v, of all prompts together


class Ledger(NamedTuple):
    """The objective and where the nats went, means over the prompts."""

    objective: jax.Array
    potential: jax.Array
    kl: jax.Array
    useful: jax.Array
    within_successes: jax.Array
    within_failures: jax.Array
    virial: jax.Array  # ½ v Δ (Ω/β − Δ): what a rest point of these p spends beyond the useful part
    gain: jax.Array  # Ω Cov(r, ℓ)
    price: jax.Array  # β Var ℓ; gain − price is dJ/ds along the ray from π_ref


Form: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def linear(theta: jax.Array, features: jax.Array) -> jax.Array:
    """Logits [P, N] of a log-linear policy with features [P, N, D]."""
    return features @ theta


def two_layers(theta: jax.Array, contexts: jax.Array, *, outcomes: int) -> jax.Array:
    """Logits [P, N] of a network with one hidden layer over contexts [P, C]; as many hidden units as θ [D] has room for."""
    width = contexts.shape[1]
    hidden = theta.size // (width + outcomes)
    first, second = theta[: width * hidden].reshape(width, hidden), theta[width * hidden :].reshape(hidden, outcomes)
    return jnp.tanh(contexts @ first) @ second


def make_toy(seed: int, *, prompts: int, outcomes: int, rank: int, signal: float, size: int | None = None) -> Toy:
    """A log-linear policy with ``rank`` random features; ``signal`` is how far a success moves each, half of it in common.

    Zeros fill the features up to ``size``, so that one program serves all ranks.

    >>> make_toy(0, prompts=2, outcomes=8, rank=3, signal=1.0, size=4).inputs.shape
    (2, 8, 4)
    """
    random, size = np.random.default_rng(seed), size or rank
    rewards = random.random((prompts, outcomes)) < random.uniform(0.1, 0.5, (prompts, 1))
    rewards[:, 0], rewards[:, 1] = True, False
    prior = random.normal(size=(prompts, outcomes))
    common, own = random.normal(size=size), random.normal(size=(prompts, 1, size))
    features = random.normal(size=(prompts, outcomes, size)) + signal * rewards[..., None] * (common + own) / 2
    features[..., rank:] = 0.0
    return Toy(*map(jnp.asarray, (prior, rewards.astype(float), features, np.zeros(size))))


def make_network(seed: int, *, prompts: int, outcomes: int, hidden: int, width: int = 6) -> tuple[Toy, Form]:
    """A small network with random parameters as reference."""
    random = np.random.default_rng(seed)
    rewards = random.random((prompts, outcomes)) < random.uniform(0.1, 0.5, (prompts, 1))
    rewards[:, 0], rewards[:, 1] = True, False
    first = random.normal(size=width * hidden) / np.sqrt(width)
    second = random.normal(size=hidden * outcomes) / np.sqrt(hidden)
    prior, contexts = np.zeros((prompts, outcomes)), random.normal(size=(prompts, width))
    toy = Toy(*map(jnp.asarray, (prior, rewards.astype(float), contexts, np.concatenate([first, second]))))
    return toy, partial(two_layers, outcomes=outcomes)


def log_policy(toy: Toy, theta: jax.Array, form: Form) -> jax.Array:
    """log π [P, N] at θ [D]."""
    return jax.nn.log_softmax(toy.prior + form(theta, toy.inputs), axis=-1)


@partial(jax.jit, static_argnames="form")
def state_of(toy: Toy, theta: jax.Array, form: Form = linear) -> State:
    """The policy at θ [D]."""
    log = log_policy(toy, theta, form)
    success, failure = (jax.nn.logsumexp(log, axis=-1, b=x) for x in (toy.rewards, 1 - toy.rewards))
    return State(jnp.exp(log), log - log_policy(toy, toy.start, form), success - failure)


def gradient(toy: Toy, theta: jax.Array, beta: float, weights: Weights, form: Form = linear) -> jax.Array:
    """∇J = Σ_i E[(Ω_i r − β ℓ) s], [D]."""
    state = state_of(toy, theta, form)
    pull = omega(state.logit, weights, logits=True)[:, None] * toy.rewards - beta * state.log_ratio
    return jax.vjp(lambda theta: log_policy(toy, theta, form), theta)[1](state.policy * pull)[0]


def natural(toy: Toy, theta: jax.Array, ascents: jax.Array, form: Form = linear) -> jax.Array:
    """F⁻¹ g for each row g of [K, D], F = Σ_i E[s sᵀ] over the prompts; directions that F does not see are left alone."""
    scores = jax.jacfwd(lambda theta: log_policy(toy, theta, form))(theta)
    policy = state_of(toy, theta, form).policy
    rows = (jnp.sqrt(policy)[..., None] * scores).reshape(-1, theta.size)
    fisher = rows.T @ rows
    ridge = RIDGE * jnp.trace(fisher) / theta.size
    return jnp.linalg.solve(fisher + ridge * jnp.eye(theta.size), ascents.T).T


@partial(jax.jit, static_argnames="form")
def regression(toy: Toy, weights: Weights, form: Form = linear) -> Regression:
    """How the rewards regress on the scores under π_ref: c_i = ∇p_i, K = c F⁻¹ cᵀ, ρ = KΩ/(vΩ)."""
    state = state_of(toy, toy.start, form)
    slopes = jax.jacrev(lambda theta: (jnp.exp(log_policy(toy, theta, form)) * toy.rewards).sum(-1))(
        toy.start
    )  # [P, D]
    coupling = slopes @ natural(toy, toy.start, slopes, form).T
    pull, v = omega(state.logit, weights, logits=True), variance(state.logit)
    shares = coupling @ pull / (v * pull)
    return Regression((coupling + coupling.T) / 2, shares, pull @ coupling @ pull / (pull**2 * v).sum())


@jax.jit
def rest(toy: Toy, beta: float, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Where small natural steps of a log-linear policy end: θ [D], and how far a full step would still move it, of |θ|."""

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        theta, _, count = carry
        ahead = natural(toy, theta, gradient(toy, theta, beta, weights)[None])[0] / beta
        return theta + STEP * ahead, jnp.linalg.norm(ahead) / jnp.linalg.norm(theta + ahead), count + 1

    def goes_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (carry[1] > TOLERANCE) & (carry[2] < MOST_STEPS)

    theta, left, _ = jax.lax.while_loop(goes_on, step, (toy.start, jnp.asarray(jnp.inf), jnp.asarray(0)))
    return theta, left


@jax.jit
def ledger(toy: Toy, state: State, start: jax.Array, beta: float, weights: Weights) -> Ledger:
    """Where the nats went, by enumeration; ``start`` [P] are the log-odds of π_ref."""

    def mean(values: jax.Array) -> jax.Array:
        return (state.policy * values).sum(-1)

    p, q = jax.nn.sigmoid(state.logit), jax.nn.sigmoid(-state.logit)
    kl, of_successes = mean(state.log_ratio), mean(toy.rewards * state.log_ratio)
    split = split_kl(state.logit, start, of_successes / p, (kl - of_successes) / q, logits=True)
    phi = potential(state.logit, weights, logits=True) - potential(start, weights, logits=True)
    covariance = of_successes - p * kl
    return Ledger(
        objective=(phi - beta * kl).mean(),
        potential=phi.mean(),
        kl=kl.mean(),
        useful=split.useful.mean(),
        within_successes=split.within_successes.mean(),
        within_failures=split.within_failures.mean(),
        virial=rest_excess(state.logit, start, beta=beta, weights=weights, logits=True).mean(),
        gain=(omega(state.logit, weights, logits=True) * covariance).mean(),
        price=(beta * (mean(state.log_ratio**2) - kl**2)).mean(),
    )


@partial(jax.jit, static_argnames=("steps", "form"))
def climb(
    toy: Toy, beta: float, weights: Weights, *, rate: float, steps: int, form: Form = linear
) -> tuple[jax.Array, Ledger]:
    """θ [D] after plain gradient steps θ ← θ + rate ∇J without noise, and the ledger [steps] on the way."""
    start = state_of(toy, toy.start, form).logit

    def step(theta: jax.Array, _: None) -> tuple[jax.Array, Ledger]:
        spent = ledger(toy, state_of(toy, theta, form), start, beta, weights)
        return theta + rate * gradient(toy, theta, beta, weights, form), spent

    return jax.lax.scan(step, toy.start, None, length=steps)


@partial(jax.jit, static_argnames="steps")
def sampled_climb(toy: Toy, beta: float, *, rate: float, steps: int, seed: int) -> tuple[Ledger, jax.Array]:
    """The same with one group per prompt drawn at each step, and the squared norm [steps] of each sampled gradient."""
    start = state_of(toy, toy.start).logit

    def step(theta: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[Ledger, jax.Array]]:
        state = state_of(toy, theta)
        drawn = jax.random.categorical(key, jnp.log(state.policy), shape=(GROUP, toy.prior.shape[0])).T  # [P, G]
        rewards, ratios = (jnp.take_along_axis(x, drawn, 1) for x in (toy.rewards, state.log_ratio))
        centred, excess = (x - x.mean(-1, keepdims=True) for x in (rewards, ratios))
        spread = jnp.sqrt((centred**2).mean(-1, keepdims=True) + WEIGHTS.epsilon)
        coefficients = centred / spread - beta * excess * GROUP / (GROUP - 1)

        def surrogate(theta: jax.Array) -> jax.Array:
            return (coefficients * jnp.take_along_axis(log_policy(toy, theta, linear), drawn, 1)).sum() / GROUP

        ascent = jax.grad(surrogate)(theta)
        return theta + rate * ascent, (ledger(toy, state, start, beta, WEIGHTS), (ascent**2).sum())

    return jax.lax.scan(step, toy.start, jax.random.split(jax.random.key(seed), steps))[1]


@partial(jax.jit, static_argnames="form")
def reach(toy: Toy, theta: jax.Array, beta: float, form: Form = linear) -> dict[str, Any]:
    """What a policy came to, beside the log-odds of its reference and the entropy within successes and failures there."""
    first, last = state_of(toy, toy.start, form), state_of(toy, theta, form)
    p, q = jax.nn.sigmoid(first.logit), jax.nn.sigmoid(-first.logit)
    # p H_S + (1−p) H_F is the entropy of the policy less that of success and failure.
    entropy = -(first.policy * jnp.log(first.policy)).sum(-1) + p * jnp.log(p) + q * jnp.log(q)
    spent = ledger(toy, last, first.logit, beta, WEIGHTS)
    return {"reference": first.logit, "reached": last.logit, "ledger": spent, "entropy": entropy.mean()}


def compare(toy: Toy, theta: jax.Array, beta: float, form: Form = linear) -> dict[str, Any]:
    """Where a policy came to rest, θ [D], against what was to be expected of its reference."""
    found, end = regression(toy, WEIGHTS, form), reach(toy, theta, beta, form)
    start, r2 = end["reference"], jnp.clip(found.shares, 0.0, 1.0)
    logits = {
        "table": flow_point(start, beta=beta, weights=WEIGHTS, logits=True),
        "alone": attainable_point(start, beta=beta, weights=WEIGHTS, r2=r2, logits=True),
        "together": attainable_points(start, beta=beta, weights=WEIGHTS, coupling=found.coupling, logits=True),
    }
    gain = logits["together"] - start
    pull = omega(logits["together"], WEIGHTS, logits=True) / beta
    excess = variance(logits["together"]) * gain * (pull - gain) / 2
    reached = jax.nn.sigmoid(end["reached"])
    ends = {name: jax.nn.sigmoid(x) for name, x in logits.items()}
    return {
        "beta": beta,
        "r2": found.r2,
        "least_share": found.shares.min(),
        "most_share": found.shares.max(),
        "p_ref": jax.nn.sigmoid(start),
        "reached": reached,
        **ends,
        "rms": {name: jnp.sqrt(((x - reached) ** 2).mean()) for name, x in ends.items()},
        "nats": excess.mean() / end["entropy"],
        "ledger": end["ledger"],
    }


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes climbs.png, climbs.json, rank.png and rank.json into ``out``, and prints the tables."""
    _show_climbs(out, quick)
    families = {"1 prompt, 64 outcomes": QUICK} if quick else FAMILIES
    cases = {name: _rank_cases(family, 1 if quick else SEEDS) for name, family in families.items()}
    for name, rows in cases.items():
        print(f"\n{name}\n{_rank_table(rows)}")
    print(f"\nOne hidden layer, 8 prompts, 64 outcomes, plain gradient steps\n{_network_table(quick)}")
    _show_ranks(out, cases)


def _show_climbs(out: Path, quick: bool) -> None:
    toy = make_toy(1, **CLIMB)
    _, path = climb(toy, 1.0, WEIGHTS, rate=0.003, steps=60 if quick else 600)
    steps = 100 if quick else 20_000
    noisy = {rate: sampled_climb(toy, 1.0, rate=rate, steps=steps, seed=0) for rate in (0.01, 0.03, 0.1)}
    rows, late = [], slice(steps // 5, None)
    for rate, (spent, squares) in noisy.items():
        excess = spent.kl - spent.useful
        slope, law = (spent.gain - spent.price)[late], -rate / 2 * squares[late] / toy.prior.shape[0]
        rows.append(
            (rate, slope.mean(), law.mean(), (slope < 0).mean(), excess[late].mean(), spent.objective[late].mean())
        )
    end = jax.tree.map(lambda x: x[-1], path)
    rows.insert(0, (0.0, end.gain - end.price, 0.0, 0.0, end.kl - end.useful, end.objective))
    head = ["η", "dJ/ds", "−η E‖ĝ‖²/2", "share below 0", "X", "J"]
    print(f"At the end of a path without noise (η = 0), and the mean of sampled ones\n{_table(head, rows)}")
    figure, (panels,) = figures.new_figure(1, 3, size=(12, 4.6))
    x = np.arange(path.kl.size)
    for k, (name, y) in enumerate({"J": path.objective, "Φ": path.potential, "β KL": path.kl}.items()):
        panels[0].plot(x, y, **figures.line(k, label=name))
    parts = {"useful": path.useful, "within successes": path.within_successes, "within failures": path.within_failures}
    panels[1].stackplot(x, *parts.values(), labels=list(parts), colors=figures.COLOURS[1:4], alpha=0.7)
    panels[1].plot(x, path.useful + path.virial, color=figures.INK, linestyle=":", label="useful + at rest")
    panels[2].plot(x, path.gain - path.price, **figures.line(0, label="no noise"))
    shown = slice(0, x.size)
    for k, (rate, (spent, _)) in enumerate(list(noisy.items())[1:], start=1):
        panels[2].plot(
            x, (spent.gain - spent.price)[shown], **figures.line(k, label=f"sampled, η = {rate}", linewidth=0.8)
        )
        panels[2].axhline(float(rows[k + 1][2]), color=figures.COLOURS[k], linestyle="--", linewidth=1)
    panels[2].set(ylim=(-0.4, 0.25))
    for panel, name in zip(panels, ("the objective", "what the KL is spent on", "arrived?"), strict=True):
        panel.set(xlabel="steps")
        panel.legend(frameon=False, fontsize=8)
        figures.title(panel, name)
    panels[0].set(ylabel="nats per prompt")
    numbers = {"path": path, "sampled": [dict(zip(head, row, strict=True)) for row in rows]}
    figures.save(figure, "climbs", numbers, out=out, caption=CLIMB_CAPTION.format(**CLIMB))


def _rank_cases(family: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """`compare` for every rank, β and seed of a family."""
    ranks, form = family["ranks"], {name: family[name] for name in ("prompts", "outcomes", "signal")}
    cases = []
    for rank in ranks:
        for seed in range(seeds):
            toy = make_toy(seed, rank=rank, size=max(ranks), **form)
            for beta in BETAS:
                theta, left = rest(toy, beta, WEIGHTS)
                cases.append({"rank": rank, "seed": seed, "left": left, **compare(toy, theta, beta)})
    return cases


def _rank_table(cases: list[dict[str, Any]]) -> str:
    """A row for every rank and β: means over prompts and seeds, errors as root mean squares per prompt."""
    rows = []
    for rank, beta in sorted({(case["rank"], case["beta"]) for case in cases}, key=lambda pair: (pair[1], pair[0])):
        chosen = [case for case in cases if (case["rank"], case["beta"]) == (rank, beta)]
        mean = {name: _mean(chosen, name) for name in ("r2", "p_ref", "reached", *PREDICTIONS, "nats")}
        rms = [np.sqrt(np.mean([float(case["rms"][name]) ** 2 for case in chosen])) for name in PREDICTIONS]
        excess, virial = (
            sum(float(f(case["ledger"])) for case in chosen) for f in (_excess, lambda spent: spent.virial)
        )
        shares = min(float(case["least_share"]) for case in chosen), max(float(case["most_share"]) for case in chosen)
        rows.append((rank, beta, *mean.values(), *rms, virial / excess, "{:.2f} … {:.2f}".format(*shares)))
    head = ["rank", "β", "R²", "p_ref", "reached", "p*", "p† alone", "p† together", "X†/H"]
    return _table([*head, "rms p*", "rms alone", "rms together", "virial/X", "ρ"], rows)


def _network_table(quick: bool) -> str:
    """A network of one hidden layer, which is not log-linear, after plain gradient steps."""
    rows = []
    for hidden in (2,) if quick else (2, 6):
        toy, form = make_network(1, prompts=8, outcomes=64, hidden=hidden)
        for beta in BETAS[2:] if quick else BETAS[1:]:
            theta, path = climb(toy, beta, WEIGHTS, rate=0.05, steps=50 if quick else 20_000, form=form)
            case = compare(toy, theta, beta, form)
            monotone = "yes" if bool((jnp.diff(path.objective) > -1e-12).all()) else "no"
            ends = (_mean([case], name) for name in ("r2", "p_ref", "reached", *PREDICTIONS))
            slope = (path.gain[-1] - path.price[-1]) / path.gain[-1]
            rows.append(
                (hidden, beta, *ends, *case["rms"].values(), path.virial[-1] / _excess(case["ledger"]), slope, monotone)
            )
    head = [
        "hidden",
        "β",
        "R²",
        "p_ref",
        "reached",
        "p*",
        "p† alone",
        "p† together",
        "rms p*",
        "rms alone",
        "rms together",
    ]
    return _table([*head, "virial/X", "dJ/ds over Ω Cov", "J monotone"], rows)


def _show_ranks(out: Path, cases: dict[str, list[dict[str, Any]]]) -> None:
    figure, (panels,) = figures.new_figure(1, 4, size=(14, 4.8))
    family, rows = next(iter(cases.items()))
    ranks, betas = (sorted({row[key] for row in rows}) for key in ("rank", "beta"))
    names = {"table": "p*, a table", "alone": "p†, each alone", "together": "p†, together"}
    for panel, beta in zip(panels, betas, strict=False):
        chosen = [[row for row in rows if (row["rank"], row["beta"]) == (rank, beta)] for rank in ranks]
        for k, (key, label) in enumerate(names.items(), start=1):
            panel.plot(ranks, [_mean(group, key) for group in chosen], **figures.marker(k, label=label))
        reached = [np.concatenate([np.asarray(row["reached"]) for row in group]) for group in chosen]
        bars = [np.abs(np.quantile(x, (0.1, 0.9)) - x.mean()) for x in reached]
        middle = [x.mean() for x in reached]
        panel.errorbar(ranks, middle, np.transpose(bars), fmt="o", color=figures.INK, capsize=3, label="reached")
        panel.axhline(_mean(rows, "p_ref"), color="0.5", linestyle=":", label="p_ref")
        panel.set(xscale="log", xlabel="rank", ylim=(0, 1.02), xticks=ranks, xticklabels=ranks)
        panel.minorticks_off()
        figures.title(panel, f"β = {beta:g}")
    panels[0].set(ylabel="success at rest")
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    for k, (name, group) in enumerate(cases.items()):
        x = np.array([float(case["nats"]) for case in group])
        y = np.array([float(case["rms"]["together"]) for case in group])
        panels[3].plot(np.maximum(x, 1e-4), np.maximum(y, 1e-4), **figures.marker(k, linestyle="none", label=name))
    panels[3].axhline(0.04, color="0.5", linestyle=":")
    panels[3].set(xscale="log", yscale="log", xlabel="X†/H", ylabel="rms error of p†, together")
    panels[3].legend(frameon=False, fontsize=8)
    figures.title(panels[3], "where it fails")
    figures.save(figure, "rank", cases, out=out, caption=RANK_CAPTION.format(family=family, seeds=SEEDS))


def _excess(spent: Ledger) -> jax.Array:
    return spent.kl - spent.useful


def _mean(cases: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([np.mean(np.asarray(case[name])) for case in cases]))


def _table(head: list[str], rows: list[Any]) -> str:
    """A Markdown table, numbers to three digits."""
    cells = [head, ["---"] * len(head)]
    cells += [[x if isinstance(x, str) else f"{float(x):.3g}" for x in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


if __name__ == "__main__":
    figures.run(experiment)
