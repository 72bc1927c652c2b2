"""Bias and noise of the gradients of KL terms, exactly where it can be computed: on-policy, off-policy, and at the fixed point.

Chains over eight tokens (experiments/markov_language.py) have exact gradients at any length. Of a completion, in nats:
K = KL(π‖π_ref), D = KL(π‖π_old). Noise is the root mean square distance of the gradient of one completion, drawn in groups
of 8, from its mean.

What to expect of the sequence term (derived): spread over many tokens, ℓ = log π/π_ref of a completion is nearly normal with
variance 2K, and the baseline of the other G − 1 rows adds 1/(G − 1) of it. So its noise at weight β is β√(2K·G/(G − 1)) times
that of a surrogate with advantages of mean square 1, whatever T; with D nats of drift E_old[ρ²] ≈ e^{2D}, and noise grows
by about e^D. At the fixed point βℓ = A + const, and surrogate and sequence term cancel row by row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments.markov_language import (
    TOKENS,
    Completions,
    Language,
    at,
    distance,
    log_ratio,
    logps,
    path_measure,
    repeat,
    row_kl,
    sample,
    score_size,
    sequence_kl,
    visits,
)
from grpo_jax import theory
from grpo_jax.objective import GRPO, group_advantages, grpo_loss_terms

Loss: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

GROUP = 8
BOUND = 20.0  # on log π/π_old, in the loss


class Noise(NamedTuple):
    """Of an estimator of ∇KL(π‖π_ref).

    Attributes:
      bias: of its exact expectation, over |∇KL|.
      cosine: of its exact expectation with ∇KL.
      noise: per completion, over |∇KL|.
      to_surrogate: noise at β = 1 over that of a surrogate with advantages of mean square 1.
      error: of the sample mean, in standard errors; its mean square is 1 if the expectation is right.
    """

    bias: jax.Array
    cosine: jax.Array
    noise: jax.Array
    to_surrogate: jax.Array
    error: jax.Array


def offered(kl: str, *, grouped: bool = False) -> Loss:
    """A KL term of the library, summed over the rows of a group."""
    objective = replace(GRPO, kl=kl)

    def loss(logps: jax.Array, old: jax.Array, ref: jax.Array, mask: jax.Array, _: jax.Array) -> jax.Array:
        size, zeros = len(logps) if grouped else None, jnp.zeros(len(logps), jnp.float32)
        terms = grpo_loss_terms(logps, old, ref, zeros, mask, beta=1.0, objective=objective, group_size=size)
        return terms.total.astype(logps.dtype)

    return loss


def per_decision(logps: jax.Array, old: jax.Array, ref: jax.Array, mask: jax.Array, _: jax.Array) -> jax.Array:
    """Σ_t w_{≤t} (x_t − b_t), x = log π/π_ref, w_{≤t} = π/π_old of the tokens up to t: a token pays for its future only."""
    cost = jax.lax.stop_gradient(jnp.where(mask, logps - ref, 0.0))
    ratio = jnp.exp(jnp.cumsum(jnp.where(mask, logps - old, 0.0), -1))
    return (ratio * (cost - _of_others(cost))).sum()


def analytic(logps: jax.Array, old: jax.Array, _: jax.Array, mask: jax.Array, kl: jax.Array) -> jax.Array:
    """Σ_t w_{<t} (KL_t − b_t): the KL of each next token summed over the vocabulary, and differentiated through w as well."""
    cost, log_ratios = jnp.where(mask, kl, 0.0), jnp.where(mask, logps - old, 0.0)
    ratio = jnp.exp(jnp.cumsum(log_ratios, -1) - log_ratios)
    return (ratio * (cost - _of_others(jax.lax.stop_gradient(cost)))).sum()


ESTIMATORS: dict[str, Loss] = {
    "sequence, alone": offered("sequence_reverse"),
    "sequence": offered("sequence_reverse", grouped=True),
    "per decision": per_decision,
    "analytic": analytic,
    "token k2": offered("token_reverse"),
    "token r·k3": offered("token_reverse_weighted"),
    "token k3": offered("token_forward"),
}
TOKENWISE = tuple(name for name in ESTIMATORS if name.startswith("token"))


def group_gradients(
    table: jax.Array, old: jax.Array, reference: jax.Array, group: Completions, names: tuple[str, ...]
) -> jax.Array:
    """[names, *table]: ∇ of each KL term over one group, as the mean over its completions."""

    def features(table: jax.Array) -> tuple[jax.Array, jax.Array]:
        kl = row_kl(table, jnp.broadcast_to(reference, table.shape))
        return logps(table, group), kl[at(table, group.rows)]

    (now, kl), pull = jax.vjp(features, table)
    fixed = logps(old, group), logps(reference, group), group.mask
    slopes = [
        jax.grad(lambda x, y, name=name: ESTIMATORS[name](x, *fixed, y) / len(x), argnums=(0, 1))(now, kl)
        for name in names
    ]
    return jax.vmap(pull)(jax.tree.map(lambda *x: jnp.stack(x), *slopes))[0]


@partial(jax.jit, static_argnames=("length",))
def expected_gradients(spoken: Language, length: int) -> jax.Array:
    """[ESTIMATORS, TOKENS + 1, TOKENS]: exact expectations over completions of the old policy (the bound on ratios aside)."""
    exact = jax.grad(lambda x: sequence_kl(repeat(x, length), spoken.reference, spoken.goes_on))(spoken.policy)
    # The term of a token depends on it and on the token before only: so sum over all pairs, weighted by how often they occur.
    rows, tokens = jnp.divmod(jnp.arange((TOKENS + 1) * TOKENS), TOKENS)
    pairs = Completions(*(x[:, None, None] for x in (tokens, rows, jnp.ones_like(rows, bool))))
    old = spoken.policy, spoken.old, spoken.reference
    each = jax.vmap(lambda pair: group_gradients(*old, pair, TOKENWISE))(pairs)
    often = visits(repeat(spoken.old, length), spoken.goes_on).sum(0)[:, None] * jax.nn.softmax(spoken.old)
    tokenwise = jnp.tensordot(often.ravel(), each, 1)
    return jnp.concatenate([repeat(exact, len(ESTIMATORS) - len(TOKENWISE)), tokenwise])


@partial(jax.jit, static_argnames=("length", "groups"))
def measure(spoken: Language, length: int, groups: int, seed: int = 0) -> dict[str, Noise]:
    """Bias and noise of every estimator; completions are sampled from the old policy."""
    completions = sample(jax.random.key(seed), repeat(spoken.old, length), spoken.goes_on, groups, GROUP)

    def one(group: Completions) -> jax.Array:
        return group_gradients(spoken.policy, spoken.old, spoken.reference, group, tuple(ESTIMATORS))

    each = jax.lax.map(one, completions, batch_size=32)
    expected = expected_gradients(spoken, length)
    size, score = jnp.linalg.norm(expected[0]), score_size(spoken.policy, length, spoken.goes_on)
    noises = {}
    for k, name in enumerate(ESTIMATORS):
        noise = jnp.sqrt(GROUP * each[:, k].var(0, ddof=1).sum())
        noises[name] = Noise(
            bias=jnp.linalg.norm(expected[k] - expected[0]) / size,
            cosine=(expected[k] * expected[0]).sum() / (jnp.linalg.norm(expected[k]) * size),
            noise=noise / size,
            to_surrogate=noise / score,
            error=jnp.linalg.norm(each[:, k].mean(0) - expected[k]) / noise * np.sqrt(GROUP * groups),
        )
    return noises


def completions_to_match(unbiased: Noise, biased: Noise) -> float:
    """N* at which the mean square errors are equal: the biased estimator is better with fewer completions."""
    return float(jnp.maximum(unbiased.noise**2 - biased.noise**2, 0.0) / biased.bias**2)


@partial(jax.jit, static_argnames=("length", "groups"))
def drifted(spoken: Language, length: int, groups: int, seed: int = 0) -> dict[str, jax.Array]:
    """The sequence estimator off-policy, also where ρ = π/π_old is too wild to sample.

    E_old[ρ² f] = Z·E_q[f] for the chain q ∝ π²/π_old, from which f is sampled instead: no wild weights are left.

    Returns:
      effective: share of the samples that is left, 1/E_old[ρ²], exact.
      noise: per completion, over |∇KL|; without the bound.
      beyond: share of π's own completions whose ρ is beyond the bound of the loss, which drops their gradient.
    """
    policy, reference, goes_on = spoken.policy, spoken.reference, spoken.goes_on
    kernel = 2 * jax.nn.log_softmax(policy) - jax.nn.log_softmax(spoken.old)
    tilted, log_total = path_measure(kernel, jnp.zeros_like(goes_on), length, goes_on)
    chains = tilted, repeat(spoken.old, length), repeat(policy, length)
    keys = jax.random.split(jax.random.key(seed), len(chains))
    wide, old, own = (sample(k, x, goes_on, groups, GROUP) for k, x in zip(keys, chains, strict=True))
    costs = log_ratio(policy, reference, old)

    def squares(row: Completions) -> jax.Array:
        return (jax.grad(lambda x: jnp.where(row.mask, logps(x, row), 0.0).sum())(policy) ** 2).sum()

    square = jax.lax.map(jax.vmap(squares), wide)
    spread = (log_ratio(policy, reference, wide) - costs.mean()) ** 2 + costs.var() / (GROUP - 1)
    size = jnp.linalg.norm(expected_gradients(spoken, length)[0])
    second = jnp.exp(log_total) * (square * spread).mean() / size**2
    return {
        "effective": jnp.exp(-log_total),
        "noise": jnp.sqrt(second - 1 + 1 / (GROUP - 1)),  # rows of a group share their costs: hence the last term
        "beyond": (log_ratio(policy, spoken.old, own) > BOUND).mean(),
    }


@partial(jax.jit, static_argnames=("length", "scale", "groups"))
def at_fixed_point(
    length: int, scale: str, groups: int, *, wander: float = 0.0, p_ref: float = 0.3, beta: float = 1.0
) -> dict[str, Any]:
    """The whole gradient, surrogate and KL, at the policy of the predicted p*, or near it.

    Tokens come in two halves that are rarely left, and a completion succeeds if it ends in the first. So the optimal policy
    π* ∝ π_ref exp(Ω r/β) is a chain again, with one table per position, all of which are trained.

    Args:
      length: T.
      scale: of the advantages, "std" or "none".
      groups: to sample.
      wander: KL(π*‖π) in nats of a random change of the policy that has nothing to do with the reward.
      p_ref: roughly, the success probability of the reference.
      beta: weight of the KL.

    Returns:
      noise: name → noise of the whole gradient over that of the surrogate alone.
      unbalanced: name → length of the exact expectation over that of the surrogate's alone.
    """
    normaliser, goes_on = replace(GRPO, scale=scale).normaliser(), jnp.ones(TOKENS)
    succeeds = jnp.arange(TOKENS) < TOKENS // 2
    rng = np.random.default_rng(1)
    free, direction = (jnp.asarray(rng.normal(size=(TOKENS + 1, TOKENS))) for _ in range(2))
    leaves = succeeds[None] != jnp.append(succeeds, True)[:, None]
    rate = jnp.where(succeeds, jnp.log(p_ref), jnp.log1p(-p_ref)) - jnp.log(length + 1.0)
    reference = jax.nn.log_softmax(free + jnp.where(leaves, rate[None], 0.0))
    p_reference = jnp.exp(path_measure(reference, jnp.where(succeeds, 0.0, -jnp.inf), length, goes_on)[1])
    weights = theory.Group(GROUP, **normaliser)
    p_star = theory.flow_point(p_reference, beta=beta, weights=weights)
    omega = theory.omega(p_star, weights)
    steps, _ = path_measure(reference, jnp.where(succeeds, omega / beta, 0.0), length, goes_on)
    steps = steps + distance(steps, direction, kl=wander, goes_on=goes_on) * direction[None]
    completions = sample(jax.random.key(2), steps, goes_on, groups, GROUP)
    rewards = jnp.where(succeeds[completions.tokens[..., -1]], 1.0, 0.0)
    noise = _whole_noise(
        steps, reference, completions, group_advantages(rewards, **normaliser).astype(jnp.float32), beta
    )

    push, balance = _exact_balance(steps, reference, succeeds, goes_on, weights, beta)
    return {
        "p_ref": p_reference,
        "p_star": p_star,
        "kl": sequence_kl(steps, reference, goes_on),
        "noise": dict(zip(ESTIMATORS, noise[1:] / noise[0], strict=True)),
        "unbalanced": {name: jnp.linalg.norm(x) / jnp.linalg.norm(push) for name, x in balance.items()},
    }


def _whole_noise(
    steps: jax.Array, reference: jax.Array, completions: Completions, advantages: jax.Array, beta: float | jax.Array
) -> jax.Array:
    """[1 + ESTIMATORS]: of the surrogate alone, and with each KL term."""

    def surrogate(table: jax.Array, group: Completions, advantages: jax.Array) -> jax.Array:
        objective = replace(GRPO, kl="none")
        now = logps(table, group)
        terms = grpo_loss_terms(now, None, None, advantages, group.mask, beta=0.0, objective=objective)
        return terms.total.astype(now.dtype) / GROUP

    def add(sums: tuple[jax.Array, jax.Array], batch: tuple[Completions, jax.Array]) -> tuple[Any, None]:
        group, advantages = batch
        push = jax.grad(surrogate)(steps, group, advantages)[None]
        kls = group_gradients(steps, steps, reference, group, tuple(ESTIMATORS))
        whole = jnp.concatenate([push, push + beta * kls])
        return (sums[0] + whole, sums[1] + (whole**2).sum((1, 2, 3))), None

    number = len(advantages)
    start = jnp.zeros((1 + len(ESTIMATORS), *steps.shape)), jnp.zeros(1 + len(ESTIMATORS))
    (total, squares), _ = jax.lax.scan(add, start, (completions, advantages))
    return jnp.sqrt(GROUP * (squares / number - ((total / number) ** 2).sum((1, 2, 3))))


def _exact_balance(
    steps: jax.Array, reference: jax.Array, succeeds: jax.Array, goes_on: jax.Array, weights: theory.Group, beta: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Ω∇p, and Ω∇p − β∇KL for the three divergences."""
    fixed = jnp.broadcast_to(reference, steps.shape)
    now = visits(steps, goes_on)

    def success(steps: jax.Array) -> jax.Array:
        return jnp.where(succeeds, visits(steps, goes_on)[-1] @ jax.nn.softmax(steps[-1]), 0.0).sum()

    p, slope = jax.value_and_grad(success)(steps)
    push = theory.omega(p, weights) * slope
    divergences = {
        "sequence": lambda x: sequence_kl(x, reference, goes_on),
        "token k2": lambda x: (now * row_kl(x, fixed)).sum(),
        "token k3": lambda x: (now * row_kl(fixed, x)).sum(),
    }
    return push, {name: push - beta * jax.grad(kl)(steps) for name, kl in divergences.items()}


def _of_others(x: jax.Array) -> jax.Array:
    """[G, T] mean over the other rows of the group."""
    return (x.sum(0, keepdims=True) - x) / (len(x) - 1)
