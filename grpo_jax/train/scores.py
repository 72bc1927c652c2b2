"""The score features of a policy, s = ∇_θ log π of each completion, as two products that never hold them.

With S the scores of all completions, one row each, what a network lets through is a regression on S (`grpo_jax.runs.attainable`).
It takes S only in two ways, each of which is a program that a run has anyway:

    Sᵀ u   a gradient of log-probabilities, weighted by u: `pull_back`
    S w    how the log-probabilities change along w: two scorings, at θ + εw and θ − εw: `along`

and, so that few steps are enough, in coordinates in which a batch's gradient is as large in all directions: `Whitening`.

Dimension key: see grpo_jax.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.objective import LossTerms
from grpo_jax.rollout import PromptBatch, Rollout, score_packed
from grpo_jax.rollout.packing import pack
from grpo_jax.train.iteration import Recipe
from grpo_jax.train.packed_gradient import packed_gradient
from grpo_jax.train.step import Batch

LARGEST = 1024  # a side that is longer than this, or than the other side, is whitened entry by entry
DAMPING = 0.1  # of a side, in units of its mean eigenvalue
ROUNDS = 18  # of Newton and Schulz


def pull_back(recipe: Recipe, params: Any, prompts: PromptBatch, rollout: Rollout, weights: jax.Array) -> Any:
    """Sᵀu = Σ u ∇_θ log π(completion), like ``params``.

    Args:
      recipe: of the run.
      params: of the policy.
      prompts, rollout: P prompts with G completions each.
      weights: [P, G] u.
    """
    batch = Batch(prompts, rollout.completions, rollout.mask, weights, rollout.logps, old_logps=None, ref_logps=None)

    def weighted(groups: Batch, logps: jax.Array, entropy: jax.Array) -> LossTerms:
        of_completions = jnp.where(groups.mask, logps, 0.0).sum(-1)  # [..., G]
        return LossTerms((groups.advantages * of_completions).sum(), jnp.float32(1.0), {})

    gradient, _, _ = packed_gradient(
        weighted,
        recipe.policy,
        params,
        batch,
        pack(rollout.mask, recipe.layout),
        through_entropy=False,
        temperature=recipe.temperature,
        chunk_size=recipe.layout.chunk_size,
    )
    return gradient


def along(
    recipe: Recipe, params: Any, direction: Any, step: jax.Array, prompts: PromptBatch, rollout: Rollout
) -> jax.Array:
    """S w: [P, G] the change of log π(completion) along w, (log π_{θ+εw} − log π_{θ−εw})/2ε, in nats.

    A central difference is the exact derivative but for ε² and rounding; choose ε so that log-probabilities change by some
    hundredths of a nat. The policy must compute in float32: bfloat16 rounds such steps away.

    Args:
      recipe: of the run.
      params: θ.
      direction: w, like ``params``.
      step: ε.
      prompts, rollout: P prompts with G completions each.
    """

    def logps(step: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda x, w: x + step * w, params, direction)
        options: dict[str, Any] = {"layout": recipe.layout, "temperature": recipe.temperature}
        return score_packed(recipe.policy, moved, prompts, rollout.completions, rollout.mask, **options).sum(-1)

    return (logps(step) - logps(-step)) / (2 * step)


def moments(gradient: Any, before: Any | None = None) -> Any:
    """For each leaf g [..., m, n], a stack of matrices: Σ g gᵀ [..., m, m] and Σ gᵀ g [..., n, n], added to those ``before``.

    Of a side that is longer than `LARGEST`, or than the other side, only the diagonal is kept, [..., m] or [..., n]. A vector is
    a matrix of one row.
    """

    def side(g: jax.Array) -> jax.Array:
        return jnp.square(g).sum(-2) if _is_long(g.shape[-1], g.shape[-2]) else jnp.swapaxes(g, -1, -2) @ g

    def leaf(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        matrices = _as_matrices(g)
        return side(jnp.swapaxes(matrices, -1, -2)), side(matrices)

    of_gradient = jax.tree.map(leaf, gradient)
    return of_gradient if before is None else jax.tree.map(jnp.add, before, of_gradient)


def whitening(moments: Any, like: Any) -> Any:
    """What `whiten` multiplies by: for each leaf the inverse square roots of both sides' moments, damped.

    If the Fisher matrix of a leaf were a Kronecker product L ⊗ R, the two roots together would be its inverse, because both
    sums grow like the square of the gradient. They are taken of moments with mean eigenvalue 1, and divided by the root of
    the leaf's mean square.

    Source: the Kronecker factors are those of Shampoo, arXiv 1802.09568, at the powers that arXiv 2406.17748 finds right.

    Args:
      moments: see `moments`.
      like: the parameters.
    """

    def leaf(x: jax.Array, sides: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        m, n = _as_matrices(x).shape[-2:]
        left, right = _root(sides[0], _is_long(m, n)), _root(sides[1], _is_long(n, m))
        mean_square = _trace(sides[1], _is_long(n, m)).sum() / x.size
        return left / jnp.where(mean_square > 0, jnp.sqrt(mean_square), 1.0), right

    return jax.tree.map(leaf, like, moments)


def whiten(factors: Any, gradient: Any) -> tuple[Any, jax.Array]:
    """L^(−½) g R^(−½) leaf by leaf, see `whitening`, and its product with the gradient: gᵀ M g."""

    def leaf(g: jax.Array, factor: tuple[jax.Array, jax.Array]) -> jax.Array:
        (left, right), matrices = factor, _as_matrices(g)
        m, n = matrices.shape[-2:]
        matrices = left[..., None] * matrices if _is_long(m, n) else left @ matrices
        matrices = matrices * right[..., None, :] if _is_long(n, m) else matrices @ right
        return matrices.reshape(g.shape)

    white = jax.tree.map(leaf, gradient, factors)
    return white, optax.tree.vdot(gradient, white)


def _is_long(side: int, other: int) -> bool:
    return side > LARGEST or side > other


def _as_matrices(x: jax.Array) -> jax.Array:
    return x[None] if x.ndim == 1 else x


def _trace(sums: jax.Array, is_diagonal: bool) -> jax.Array:
    return sums.sum(-1) if is_diagonal else jnp.trace(sums, axis1=-2, axis2=-1)


def _root(sums: jax.Array, is_diagonal: bool) -> jax.Array:
    """(sums over their mean eigenvalue, plus the damping) to the power −½."""
    mean = _trace(sums, is_diagonal) / sums.shape[-1]  # [...]
    mean = jnp.where(mean > 0, mean, 1.0)[..., None]
    return jax.lax.rsqrt(sums / mean + DAMPING) if is_diagonal else _inverse_root(sums / mean[..., None])


def _inverse_root(matrices: jax.Array) -> jax.Array:
    """A^(−½) of A = M + `DAMPING`, for symmetric M ≥ 0 [..., n, n], by products alone: with Y = A/a and Z = 1, repeat
    T = (3 − Z Y)/2, Y ← Y T, Z ← T Z until Z is the inverse root of A/a.

    Source: N. J. Higham, Functions of Matrices (2008), eq. 6.35, Newton and Schulz. `ROUNDS` are enough for eigenvalues that
    differ by a factor of 10⁴; any fewer would still give a symmetric positive matrix, and so a preconditioner.
    """
    unit = jnp.broadcast_to(jnp.eye(matrices.shape[-1]), matrices.shape)
    matrices = matrices + DAMPING * unit
    size = jnp.sqrt(jnp.square(matrices).sum((-1, -2), keepdims=True))  # a, at least the largest eigenvalue

    def again(_: int, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        root, inverse = pair
        half = (3 * unit - inverse @ root) / 2
        return root @ half, half @ inverse

    return jax.lax.fori_loop(0, ROUNDS, again, (matrices / size, unit))[1] / jnp.sqrt(size)
