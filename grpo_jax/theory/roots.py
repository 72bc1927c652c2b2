"""Solving the two fixed-point equations in log-odds, array-wise, to the last bit and with derivatives.

By bisection and not by Newton's method: next to a fold the derivative vanishes, and a bracket still holds its root.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from grpo_jax.theory.dynamics import log_odds_slope
from grpo_jax.theory.weights import Weights

# Beyond these log-odds every Ω has reached its end value (ε > e^−64), so all folds lie on this grid.
REACH, POINTS = 64.0, 2049
BISECTIONS = 80  # more than a float64 can resolve
MOST_ROOTS = 8  # one or three are known to occur

_Residual: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, Weights], jax.Array]


@jax.jit
def all_roots(reference: jax.Array, beta: jax.Array, weights: Weights) -> jax.Array:
    """Every root of `_reverse_residual` above one reference, ascending, then nan; at most `MOST_ROOTS`."""
    grid = jnp.linspace(-REACH, REACH, POINTS, dtype=reference.dtype)
    # Hills and valleys of g are nodes too, so that no pair of roots hides between two points of the grid.
    extrema = sign_changes(lambda x: beta - log_odds_slope(x, weights), grid)
    most = jnp.maximum(weights.omega(jnp.full_like(reference, jnp.inf)), weights.omega(reference))
    beyond = jnp.maximum(reference, REACH) + jnp.where(jnp.isinf(most), 0.0, most) / beta + 1
    nodes = jnp.concatenate([reference[None], beyond[None], grid, jnp.where(jnp.isnan(extrema), grid[0], extrema)])
    nodes = jnp.sort(jnp.maximum(nodes, reference))
    nodes = jnp.concatenate([reference[None] - 1, nodes])  # where Ω is 0 the reference is the root
    return sign_changes(lambda x: _reverse_residual(x, reference, beta, weights), nodes)


def sign_changes(f: Callable[[jax.Array], jax.Array], nodes: jax.Array) -> jax.Array:
    """[MOST_ROOTS] where f changes sign between neighbours of nodes [N], to the last bit, padded with nan.

    >>> round(float(sign_changes(lambda x: x**2 - 2, jnp.array([0.0, 1.0, 3.0]))[0]), 5)
    1.41421
    """
    above = f(nodes) >= 0
    changes = above[:-1] != above[1:]
    (cell,) = jnp.nonzero(changes, size=MOST_ROOTS, fill_value=-1)
    sign = jnp.where(above[cell], -1.0, 1.0).astype(nodes.dtype)
    roots = bisect(lambda x: sign * f(x), nodes[cell], nodes[cell + 1])
    return jnp.where(cell < 0, jnp.nan, roots)


def fold_between(low: jax.Array, high: jax.Array, beta: jax.Array, weights: Weights) -> jax.Array:
    """Whether `flow_point` jumps somewhere on the way from one of its values to a higher one.

    The reference that ends at L is L − Ω/β. Where that falls with L, no reference ends, and it is jumped over.

    Args:
      low: [...] a flow point, in log-odds.
      high: [...] another, not below it, in log-odds.
      beta: weight of the KL, a scalar.
      weights: the normaliser.

    Returns:
      [...] bool.

    >>> from grpo_jax.theory import Whitened
    >>> bool(fold_between(jnp.float32(0.0), jnp.float32(300.0), jnp.float32(1.0), Whitened(1e-5)))
    True
    """
    grid = jnp.linspace(-REACH, REACH, POINTS, dtype=low.dtype)
    falling = log_odds_slope(grid, weights) > beta
    grid, falling = (x.reshape((-1,) + (1,) * low.ndim) for x in (grid, falling))
    return (falling & (grid > low[None]) & (grid < high[None])).any(0)


def _implicit(residual: _Residual, solve: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``solve``, an elementwise root of ``residual``, with the derivatives of the implicit function theorem."""

    @jax.custom_jvp
    def root(reference: jax.Array, beta: jax.Array, weights: Weights) -> jax.Array:
        return solve(reference, beta, weights)

    @root.defjvp
    def root_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        value = root(*primals)
        finite = jnp.isfinite(value)
        at = jnp.where(finite, value, 0.0)
        _, along = jax.jvp(lambda x: residual(x, *primals), (at,), (jnp.ones_like(at),))
        _, across = jax.jvp(lambda *inputs: residual(at, *inputs), primals, tangents)
        return value, jnp.where(finite, -across / along, 0.0)

    return root


def _reverse_residual(logit: jax.Array, reference: jax.Array, beta: jax.Array, weights: Weights) -> jax.Array:
    """g(L) = L − L_ref − Ω/β, rising through 0 at a stable point of the flow."""
    return logit - reference - weights.omega(logit) / beta


def _forward_residual(logit: jax.Array, reference: jax.Array, beta: jax.Array, weights: Weights) -> jax.Array:
    """ln[(p − p_ref)/v] − ln[Ω/β], which rises; (p − p_ref)/v = (1 − e^{L_ref − L})(1 + e^L)/(1 + e^{L_ref})."""
    ahead = jnp.log(-jnp.expm1(reference - logit)) + jax.nn.softplus(logit) - jax.nn.softplus(reference)
    return ahead + jnp.log(beta) - jnp.log(weights.omega(logit))


def _solve_flow(reference: jax.Array, beta: jax.Array, weights: Weights) -> jax.Array:
    """The smallest root of `_reverse_residual` above the reference: a scan for the first bracket, then bisection."""
    grid = jnp.linspace(-REACH, REACH, POINTS, dtype=reference.dtype)
    column = (-1,) + (1,) * reference.ndim
    pull, bend = (f.reshape(column) for f in (weights.omega(grid), log_odds_slope(grid, weights)))
    g = grid.reshape(column) - reference[None] - pull / beta[None]  # below L_ref it is negative
    rising = (bend < beta[None]) & (grid.reshape(column) > reference[None])

    # The first grid point at which g is no longer negative; POINTS where there is none.
    first = jnp.where((g >= 0).any(0), jnp.argmax(g >= 0, axis=0), POINTS)
    # Just above the fold, g rises above 0 and falls back between two neighbouring grid points; the top of that hill tells.
    hill = rising[:-1] & ~rising[1:] & (jnp.arange(1, POINTS).reshape(column) < first[None])
    height = jnp.where(hill, jnp.maximum(g[:-1], g[1:]), -jnp.inf)
    cell = jnp.argmax(height, axis=0)
    top = bisect(lambda x: log_odds_slope(x, weights) - beta, grid[cell], grid[cell + 1])
    pokes = hill.any(0) & (_reverse_residual(top, reference, beta, weights) >= 0)

    # The bracket: up to the top of that hill, else up to that grid point, else up to where L − L_ref exceeds the largest Ω/β.
    padded = jnp.concatenate([grid[:1], grid])
    furthest = jnp.asarray(jnp.inf, reference.dtype)
    most = jnp.maximum(weights.omega(furthest), weights.omega(grid[-1]))
    beyond = jnp.maximum(reference, REACH) + jnp.maximum(most, weights.omega(reference)) / beta + 1
    low = jnp.where(pokes, grid[cell], padded[first])
    low = jnp.where(first == 0, reference, jnp.maximum(reference, low))
    high = jnp.where(pokes, top, jnp.where(first == POINTS, beyond, grid[jnp.minimum(first, POINTS - 1)]))
    endless = jnp.isinf(high)
    root = bisect(
        lambda x: _reverse_residual(x, reference, beta, weights), low, jnp.where(endless, low, jnp.maximum(low, high))
    )
    return jnp.where(endless, jnp.inf, root)


def _solve_forward(reference: jax.Array, beta: jax.Array, weights: Weights) -> jax.Array:
    """The one root of `_forward_residual`; infinite where only dynamic sampling, whose Ω grows like e^L, leaves none.

    Every other Ω is below 4 e^{L/2} for L ≥ 0, so the root is below ``high``.
    """
    high = jnp.maximum(2 * (jnp.maximum(reference, 0.0) + jnp.log1p(1 / beta) + 3), REACH)
    root = bisect(lambda x: _forward_residual(x, reference, beta, weights), reference, high)
    return jnp.where(_forward_residual(high, reference, beta, weights) < 0, jnp.inf, root)


flow_root = _implicit(_reverse_residual, _solve_flow)
forward_root = _implicit(_forward_residual, _solve_forward)


def bisect(f: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """A sign change of f, negative at low and not at high, to the last bit; elementwise.

    >>> round(float(bisect(lambda x: x**2 - 2, jnp.zeros(()), jnp.full((), 2.0))), 5)
    1.41421
    """

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = low + (high - low) / 2
        right = f(middle) < 0
        return jnp.where(right, middle, low), jnp.where(right, high, middle)

    return jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))[1]
