"""Log-probabilities of completions, without the logits of all tokens at once.

A scan goes over chunks of positions. Of each chunk it computes the logits, takes from them what is asked for, and forgets them.
The backward pass, a second scan, computes them again.

Dimension key: see grpo_jax. Here n counts chunks, and c the positions of a chunk. Names that begin with ``to_`` are gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from grpo_jax.products import mark_varying, sum_dtype, transposed, unembed, varying_axes

Unembedding: TypeAlias = jax.Array | Callable[[jax.Array], jax.Array]
Projection: TypeAlias = Callable[..., jax.Array]  # (states of a chunk, *constants) -> its logits

# How many logits exist at once if the caller does not say: 64 MiB of them, but those of at least 512 rows times positions
# (297 MiB at V = 151,936). With fewer the backward pass is slower, because it adds a [D, V] gradient per chunk. On a CPU more
# gain nothing (experiments/benchmarks/logps.py).
LOGITS, POSITIONS = 2**24, 512


class Inputs(NamedTuple):
    """What is scored, chunk by chunk.

    Attributes:
      states: [n, B, c, D].
      constants: what the unembedding multiplies or closes over.
      temperature: [].
      targets: [n, B, c] int32.
      ref_states: [n, B, c, D'], or None without a reference.
      ref_constants: those of the reference's unembedding.
    """

    states: jax.Array
    constants: tuple[jax.Array, ...]
    temperature: jax.Array
    targets: jax.Array
    ref_states: jax.Array | None
    ref_constants: tuple[jax.Array, ...]


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
    """Log-probability of each target token, and entropy of the distribution from which it was sampled.

    log π(o_t | q, o_<t) = z_t − log Σ_v exp z_v and H = −Σ_v π_v log π_v, with z = hidden · unembedding / temperature.
    Logits exist for ``chunk_size`` positions of every row at a time. Of the logits only log Σ_v exp z_v, in two parts, and the
    entropy are kept for the backward pass, which computes a chunk's logits again and, from them, ∂logps/∂z_v = 1[v = o_t] − π_v
    and ∂H/∂z_v = −π_v (log π_v + H). Under jit, outputs and gradients that are not used cost nothing. Inside jax.shard_map it
    needs jit.

    Args:
      hidden: [B, T, D]; position t holds the state that predicts target t (the shift by one is already done).
      unembedding: [D, V], multiplied in the dtype of ``hidden`` with sums in float32; or a function from hidden [..., D] to
        logits [..., V], which may close over parameters: these get their gradients too, summed over chunks in float32. A
        function is fastest if it makes all rows one axis, as `products.unembed` does.
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
    # Chunks of nearly equal size.
    batch, length = targets.shape
    if chunk_size is None:
        chunk_size = max(1, max(POSITIONS, LOGITS // _vocabulary_size(unembedding, hidden)) // batch)
    num_chunks = -(-length // chunk_size)
    chunk_size = -(-length // num_chunks)

    # Chunks run along T, so that a batch axis split over devices stays where it is. The end is filled with copies of the last
    # position, because a function may not like zeros.
    def in_chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, num_chunks * chunk_size - length)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        return x.reshape(batch, num_chunks, chunk_size, *x.shape[2:]).swapaxes(0, 1)  # [n, B, c, ...]

    def from_chunks(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(batch, -1)[:, :length]  # [B, T]

    states = in_chunks(hidden)  # [n, B, c, D]
    project, constants = _as_projection(unembedding, states)
    ref_project, ref_constants = project, constants
    ref_states = None if reference_hidden is None else in_chunks(reference_hidden)  # [n, B, c, D']
    if ref_states is not None and reference_unembedding is not None:
        ref_project, ref_constants = _as_projection(reference_unembedding, ref_states)
    scale = jnp.asarray(temperature, sum_dtype(hidden.dtype))
    token_ids = in_chunks(targets.astype(jnp.int32))  # [n, B, c]
    inputs = Inputs(states, constants, scale, token_ids, ref_states, ref_constants)
    # In jax.shard_map, a custom gradient must vary over devices as its input does: so all inputs vary as any of them.
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(inputs)))
    scored = _score((project, ref_project), jax.tree.map(partial(mark_varying, axes=axes), inputs))
    return tuple(from_chunks(x) for x in scored)


def _vocabulary_size(unembedding: Unembedding, hidden: jax.Array) -> int:
    if not callable(unembedding):
        return unembedding.shape[-1]
    logits = jax.eval_shape(unembedding, jax.ShapeDtypeStruct((hidden.shape[0], 1, hidden.shape[2]), hidden.dtype))
    return max(1, *logits.shape[-1:])


def _as_projection(unembedding: Unembedding, states: jax.Array) -> tuple[Projection, tuple[jax.Array, ...]]:
    """A function (states of one chunk, *constants) -> logits, and the constants: all that the unembedding closed over."""
    if not callable(unembedding):
        return lambda states, matrix: unembed(states, transposed(matrix)), (unembedding,)
    from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # here, as it doubles the time that the core takes to import

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
def _score(projections: tuple[Projection, Projection], inputs: Inputs) -> tuple[jax.Array, ...]:
    """(logps, entropy[, ref_logps]) [n, B, c]."""
    return _forward(projections, inputs)[:-1]


def _forward(projections: tuple[Projection, Projection], inputs: Inputs) -> tuple[Any, ...]:
    """As `_score`, and at the end what is subtracted from a logit to make it a log-probability, in two parts [n, B, c]."""
    project, ref_project = projections

    def chunk(_: None, x: tuple[Any, ...]) -> tuple[None, tuple[Any, ...]]:
        states, targets, ref_states = x
        z = _scaled(project(states, *inputs.constants), inputs.temperature)  # [V, B · c]
        logps, entropy, *normaliser = _statistics(z, targets)  # [B, c] each
        if ref_states is None:
            return None, (logps, entropy, tuple(normaliser))
        z = _scaled(ref_project(ref_states, *inputs.ref_constants), inputs.temperature)  # [V, B · c]
        return None, (logps, entropy, _statistics(z, targets)[0], tuple(normaliser))

    return jax.lax.scan(chunk, None, (inputs.states, inputs.targets, inputs.ref_states))[1]


def _statistics(z: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Log-probability of the target, entropy, max z and log Σ exp(z − max z) [B, c], of logits z [V, B · c].

    All is computed from z − max z: log Σ exp z itself would lose the digits that an offset common to all logits takes.
    """
    largest = z.max(0)  # [B · c]
    z = z - largest[None]
    weights = jnp.exp(z)  # [V, B · c]
    total = weights.sum(0)
    log_sum = jnp.log(total)  # [B · c]
    # A token of probability 0 adds 0, and not 0·(−inf).
    entropy = log_sum - (weights * jnp.where(weights > 0, z, 0.0)).sum(0) / total
    token_ids = targets.reshape(1, -1)
    logps = jnp.where(token_ids[0] < 0, jnp.nan, jnp.take_along_axis(z, token_ids, axis=0)[0] - log_sum)
    return tuple(x.reshape(targets.shape) for x in (logps, entropy, largest, log_sum))


def _scaled(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """z = logits [B, c, V] / temperature as [V, B · c]: sums over the vocabulary are then sums of vectors."""
    dtype = sum_dtype(logits.dtype)
    return logits.reshape(-1, logits.shape[-1]).T.astype(dtype) / temperature.astype(dtype)


def _score_forward(projections: tuple[Projection, Projection], perturbed: Any) -> tuple[Any, Any]:
    inputs = jax.tree.map(lambda x: x.value, perturbed)
    *outputs, normaliser = _forward(projections, inputs)
    return tuple(outputs), (inputs._replace(ref_states=None, ref_constants=()), outputs[1], normaliser)


def _score_backward(projections: tuple[Projection, Projection], saved: Any, gradients: Any) -> tuple[Inputs]:
    project, _ = projections
    inputs, entropy, normaliser = saved
    # An output that nobody differentiates has a symbolic zero here. The reference gets no gradient.
    to_logps, to_entropy = gradients[:2]  # [n, B, c]
    to_logps = jnp.zeros_like(entropy) if isinstance(to_logps, SymbolicZero) else to_logps
    # The terms of an entropy that is only reported are never formed.
    through_entropy = None if isinstance(to_entropy, SymbolicZero) else (entropy, to_entropy)

    def chunk(sums: Any, x: tuple[Any, ...]) -> tuple[Any, jax.Array]:
        """Adds a chunk's gradients of the constants and the temperature to their sums, and gives that of its states."""
        # The logits once more, and from them log π and π.
        states, *by_token = x
        targets, (largest, log_sum), to_logps, through_entropy = jax.tree.map(lambda v: v.reshape(1, -1), by_token)
        logits, pull_back = jax.vjp(project, states, *inputs.constants)
        z = _scaled(logits, inputs.temperature)  # [V, B · c]
        log_probs = (z - largest) - log_sum  # [V, B · c]
        probs = jnp.exp(log_probs)
        # ∂logps/∂z_v = 1[v = o_t] − π_v and ∂H/∂z_v = −π_v (log π_v + H), times the gradients of logps and H.
        is_target = jnp.arange(len(z), dtype=targets.dtype)[:, None] == targets
        times_probs = to_logps
        if through_entropy is not None:
            entropy, to_entropy = through_entropy
            times_probs = times_probs + to_entropy * (jnp.where(probs > 0, log_probs, 0.0) + entropy)
        to_z = jnp.where(is_target, to_logps, 0.0) - probs * times_probs  # [V, B · c]
        # Through z = logits / temperature, and through the unembedding.
        to_logits = (to_z / inputs.temperature.astype(z.dtype)).T.reshape(logits.shape)  # [B, c, V]
        to_states, *to_summed = pull_back(to_logits.astype(logits.dtype))
        to_summed.append(-(to_z * jnp.where(probs > 0, z, 0.0)).sum() / inputs.temperature.astype(z.dtype))
        return [s if s is None else s + g.astype(s.dtype) for s, g in zip(sums, to_summed, strict=True)], to_states

    # Constants that are not real, such as a table of integers, have no gradient.
    summed = *inputs.constants, inputs.temperature
    zeros = [jnp.zeros(x.shape, sum_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else None for x in summed]
    sums = jax.tree.map(partial(mark_varying, axes=varying_axes(entropy)), zeros)
    by_chunk = inputs.states, inputs.targets, normaliser, to_logps, through_entropy
    sums, to_states = jax.lax.scan(chunk, sums, by_chunk)
    *to_constants, to_temperature = (s if s is None else s.astype(x.dtype) for s, x in zip(sums, summed, strict=True))
    # None for the targets and the reference.
    return (Inputs(to_states, tuple(to_constants), to_temperature, None, None, None),)  # type: ignore[arg-type]


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
    heads = [("unembedding", hidden, unembedding)]
    if reference_hidden is not None:
        if reference_hidden.ndim != 3 or reference_hidden.shape[:2] != targets.shape:
            shape = reference_hidden.shape
            raise ValueError(f"reference_hidden must be [B, T, D], got {shape} for targets {targets.shape}")
        ref_unembedding = unembedding if reference_unembedding is None else reference_unembedding
        heads.append(("reference_unembedding", reference_hidden, ref_unembedding))
    elif reference_unembedding is not None:
        raise ValueError("reference_unembedding needs reference_hidden")
    for name, states, head in heads:
        if not callable(head) and (head.ndim != 2 or head.shape[0] != states.shape[2]):
            raise ValueError(f"{name} must be [D, V], got {head.shape} for hidden {states.shape}")
