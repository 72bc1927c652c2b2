"""Small steps whose advantages are old: they inherit the flips of exactly solved iterations.

With fresh advantages many small steps follow dL/dt = Ω(L)/β − (L − L_ref) and never oscillate. The unit of t is the relaxation
time: the KL term alone brings L nearer to L_ref by a factor e in it. With advantages of age τ they follow

    dL/dt = Ω(L(t − τ))/β − (L − L_ref),

whose fixed points are the same. Near one of them, with x = L − L* and m the multiplier of the exact iteration there
(`fixed_points`), it is x' = m x(t − τ) − x.

**Which delays destabilise.** x = e^{λt} needs λ + 1 = m e^{−λτ}. Where Re λ ≥ 0 the left side is at least 1 in modulus, and 1 at
λ = 0 only, while the right side is at most |m|. So for −1 ≤ m < 1 every root has Re λ < 0: stable at every τ. At m = 1, a fold,
λ = 0 is a root, and for m > 1 there is a positive one, at every τ. For m < −1 roots cross at λ = ±iω with ω² = m² − 1, first at
τ_c = arccos(1/m)/√(m² − 1), and only to the right. So a stale sampler destabilises the fixed points where exactly solved
iterations flip, and no others.

**Globally.** Let the exact map h have one fixed point and no 2-cycle. Then every solution converges, at every τ and from every
history. With a its limes inferior and b its limes superior, L' → 0 along times at which L → b, so b is in h([a, b]), and so is
a. Then [a, b] ⊆ hⁿ([a, b]) for every n, and these intervals shrink to L*, because every orbit of h converges to it (Coppel, see
thresholds.py) and a fixed point that attracts an interval does so uniformly. With three fixed points only the local part
holds: from the reference an old sampler can jump past the middle one, as exact iterations do.

**A sampler that is refreshed** every T is not a constant delay. Between two refreshes L relaxes towards the constant h(L_n), so
that L_{n+1} = q L_n + (1 − q) h(L_n) with q = e^{−T}. That is two-KL GRPO (`success_map`) with α = 1 − q at β/α, exactly: small
steps at T → 0, exact iterations at T → ∞. It is stable for −coth(T/2) < m < 1.

One update of size a is an exact two-KL iteration with α = a at β/a, π ∝ π_ref^a π^{1−a} exp(aA/β): a step of natural gradient.
Small plain-gradient steps on the logits of a tabular policy obey the same equation with a clock that runs in proportion to
p(1 − p). All this is for losses with the ratio π/π_sampler, unclipped.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpo_jax.theory.dynamics import success_map
from grpo_jax.theory.weights import Weights, as_float, log_odds


def critical_delay(multiplier: ArrayLike, *, step: ArrayLike = 0.0) -> jax.Array:
    """The age of advantages from which on small steps oscillate about a fixed point: τ_c = arccos(1/m)/√(m² − 1) for m < −1.

    With steps of size a, x ← (1 − a) x + a m x(s updates ago), it is a (π − arg(e^{iθ} − 1 + a))/θ with
    sin(θ/2) = a √(m² − 1)/(2 √(1 − a)): stable exactly if a s is less.

    Args:
      multiplier: [...] m of the exact iteration at the fixed point, as in `fixed_points`.
      step: [...] a in [0, 1], the share of the way to its target that an update goes; 0: many small steps.

    Returns:
      [...] in relaxation times (1/a updates): ∞ for −1 ≤ m < 1, which no delay destabilises; 0 where it is unstable without
      any: m ≥ 1, or m ≤ 1 − 2/a.

    Source: derived; the linear delay equation of this file. Checked against the roots of z^{s+1} = (1 − a) z^s + a m in tests.

    >>> [round(float(critical_delay(m)), 4) for m in (-0.9, -1.323, -3.0)]
    [inf, 2.8027, 0.6755]
    """
    m = as_float(multiplier)
    a = jnp.asarray(step, m.dtype)
    m, a = jnp.broadcast_arrays(m, a)
    flips = m < -1
    frequency = jnp.sqrt(jnp.where(flips, jnp.square(m) - 1, 1.0))
    small = a == 0
    share = jnp.where(small | (a == 1), 0.5, a)
    half = jnp.minimum(share * frequency / (2 * jnp.sqrt(1 - share)), 1.0)  # sin(θ/2)
    angle = 2 * jnp.arcsin(half)
    finite = share * (jnp.pi - jnp.arctan2(jnp.sin(angle), share - 2 * jnp.square(half))) / angle
    finite = jnp.where(half == 1, 0.0, finite)
    critical = jnp.where(small, (jnp.pi - jnp.arctan(frequency)) / frequency, jnp.where(a == 1, 0.0, finite))
    return jnp.where(flips, critical, jnp.where(m < 1, jnp.inf, jnp.where(jnp.isnan(m), jnp.nan, 0.0)))


def critical_refresh(multiplier: ArrayLike) -> jax.Array:
    """The time between two refreshes of the sampler from which on small steps oscillate: T_c = ln((|m| + 1)/(|m| − 1)), m < −1.

    N updates of size a are T = −N ln(1 − a). From refresh to refresh the multiplier is q + (1 − q) m with q = e^{−T}.

    Args:
      multiplier: [...] m of the exact iteration at the fixed point, as in `fixed_points`.

    Returns:
      [...] in relaxation times: ∞ for −1 ≤ m < 1; 0 for m ≥ 1, which is unstable with a fresh sampler too.

    Source: derived; q + (1 − q) m = −1.

    >>> [round(float(critical_refresh(m)), 4) for m in (-0.9, -1.323, -3.0)]
    [inf, 1.973, 0.6931]
    """
    m = as_float(multiplier)
    flips = m < -1
    critical = 2 * jnp.arctanh(-1 / jnp.where(flips, m, -2.0))
    return jnp.where(flips, critical, jnp.where(m < 1, jnp.inf, jnp.where(jnp.isnan(m), jnp.nan, 0.0)))


@partial(jax.jit, static_argnames="logits")
def stale_iterate(
    p_ref: ArrayLike,
    staleness: ArrayLike,
    *,
    beta: ArrayLike,
    weights: Weights,
    step: ArrayLike = 1.0,
    logits: bool = False,
) -> jax.Array:
    """The success probabilities after updates whose advantages were measured some updates ago.

    L_{n+1} = L_n + a [L_ref + Ω(p_{n−s_n})/β − L_n], from the reference on; what is older than the start is the start.

    Args:
      p_ref: [...] success probability of the reference policy; 0 and 1 stay.
      staleness: [N] s_n ≥ 0, whole numbers: a constant for a pipeline, `update_staleness` for a sampler that is refreshed.
      beta: weight of the sequence-level KL, > 0.
      weights: the normaliser.
      step: a in (0, 1], the share of the way to its target that an update goes; 1 with s = 0 is `iterate`.
      logits: probabilities are taken and returned as log-odds.

    Returns:
      [N + 1, ...], the start included.

    Source: derived from arXiv 2503.06639, Thm 9: each update is one of its two-KL iterations, with α = a at β/a.

    >>> from grpo_jax.theory import Whitened
    >>> ages = jnp.zeros(2000, int), jnp.full(2000, 100)
    >>> fresh, old = (stale_iterate(1e-3, age, beta=3.0, weights=Whitened(1e-5), step=0.1) for age in ages)
    >>> [round(float(jnp.ptp(path[-500:])), 1) for path in (fresh, old)]
    [0.0, 0.6]
    """
    reference = log_odds(p_ref, logits=logits)
    ages = jnp.asarray(staleness)
    step = jnp.asarray(step, reference.dtype)
    scale = jnp.asarray(beta, reference.dtype) / step

    def update(path: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        n, age = now
        sampled = path[jnp.maximum(n - age, 0)]
        mapped = success_map(sampled, reference, beta=scale, weights=weights, alpha=step, p_prev=path[n], logits=True)
        return path.at[n + 1].set(mapped), None

    start = jnp.broadcast_to(reference, (ages.shape[0] + 1, *reference.shape))
    path, _ = jax.lax.scan(update, start, (jnp.arange(ages.shape[0], dtype=ages.dtype), ages))
    return path if logits else jax.nn.sigmoid(path)
