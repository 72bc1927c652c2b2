"""Log-probabilities of completions, without the logits of all tokens at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from grpo_jax.products import mark_varying, sum_dtype, transposed, unembed, varying_axes

Unembedding: TypeAlias = jax.Array | Callable[[jax.Array], jax.Array]

# How many logits exist at once if the caller does not say: 64 MiB of them, but those of at least 512 positions (297 MiB at V =
# 151,936). Fewer make the backward pass slower, which adds a [D, V] gradient per chunk; on a CPU more gain nothing
# (experiments/benchmarks/logps.py).
LOGITS, POSITIONS = 2**24, 512


def completion_logps(
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk_size: int | None = None,
    reference_hidden: jax.Array | None = None,
    reference_unembedding: Unembedding | None = None,
) -> tuple[jax.Array, ...]:
    """Log-probability of each target token and entropy of the distribution it was drawn from.

    log π(o_t | q, o_<t) = z_t − log Σ_v exp z_v and H = −Σ_v π_v log π_v, with z = hidden · unembedding / temperature.
    Logits exist for ``chunk_size`` positions of every row at a time. Only log Σ_v exp z_v is kept for the backward pass, which
    computes a chunk's logits again and, from them, ∂logps/∂z_v = 1[v = o_t] − π_v and ∂H/∂z_v = −π_v (log π_v + H).
    An output that nobody uses, or a gradient that nobody asks for, costs nothing under jit; inside jax.shard_map it needs jit.

    Args:
      hidden: [B, T, D]; position t holds the state that predicts target t (the shift by one is already done).
      unembedding: [D, V], multiplied in the dtype of ``hidden`` with sums in float32; or a function from hidden [..., D] to
        logits [..., V], which may close over parameters: these get their gradients too, summed over chunks in float32. It is
        fastest where it makes one axis of all rows, as `products.unembed` does.
      targets: [B, T] integer token ids, 0 ≤ id < V.
      temperature: scalar, of the sampling distribution; the scored distribution is the sampled one.
      chunk_size: positions of T per chunk; None chooses: 64 MiB of logits, or 512 rows times positions where these need more,
        and at least one position. The peak is B·chunk_size·V float32 numbers, twice where XLA does not reuse them, and in the
        backward pass one gradient of the unembedding.
      reference_hidden: [B, T, D'] of the reference policy, scored in the same pass and without gradient.
      reference_unembedding: its unembedding; None for ``unembedding``.

    Returns:
      (logps [B, T], entropy [B, T]), in nats, float32 (float64 where the logits are); with ``reference_hidden``
      (logps, entropy, ref_logps [B, T]). Tokens of logit −inf have probability 0, add nothing to the entropy and get no
      gradient; a target outside 0 … V − 1 gives nan.

    Raises:
      ValueError: shapes that do not belong together, nothing to score, or a chunk_size below 1.
      TypeError: hidden states that are not real, or targets that are not integers; forward-mode derivatives.

    Source: the gradient of softmax; checked against autodiff and finite differences in tests/objective/test_logps.py.

    >>> logps, entropy = completion_logps(jnp.zeros((1, 3, 2)), jnp.zeros((2, 4)), jnp.zeros((1, 3), jnp.int32))
    >>> bool(jnp.allclose(logps, -jnp.log(4.0))), bool(jnp.allclose(entropy, jnp.log(4.0)))
    (True, True)
    """
    _check(hidden, unembedding, targets, temperature, chunk_size, reference_hidden, reference_unembedding)
    batch, length = targets.shape
    if chunk_size is None:
        chunk_size = max(1, max(POSITIONS, LOGITS // _vocabulary(unembedding, hidden)) // batch)
    num_chunks = -(-length // chunk_size)
    size = -(-length // num_chunks)

    # Chunks run along T, so that a batch axis split over devices stays where it is. The end is filled with what is there:
    # a function may not like zeros.
    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - length)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        return x.reshape(batch, num_chunks, size, *x.shape[2:]).swapaxes(0, 1)

    def restore(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    states = cut(hidden)
    project, constants = _opened(unembedding, states)
    ref_project, ref_constants = project, constants
    ref_states = None if reference_hidden is None else cut(reference_hidden)
    if ref_states is not None and reference_unembedding is not None:
        ref_project, ref_constants = _opened(reference_unembedding, ref_states)
    scale = jnp.asarray(temperature, sum_dtype(hidden.dtype))
    tokens = cut(targets.astype(jnp.int32))
    inputs = states, constants, scale, tokens, (ref_states, ref_constants)
    # In jax.shard_map, a custom gradient must vary over devices as its input does: so all inputs vary as any of them.
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(inputs)))
    scored = _score((project, ref_project), *jax.tree.map(partial(mark_varying, axes=axes), inputs))
    return tuple(restore(x) for x in scored)


Projection: TypeAlias = Callable[..., jax.Array]


def _vocabulary(unembedding: Unembedding, hidden: jax.Array) -> int:
    if not callable(unembedding):
        return unembedding.shape[-1]
    logits = jax.eval_shape(unembedding, jax.ShapeDtypeStruct((hidden.shape[0], 1, hidden.shape[2]), hidden.dtype))
    return max(1, *logits.shape[-1:])


def _opened(unembedding: Unembedding, states: jax.Array) -> tuple[Projection, tuple[jax.Array, ...]]:
    """A function (states of one chunk, *constants) -> logits, and the constants: all it closed over."""
    if not callable(unembedding):
        return lambda states, matrix: unembed(states, transposed(matrix)), (unembedding,)
    # jax.closure_convert would leave integers and booleans in the closure, where traced ones fail.
    traced = jax.make_jaxpr(unembedding)(jax.ShapeDtypeStruct(states.shape[1:], states.dtype))
    shapes = [x.shape for x in traced.out_avals]
    if [s[:-1] for s in shapes] != [states.shape[1:-1]]:
        raise ValueError(f"a function of hidden must give logits [..., V], gave {shapes} for {states.shape[1:]}")

    def project(states: jax.Array, *constants: jax.Array) -> jax.Array:
        (logits,) = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, constants))(states)
        return logits

    return project, tuple(traced.consts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(
    projections: tuple[Projection, Projection],
    states: jax.Array,
    constants: tuple[jax.Array, ...],
    temperature: jax.Array,
    targets: jax.Array,
    reference: tuple[jax.Array | None, tuple[jax.Array, ...]],
) -> tuple[jax.Array, ...]:
    """(logps, entropy[, ref_logps]) [chunks, B, C] of states [chunks, B, C, D] and targets [chunks, B, C]."""
    *outputs, _ = _forward(projections, states, constants, temperature, targets, reference)
    return tuple(outputs)


def _forward(
    projections: tuple[Projection, Projection],
    states: jax.Array,
    constants: tuple[jax.Array, ...],
    temperature: jax.Array,
    targets: jax.Array,
    reference: tuple[jax.Array | None, tuple[jax.Array, ...]],
) -> tuple[jax.Array, ...]:
    """As `_score`, and at the end what to take from a logit to make it a log-probability, in two parts."""
    project, ref_project = projections
    ref_states, ref_constants = reference

    def chunk(_: None, x: tuple[Any, ...]) -> tuple[None, tuple[Any, ...]]:
        states, targets, ref_states = x
        logps, entropy, *normaliser = _statistics(_scaled(project(states, *constants), temperature), targets)
        if ref_states is None:
            return None, (logps, entropy, tuple(normaliser))
        reference = _statistics(_scaled(ref_project(ref_states, *ref_constants), temperature), targets)
        return None, (logps, entropy, reference[0], tuple(normaliser))

    return jax.lax.scan(chunk, None, (states, targets, ref_states))[1]


def _statistics(z: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Log-probability of the target, entropy, largest logit, and log Σ exp of what it leaves [B, C], of logits [V, B · C].

    All is computed from z − max z: log Σ exp z itself would lose the digits that an offset common to all logits takes.
    """
    top = z.max(0)
    z = z - top[None]
    weights = jnp.exp(z)
    total = weights.sum(0)
    rest = jnp.log(total)
    # A token of probability 0 adds 0, and not 0·(−inf).
    entropy = rest - (weights * jnp.where(weights > 0, z, 0.0)).sum(0) / total
    places = targets.reshape(1, -1)
    logps = jnp.where(places[0] < 0, jnp.nan, jnp.take_along_axis(z, places, axis=0)[0] - rest)
    return tuple(x.reshape(targets.shape) for x in (logps, entropy, top, rest))


def _scaled(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits [B, C, V] / temperature as [V, B · C]: sums over the vocabulary are then sums of vectors."""
    dtype = sum_dtype(logits.dtype)
    return logits.reshape(-1, logits.shape[-1]).T.astype(dtype) / temperature.astype(dtype)


def _score_forward(projections: tuple[Projection, Projection], *perturbed: Any) -> tuple[Any, Any]:
    states, constants, temperature, targets, reference = jax.tree.map(lambda x: x.value, perturbed)
    *outputs, normaliser = _forward(projections, states, constants, temperature, targets, reference)
    return tuple(outputs), (states, constants, temperature, targets, outputs[1], normaliser)


def _score_backward(projections: tuple[Projection, Projection], saved: Any, gradients: Any) -> tuple[Any, ...]:
    project, _ = projections
    states, constants, temperature, targets, entropy, normaliser = saved
    to_logps, to_entropy = gradients[:2]  # none goes to the reference
    to_logps = jnp.zeros_like(entropy) if isinstance(to_logps, SymbolicZero) else to_logps
    # An entropy that is only reported has a symbolic zero here, and its terms are never formed.
    by_entropy = None if isinstance(to_entropy, SymbolicZero) else (entropy, to_entropy)

    def chunk(sums: Any, x: tuple[Any, ...]) -> tuple[Any, jax.Array]:
        states, *by_token = x
        targets, (top, rest), to_logps, by_entropy = jax.tree.map(lambda v: v.reshape(1, -1), by_token)
        logits, pull = jax.vjp(project, states, *constants)
        z = _scaled(logits, temperature)
        log_probs = (z - top) - rest
        probs = jnp.exp(log_probs)
        is_target = jnp.arange(len(z), dtype=targets.dtype)[:, None] == targets
        weights = to_logps
        if by_entropy is not None:
            entropy, to_entropy = by_entropy
            weights = weights + to_entropy * (jnp.where(probs > 0, log_probs, 0.0) + entropy)
        to_z = jnp.where(is_target, to_logps, 0.0) - probs * weights
        to_logits = (to_z / temperature.astype(z.dtype)).T.reshape(logits.shape)
        to_states, *parts = pull(to_logits.astype(logits.dtype))
        to_temperature = -(to_z * jnp.where(probs > 0, z, 0.0)).sum() / temperature.astype(z.dtype)
        parts.append(to_temperature)
        return [s if s is None else s + g.astype(s.dtype) for s, g in zip(sums, parts, strict=True)], to_states

    inputs = (*constants, temperature)  # those that are not real, such as a table of integers, have no gradient
    zeros = [jnp.zeros(c.shape, sum_dtype(c.dtype)) if jnp.issubdtype(c.dtype, jnp.floating) else None for c in inputs]
    sums = jax.tree.map(partial(mark_varying, axes=varying_axes(entropy)), zeros)
    sums, to_states = jax.lax.scan(chunk, sums, (states, targets, normaliser, to_logps, by_entropy))
    *to_constants, to_temperature = (s if s is None else s.astype(c.dtype) for s, c in zip(sums, inputs, strict=True))
    return to_states, tuple(to_constants), to_temperature, None, None


_score.defvjp(_score_forward, _score_backward, symbolic_zeros=True)


def _check(
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    temperature: float | jax.Array,
    chunk_size: int | None,
    reference_hidden: jax.Array | None,
    reference_unembedding: Unembedding | None,
) -> None:
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2]:
        raise ValueError(f"hidden must be [B, T, D] and targets [B, T], got {hidden.shape} and {targets.shape}")
    if 0 in targets.shape:
        raise ValueError(f"targets have nothing to score: [B, T] = {targets.shape}")
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise TypeError(f"hidden must be real, got {hidden.dtype}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if jnp.shape(temperature) != ():
        raise ValueError(f"temperature must be a scalar, got shape {jnp.shape(temperature)}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer, at least 1, got {chunk_size!r}")
    if reference_hidden is None and reference_unembedding is not None:
        raise ValueError("reference_unembedding needs reference_hidden")
    if reference_hidden is not None and (reference_hidden.ndim != 3 or reference_hidden.shape[:2] != targets.shape):
        raise ValueError(
            f"reference_hidden must be [B, T, D], got {reference_hidden.shape} for targets {targets.shape}"
        )
    heads = {"unembedding": (hidden, unembedding)}
    if reference_hidden is not None:
        other = unembedding if reference_unembedding is None else reference_unembedding
        heads["reference_unembedding"] = (reference_hidden, other)
    for name, (states, head) in heads.items():
        if not callable(head) and (head.ndim != 2 or head.shape[0] != states.shape[2]):
            raise ValueError(f"{name} must be [D, V], got {head.shape} for hidden {states.shape}")
