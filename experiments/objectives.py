"""What every objective really descends and where it ends, by exact expectation over all groups of a tiny language.

    python -m experiments.objectives [--docs=docs/objectives.md] [--out=runs/objectives]

Prints four tables as Markdown and writes OUT/objectives.json; with --docs it also replaces the tables in that page. No sampling
anywhere: all 15 completions, all groups of three, the library's own loss. Some 40 seconds on 2 cores.
"""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.tiny_language import MASK, NUM, PREFIX, PREFIXES, TOKENS, logps, probabilities, random_policy
from grpo_jax import theory
from grpo_jax.environment import prepare_environment
from grpo_jax.objective import NAMED, Objective, beta_effective, group_advantages, grpo_loss_terms

GROUP = 3
GROUPS = np.array(list(itertools.combinations_with_replacement(range(NUM), GROUP)))
ORDERS = np.array(
    [math.factorial(GROUP) / math.prod(map(math.factorial, Counter(g).values())) for g in GROUPS.tolist()]
)
"""Groups up to the order of their rows, which the loss does not see, and in how many orders each can be drawn."""

REFERENCE, POLICY, OLD = random_policy(1, 0.7), random_policy(0), random_policy(2, 0.5)
SUCCESS = jnp.asarray(((TOKENS == 1) & MASK).sum(-1) >= 2)
"""A completion is right if it holds the second letter at least twice; it may stop at any length."""

UNCLIPPED: dict[str, Any] = {"clip_low": None, "clip_high": None}
TOKEN_KLS = ("token_reverse", "token_reverse_weighted", "token_forward")
REDUCTIONS: dict[str, dict[str, Any]] = {
    "sequence_sum": {},
    "constant": {"reduce": "constant", "constant_length": 3},
    "sequence_mean": {"reduce": "sequence_mean"},
    "token_mean": {"reduce": "token_mean"},
}


def expected_loss(
    table: jax.Array,
    *,
    objective: Objective,
    beta: float,
    beta_mirror: float = 0.0,
    rewards: jax.Array = SUCCESS,
    old: jax.Array | None = None,
) -> jax.Array:
    """E over all groups sampled from π_old (from π itself, without gradient, where ``old`` is None) of the library's loss."""
    sampler = jax.lax.stop_gradient(table if old is None else old)
    weights = jnp.asarray(ORDERS, jnp.float32) * probabilities(sampler)[GROUPS].prod(-1)

    def loss(rows: jax.Array) -> jax.Array:
        take = lambda t: None if t is None else logps(t)[rows]  # noqa: E731
        advantages = group_advantages(rewards[rows], **objective.normaliser())
        mask = jnp.asarray(MASK)[rows]
        weighed: dict[str, Any] = {"beta": beta, "beta_mirror": beta_mirror, "objective": objective}
        terms = grpo_loss_terms(
            logps(table)[rows], take(old), take(REFERENCE), advantages, mask, group_size=GROUP, **weighed
        )
        return terms.total / terms.weight

    return (weights * jax.vmap(loss)(jnp.asarray(GROUPS))).sum()


def success(table: jax.Array) -> jax.Array:
    """p of the policy."""
    return jnp.where(SUCCESS, probabilities(table), 0.0).sum()


def sequence_kl(table: jax.Array, anchor: jax.Array = REFERENCE) -> jax.Array:
    """KL(π‖anchor) of whole completions."""
    p, q = probabilities(table), probabilities(anchor)
    return (p * (jnp.log(p) - jnp.log(q))).sum()


def token_kl(table: jax.Array, visitor: jax.Array, *, forward: bool) -> jax.Array:
    """Σ_t of the exact KL of the next token at the prefixes that ``visitor`` visits."""
    log_p, log_q = jax.nn.log_softmax(table), jax.nn.log_softmax(REFERENCE)
    a, b = (log_q, log_p) if forward else (log_p, log_q)
    per_prefix = (jnp.exp(a) * (a - b)).sum(-1)
    visits = jnp.where(MASK, probabilities(visitor)[:, None], 0.0)
    return (visits * per_prefix[PREFIX]).sum()


def claimed_gradient(kl: str, old: jax.Array | None = None) -> jax.Array:
    """The gradient at POLICY that `Objective.kl` is named by; off-policy at the prefixes of ``old``."""
    visitor = POLICY if old is None else old
    return {
        "sequence_reverse": lambda: jax.grad(sequence_kl)(POLICY),
        "token_forward": lambda: jax.grad(lambda t: token_kl(t, visitor, forward=True))(POLICY),
    }.get(kl, lambda: jax.grad(lambda t: token_kl(t, visitor, forward=False))(POLICY))()


def kl_gradient(kl: str, old: jax.Array | None = None, **choices: Any) -> jax.Array:
    """The expected gradient at POLICY of the loss with β = 1 where every reward is equal: that of the KL term alone."""
    objective = Objective(kl=kl, **(UNCLIPPED | choices))
    options: dict[str, Any] = {"objective": objective, "beta": 1.0, "rewards": jnp.zeros(NUM), "old": old}
    return jax.jit(jax.grad(lambda table: expected_loss(table, **options)))(POLICY)


def k1_gradient() -> jax.Array:
    """The expected gradient of Σ_t log π/π_ref written into the loss, which `Objective` refuses."""
    weights = jax.lax.stop_gradient(probabilities(POLICY))
    return jax.grad(lambda t: (weights * jnp.where(MASK, logps(t) - logps(REFERENCE), 0.0).sum(-1)).sum())(POLICY)


def descend(start: jax.Array, loss: Any, *, steps: int, rate: float = 0.5, momentum: float = 0.95) -> jax.Array:
    """Many exact gradient steps with momentum."""

    def step(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        table, velocity = state
        velocity = momentum * velocity - rate * jax.grad(loss)(table)
        return table + velocity, velocity

    return jax.jit(lambda t: jax.lax.fori_loop(0, steps, step, (t, jnp.zeros_like(t)))[0])(start)


def end_of(objective: Objective, *, beta: float, steps: int = 2_000) -> jax.Array:
    """The policy that on-policy exact steps lead to."""
    return descend(REFERENCE, lambda t: expected_loss(t, objective=objective, beta=beta), steps=steps)


def solved_iterates(
    objective: Objective, number: int, *, beta: float, beta_mirror: float, steps: int = 2_000
) -> list[float]:
    """p_0 … p_number where every iteration's problem, with groups drawn from its π_old, is solved exactly."""
    table, path = REFERENCE, [float(success(REFERENCE))]
    weights: dict[str, Any] = {"beta": beta, "beta_mirror": beta_mirror}
    for _ in range(number):
        table = descend(table, lambda t, o=table: expected_loss(t, objective=objective, old=o, **weights), steps=steps)
        path.append(float(success(table)))
    return path


def token_wise_end(beta: float, weights: theory.Weights, *, forward: bool) -> float:
    """p* of a token-wise KL, predicted: a policy of every prefix against its own future, and one equation for p.

    At a prefix the surrogate pushes token a by λ(Q(a) − V), λ = Ω(p)/β, with Q(a) the success probability after it. Against
    KL(π‖π_ref) of that token this rests at π ∝ π_ref e^{λQ}, against KL(π_ref‖π) at π = π_ref/(1 + λ(V − Q)), V = Σ πQ. Going
    back from the ends gives p(λ); the end is the first p above p_ref with p = p(Ω(p)/β).
    """
    table = np.asarray(jax.nn.softmax(REFERENCE), np.float64)
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}
    verdict = {tuple(t[m]): bool(s) for t, m, s in zip(TOKENS, MASK, np.asarray(SUCCESS), strict=True)}

    def value(prefix: tuple[int, ...], push: float) -> float:
        q = np.array([float(verdict[o]) if (o := (*prefix, a)) in verdict else value(o, push) for a in range(3)])
        ref = table[index[prefix]]
        if not forward:
            tilted = ref * np.exp(push * (q - q.max()))
            return float((tilted * q).sum() / tilted.sum())
        low, high = q.max() - 1 / push, q.max()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (ref / (1 + push * (middle - q))).sum() > 1 else (low, middle)
        return (low + high) / 2

    low, high = float(success(REFERENCE)), 1.0
    for _ in range(60):
        p = (low + high) / 2
        push = float(theory.omega(p, weights)) / beta
        low, high = (p, high) if value((), push) > p else (low, p)
    return (low + high) / 2


def prediction(objective: Objective, beta: float) -> float | None:
    """Where the theory sends exact small steps of an objective that sums over tokens; None without a KL to the reference."""
    if not objective.holds_to_reference:
        return None
    weights = theory.Group(GROUP, **objective.normaliser())
    if objective.kl == "sequence_reverse":
        return float(theory.flow_point(success(REFERENCE), beta=beta, weights=weights))
    return token_wise_end(beta, weights, forward=objective.kl == "token_forward")


def gradients() -> list[dict[str, Any]]:
    """For each KL term: the relative error of its expected gradient against the one it is named by, and its angle."""
    sequence = claimed_gradient("sequence_reverse")
    k1 = float(jnp.linalg.norm(k1_gradient()) / jnp.linalg.norm(sequence))
    rows: list[dict[str, Any]] = [{"kl": "k1 (refused)", "descends": "nothing", "size": k1}]
    for kl in ("sequence_reverse", *TOKEN_KLS):
        row: dict[str, Any] = {"kl": kl}
        for name, old in (("on", None), ("off", OLD)):
            claimed, gradient = claimed_gradient(kl, old), kl_gradient(kl, old)
            row[name] = float(jnp.linalg.norm(gradient - claimed) / jnp.linalg.norm(claimed))
            row[f"{name}_cosine"] = float(
                (gradient * sequence).sum() / jnp.linalg.norm(gradient) / jnp.linalg.norm(sequence)
            )
        rows.append(row)
    return rows


def ends(beta: float) -> list[dict[str, Any]]:
    """For each KL term: predicted p*, and where exact steps end under each reduction."""
    rows = []
    for kl in ("sequence_reverse", *TOKEN_KLS):
        row: dict[str, Any] = {"kl": kl, "predicted": prediction(Objective(kl=kl), beta)}
        for name, choices in REDUCTIONS.items():
            row[name] = float(success(end_of(Objective(kl=kl, ratio="token", **choices), beta=beta)))
        rows.append(row)
    return rows


def named_ends(beta: float) -> list[dict[str, Any]]:
    """For each named objective: where it says it ends, and where exact steps end; mirror needs inner steps, see `recursions`."""
    rows = []
    for name, objective in NAMED.items():
        if objective.anchor == "previous":
            continue
        effective = (
            beta_effective(beta, objective=objective, group_size=GROUP) if objective.holds_to_reference else None
        )
        measured = float(success(end_of(objective, beta=beta)))
        predicted = prediction(objective, beta)
        rows.append({"name": name, "effective": effective, "predicted": predicted, "measured": measured})
    return rows


def recursions(beta: float, beta_mirror: float, number: int = 3) -> list[dict[str, Any]]:
    """p_1, p_2, … where every iteration is solved exactly, beside p_n = h(p_{n−1})."""
    rows = []
    for name in ("GRPO", "DR_GRPO", "RLOO", "MAXRL", "TWO_KL_GRPO", "MIRROR_GRPO", "MIRROR_DR_GRPO"):
        objective = replace(NAMED[name], **UNCLIPPED)
        to_reference, to_previous = beta * objective.holds_to_reference, beta_mirror * objective.holds_to_previous
        weights = theory.Group(GROUP, **objective.normaliser())
        total = to_reference + to_previous
        iterates = theory.iterate(success(REFERENCE), number, beta=total, weights=weights, alpha=to_reference / total)
        path = solved_iterates(objective, number, beta=to_reference, beta_mirror=to_previous)
        rows.append({"name": name, "measured": path[1:], "predicted": [float(p) for p in iterates[1:]]})
    return rows


def markdown(results: dict[str, Any]) -> dict[str, str]:
    """{marker: table in Markdown} of the results that `main` measured."""
    small = lambda x: f"{x:.0e}" if x < 1e-3 else f"{x:.2f}"  # noqa: E731
    number = lambda x: "–" if x is None else f"{x:.4f}"  # noqa: E731
    arrow = lambda path: ", ".join(f"{p:.4f}" for p in path)  # noqa: E731
    k1, *rest = results["gradients"]
    by_kl = [["`kl`", "error on-policy", "error off-policy", "cosine with ∇KL(π‖π_ref), on- and off-policy"]]
    by_kl += [
        [f"`{r['kl']}`", small(r["on"]), small(r["off"]), f"{r['on_cosine']:.3f}, {r['off_cosine']:.3f}"] for r in rest
    ]
    by_kl += [["k1 in the loss (refused)", f"gradient {small(k1['size'])} of ∇KL", "", "none"]]
    end = [["`kl`", "predicted p*", *(f"`{name}`" for name in REDUCTIONS)]]
    end += [[f"`{r['kl']}`", number(r["predicted"]), *(number(r[k]) for k in REDUCTIONS)] for r in results["ends"]]
    named = [["objective", "effective β", "p* predicted, tokens summed", "exact steps end at"]]
    named += [
        [f"`{r['name']}`", *(number(r[k]) for k in ("effective", "predicted", "measured"))] for r in results["named"]
    ]
    solved = [["objective", "p_1, p_2, p_3 measured", "h(p_0), h(p_1), h(p_2)"]]
    solved += [[f"`{r['name']}`", arrow(r["measured"]), arrow(r["predicted"])] for r in results["recursions"]]
    tables = {"gradients": by_kl, "ends": end, "named": named, "recursions": solved}
    return {marker: _table(rows) for marker, rows in tables.items()}


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with what stands between <!-- NAME --> and <!-- end NAME --> replaced.

    >>> with_tables("a <!-- t -->old<!-- end t --> b", {"t": "new"})
    'a <!-- t -->\\nnew<!-- end t --> b'
    """
    for name, table in tables.items():
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- end {name} -->")
        page = f"{before}<!-- {name} -->\n{table}<!-- end {name} -->{after}"
    return page


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *body))


def main(arguments: list[str]) -> None:
    """Measures, prints, and writes."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    prepare_environment()
    beta, beta_mirror = 0.5, 1.0
    results = {
        "p_ref": float(success(REFERENCE)),
        "beta": beta,
        "beta_mirror": beta_mirror,
        "gradients": gradients(),
        "ends": ends(beta),
        "named": named_ends(beta),
        "recursions": recursions(beta, beta_mirror),
    }
    tables = markdown(results)
    print(f"p_ref = {results['p_ref']:.4f}, β = {beta}, β_mirror = {beta_mirror}, G = {GROUP}\n")
    print("\n".join(tables.values()))
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "objectives.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    if flags.FLAGS.docs is not None:
        page = Path(flags.FLAGS.docs)
        page.write_text(with_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_string("docs", None, "Markdown page whose tables are replaced.")
    flags.DEFINE_string("out", "runs/objectives", "Where objectives.json goes.")
    app.run(main)
