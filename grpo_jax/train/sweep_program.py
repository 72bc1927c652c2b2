"""The program of a sweep: the pieces of a run mapped over seeds and points, and spread over a mesh without communication."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax.data import PromptSet, prompt_batch
from grpo_jax.runs.setup import Program
from grpo_jax.train.compiled import Pieces, iterations, make_optimizer, make_pieces
from grpo_jax.train.step import TrainState, init_state

AXES = ("seeds", "points")
POINTS = PartitionSpec(None, "sweep")  # arrays [seeds, points, ...]
WHOLE = PartitionSpec()


class SweepFunctions(NamedTuple):
    """The jitted pieces of a sweep; arrays of points lead with [seeds, points], and the points are spread over the mesh.

    Attributes:
      start: reference parameters [seeds, ...] -> states.
      iterate: (states, ref_params or None, base_keys [seeds], index [seeds, K, P], table, count, first, betas, learning_rates)
        -> (states, metrics, skipped), as `iterations`.
      draw: (params, keys [seeds], rows [seeds, blocks, P], table, first_sample) -> [..., blocks, P] successes, tokens and
        truncated completions of each prompt.
    """

    start: Callable[..., TrainState]
    iterate: Callable[..., tuple[TrainState, dict[str, jax.Array], jax.Array]]
    draw: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def make_sweep_functions(config: Any, program: Program, mesh: Mesh, *, batched: bool) -> SweepFunctions:
    """Maps the pieces of a run over seeds and points, and jits them for a mesh with the one axis "sweep"."""
    pieces = make_pieces(config, program.objective, program.bound, in_step=AXES if batched else None)
    optimizer = make_optimizer(config, config.optimizer.learning_rate)
    spread = partial(over_points, mesh=mesh, batched=batched)

    def start(ref_params: Any, betas: jax.Array) -> TrainState:
        of_point = lambda params, _: init_state(params, optimizer)  # noqa: E731
        return jax.vmap(lambda params, row: jax.vmap(partial(of_point, params))(row))(ref_params, betas)

    def iterate(
        states: Any,
        ref_params: Any,
        base_keys: Any,
        index: Any,
        table: Any,
        count: Any,
        first: Any,
        betas: Any,
        rates: Any,
    ) -> Any:
        def of_point(shared: Any, of_seed: Any, point: Any) -> Any:
            (table, count, first), (ref_params, base_key, index), (state, beta, rate) = shared, of_seed, point
            return iterations(state, ref_params, table, index, count, base_key, first, beta, rate, pieces=pieces)

        return spread(of_point)((table, count, first), (ref_params, base_keys, index), (states, betas, rates))

    def draw(params: Any, keys: Any, rows: Any, table: Any, first_sample: Any) -> Any:
        def of_point(shared: Any, of_seed: Any, params: Any) -> Any:
            (table, first), (key, rows) = shared, of_seed
            count = partial(_count, pieces, params, table, key, first, group_drawn(config))
            return jax.lax.map(count, rows)

        return spread(of_point)((table, first_sample), (keys, rows), params)

    return SweepFunctions(
        start=jax.jit(start, out_shardings=NamedSharding(mesh, POINTS)),
        iterate=jax.jit(iterate, donate_argnums=0),
        draw=jax.jit(draw),
    )


def over_points(function: Callable[..., Any], *, mesh: Mesh, batched: bool) -> Callable[..., Any]:
    """(shared, of seeds [seeds, ...], of points [seeds, points, ...]) -> [seeds, points, ...], from a function of one point.

    Nested, so that what a seed shares is not repeated for its points, and over a mesh axis without any communication.
    """
    if batched:
        inner = jax.vmap(function, in_axes=(None, None, 0), axis_name=AXES[1])
        every = jax.vmap(inner, in_axes=(None, 0, 0), axis_name=AXES[0])
    else:

        def every(shared: Any, of_seeds: Any, of_points: Any) -> Any:
            def points(seed: tuple) -> Any:
                return jax.lax.map(lambda point: function(shared, seed[0], point), seed[1])

            return jax.lax.map(points, (of_seeds, of_points))

    return jax.shard_map(every, mesh=mesh, in_specs=(WHOLE, WHOLE, POINTS), out_specs=POINTS, check_vma=False)


def make_sweep_mesh(points: int, devices: list[Any] | None = None) -> Mesh:
    """A mesh of as many devices as divide the points of a seed equally.

    >>> dict(make_sweep_mesh(15, jax.devices()[:1]).shape)
    {'sweep': 1}
    """
    devices = jax.devices() if devices is None else devices
    size = max(n for n in range(1, len(devices) + 1) if points % n == 0)
    return jax.make_mesh((size,), ("sweep",), devices=devices[:size], axis_types=(AxisType.Auto,))


def group_drawn(config: Any) -> int:
    """Completions of a prompt that are drawn at a time."""
    return min(config.evaluate.final_samples, config.evaluate.batch_samples)


def _count(
    pieces: Pieces, params: Any, table: PromptSet, key: jax.Array, first: jax.Array, group: int, rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Successes, tokens and truncated completions [P] among ``group`` samples of the prompts of some rows."""
    assert pieces.verify_tokens is not None
    rollout = pieces.sample(params, prompt_batch(table, rows), key, group_size=group, first_sample=first)
    right = pieces.verify_tokens(rollout.completions, rollout.mask, table.answers[rows], table.answer_mask[rows])
    counted = right, rollout.mask, rollout.truncated
    return tuple(x.reshape(len(rows), -1).sum(-1, dtype=jnp.int32) for x in counted)  # type: ignore[return-value]
