"""How strongly a trainer pushes on a prompt that is solved with probability p: the weights ω⁺, ω⁻ and their sum Ω.

Maximising E[A] with a normalised advantage A moves p along Ω(p)·∇p, and Ω is all that the dynamics sees of the
normaliser. A normaliser is a value here: the population forms of the paper, or the expectation over finite groups.
Everything is computed from the log-odds L = ln(p / (1 − p)), because p and 1 − p both matter and one of them rounds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

LEVEL, PANELS, NODES = 40.0, 20, 16
"""Of the integrals over log-odds: where an integrand has levelled off, and the panels and nodes up to there."""

_Class = TypeVar("_Class", bound=type)


def as_tree(*traced: str) -> Callable[[_Class], _Class]:
    """Registers a dataclass as a pytree whose leaves are the traced fields; the others, and the class, are static.

    `jax.tree_util.register_dataclass` does not do: jaxlib 0.10 to 0.12 compares such trees by fields and leaves but not by
    class, so that jit now and then runs the program compiled for another normaliser.
    """

    def register(cls: _Class) -> _Class:
        static = [field.name for field in fields(cls) if field.name not in traced]

        def flatten(weights: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(weights, name) for name in traced], (cls, *(getattr(weights, name) for name in static))

        def unflatten(form: tuple[Any, ...], leaves: Any) -> Any:
            return cls(**dict(zip(static, form[1:], strict=True)), **dict(zip(traced, leaves, strict=True)))

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
        return cls

    return register


LARGEST_GROUP = 1_000_000  # completions; the sums over a group are exact, and take memory in proportion


@as_tree("epsilon")
@dataclass(frozen=True)
class Whitened:
    """Mean and standard deviation of the whole population, ε inside the root: Ω = 1/√(p(1−p) + ε).

    Source: arXiv 2503.06639, §2.3.

    >>> round(float(omega(0.5, Whitened(epsilon=0.0))), 6)
    2.0
    """

    epsilon: ArrayLike = 1e-4

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def omega(self, logit: jax.Array) -> jax.Array:
        """Ω at log-odds [...]."""
        return jax.lax.rsqrt(variance(logit) + jnp.asarray(self.epsilon, logit.dtype))

    def slope(self, logit: jax.Array) -> jax.Array:
        """dΩ/dp at log-odds [...]."""
        return 0.5 * jnp.tanh(logit / 2) * self.omega(logit) ** 3

    def potential(self, logit: jax.Array) -> jax.Array:
        """∫Ω dp from p = ½ at log-odds [...]: the angle whose sine is (2p − 1)/√(1 + 4ε); its cosine is 2√(v + ε)/√(1 + 4ε)."""
        cosine = 2 * jnp.sqrt(variance(logit) + jnp.asarray(self.epsilon, logit.dtype))
        return jnp.arctan2(jnp.tanh(logit / 2), cosine)


@as_tree("epsilon")
@dataclass(frozen=True)
class WhitenedStd:
    """Mean and standard deviation of the whole population, ε added to the standard deviation: Ω = 1/(√(p(1−p)) + ε).

    Source: the form of most libraries; arXiv 2503.06639, §2.3 with the smoothing moved.

    >>> round(float(omega(0.5, WhitenedStd(epsilon=0.5))), 6)
    1.0
    """

    epsilon: ArrayLike = 1e-4

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def omega(self, logit: jax.Array) -> jax.Array:
        """Ω at log-odds [...]."""
        return 1 / (_std(logit) + jnp.asarray(self.epsilon, logit.dtype))

    def slope(self, logit: jax.Array) -> jax.Array:
        """dΩ/dp at log-odds [...]."""
        return 0.5 * jnp.tanh(logit / 2) / _std(logit) * self.omega(logit) ** 2

    def potential(self, logit: jax.Array) -> jax.Array:
        """∫Ω dp from p = ½ at log-odds [...].

        With p = sin²(φ/2), dp = √v dφ and √v = ½ sin φ, so ∫Ω dp = φ − a ∫dφ/(sin φ + a) with a = 2ε.
        """
        a = 2 * jnp.asarray(self.epsilon, logit.dtype)
        angle = lambda x: jnp.arctan2(2 * _std(x), -jnp.tanh(x / 2))  # noqa: E731
        from_zero = lambda x: angle(x) - a * _angle_integral(x, a)  # noqa: E731
        return from_zero(logit) - from_zero(jnp.zeros_like(logit))


@as_tree()
@dataclass(frozen=True)
class MeanOnly:
    """Mean of the whole population, no scale (Dr. GRPO): Ω = 1.

    Source: arXiv 2503.06639, §5.

    >>> float(omega(0.3, MeanOnly()))
    1.0
    """

    def omega(self, logit: jax.Array) -> jax.Array:
        """Ω at log-odds [...]."""
        return jnp.ones_like(logit)

    def slope(self, logit: jax.Array) -> jax.Array:
        """dΩ/dp at log-odds [...]."""
        return jnp.zeros_like(logit)

    def potential(self, logit: jax.Array) -> jax.Array:
        """p − ½ at log-odds [...]."""
        return jnp.tanh(logit / 2) / 2


@as_tree("epsilon")
@dataclass(frozen=True)
class Group:
    """Groups of ``size`` completions, normalised as `group_advantages` does, averaged over the draws of a group.

    Ω_G is the number with E[(1/G) Σ_i A_i ∇log π(o_i)] = Ω_G(p) ∇p. With s_k what divides in a group of k successes,

        Ω_G = c · E[1/s_{1+J}],   baseline "mean": c = (G−1)/G, J ~ Binomial(G−2, p);   "leave_one_out": c = 1, same J;
                                  "none": c = 1, J ~ Binomial(G−1, p).

    Groups whose rewards are all equal have zero advantage and so are absent, except for baseline "none" with a scale
    other than "std", where a group of successes only still pushes. With ``dynamic_sampling`` they are drawn again until
    they differ: Ω = Ω_G / (1 − p^G − (1−p)^G), which grows without bound at both ends.

    Source: derived; E[score | success] = ∇p/p and E[score | failure] = −∇p/(1−p), then C(G,k) k (G−k) =
    G (G−1) C(G−2,k−1). Checked by enumerating all 2^G reward vectors in tests/theory.

    >>> round(float(omega(0.37, Group(4))), 5)  # √3 + (3 − 2√3) p(1−p)
    1.62387
    """

    size: int
    ddof: int = 0
    epsilon: ArrayLike = 0.0
    epsilon_in: str = "variance"
    baseline: str = field(default="mean", kw_only=True)
    scale: str = field(default="std", kw_only=True)
    dynamic_sampling: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
        if not isinstance(self.size, int) or not 2 <= self.size <= LARGEST_GROUP:
            raise ValueError(f"size={self.size!r}: a group has at least 2 completions, and at most {LARGEST_GROUP:,}")
        for name, value, choices in (
            ("ddof", self.ddof, (0, 1)),
            ("epsilon_in", self.epsilon_in, ("variance", "std")),
            ("baseline", self.baseline, ("mean", "leave_one_out", "none")),
            ("scale", self.scale, ("std", "none", "mean")),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")

    def omega(self, logit: jax.Array) -> jax.Array:
        """Ω_G at log-odds [...]."""
        mean = _binomial_mean(self._coefficients(logit.dtype), logit)
        return mean / self._live(logit) if self.dynamic_sampling else mean

    def slope(self, logit: jax.Array) -> jax.Array:
        """dΩ_G/dp at log-odds [...]: the derivative of a binomial mean is a binomial mean of differences."""
        coefficients = self._coefficients(logit.dtype)
        degree = coefficients.shape[0] - 1
        rise = _binomial_mean(degree * jnp.diff(coefficients), logit) if degree else jnp.zeros_like(logit)
        if not self.dynamic_sampling:
            return rise
        power = self.size - 1  # d live/dp = G [(1−p)^{G−1} − p^{G−1}]
        tilt = jnp.exp(power * jax.nn.log_sigmoid(-logit)) - jnp.exp(power * jax.nn.log_sigmoid(logit))
        return (rise - self.omega(logit) * self.size * tilt) / self._live(logit)

    def potential(self, logit: jax.Array) -> jax.Array:
        """∫Ω_G dp from p = ½ at log-odds [...]: the integral of a binomial mean is a binomial mean of partial sums.

        With dynamic sampling it is Gauss and Legendre's rule in log-odds, where Ω dp = Ω v dL is smooth and levels off.
        """
        if self.dynamic_sampling:
            return _integral(lambda x: self.omega(x) * variance(x), logit)
        coefficients = self._coefficients(logit.dtype)
        partial_sums = jnp.append(0.0, jnp.cumsum(coefficients)) / coefficients.shape[0]
        return _binomial_mean(partial_sums, logit) - _binomial_mean(partial_sums, jnp.zeros_like(logit))

    def _live(self, logit: jax.Array) -> jax.Array:
        """1 − p^G − (1−p)^G without the difference: Σ_k C(G,k) p^k (1−p)^{G−k} = v G(G−1) E[1/((J+1)(G−1−J))]."""
        j = jnp.arange(self.size - 1, dtype=logit.dtype)
        share = self.size * (self.size - 1) / ((j + 1) * (self.size - 1 - j))
        return variance(logit) * _binomial_mean(share, logit)

    def _coefficients(self, dtype: jnp.dtype) -> jax.Array:
        """c / s_k for k = 1 … G−1, and for baseline "none" also k = G."""
        size = self.size
        successes = jnp.arange(1, size, dtype=dtype)
        if self.scale == "std":
            var = successes * (size - successes) / (size * (size - self.ddof))
            epsilon = jnp.asarray(self.epsilon, dtype)
            inverse = 1 / (jnp.sqrt(var + epsilon) if self.epsilon_in == "variance" else jnp.sqrt(var) + epsilon)
        else:
            inverse = size / successes if self.scale == "mean" else jnp.ones_like(successes)
        if self.baseline == "none":
            return jnp.append(inverse, 0.0 if self.scale == "std" or self.dynamic_sampling else 1.0)
        return inverse * (size - 1) / size if self.baseline == "mean" else inverse


@as_tree("weights", "tpr", "fpr")
@dataclass(frozen=True)
class NoisyVerifier:
    """A normaliser fed by a verifier that passes correct completions at rate TPR and wrong ones at rate FPR.

    The observed success probability is p̃ = FPR + J p with J = TPR − FPR, and the true one is pushed with
    Ω(p) = J · Ω_w(p̃). J < 0, a verifier worse than chance, pushes down.

    Source: derived; E[A | truly correct] − E[A | truly wrong] = J (ω⁺ + ω⁻)(p̃). Checked on explicit policies in
    tests/theory.

    >>> round(float(omega(0.3, NoisyVerifier(MeanOnly(), tpr=0.9, fpr=0.2))), 3)
    0.7
    """

    weights: "Whitened | WhitenedStd | MeanOnly | Group"
    tpr: ArrayLike = 1.0
    fpr: ArrayLike = 0.0

    def __post_init__(self) -> None:
        for name, rate in (("tpr", self.tpr), ("fpr", self.fpr)):
            if isinstance(rate, (int, float)) and not 0 <= rate <= 1:
                raise ValueError(f"{name}={rate!r} is a rate, in [0, 1]")

    def omega(self, logit: jax.Array) -> jax.Array:
        """J Ω_w(p̃) at log-odds [...] of the true p."""
        return self.advantage(logit.dtype) * self.weights.omega(self.observed(logit))

    def slope(self, logit: jax.Array) -> jax.Array:
        """dΩ/dp = J² dΩ_w/dp̃ at log-odds [...] of the true p."""
        return self.advantage(logit.dtype) ** 2 * self.weights.slope(self.observed(logit))

    def potential(self, logit: jax.Array) -> jax.Array:
        """∫Ω dp from p = ½ at log-odds [...] of the true p: that of the observed p̃, because J dp = dp̃."""
        observed = self.weights.potential(self.observed(logit))
        return observed - self.weights.potential(self.observed(jnp.zeros_like(logit)))

    def advantage(self, dtype: jnp.dtype) -> jax.Array:
        """J = TPR − FPR, Youden's index."""
        return jnp.asarray(self.tpr, dtype) - jnp.asarray(self.fpr, dtype)

    def observed(self, logit: jax.Array) -> jax.Array:
        """The log-odds of p̃ at log-odds [...] of the true p; 1 − p̃ is a sum of its own, never a difference."""
        p, q = jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
        tpr, fpr = jnp.asarray(self.tpr, logit.dtype), jnp.asarray(self.fpr, logit.dtype)
        passed, failed = tpr * p + fpr * q, (1 - tpr) * p + (1 - fpr) * q
        inside = (passed > 0) & (failed > 0)
        ends = jnp.where(passed > 0, jnp.inf, jnp.where(jnp.isnan(passed), jnp.nan, -jnp.inf)).astype(logit.dtype)
        return jnp.where(inside, jnp.log(jnp.where(inside, passed, 1.0) / jnp.where(inside, failed, 1.0)), ends)


Weights: TypeAlias = Whitened | WhitenedStd | MeanOnly | Group | NoisyVerifier


def omega(p: ArrayLike, weights: Weights, *, logits: bool = False) -> jax.Array:
    """The total weight Ω(p) = ω⁺(p) + ω⁻(p): at a fixed point, β times the gain in log-odds.

    Args:
      p: [...] success probability, in [0, 1].
      weights: the normaliser.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] Ω, in the float type of ``p``; infinite at p ∈ {0, 1} for population whitening with ε = 0.

    Source: arXiv 2503.06639, §2.3.

    >>> round(float(omega(0.3, Whitened(epsilon=1e-4))), 5)
    2.18166
    """
    return weights.omega(log_odds(p, logits=logits))


def omega_plus(p: ArrayLike, weights: Weights, *, logits: bool = False) -> jax.Array:
    """The weight ω⁺(p) = E[A | success] of a correct completion: (1 − p) Ω(p), or Ω(p) where nothing is subtracted.

    Args:
      p: [...] success probability, in [0, 1].
      weights: the normaliser.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] ω⁺, in the float type of ``p``.

    Source: arXiv 2503.06639, §2.3.

    >>> round(float(omega_plus(0.1, Whitened(epsilon=1e-2))), 5)
    2.84605
    """
    return _omega_pair(log_odds(p, logits=logits), weights)[0]


def omega_minus(p: ArrayLike, weights: Weights, *, logits: bool = False) -> jax.Array:
    """The weight ω⁻(p) = −E[A | failure] of a wrong completion: p Ω(p), or 0 where nothing is subtracted.

    Args:
      p: [...] success probability, in [0, 1].
      weights: the normaliser.
      logits: ``p`` is given as log-odds.

    Returns:
      [...] ω⁻, in the float type of ``p``.

    Source: arXiv 2503.06639, §2.3.

    >>> round(float(omega_minus(0.1, Whitened(epsilon=1e-2))), 5)
    0.31623
    """
    return _omega_pair(log_odds(p, logits=logits), weights)[1]


def log_odds(p: ArrayLike, *, logits: bool = False) -> jax.Array:
    """L = ln(p / (1 − p)) as a float array; −∞ and +∞, with zero gradient, at the ends; nan outside [0, 1].

    >>> round(float(log_odds(0.2)), 4), float(log_odds(0)), float(log_odds(3, logits=True))
    (-1.3863, -inf, 3.0)
    """
    p = as_float(p)
    if logits:
        return p
    inside = (p > 0) & (p < 1)
    safe = jnp.where(inside, p, 0.5)
    ends = jnp.where(p == 0, -jnp.inf, jnp.where(p == 1, jnp.inf, jnp.nan)).astype(p.dtype)
    return jnp.where(inside, jnp.log(safe) - jnp.log1p(-safe), ends)


def as_float(x: ArrayLike) -> jax.Array:
    """An array [...] of floats; whole numbers and booleans become floats, float32 stays.

    >>> as_float([1, 2]).tolist()
    [1.0, 2.0]
    """
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def variance(logit: jax.Array) -> jax.Array:
    """v = p(1 − p) of the reward, from log-odds [...].

    >>> float(variance(jnp.zeros(())))
    0.25
    """
    return jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)


def upward(weights: Weights) -> tuple[ArrayLike, Weights]:
    """(s, weights) such that s L obeys the map of those weights, and they push up.

    A verifier worse than chance pushes p down just as the one with its two rates exchanged pushes 1 − p up.

    >>> sign, weights = upward(NoisyVerifier(MeanOnly(), tpr=0.2, fpr=0.7))
    >>> float(sign), round(float(weights.tpr), 2), round(float(weights.fpr), 2)
    (-1.0, 0.7, 0.2)
    """
    if not isinstance(weights, NoisyVerifier):
        return 1.0, weights
    tpr, fpr = as_float(weights.tpr), as_float(weights.fpr)
    better = replace(weights, tpr=jnp.maximum(tpr, fpr), fpr=jnp.minimum(tpr, fpr))
    return jnp.where(tpr < fpr, -1.0, 1.0).astype(tpr.dtype), better


def _std(logit: jax.Array) -> jax.Array:
    """√v without √0, whose derivative is infinite."""
    return jnp.exp((jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit)) / 2)


def _omega_pair(logit: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """(ω⁺, ω⁻) at log-odds [...]."""
    if isinstance(weights, NoisyVerifier):
        plus, minus = _omega_pair(weights.observed(logit), weights.weights)
        tpr, fpr = (jnp.asarray(rate, logit.dtype) for rate in (weights.tpr, weights.fpr))
        return tpr * plus - (1 - tpr) * minus, (1 - fpr) * minus - fpr * plus
    total = weights.omega(logit)
    if isinstance(weights, Group) and weights.baseline == "none":
        return total, jnp.zeros_like(logit)
    return jax.nn.sigmoid(-logit) * total, jax.nn.sigmoid(logit) * total


def _binomial_mean(values: jax.Array, logit: jax.Array) -> jax.Array:
    """E[values[J]] for J ~ Binomial(len(values) − 1, p), exactly, at log-odds [...]."""
    n = values.shape[0] - 1
    axes = tuple(range(logit.ndim))
    choose = jnp.asarray(_log_choose(n), logit.dtype)
    j = jnp.arange(n + 1, dtype=logit.dtype)
    choose, j = (jnp.expand_dims(x, axes) for x in (choose, j))
    logit = jnp.clip(logit, -1e4, 1e4)[..., None]  # 0·∞ at the ends would be nan
    mass = jnp.exp(choose + j * jax.nn.log_sigmoid(logit) + (n - j) * jax.nn.log_sigmoid(-logit))
    # Divided by the sum of the masses, 1 but for the rounding of large ln C(n, j). Both sums are one matrix product
    # because the fused float32 reductions of jax 0.11 and 0.12's CPU backend return wrong sums inside larger programs.
    both = jnp.matmul(mass, jnp.stack([values, jnp.ones_like(values)], axis=-1), precision="highest")
    return both[..., 0] / both[..., 1]


@cache
def _log_choose(n: int) -> list[float]:
    """ln C(n, j) for j = 0 … n: from the whole numbers, and where those have hundreds of digits from ln Γ, within 1e-10."""
    if n <= 1000:
        return [math.log(math.comb(n, j)) for j in range(n + 1)]
    factorials = [math.lgamma(j + 1) for j in range(n + 1)]
    return [factorials[n] - factorials[j] - factorials[n - j] for j in range(n + 1)]


def _angle_integral(logit: jax.Array, a: jax.Array) -> jax.Array:
    """∫_0^φ dφ'/(sin φ' + a) at φ = 2 arcsin √p, for a ≥ 0; 0 at a = 0, where it is multiplied by a.

    It is 2 atanh(√D x)/√D with D = 1 − a² and x = √p/(√p + a√(1 − p)), and an arc tangent where D < 0. Near √D x = 1 the
    difference 1 − √D x is computed without cancellation, near D = 0 both are their series.
    """
    right, wrong = (jnp.exp(jax.nn.log_sigmoid(x) / 2) for x in (logit, -logit))
    is_zero = a == 0
    a = jnp.where(is_zero, 1.0, a)
    below = right + a * wrong
    x, d = right / below, 1 - a * a
    root = jnp.sqrt(jnp.maximum(jnp.abs(d), 1e-30))
    rest = a * (wrong + right * a / (1 + root)) / below  # 1 − √D x where D > 0
    below_one = jnp.log1p((2 * root * x) / jnp.where(d > 0, rest, 1.0)) / root
    above_one = 2 * jnp.arctan(root * x) / root
    series = 2 * x * (1 + d * x**2 / 3 + d**2 * x**4 / 5 + d**3 * x**6 / 7)
    integral = jnp.where(jnp.abs(d) < 1e-3, series, jnp.where(d > 0, below_one, above_one))
    return jnp.where(is_zero, 0.0, integral)


def _integral(f: Callable[[jax.Array], jax.Array], end: jax.Array) -> jax.Array:
    """∫_0^end f(x) dx at ends [...], for f that is smooth on scales of 1 and constant beyond |x| = `LEVEL`."""
    nodes, node_weights = np.polynomial.legendre.leggauss(NODES)
    shape = (1,) * end.ndim + (-1,)
    grid = ((np.arange(PANELS)[:, None] + (nodes + 1) / 2) / PANELS).reshape(shape)  # PANELS·NODES points in (0, 1)
    shares = np.tile(node_weights / (2 * PANELS), PANELS).reshape(shape)
    inside = jnp.clip(end, -LEVEL, LEVEL)
    at_nodes = f(inside[..., None] * jnp.asarray(grid, end.dtype))
    total = (at_nodes * jnp.asarray(shares, end.dtype)).sum(-1) * inside
    return total + jnp.where(jnp.abs(end) > LEVEL, end - inside, 0.0) * f(inside)


def _check_epsilon(epsilon: ArrayLike) -> None:
    if isinstance(epsilon, (int, float)) and not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon!r} must not be negative, and finite")
