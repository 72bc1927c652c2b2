"""What the noise of the updates costs: a law for it, averaging and two rates against it, on policies whose outcomes are counted.

    python -m experiments.noise [--out=runs/theory] [--quick]

A softmax policy over the outcomes of a few prompts, with features that the prompts share, is trained by the loss of the trainer
(`grpo_loss`) on sampled groups, at constant rates, from the point at which small steps without noise rest. All that is reported
of a policy is a sum over its outcomes. OUT/noise.png, noise.json and noise.md are the outcome. The law is derived in
docs/networks.md: steps of size η at rest, along gradients of covariance C, cost

    J* − E[J] = η tr(C)/4 for SGD,    η Σ_j √C_jj / 4 for Adam,    tr(H⁻¹C)/(2n) for the average of n updates, H = −∇∇J,

and, as long as p stays where it is, they are β(X − X*).
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from scipy.optimize import minimize

from experiments.theory import figures
from grpo_jax import theory
from grpo_jax.objective import GRPO, group_advantages, grpo_loss
from grpo_jax.train.optimizer import average_tail, averaged_params

BETA, GROUP = 1.0, 8
PROMPTS, OUTCOMES, RANK = 8, 16, 24
OPTIMIZERS = {"SGD": optax.sgd, "Adam": lambda rate: optax.adam(rate, b1=0.9, b2=0.999)}
# (optimizer, groups of every prompt in an update): learning rates, each twice the one before.
SERIES = {
    ("SGD", 1): (0.05, 0.1, 0.2, 0.4),
    ("SGD", 4): (0.2, 0.4),
    ("Adam", 1): (0.004, 0.008, 0.016, 0.032),
    ("Adam", 4): (0.008, 0.016),
}
RELAXATIONS, CHAINS = (
    12,
    64,
)  # length of a run, after as much to find its spread, in times that the slowest direction takes
CAPTION = (
    "Derived here. A softmax policy, 8 prompts of 16 outcomes and 24 shared features, G = 8, β = 1, at constant rates; means of"
    " 64 runs from the point where small steps without noise rest, every number a sum over outcomes. Left: what noise costs"
    " on the objective, over the learning rate; lines are the law η tr(C)/4 for SGD and η Σ√C/4 for Adam, with the covariance C"
    " of one update's gradient at the rest point; hollow, and pale lines: the average of the parameters over n updates, and its"
    " law tr(H⁻¹C)/2n. Right: the same runs over the cost that the law names: the nats go into X, which buys no success, and p"
    " hardly moves."
)


class Policy(NamedTuple):
    """π(o | q) ∝ exp(base + features·θ), the reference at θ = 0.

    Attributes:
      base: [Q, N].  features: [Q, N, r].  success: [Q, N] bool.
    """

    base: jax.Array
    features: jax.Array
    success: jax.Array

    def logps(self, theta: jax.Array) -> jax.Array:
        """[Q, N] log π."""
        return jax.nn.log_softmax(self.base + self.features @ theta)


class Exact(NamedTuple):
    """Means over prompts, all nats but p: success, KL(π‖π_ref), its part X that buys no success, the objective J."""

    p: jax.Array
    kl: jax.Array
    excess: jax.Array
    objective: jax.Array


def _weights(group_size: int) -> theory.Group:
    return theory.Group(group_size, **GRPO.normaliser())


def random_policy(seed: int = 0, *, prompts: int = PROMPTS, outcomes: int = OUTCOMES, rank: int = RANK) -> Policy:
    """Normal features, and a reference whose success probabilities spread over (0, 1)."""
    random = np.random.default_rng(seed)
    base, features = random.normal(size=(prompts, outcomes)), random.normal(size=(prompts, outcomes, rank))
    success = random.random((prompts, outcomes)) < np.linspace(0.1, 0.5, prompts)[:, None]
    success[:, 0], success[:, 1] = True, False
    return Policy(jnp.asarray(base), jnp.asarray(features), jnp.asarray(success))


def tabular(policy: Policy) -> Policy:
    """The same prompts with a parameter for each outcome: nothing is shared, and X = 0 is within reach."""
    prompts, outcomes = policy.success.shape
    return policy._replace(features=jnp.eye(prompts * outcomes).reshape(prompts, outcomes, -1))


def exact(policy: Policy, theta: jax.Array, *, beta: float = BETA, group_size: int = GROUP) -> Exact:
    """By summing over outcomes; J = Σ[Φ_G(p) − β KL]/Q with Φ_G' = Ω_G, 0 at the reference."""
    logps, ref_logps = policy.logps(theta), policy.logps(jnp.zeros_like(theta))
    p, p_ref = ((jnp.exp(x) * policy.success).sum(-1) for x in (logps, ref_logps))  # [Q]
    kl = (jnp.exp(logps) * (logps - ref_logps)).sum(-1)
    gained = theory.objective_gain(p, p_ref, kl, beta=beta, weights=_weights(group_size))
    return Exact(*(x.mean() for x in (p, kl, kl - theory.bernoulli_kl(p, p_ref), gained)))


def rest_point(policy: Policy, *, beta: float = BETA, group_size: int = GROUP) -> jax.Array:
    """θ at which ∇J = 0, uphill from the reference without noise."""

    @jax.jit
    @jax.value_and_grad
    def negative(theta: jax.Array) -> jax.Array:
        return -exact(policy, theta, beta=beta, group_size=group_size).objective

    start = np.zeros(policy.features.shape[-1])
    found = minimize(negative, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 10_000})
    if np.abs(found.jac).max() > 1e-7:
        raise RuntimeError(f"no rest point found: {found.message}")
    return jnp.asarray(found.x)


def curvature(policy: Policy, theta: jax.Array, **setting: Any) -> np.ndarray:
    """[r, r] −∇∇J."""
    return -np.asarray(jax.jit(jax.hessian(lambda t: exact(policy, t, **setting).objective))(theta))


def gradient(
    policy: Policy, theta: jax.Array, outcomes: jax.Array, *, beta: float = BETA, group_size: int = GROUP
) -> jax.Array:
    """[r] the trainer's gradient, uphill, from sampled outcomes [Q, M·G]: M groups of every prompt."""
    rewards = jnp.take_along_axis(policy.success, outcomes, axis=1).astype(jnp.float32).reshape(-1, group_size)
    advantages = group_advantages(rewards, **GRPO.normaliser()).reshape(-1)

    def loss(theta: jax.Array) -> jax.Array:
        logps, ref_logps = (
            jnp.take_along_axis(policy.logps(t), outcomes, axis=1).reshape(-1, 1)
            for t in (theta, jnp.zeros_like(theta))
        )
        mask = jnp.ones(logps.shape, bool)
        return grpo_loss(logps, None, ref_logps, advantages, mask, beta=beta, group_size=group_size)[0]

    return -jax.grad(loss)(theta)


def sampled(policy: Policy, theta: jax.Array, key: jax.Array, completions: int) -> jax.Array:
    """[Q, completions] outcomes."""
    return jax.random.categorical(key, policy.logps(theta), shape=(completions, len(policy.base))).T


def covariance(policy: Policy, theta: jax.Array, *, groups: int, draws: int = 20_000, **setting: Any) -> np.ndarray:
    """[r, r] of the gradient of one update with so many groups of every prompt, from draws at θ."""
    size = setting.get("group_size", GROUP)
    one = lambda key: gradient(policy, theta, sampled(policy, theta, key, groups * size), **setting)  # noqa: E731
    drawn = jax.lax.map(one, jax.random.split(jax.random.key(1), draws), batch_size=500)
    return np.cov(np.asarray(drawn).T).reshape(len(theta), -1)


def law(optimizer: str, rate: float, covariance: np.ndarray) -> float:
    """J* − E[J] of constant steps around the rest point, to first order in the rate, from the covariance of the gradient."""
    spread = np.trace(covariance) if optimizer == "SGD" else np.sqrt(np.diag(covariance)).sum()
    return rate * float(spread) / 4


def average_law(count: int, curvature: np.ndarray, covariance: np.ndarray) -> float:
    """J* − E[J] of the average over many updates, tr(H⁻¹C)/(2n): neither rate nor optimizer is in it."""
    return float(np.trace(np.linalg.solve(curvature, covariance))) / (2 * count)


@partial(jax.jit, static_argnames=("optimizer", "groups", "beta", "group_size"))
def trained(
    policy: Policy,
    start: jax.Array,
    keys: jax.Array,
    rate: jax.Array,
    count: jax.Array,
    *,
    optimizer: str,
    groups: int,
    beta: float = BETA,
    group_size: int = GROUP,
) -> dict[str, jax.Array]:
    """{quantity: [chains]} of independent runs of constant steps from ``start``.

    Args:
      policy: see `Policy`.
      start: θ, the rest point, so that only the spread around it has to be found.
      keys: [chains].
      rate: η.
      count: updates of a run that count; as many before it do not.
      optimizer: "SGD" or "Adam".
      groups: of every prompt in an update.
      beta, group_size: of the objective.

    Returns:
      The means over the counted updates of what `exact` says, of "virial", θ·∇J, and of "squared", the squared norm of the
      sampled gradient; and, after "averaged ", what `exact` says of the parameters' average over them.
    """
    setting: dict[str, Any] = {"beta": beta, "group_size": group_size}
    transform = optax.chain(OPTIMIZERS[optimizer](rate), average_tail(count))
    objective = lambda theta: exact(policy, theta, **setting)  # noqa: E731

    def run(key: jax.Array) -> dict[str, jax.Array]:
        def update(i: jax.Array, carry: Any) -> Any:
            theta, state, sums = carry
            found = gradient(
                policy, theta, sampled(policy, theta, jax.random.fold_in(key, i), groups * group_size), **setting
            )
            slope, values = jax.grad(lambda t: (objective(t).objective, objective(t)), has_aux=True)(theta)
            now = values._asdict() | {"virial": theta @ slope, "squared": found @ found}
            sums = {name: sums[name] + jnp.where(i >= count, x, 0.0) for name, x in now.items()}
            updates, state = transform.update(-found, state, theta)
            return optax.apply_updates(theta, updates), state, sums

        names = (*Exact._fields, "virial", "squared")
        carry = start, transform.init(start), {name: jnp.zeros(()) for name in names}
        theta, state, sums = jax.lax.fori_loop(0, 2 * count, update, carry)
        ends = objective(averaged_params(theta, state))._asdict()
        return {name: x / count for name, x in sums.items()} | {f"averaged {name}": x for name, x in ends.items()}

    return jax.vmap(run)(keys)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes noise.png, noise.json and noise.md into ``out``."""
    size = {"chains": 8, "relaxations": 1, "draws": 500} if quick else {"chains": CHAINS, "relaxations": RELAXATIONS}
    numbers = compute(**size)
    figure, axes = figures.new_figure(1, 2, size=(10.5, 5.2))
    _costs(axes[0, 0], numbers["rows"], numbers["rest"])
    _where(axes[0, 1], numbers["rows"], numbers["rest"])
    figures.save(figure, "noise", numbers, out=out, caption=CAPTION)
    page = "\n".join(_page(numbers))
    (out / "noise.md").write_text(page + "\n", encoding="utf-8")
    print(page)


def compute(*, chains: int, relaxations: float, draws: int = 20_000) -> dict[str, Any]:
    """The rest point, a row for each optimizer, batch and rate, and the lines through two rates."""
    policy = random_policy()
    start, table = rest_point(policy), tabular(policy)
    rest = {name: float(x) for name, x in exact(policy, start)._asdict().items()}
    hessian, one = curvature(policy, start), covariance(policy, start, groups=1, draws=draws)
    keys = jax.random.split(jax.random.key(2), chains)
    rows = []
    for (optimizer, groups), rates in SERIES.items():
        spread = one / groups  # groups are independent
        scale = np.ones(len(start)) if optimizer == "SGD" else 1 / np.sqrt(np.diag(spread))
        slowest = np.linalg.eigvals(scale[:, None] * hessian).real.min()
        for rate in rates:
            count = max(2, round(relaxations / (rate * slowest)))
            found = trained(policy, start, keys, rate, count, optimizer=optimizer, groups=groups)
            row = {"optimizer": optimizer, "completions": groups * policy.success.shape[0] * GROUP, "rate": rate}
            row |= {"updates": count, "law": law(optimizer, rate, spread)}
            row["law of the average"] = average_law(count, hessian, spread)
            means = {name: float(x.mean()) for name, x in found.items()}
            errors = {name: float(x.std(ddof=1) / np.sqrt(chains)) for name, x in found.items()}
            rows.append(row | {"mean": means, "error": errors})
    of_table = covariance(table, rest_point(table), groups=1, draws=draws)
    return {
        "beta": BETA,
        "reference": exact(policy, jnp.zeros_like(start))._asdict(),
        "rest": rest,
        "rows": rows,
        "two_rates": _two_rates(rows),
        "trace": {
            "shared": np.trace(one),
            "independent": _independent_trace(policy, start),
            "tabular": np.trace(of_table),
        },
    }


def _two_rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """2·f(η) − f(2η) of the two smallest rates of each optimizer and batch, with its standard error."""
    found = []
    for _, series in itertools.groupby(rows, lambda row: (row["optimizer"], row["completions"])):
        low, high = list(series)[:2]
        means = {name: 2 * low["mean"][name] - high["mean"][name] for name in Exact._fields}
        errors = {name: float(np.hypot(2 * low["error"][name], high["error"][name])) for name in Exact._fields}
        found.append(low | {"mean": means, "error": errors})
    return found


def _independent_trace(policy: Policy, theta: jax.Array) -> float:
    """tr C of one group per prompt, as if coefficients and scores were independent: the mean of σ² E‖s‖² over completions."""
    logps, ref_logps = np.asarray(policy.logps(theta)), np.asarray(policy.logps(jnp.zeros_like(theta)))
    weights, success, features = np.exp(logps), np.asarray(policy.success), np.asarray(policy.features)

    def mean(x: np.ndarray) -> np.ndarray:
        return (weights * x).sum(-1, keepdims=True)

    p, ratio = mean(success), logps - ref_logps
    coefficient = np.asarray(theory.omega(p, _weights(GROUP))) * (success - p) - BETA * (ratio - mean(ratio))
    scores = features - (weights[..., None] * features).sum(1, keepdims=True)
    squared = mean(coefficient**2) * mean((scores**2).sum(-1))
    return float(squared.mean() / (len(p) * GROUP))


def _page(numbers: dict[str, Any]) -> list[str]:
    """The tables, in Markdown."""
    rest, reference, trace = numbers["rest"], numbers["reference"], numbers["trace"]
    lines = [
        f"Rest point without noise: p {rest['p']:.4f} (p_ref {float(reference['p']):.4f}), KL {rest['kl']:.4f}, "
        f"X {rest['excess']:.4f}, J {rest['objective']:.4f}, at β = {numbers['beta']:g}.",
        "",
        "| optimizer, B, rate | J lost: law | measured | by the average: law | measured | X − X* | p − p* | −θ·∇J | η‖g‖²/2 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = ((-1, "objective"), (-1, "averaged objective"), (1, "excess"), (1, "p"))
    for row in numbers["rows"]:
        mean, error = row["mean"], row["error"]
        shown = [f"{row['optimizer']}, {row['completions']}, {row['rate']:g}", f"{row['law']:.5f}"]
        measured = [f"{sign * (mean[k] - rest[k.split()[-1]]):.5f} ± {error[k]:.5f}" for sign, k in columns]
        shown += [measured[0], f"{row['law of the average']:.5f}", *measured[1:]]
        shown.append(f"{-mean['virial']:.5f} ± {error['virial']:.5f}")
        shown.append(f"{row['rate'] * mean['squared'] / 2:.5f}" if row["optimizer"] == "SGD" else "")
        lines.append(f"| {' | '.join(shown)} |")
    lines += ["", "| 2f(η) − f(2η), less the rest point | p | KL | X | J |", "|---|---|---|---|---|"]
    for row in numbers["two_rates"]:
        shown = [f"{row['optimizer']}, {row['completions']}, {row['rate']:g} and {2 * row['rate']:g}"]
        shown += [f"{row['mean'][k] - rest[k]:+.5f} ± {row['error'][k]:.5f}" for k in Exact._fields]
        lines.append(f"| {' | '.join(shown)} |")
    traces = (
        f"{trace['shared']:.4f}; as a mean of σ²·E‖s‖²: {trace['independent']:.4f}; of a table at its own rest point: "
    )
    return [*lines, "", f"tr C of an update with one group of every prompt: {traces}{trace['tabular']:.6f}."]


def _costs(panel: Axes, rows: list[dict[str, Any]], rest: dict[str, float]) -> None:
    by_series = itertools.groupby(rows, lambda row: f"{row['optimizer']}, B = {row['completions']}")
    for k, (label, group) in enumerate(by_series):
        series = list(group)
        rates, points = [row["rate"] for row in series], figures.marker(k) | {"linestyle": ""}
        lost, by_average = (
            [rest["objective"] - row["mean"][name] for row in series] for name in ("objective", "averaged objective")
        )
        panel.plot(rates, [row["law"] for row in series], **figures.line(k))
        panel.plot(rates, [row["law of the average"] for row in series], **figures.line(k), alpha=0.5)
        panel.plot(rates, lost, **points, label=label)
        panel.plot(rates, by_average, **points, markerfacecolor="none")
    panel.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="J at rest − J, nats")
    panel.legend(fontsize=8, frameon=False)
    figures.title(panel, "what noise costs; hollow: the averaged parameters")


def _where(panel: Axes, rows: list[dict[str, Any]], rest: dict[str, float]) -> None:
    costs = np.array([row["law"] for row in rows])
    for k, (name, label) in enumerate((("excess", "X − X at rest, nats"), ("p", "p − p at rest"))):
        values = np.array([row["mean"][name] for row in rows]) - rest[name]
        errors = 2 * np.array([row["error"][name] for row in rows])
        panel.errorbar(costs, values, errors, **figures.marker(k + 1) | {"linestyle": ""}, label=label)
    ends = np.array([0, costs.max()])
    panel.plot(ends, ends / BETA, color="0.6", linewidth=1, zorder=0, label="the law")
    panel.set(xlabel="what noise costs by the law, nats")
    panel.legend(fontsize=8, frameon=False)
    figures.title(panel, "where the nats go")


if __name__ == "__main__":
    figures.run(experiment)
