"""Where GRPO ends for a network, which cannot tilt its policy as a table can.

A table moves along one line: successes up, failures down, nothing else. A network moves along its score features s = ∇ log π,
and what they cannot express of the reward costs nats that buy no success. All that counts, to first order, is how the rewards
regress on the scores under the reference policy. With c_i = Cov(s, r) = ∇p_i of prompt i, F = Σ_i E[s sᵀ] summed over the
prompts that share the parameters, and v = p(1 − p):

    K_ij = c_iᵀ F⁻¹ c_j,   R² = K_ii/v_i for one prompt: the share of the variance of its reward that the scores explain.

Beyond first order the residual of that regression is taken to be Gaussian, with one covariance within successes and within
failures. Then the ends below are exact for log-linear policies π ∝ π_ref exp(θ·φ). Proof: with δ = E[φ|success] − E[φ|failure]
and Σ the covariance within both, tilting by θ leaves δ and Σ as they are, moves L = logit p by δ·θ, and makes c = v δ and
F = Σ_i (Σ_i + v_i δ_i δ_iᵀ). At rest β F θ = Σ_i Ω_i c_i. With W = Σ_i Σ_i this is W θ = Σ_j v_j (Ω_j/β − Δ_j) δ_j, and with
M_ij = δ_iᵀ W⁻¹ δ_j the gains Δ_i = δ_iᵀθ obey

    Δ = M diag(v) (Ω/β − Δ).

For one prompt M = R²/((1 − R²) v_ref), because at the reference K = v_ref² M/(1 + v_ref M). For many, with D = diag(v_ref),
K = D M (1 + D M)⁻¹ D: the equation needs K alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.roots import REACH, flow_root
from grpo_jax.theory.weights import Weights, as_tree, log_odds, upward, variance

STEP, MOST_STEPS = 0.1, 20_000  # of the flow of `attainable_points`
BATCH = 256  # prompts solved at a time: each scans a grid of log-odds


@as_tree("weights", "r2", "reference")
@dataclass(frozen=True)
class _Limited:
    """A network of limited capacity as a normaliser of its own: Ω̃ = ρ Ω with ρ = R² v/(R² v + (1 − R²) v_ref)."""

    weights: Any
    r2: jax.Array
    reference: jax.Array

    def omega(self, logit: jax.Array) -> jax.Array:
        """ρ Ω at log-odds [...]."""
        share, pull = self._share(logit), self.weights.omega(logit)
        finite = jnp.isfinite(pull)
        return jnp.where(finite, share * jnp.where(finite, pull, 0.0), jnp.where(share > 0, pull, 0.0))

    def slope(self, logit: jax.Array) -> jax.Array:
        """d(ρ Ω)/dp at log-odds [...]: dρ/dv = R² (1 − R²) v_ref/(R² v + (1 − R²) v_ref)²."""
        share, missing = self._share(logit), (1 - self.r2) * variance(self.reference)
        total = self.r2 * variance(logit) + missing
        rise = -jnp.tanh(logit / 2) * self.r2 * missing / jnp.where(total > 0, total, 1.0) ** 2
        return share * self.weights.slope(logit) + rise * self.weights.omega(logit)

    def _share(self, logit: jax.Array) -> jax.Array:
        """ρ at log-odds [...]; with R² = 1 it is 1 also where v has rounded to 0."""
        explained, missing = self.r2 * variance(logit), (1 - self.r2) * variance(self.reference)
        some = explained + missing > 0
        return jnp.where(some, explained / jnp.where(some, explained + missing, 1.0), 1.0)


@partial(jax.jit, static_argnames="logits")
def attainable_point(
    p_ref: ArrayLike, *, beta: ArrayLike, weights: Weights, r2: ArrayLike, logits: bool = False
) -> jax.Array:
    """The success probability p† at which many small steps end whose score features explain a share R² of the reward.

    logit p† = logit p_ref + ρ Ω(p†)/β with ρ = R² v†/(R² v† + (1 − R²) v_ref): the first solution above p_ref. Limited
    capacity acts like the larger β/ρ. With R² = 1 it is `flow_point`, with R² = 0 p_ref itself, to rounding.

    To first order in 1/β it holds for every policy, beyond that for log-linear policies with Gaussian residuals. For other
    log-linear ones the log-odds reached differ from those of p† by

        (Ω/β)² [(3/2)(1 − 2R²)(Var(e|success) − Var(e|failure)) − E[e³]/v_ref] + O(β⁻³),

    with e = g − R²(r − p_ref), where g is the regression of r − p_ref on the scores under π_ref. The Gaussian form ends where
    the nats spent beyond kl(p†‖p_ref), v†Δ(Ω/β − Δ)/2 with the gain Δ, are no longer few beside the entropy of the failures.

    Args:
      p_ref: [...] success probability of the reference policy; 0 and 1 are returned unchanged, with zero gradient.
      beta: weight of the KL, > 0; a scalar, or of the shape of ``p_ref``. Otherwise p† is nan.
      weights: the normaliser.
      r2: share of the variance of the reward that a linear regression on the scores explains under π_ref, in [0, 1]; a
        scalar, or of the shape of ``p_ref``. Outside it p† is nan.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [...] p†. Differentiable in p_ref, β, ε and R².

    Source: derived, in the head of this file and in docs/networks.md; checked on explicit policies in tests/theory.

    >>> from grpo_jax.theory import Group
    >>> [round(float(p), 4) for p in attainable_point(jnp.full(3, 0.2), beta=1.0, weights=Group(8), r2=jnp.array([0, 0.5, 1]))]
    [0.2, 0.4364, 0.6249]
    """
    reference = log_odds(p_ref, logits=logits)
    beta, r2 = (jnp.broadcast_to(jnp.asarray(x, reference.dtype), reference.shape) for x in (beta, r2))
    sign, better = upward(jax.tree.map(lambda leaf: jnp.asarray(leaf, reference.dtype), weights))
    at_end, allowed = jnp.isinf(reference), (r2 >= 0) & (r2 <= 1) & (beta > 0)

    def solve(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        start, scale, share = inputs
        return flow_root(start, scale, _Limited(better, share, start))

    inputs = sign * jnp.where(at_end, 0.0, reference), beta, jnp.where(allowed, r2, 0.0)
    logit = jax.lax.map(solve, tuple(x.ravel() for x in inputs), batch_size=BATCH).reshape(reference.shape)
    logit = jnp.where(at_end, reference, sign * logit)
    logit = jnp.where(allowed, logit, jnp.nan)
    return logit if logits else jax.nn.sigmoid(logit)


def attainable_points(
    p_ref: ArrayLike, *, beta: float, weights: Weights, coupling: ArrayLike, logits: bool = False
) -> jax.Array:
    """The success probabilities at which prompts that share a network's parameters end together, by many small steps.

    The gains Δ = logit p − logit p_ref obey Δ = M diag(v)(Ω(p)/β − Δ), with K = D M (1 + D M)⁻¹ D and D = diag(v_ref). Found
    by following dΔ/dt = T(Δ) − Δ from 0, where T solves the equation for the v and Ω of Δ: the natural gradient flow.

    To first order Δ_i = ρ_i Ω_i/β with ρ_i = (KΩ)_i/(v_i Ω_i), which exceeds 1 where other prompts pull along and is negative
    where they pull the other way: **such a prompt falls below p_ref**. Only Σ_i Ω_i² v_i ρ_i = Ωᵀ K Ω ≥ 0 is certain.

    Args:
      p_ref: [P] success probabilities of the reference policy; 0 and 1 are returned unchanged.
      beta: weight of the KL, > 0.
      weights: the normaliser.
      coupling: [P, P] the K_ij = c_iᵀ F⁻¹ c_j under π_ref, F summed over the prompts. diag(R² v_ref) are prompts that share
        nothing: `attainable_point`.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [P] p†, computed in double precision on the host: to 13 digits of p, and up to log-odds of ±64.

    Raises:
      ValueError: ``beta`` is not positive, the shapes do not fit, K is not symmetric, or it explains more than there is.

    Source: derived, in the head of this file and in docs/networks.md.

    >>> from grpo_jax.theory import Group
    >>> coupling = jnp.array([[0.08, -0.03], [-0.03, 0.02]])  # the second prompt is pulled the wrong way
    >>> [round(float(p), 3) for p in attainable_points(jnp.array([0.2, 0.5]), beta=2.0, weights=Group(8), coupling=coupling)]
    [0.271, 0.484]
    """
    with jax.enable_x64(True):
        reference, gram = log_odds(jnp.asarray(p_ref, float), logits=logits), jnp.asarray(coupling, float)
        _check_coupling(reference, gram, beta)
        weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), weights)
        logit = _flow_together(reference, jnp.asarray(float(beta)), weights, gram)
        return logit if logits else jax.nn.sigmoid(logit)


@jax.jit
def _flow_together(reference: jax.Array, beta: jax.Array, weights: Weights, coupling: jax.Array) -> jax.Array:
    """Log-odds [P] at the end of dΔ/dt = T(Δ) − Δ from Δ = 0, no prompt moving further than `STEP` at a time.

    With W = diag(v/v_ref), S = √D and K̂ = S⁻¹ K S⁻¹, whose eigenvalues lie in [0, 1], T = S⁻¹ (1 − K̂ + K̂ W)⁻¹ K̂ W S Ω/β.
    """
    at_end = jnp.abs(reference) >= REACH
    start = jnp.where(at_end, 0.0, reference)
    root = jnp.sqrt(variance(start))
    inside = (~at_end).astype(root.dtype) / root
    shares = inside[:, None] * coupling * inside[None, :]
    limited = _Limited(weights, jnp.clip(jnp.diag(shares), 0.0, 1.0), start)

    def target(gain: jax.Array) -> jax.Array:
        scale = variance(start + gain) / root**2
        matrix = jnp.eye(root.shape[0]) - shares + shares * scale[None, :]
        pull = scale * root * weights.omega(start + gain) / beta
        return jnp.linalg.solve(matrix, shares @ pull) / root

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        gain, _, count = state
        # Shorter where the own pull of a prompt falls so fast that a step would overshoot, and never above `STEP`.
        fall = jnp.maximum(0.0, -variance(start + gain) * limited.slope(start + gain) / beta)
        ahead = jnp.clip(STEP * (target(gain) - gain) / (1 + fall), -STEP, STEP)
        moved = jnp.clip(start + gain + ahead, -REACH, REACH) - start
        return moved, (variance(start + gain) * jnp.abs(moved - gain)).max(), count + 1

    def goes_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, moved, count = state
        return (moved > 1e-14) & (count < MOST_STEPS)

    first = jnp.zeros_like(start), jnp.asarray(jnp.inf), jnp.asarray(0)
    gain, _, _ = jax.lax.while_loop(goes_on, step, first)
    return jnp.where(at_end, reference, start + gain)


def _check_coupling(reference: jax.Array, coupling: jax.Array, beta: float) -> None:
    """Refuses what is no Gram matrix of regressions on shared scores."""
    prompts = reference.size
    if not beta > 0:
        raise ValueError(f"beta={beta!r} must be positive")
    if reference.ndim != 1 or jnp.isnan(reference).any():
        raise ValueError("p_ref must be one probability per prompt, [P]")
    if coupling.shape != (prompts, prompts) or not jnp.allclose(coupling, coupling.T, rtol=1e-6, atol=1e-12):
        raise ValueError(f"coupling of shape {coupling.shape} must be symmetric, {prompts} by {prompts}")
    v = variance(reference)
    root = jnp.sqrt(jnp.where(v > 0, v, jnp.inf))
    shares = jnp.linalg.eigvalsh(coupling / root[:, None] / root[None, :])
    if not (shares.min() > -1e-6 and shares.max() < 1 + 1e-6):
        raise ValueError(
            f"coupling explains {float(shares.min()):.3f} to {float(shares.max()):.3f} of the rewards' variance: not in [0, 1]"
        )
