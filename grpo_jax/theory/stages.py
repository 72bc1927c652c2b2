"""Training in stages: when a stage has converged, its policy becomes the reference of the next."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.limits import flow_point
from grpo_jax.theory.weights import Weights, log_odds


def stages(p_ref: ArrayLike, num_stages: int, *, beta: ArrayLike, weights: Weights, logits: bool = False) -> jax.Array:
    """The success probability after each stage of small steps, the reference reset to the converged policy in between.

    L_s = L_{s−1} + Ω(p_s)/β, so each stage adds at least Ω_min/β, Ω(½)/β ≈ 2/β for whitening, and stages alone reach every p < 1;
    below the fold of its own start (`fold_beta`) a stage saturates.

    Args:
      p_ref: [...] success probability of the first reference policy; 0 and 1 stay.
      num_stages: S ≥ 0.
      beta: weight of the sequence-level KL to the reference of the stage, > 0; a scalar, or of the shape of ``p_ref``.
      weights: the normaliser.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [S + 1, ...], the first reference included.

    Raises:
      ValueError: ``num_stages`` is negative.

    Source: arXiv 2503.06639 (resetting the reference amplifies again); the gain per stage is derived.

    >>> from grpo_jax.theory import Whitened
    >>> [round(float(p), 3) for p in stages(0.03, 5, beta=2.0, weights=Whitened(1e-3))]
    [0.03, 0.123, 0.296, 0.533, 0.798, 1.0]
    """
    if num_stages < 0:
        raise ValueError(f"num_stages={num_stages!r} must not be negative")
    path = [log_odds(p_ref, logits=logits)]
    for _ in range(num_stages):
        path.append(flow_point(path[-1], beta=beta, weights=weights, logits=True))
    stacked = jnp.stack(path)
    return stacked if logits else jax.nn.sigmoid(stacked)
